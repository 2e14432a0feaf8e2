"""Nonsense to every public function: each error is one that the package raises itself, and says why."""

import ast
import functools
import importlib.util
import inspect
import random
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import bilinear_ops as bo
from bilinear_ops.testing import randn

ROOT = Path(bo.__file__).parent
MODULES = {"bo": bo, "analysis": bo.analysis, "nn": bo.nn, "init": bo.init, "plots": bo.plots}
if importlib.util.find_spec("matplotlib") is None:
    del MODULES["plots"]
DRAWN = 40  # calls of each function

H, D, C, K, OUT, M = 6, 4, 5, 3, 2, 7


class Good(NamedTuple):
    """A call that works: the arguments, and how to call with them where that is not by keyword."""

    arguments: dict[str, Any]
    call: Callable[..., Any] | None = None


def layer() -> dict[str, Any]:
    return {"w": randn(H, D), "v": randn(H, D), "p": randn(OUT, H)}


def directions() -> dict[str, Any]:
    return {"w": randn(H, D), "v": randn(H, D), "c": randn(K, H)}


def biases() -> dict[str, Any]:
    return {"b_w": randn(H), "b_v": randn(H), "b_p": randn(OUT)}


def two_layers() -> dict[str, Any]:
    return {f"{name}{i}": t for i in (1, 2) for name, t in layer().items()}


def rank1() -> dict[str, Any]:
    return {"x": randn(M, D), "read": randn(D, C), "write": randn(C, OUT), "bias": randn(OUT)}


def eigenpairs() -> Any:
    return bo.analysis.interaction_eigh(**directions())


def good() -> dict[str, Good]:
    """For every public callable, by module and name."""
    gates, active = torch.rand(M, C), torch.randint(C, (M, 2))
    drawn = {"samples": 2, "seed": 3, "sampling": "continuous", "stream": 1}
    own = {"weight": randn(OUT, D), "routing": torch.rand(M) < 0.5, "delta": torch.rand(2, M)}
    numbers = {"row_numbers": torch.arange(M), "column_numbers": torch.arange(C)}
    activation = {"activation": "swish", "beta": 0.5}
    index = {name: torch.randint(n, (4,)) for name, n in (("k", K), ("i", D), ("j", D))}
    square = randn(K, D, D)
    symmetric = square + square.mT
    vectors = torch.linalg.qr(randn(K, D, 2))[0].mT.contiguous()
    expansion = {"factor": 2, "noise": 0.1, "generator": None}
    x, options = randn(M, D), {"limit": 1.0, "offset": 0.5}
    cases = {
        "bo.active_interactions": Good(
            {**directions(), "basis": randn(D, 8), "in_indices": torch.randint(8, (M, 2)), "in_acts": randn(M, 2),
             "out_indices": torch.randint(K, (M, 2))}
        ),
        "bo.component_gates": Good(
            {"acts": gates, "w1": randn(C, 3), "b1": randn(C, 3), "w2": randn(C, 3), "b2": randn(C)}
        ),
        "bo.eigen_form": Good(
            {"x": x, "values": randn(K, 2), "vectors": randn(K, 2, D), "pairs": (torch.arange(3), torch.arange(3)),
             "reduce": "sum"}
        ),
        "bo.faithfulness_loss": Good(
            {"weight": randn(OUT, D), "read": randn(D, C), "write": randn(C, OUT), "impl": "auto"}
        ),
        "bo.frequency_penalty": Good({"frequencies": torch.rand(C), "scale": 0.5, "running": torch.rand(C)}),
        "bo.gate": Good({"a": x, "z": x, **activation, **options, "impl": "auto"}),
        "bo.gated_bilinear": Good(
            {"x": x, **layer(), **biases(), **activation, **options, "impl": "auto"},
            lambda p, b_p, **arguments: bo.gated_bilinear(**arguments),
        ),
        "bo.gated_mlp": Good({"x": x, **layer(), **biases(), **activation, "mask": torch.rand(M, H), "impl": "auto"}),
        "bo.importance_minimality": Good({"gates": gates, "pnorm": 1.0, "eps": 1e-12}),
        "bo.interaction_diagonal": Good({**directions(), "basis": randn(D, 8)}),
        "bo.interaction_entries": Good({**directions(), **index, "basis": randn(D, 8)}),
        "bo.interaction_matrices": Good({**directions(), "layout": "full", "impl": "auto"}),
        "bo.interaction_moments": Good({**directions(), "basis": randn(D, 8), "impl": "auto"}),
        "bo.interaction_topk": Good(
            {**directions(), "n": 2, "score": "cross", "scope": "output", "weight": torch.rand(8, 8),
             "basis": randn(D, 8)}
        ),
        "bo.iter_interaction_matrices": Good(
            {**directions(), "layout": "full", "chunk_bytes": 10000, "impl": "auto"},
            lambda **arguments: list(bo.iter_interaction_matrices(**arguments)),
        ),
        "bo.layer_inner": Good(two_layers()),
        "bo.lower_leaky_hard_sigmoid": Good({"x": x, "alpha": 0.1}),
        "bo.neuron_gram": Good({"w": randn(H, D), "v": randn(H, D), "w2": randn(H, D), "v2": randn(H, D)}),
        "bo.pack_symmetric": Good({"q": symmetric}),
        "bo.pooled_faithfulness_loss": Good(
            {"layers": [(randn(OUT, D), randn(D, C), randn(C, OUT))], "relative": True, "impl": "auto"}
        ),
        "bo.quadratic_form": Good({"x": x, "q": symmetric}),
        "bo.rank1_accumulate": Good(
            {"gates": gates, "read": randn(D, C), "write": randn(C, OUT), "base": randn(OUT, D)}
        ),
        "bo.rank1_linear": Good({**rank1(), "mask": gates, **own, "delta": torch.rand(M), "acts": randn(M, C)}),
        "bo.rank1_sparse": Good(
            {**rank1(), "indices": active, "gates": torch.rand(M, 2), "acts": randn(M, 2), "impl": "auto"}
        ),
        "bo.smooth_l0": Good({"gates": gates, "gamma": 0.5}),
        "bo.stochastic_delta": Good({"shape": (M,), **{k: v for k, v in drawn.items() if k != "sampling"}}),
        "bo.stochastic_gated_mlp": Good(
            {"x": x, **layer(), **biases(), "gates": torch.rand(M, H), **activation, **drawn, "target": randn(M, OUT),
             "delta": torch.rand(2, M), "routing": own["routing"]}
        ),
        "bo.stochastic_mask": Good({"gates": gates, **drawn, **numbers}),
        "bo.stochastic_rank1_linear": Good({**rank1(), "gates": gates, **drawn, **own, **numbers, "acts": randn(M, C)}),
        "bo.subset_routing": Good({"sites": 3, "shape": (M,), "seed": 1, "stream": 0}),
        "bo.unpack_symmetric": Good({"t": randn(K, 10), "d": 4}),
        "bo.upper_leaky_hard_sigmoid": Good({"x": x, "alpha": 0.1}),
        "bo.warmup": Good({"op": bo.gated_bilinear, "x": (M, D)}, lambda op, x: bo.warmup(op, x)),
        "analysis.adversarial_masks": Good({"vectors": randn(K, D)}),
        "analysis.augment_biases": Good({**layer(), **biases()}),
        "analysis.best_quadratic": Good(
            {**layer(), "activation": "swish", "b_w": randn(H), "b_v": randn(H), "mean": randn(D), "cov": torch.eye(D),
             "beta": 0.5, "error": 0.5}
        ),
        "analysis.bias_terms": Good({**layer(), **biases()}),
        "analysis.cp_decompose": Good({**layer(), "rank": 2, "steps": 2, "inner_steps": 2, "tol": 1e-6, "restarts": 1}),
        "analysis.effective_rank": Good({"t": torch.rand(K, D)}),
        "analysis.even_odd_split": Good({"fn": torch.sin, "x": x}),
        "analysis.explain": Good({"x": x, "pairs": eigenpairs(), "n": 2, "logits": randn(M, K)}),
        "analysis.gated_interactions": Good({"x": x, **directions(), **activation}),
        "analysis.glu_gates": Good({"x": x, "v": randn(H, D), **activation, "b_v": randn(H)}),
        "analysis.hosvd": Good({**layer(), "rank": 2, "mode": "output"}),
        "analysis.hoyer": Good({"t": torch.rand(K, D)}),
        "analysis.interaction_clusters": Good({"q": symmetric[0], "clusters": 2}),
        "analysis.interaction_eigh": Good(
            {**directions(), "n": 2, "which": "abs", "basis": torch.linalg.qr(randn(D, D))[0], "method": "auto",
             "tol": 1e-4, "chunk_bytes": 1 << 20}
        ),
        "analysis.joint_diagonalise": Good({**directions(), "sweeps": 2, "tol": 1e-6}),
        "analysis.kept_strength": Good({"x": x, **layer(), **activation, "radii": torch.rand(2)}),
        "analysis.layer_distance": Good(two_layers()),
        "analysis.layer_similarity": Good(
            {**two_layers(), "measure": "gaussian", "affine1": (randn(OUT, D), randn(OUT)), "affine2": (None, None)}
        ),
        "analysis.layer_weights": Good({"module": bo.nn.GatedMLP(D, H)}),
        "analysis.load_chunks": Good({"paths": []}),
        "analysis.loss_added": Good(
            {"logits": x, "reconstructed": x + 1, "zeroed": 0 * x, "targets": torch.randint(D, (M,))}
        ),
        "analysis.reexpress": Good({**layer(), "directions": randn(K, OUT)}),
        "analysis.sparse_decompose": Good({**layer(), "terms": 2, "penalty": 1e-3, "steps": 2, "restarts": 1}),
        "analysis.strength": Good({"fn": torch.sin, "x": x}),
        "analysis.strongest_directions": Good(
            {**layer(), "n": 1, **activation, "radius": 2.0, "steps": 3, "tol": 1e-6}
        ),
        "analysis.truncate": Good({**layer(), "n": 2, "directions": randn(K, OUT), "which": "abs", "refit": True}),
        "analysis.truncation_correlation": Good(
            {"x": x, "eig": eigenpairs(), "indices": torch.randint(K, (M, 2)), "acts": randn(M, 2)}
        ),
        "analysis.truncation_curve": Good({"x": x, "eig": eigenpairs(), "target": randn(M, K), "active_only": False}),
        "analysis.virtual_interactions": Good(
            {"first": (randn(H, D), randn(H, D), randn(D, H)), "second": (randn(H, D), randn(H, D), randn(OUT, H)),
             "residual": True}
        ),
        "nn.AdversarialSource": Good({"c": C, "shape": (M,), "rule": "sign", "betas": (0.5, 0.9), "eps": 1e-8}),
        "nn.FrequencyPenalty": Good({"c": C, "scale": 0.5, "decay": 0.9}),
        "nn.GatedBilinear": Good({"d_in": D, "d_hidden": H, **activation, "bias": True}),
        "nn.GatedMLP": Good({"d_in": D, "d_hidden": H, "d_out": OUT, **activation, "bias": True}),
        "nn.Gates": Good({"d_in": D, "c": C, "hidden": 3, "kind": "scalar", "alpha": 0.1}),
        "nn.MixedWeights": Good(
            {"original": randn(K, D), "rows": M, "direction": "forward", "slack": False}
        ),
        "nn.Rank1Embedding": Good({"vocab": 9, "d": D, "c": C, "weight": randn(9, D)}),
        "nn.Rank1Linear": Good({"d_in": D, "d_out": OUT, "c": C, "weight": randn(OUT, D), "bias": randn(OUT)}),
        "nn.Transcoder": Good({"d_in": D, "d_out": OUT, "c": C, "kind": "topk", "k": 2, "bandwidth": 0.1}),
        "nn.anneal_beta": Good(
            {"model": bo.nn.GatedMLP(D, H, activation="swish"), "step": 1, "steps": 9, "fraction": 0.5}
        ),
        "nn.bilinearise_": Good({"model": bo.nn.GatedMLP(D, H, activation="swish", beta=0.0)}),
        "nn.swish_": Good({"model": bo.nn.GatedMLP(D, H, activation="silu")}),
        "nn.route": Good({"gates": gates, "rule": "topk", "threshold": 0.5, "k": 2}),
        "nn.routed_gated_mlp": Good({"x": x, **layer(), **biases(), "route": torch.rand(M, H), **activation}),
        "init.expand_gated_mlp": Good({"layer": bo.nn.GatedMLP(D, H), **expansion}),
        "init.expand_mlp": Good({"up": torch.nn.Linear(D, H), "down": torch.nn.Linear(H, D), **expansion}),
        "init.expand_rank1": Good({"layer": bo.nn.Rank1Linear(D, OUT, C), **expansion}),
        "plots.cluster": Good({"q": symmetric[0], "clusters": 2}),
        "plots.distribution": Good({"values": randn(2, 9), "labels": ["a", "b"], "bins": 4}),
        "plots.eigenplane": Good(
            {"points": randn(3, D), "vectors": vectors[0], "values": randn(2), "labels": ["a", "b", "c"]}
        ),
        "plots.eigenvectors": Good({"vectors": vectors[:1], "shape": (2, 2), "values": randn(1, 2), "labels": ["a"]}),
        "plots.explanation": Good(
            {"x": randn(D), "pairs": eigenpairs(), "n": 2, "shape": (2, 2), "logits": randn(K),
             "labels": ["a", "b", "c"]}
        ),
        "plots.interactions": Good({"q": symmetric[0], "labels": ["a", "b", "c", "d"], "clusters": 2}),
        "plots.scatter": Good({"x": randn(9), "y": randn(9)}),
        "plots.similarity": Good({"first": vectors, "second": vectors}),
        "plots.spectrum": Good({"values": randn(K, D), "labels": ["a", "b", "c"]}),
        "plots.truncation": Good({"scores": torch.rand(2, D), "labels": ["a", "b"], "full": torch.rand(2)}),
    }  # fmt: skip
    return {name: case for name, case in cases.items() if name.partition(".")[0] in MODULES}


# records of results, which only hold what they are given; run_in_chunks writes files
OTHER = {"analysis.run_in_chunks"}


def public() -> Iterator[str]:
    for module, names in MODULES.items():
        for name in names.__all__:
            value = getattr(names, name)
            record = inspect.isclass(value) and issubclass(value, tuple)
            if callable(value) and not record and f"{module}.{name}" not in OTHER:
                yield f"{module}.{name}"


def nonsense(value: Any, random: random.Random) -> Any:
    """Something that is not a valid argument, or nearly is one, in place of `value`."""
    anything = [None, "nonsense", "", -1, 0, 3, True, 1.5, float("nan"), [], (), {}, object(), b"", torch, 1j]
    near: list[Callable[[], Any]] = []
    if isinstance(value, Tensor):
        near = [
            lambda: value[None],
            lambda: value[0] if value.dim() else value[None],
            lambda: value[:0] if value.dim() else value.reshape(1, 1),
            lambda: value[..., :0] if value.dim() else value.bool(),
            lambda: torch.cat([value, value], 0) if value.dim() else value.int(),
            lambda: torch.cat([value, value], -1) if value.dim() else value.short(),
            lambda: value.mT if value.dim() > 1 else value.repeat(2),
            lambda: value.double(),
            lambda: value.bfloat16(),
            lambda: value.long(),
            lambda: value.bool(),
            lambda: value.to(torch.complex64),
            lambda: value.to("meta"),
            lambda: value.to_sparse() if value.dim() else value[None, None],
            lambda: value * float("nan"),
            lambda: value * 0,
            lambda: -value if value.dtype != torch.bool else value.float(),
            lambda: value + 100,
            lambda: value.flatten(),
            lambda: value.sum(),
            value.tolist,
        ]
    elif isinstance(value, bool):
        near = [lambda: not value, lambda: int(value)]
    elif isinstance(value, int):
        near = [functools.partial(int, n) for n in (-1, 0, 1, value + 1, 100)]
        near += [
            lambda: float(value),
            lambda: torch.tensor(value),
            lambda: str(value),
            lambda: torch.tensor([value, 1]),
        ]
    elif isinstance(value, float):
        near = [functools.partial(float, n) for n in ("nan", "inf", "-inf", -1, 0, 2)]
        near += [
            lambda: torch.tensor(value),
            lambda: torch.tensor([value, 1.0]),
            lambda: torch.tensor(1),
            lambda: str(value),
        ]
    elif isinstance(value, str):
        near = [value.upper, lambda: value + "s", lambda: value[1:]]
    elif isinstance(value, tuple | list) and value and type(value) in (tuple, list):
        near = [
            lambda: value[:-1],
            lambda: type(value)([*value, value[0]]),
            lambda: type(value)([nonsense(value[0], random), *value[1:]]),
            lambda: type(value)([*value[:-1], nonsense(value[-1], random)]),
        ]
    elif isinstance(value, tuple) and hasattr(value, "_replace"):
        name = random.choice(value._fields)
        near = [lambda: value._replace(**{name: nonsense(getattr(value, name), random)}), lambda: tuple(value)]
    if near and random.random() < 0.8:
        return random.choice(near)()
    return random.choice(anything)


@functools.cache
def raises(path: str) -> set[int]:
    """The lines of a file's `raise` statements."""
    nodes = [n for n in ast.walk(ast.parse(Path(path).read_text())) if isinstance(n, ast.Raise)]
    return {line for n in nodes for line in range(n.lineno, (n.end_lineno or n.lineno) + 1)}


def ours(error: BaseException) -> str | None:
    """The innermost frame of the package, or None where it raises the error itself."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(ROOT)]
    if not frames:
        return "outside the package"
    place = frames[-1]
    if place.lineno in raises(place.filename):
        return None
    return f"{Path(place.filename).relative_to(ROOT)}:{place.lineno}: {place.line}"


def describe(value: Any) -> str:
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, Tensor) else repr(value)[:60]


def calls(name: str, case: Good) -> Iterator[dict[str, Any]]:
    """Calls with one argument that is wrong, sometimes two."""
    draw = random.Random(name)
    for _ in range(DRAWN):
        wrong = draw.sample(sorted(case.arguments), min(len(case.arguments), draw.choice((1, 1, 1, 2))))
        yield {key: nonsense(case.arguments[key], draw) for key in wrong}


def test_every_public_function_is_tried():
    assert set(good()) == set(public())


@pytest.mark.parametrize("name", sorted(good()))
@pytest.mark.filterwarnings("ignore")
def test_errors_are_raised_by_the_package(name):
    torch.manual_seed(0)
    case = good()[name]
    module, _, attribute = name.partition(".")
    call = case.call or getattr(MODULES[module], attribute)
    if name != "bo.warmup":  # which needs a GPU
        call(**case.arguments)
    found = {}
    for changes in calls(name, case):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call(**{**case.arguments, **changes})
        except Exception as error:
            place = ours(error)
            if place is not None:
                given = ", ".join(f"{key}={describe(value)}" for key, value in changes.items())
                found.setdefault(place, f"{given}: {type(error).__name__}: {str(error)[:100]}")
    assert not found, "\n".join(f"{place}\n    {given}" for place, given in found.items())


@pytest.mark.parametrize("name", ("k", "i", "j"))
def test_indices_are_dense(name):
    arguments = good()["bo.interaction_entries"].arguments
    with pytest.raises(TypeError, match=f"{name} must be a dense tensor"):
        bo.interaction_entries(**{**arguments, name: arguments[name].to_sparse()})
