"""Gated layers under masks against their reference in float64, and against the identity through acts=."""

import functools
from itertools import cycle, product

import pytest
import torch
from torch import Tensor

import bilinear_ops as bo
from bilinear_ops import testing
from bilinear_ops.composite.limits import limits
from bilinear_ops.results import ACTIVATIONS
from bilinear_ops.testing import randn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MANY_SIZES = (*DTYPES[:2], pytest.param(DTYPES[2], marks=pytest.mark.slow))  # bfloat16 stands for both that round
IMPLS = ("torch", "triton")


@pytest.fixture(autouse=True)
def _small_slabs(monkeypatch):
    """Several slabs of tokens at every size but the smallest."""
    monkeypatch.setattr(limits, "slab", 400)


def inputs(
    tokens: int = 9, d: int = 6, h: int = 11, o: int = 5, dtype: torch.dtype = torch.float32, bias: bool = True
) -> dict[str, Tensor]:
    tensors = {
        "x": randn(tokens, d, dtype=dtype),
        "w": randn(h, d, dtype=dtype, scale=d**-0.5),
        "v": randn(h, d, dtype=dtype, scale=d**-0.5),
        "p": randn(o, h, dtype=dtype, scale=max(h, 1) ** -0.5),
        "gates": torch.rand(tokens, h).to(dtype),
    }
    biases = {"b_w": randn(h, dtype=dtype), "b_v": randn(h, dtype=dtype), "b_p": randn(o, dtype=dtype)}
    return tensors | (biases if bias else {})


def with_target(tensors: dict[str, Tensor], samples: int) -> dict[str, Tensor]:
    x, p = tensors["x"], tensors["p"]
    delta = torch.rand(samples, len(x)).to(x.dtype)
    return {**tensors, "target": randn(len(x), len(p), dtype=x.dtype), "delta": delta}


def op(module, **options):
    return lambda names, *tensors: module.stochastic_gated_mlp(**dict(zip(names, tensors, strict=True)), **options)


def mlp(module, **options):
    return lambda names, *tensors: module.gated_mlp(**dict(zip(names, tensors, strict=True)), **options)


def assert_right(fn, tensors: dict[str, Tensor], impl: str, **options) -> None:
    names, values = list(tensors), list(tensors.values())
    samples = (options.get("samples", 1),) if fn is op else ()
    dy = randn(*samples, len(tensors["x"]), len(tensors["p"]), dtype=tensors["x"].dtype)

    def run(module, wide: bool = False, **more) -> list[Tensor]:
        cast = [t.double() for t in values] if wide else values
        call = fn(module, **options, **more)
        return testing.gradients(lambda *t: call(names, *t), cast, dy.double() if wide else dy)

    results = run(bo, impl=impl), run(bo.reference), run(bo.reference, wide=True)
    for name, *found in zip(("y", *(f"d{n}" for n in names)), *results, strict=True):
        testing.assert_no_worse(*found, what=name)


SHAPES = list(
    zip(
        testing.shapes("tokens d h o", mixed=4, sizes=(1, 17, 65)),
        cycle((1, 3)),
        cycle((False, True, True)),
        cycle(product(ACTIVATIONS, ("continuous", "binomial"))),
        strict=False,
    )
)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", MANY_SIZES)
@pytest.mark.parametrize(("shape", "samples", "target", "kind"), SHAPES)
def test_sizes(shape, samples, target, kind, dtype, impl):
    activation, sampling = kind
    tensors = inputs(**shape, dtype=dtype, bias=samples > 1)
    if target:
        tensors = with_target(tensors, samples)
    if activation == "swish":
        tensors["beta"] = torch.tensor(0.7, dtype=dtype)
    assert_right(op, tensors, impl, samples=samples, seed=3, stream=2, sampling=sampling, activation=activation)


ROUTING = torch.arange(9) % 3 > 0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("delta", (None, "uniform", "tensor"))
def test_routing(delta, dtype, impl):
    tensors = with_target(inputs(dtype=dtype), 2)
    options = dict(samples=2, seed=5, routing=ROUTING, activation="silu")
    if delta != "tensor":
        del tensors["delta"]
        options |= {} if delta is None else {"delta": delta}
    assert_right(op, tensors, impl, **options)
    y = bo.stochastic_gated_mlp(**tensors, **options, impl=impl)
    torch.testing.assert_close(y[:, ~ROUTING], (tensors["target"] + tensors["b_p"])[~ROUTING].expand(2, -1, -1))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("source", ((2, 9, 11), (11,)))
@pytest.mark.parametrize("gates", ((9, 11), (11,)))
def test_sources_and_shared_gates(source, gates, impl):
    tensors = {**inputs(), "gates": torch.rand(gates), "source": torch.rand(source)}
    assert_right(op, tensors, impl, samples=2, activation="gelu")


@pytest.mark.parametrize("impl", IMPLS)
def test_is_the_subcomponents_op_of_the_hidden_units(impl):
    """The identity through acts= that specifies the op, and delta of the original output."""
    t = with_target(inputs(), 3)
    hid = bo.reference.gated_bilinear(t["x"], t["w"], t["v"], t["b_w"], t["b_v"], activation="silu")
    read, options = torch.zeros(6, 11), dict(samples=3, seed=4, stream=1, impl=impl)
    by_acts = bo.stochastic_rank1_linear(t["x"], read, t["p"].t(), t["gates"], t["b_p"], acts=hid, **options)
    masked = {**t, "target": None, "delta": None}
    torch.testing.assert_close(bo.stochastic_gated_mlp(**masked, activation="silu", **options), by_acts)
    mask = bo.stochastic_mask(t["gates"], samples=3, seed=4, stream=1)
    expected = ((hid * (mask - t["delta"][..., None])) @ t["p"].t()) + t["delta"][..., None] * t["target"] + t["b_p"]
    torch.testing.assert_close(bo.stochastic_gated_mlp(**t, activation="silu", **options), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_gates_of_swiglu(impl):
    """The bilinear layer under the mask sigmoid(V x) is the SwiGLU layer of the same weights."""
    t = inputs()
    gates = t.pop("gates")
    gates = torch.sigmoid(torch.nn.functional.linear(t["x"], t["v"], t["b_v"]))
    expected = bo.reference.gated_mlp(**t, activation="silu")
    torch.testing.assert_close(bo.gated_mlp(**t, mask=gates, impl=impl), expected)
    binomial = bo.stochastic_gated_mlp(**t, gates=gates, source=torch.zeros(11), impl=impl)
    torch.testing.assert_close(binomial[0], expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ((9, 11), (11,), ()))
def test_given_masks(mask, dtype, impl):
    tensors = inputs(dtype=dtype)
    del tensors["gates"]
    assert_right(mlp, {**tensors, "mask": torch.rand(mask).to(dtype)}, impl, activation="silu")


@pytest.mark.parametrize("impl", IMPLS)
def test_sums_over_tokens_in_fp16(impl):
    """Sums that pass its range on the way, 100 * 1000, and come back to 0."""
    x, one, gates = (
        torch.full(shape, n, dtype=torch.float16) for shape, n in (((2000, 1), 10), ((1, 1), 1), ((1,), 1))
    )
    dy = torch.ones(1, 2000, 1, dtype=torch.float16)
    dy[:, 1000:] = -1
    leaves = [t.clone().requires_grad_() for t in (one, one, one, gates)]
    y = bo.stochastic_gated_mlp(x, *leaves, source=torch.zeros(1), impl=impl)
    assert (y == 100).all()
    assert all((t == 0).all() for t in torch.autograd.grad(y, leaves, dy))


def test_leading_dimensions():
    t = with_target(inputs(12), 2)
    flat = bo.stochastic_gated_mlp(**t, samples=2, seed=1)
    shaped = {n: t[n].view(2, 3, 2, -1) for n in ("x", "gates", "target")} | {"delta": t["delta"].view(2, 2, 3, 2)}
    torch.testing.assert_close(bo.stochastic_gated_mlp(**{**t, **shaped}, samples=2, seed=1).view_as(flat), flat)
    for empty in ("tokens", "h"):
        zeros = inputs(**{empty: 0, "d": 3})
        assert not (bo.stochastic_gated_mlp(**zeros, seed=1) - zeros["b_p"]).any()


@pytest.mark.parametrize("activation", ("identity", "swish"))
def test_gradcheck(activation):
    tensors = with_target(inputs(3, 2, 4, 2, torch.float64), 2)
    if activation == "swish":
        tensors["beta"] = torch.tensor(0.7, dtype=torch.float64)
    names, values = list(tensors), [t.requires_grad_() for t in tensors.values()]
    routing = torch.tensor([True, False, True])
    fn = op(bo, samples=2, seed=1, activation=activation, routing=routing)
    assert torch.autograd.gradcheck(lambda *t: fn(names, *t), values)
    assert torch.autograd.gradgradcheck(lambda *t: fn(names, *t), values)


@pytest.fixture(scope="module")
def all_gradients():
    """A layer's tensors and all its gradients, for each implementation."""
    torch.manual_seed(0)
    tensors = with_target(inputs(), 2)

    @functools.cache
    def of(impl):
        fn = op(bo, samples=2, seed=1, activation="silu", impl=impl)
        values = list(tensors.values())
        return testing.gradients(lambda *t: fn(list(tensors), *t), values, torch.ones(2, 9, 5))[1:]

    return tensors, of


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("wanted", ("x", "w", "v", "p", "gates", "b_w", "b_v", "b_p", "target", "delta"))
def test_needed_gradients_only(wanted, impl, all_gradients):
    tensors, full = all_gradients[0], all_gradients[1](impl)
    names, fn = list(tensors), op(bo, samples=2, seed=1, activation="silu", impl=impl)
    leaves = {n: t.detach().requires_grad_(n == wanted) for n, t in tensors.items()}
    fn(names, *leaves.values()).backward(torch.ones(2, 9, 5))
    assert [n for n, t in leaves.items() if t.grad is not None] == [wanted]
    torch.testing.assert_close(leaves[wanted].grad, full[names.index(wanted)])


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl):
    t = with_target(inputs(), 2)
    ordered = [t[n].requires_grad_() for n in ("x", "w", "v", "p", "b_w", "b_v", "b_p")]
    seed, mask = torch.tensor(3), (t["gates"].requires_grad_(), None, t["delta"].requires_grad_(), None)
    args = (
        *ordered,
        None,
        t["target"].requires_grad_(),
        *mask,
        seed,
        None,
        None,
        0,
        2,
        "continuous",
        "silu",
        True,
        impl,
    )
    torch.library.opcheck(bo.rank1.gated.stochastic_gated_op, args)
    plain = [a.detach() if isinstance(a, Tensor) else a for a in args[:-2]]
    for need in ([True] * 7 + [False, True, True, False, True], [False] * 3 + [True] + [False] * 8):
        args = (randn(2, 9, 5), randn(9, 22), *plain, need, impl)
        torch.library.opcheck(bo.rank1.gated.stochastic_gated_backward_op, args)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_compile_transforms_autocast():
    tensors = with_target(inputs(), 2)
    names, values = list(tensors), tuple(tensors.values())

    def call(module):
        fn = op(module, samples=2, seed=1, activation="silu")
        return lambda *t: fn(names, *t)

    expected = call(bo)(*values)
    torch.testing.assert_close(torch.compile(call(bo), fullgraph=True, backend="aot_eager")(*values), expected)
    tangents = tuple(torch.randn_like(t) for t in values)
    tangent = torch.func.jvp(call(bo), values, tangents)[1]
    torch.testing.assert_close(tangent, torch.func.jvp(call(bo.reference), values, tangents)[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call(bo)(*values).dtype == torch.bfloat16


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tokens", (2, 200))
@pytest.mark.parametrize("samples", (1, 5))
def test_saved_bytes(samples, tokens, impl):
    """What backward keeps, at small sizes too: the inputs and [tokens, 2h], nothing of the samples but delta."""
    tensors = {n: t.requires_grad_() for n, t in with_target(inputs(tokens), samples).items()}
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        bo.stochastic_gated_mlp(**tensors, samples=samples, seed=1, impl=impl)
    beside = [t for pointer, t in saved.items() if pointer not in {t.data_ptr() for t in tensors.values()}]
    assert sum(t.numel() for t in beside) == tokens * 22 + 1  # and the seed
    saved.clear()
    names = {n: t for n, t in tensors.items() if n not in ("gates", "target", "delta")}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        bo.gated_mlp(**names, mask=tensors["gates"], recompute=True, impl=impl)
    assert set(saved) <= {t.data_ptr() for t in tensors.values()} | {0}


def bad(**changes):
    return bo.stochastic_gated_mlp(**{**with_target(inputs(), 2), "samples": 2, "seed": 3, **changes})


ERRORS = {
    "h of gates": (dict(gates=randn(9, 5)), RuntimeError, r"gates must broadcast to \[9, 11\], got \[9, 5\]"),
    "h of p": (dict(p=randn(5, 4)), RuntimeError, r"p must have shape \[o, h=11\], got \[5, 4\]"),
    "o of target": (dict(target=randn(9, 4)), RuntimeError, r"target must have shape \[..., o=5\], got \[9, 4\]"),
    "tokens of target": (dict(target=randn(8, 5)), RuntimeError, r"target must have shape \[9, 5\], got \[8, 5\]"),
    "shape of delta": (dict(delta=randn(3, 9)), RuntimeError, r"delta must broadcast to \[2, 9\], got \[3, 9\]"),
    "delta without target": (dict(target=None), ValueError, "delta needs target, got None"),
    "routing without target": (dict(target=None, delta=None, routing=ROUTING), ValueError, "routing needs target"),
    "float routing": (dict(routing=randn(9)), TypeError, "routing must be a bool tensor, got torch.float32"),
    "no seed": (dict(seed=None), TypeError, "seed must be an int or an int64 tensor .*got NoneType"),
    "no gates": (dict(gates=None), TypeError, "gates must be a torch.Tensor, got NoneType"),
    "samples": (dict(samples=0), ValueError, "samples must be at least 1, got 0"),
    "activation": (dict(activation="swiglu"), ValueError, "activation must be one of"),
    "beta": (dict(beta=0.5), ValueError, "beta belongs to activation='swish'"),
    "impl": (dict(impl="cuda"), ValueError, "impl must be .*got 'cuda'"),
    "shape of a given mask": (dict(mask=randn(9, 5)), RuntimeError, r"mask must broadcast to \[9, 11\], got \[9, 5\]"),
}


@pytest.mark.parametrize(("changes", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_bad_argument(changes, error, message):
    with pytest.raises(error, match=message):
        if "mask" in changes:
            bo.gated_mlp(**{n: t for n, t in inputs().items() if n != "gates"}, **changes)
        else:
            bad(**changes)
