"""An explicit impl="triton" launches a kernel of ours in every branch, or raises and names the branch."""

import sys
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

import bilinear_ops as bo
from bilinear_ops import _impl, environment
from bilinear_ops.kernels import config, tuning
from bilinear_ops.testing import randn

ARCHITECTURES = ("interpreter", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942")


@contextmanager
def counted(*, interpreted=True):
    """The names of the kernels launched within, in order; what those that are not interpreted leave is NaN."""
    launched = []
    run = InterpretedFunction.run

    def counting(self, *args, **options):
        launched.append(self.__name__)
        return run(self, *args, **options) if interpreted else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "run", counting)
        yield launched


def gated(m=3, dtype=torch.float32, *, down=True, **options):
    """A layer and its arguments; enough tokens reach the fused kernels, which the tables keep from small layers."""
    x, w, v, p = (randn(*s, dtype=dtype, requires_grad=True) for s in ((m, 8), (16, 8), (16, 8), (8, 16)))
    if down:
        return partial(bo.gated_mlp, x, w, v, p, activation="silu", **options)
    return partial(bo.gated_bilinear, x, w, v, **options)


def layer(k, d=3, h=4, *, directions=None, features=None):
    """w, v, c and a basis."""
    c = randn(k, h) if directions is None else bo.Directions(randn(k, directions), randn(directions, h))
    return (randn(h, d), randn(h, d), c), {} if features is None else {"basis": randn(d, features)}


def matrices(k, **sizes):
    w, v, c = layer(k, **sizes)[0]
    return partial(bo.interaction_matrices, w.requires_grad_(), v, c)


def topk(k, *, n=2, weight=None, score="cross", scope="output", **sizes):
    tensors, basis = layer(k, **sizes)
    return partial(bo.interaction_topk, *tensors, n, weight=weight, score=score, scope=scope, **basis)


def moments(k, **sizes):
    tensors, basis = layer(k, **sizes)
    return partial(bo.interaction_moments, *tensors, **basis)


def rank1(op=bo.rank1_linear, *mask, **options):
    x, read, write = (randn(*s, requires_grad=True) for s in ((5, 3), (3, 4), (4, 2)))
    return partial(op, x, read, write, *mask, **options)


def sparse(count, k=2):
    x, read, write, gates = (randn(*s, requires_grad=True) for s in ((5, 3), (3, count), (count, 2), (5, k)))
    return partial(bo.rank1_sparse, x, read, write, torch.randint(count, (5, k)), gates)


def accumulated(rows=2):
    gates, read, write, base = (randn(*s, requires_grad=True) for s in ((rows, 4), (3, 4), (4, 2), (2, 3)))
    return partial(bo.rank1_accumulate, gates, read, write, base=base)


def delta_and_routing():
    return {"weight": randn(2, 3), "delta": torch.rand(5), "routing": torch.arange(5) % 2 > 0}


# name of the branch: how to build the call
BRANCHES = {
    "gated_bilinear": partial(gated, down=False),
    "gated_bilinear, bfloat16, fused": partial(gated, 65, torch.bfloat16, down=False),
    "gated_mlp, few tokens": partial(gated, 3, torch.bfloat16),
    "gated_mlp, bfloat16, fused": partial(gated, 65, torch.bfloat16),
    "gated_mlp, float32": partial(gated, 65),
    "gated_mlp, recompute": partial(gated, 65, torch.bfloat16, recompute=True),
    "gated_mlp, mask": lambda: gated(65, torch.bfloat16, mask=torch.rand(65, 16)),
    "stochastic_gated_mlp": lambda: partial(
        bo.stochastic_gated_mlp,
        *(randn(*s, requires_grad=True) for s in ((5, 3), (4, 3), (4, 3), (2, 4))),
        torch.rand(5, 4),
        seed=1,
    ),
    "gate": lambda: partial(bo.gate, randn(5, 4, requires_grad=True), randn(5, 4, requires_grad=True)),
    "interaction_matrices, few directions": partial(matrices, 3),
    "interaction_matrices, many directions": partial(matrices, 20),
    "interaction_matrices, low rank formed": partial(matrices, 20, directions=2),
    "interaction_matrices, low rank in two stages": partial(matrices, 64, directions=2),
    "interaction_matrices, packed": lambda: partial(matrices(3), layout="packed"),
    "iter_interaction_matrices": lambda: (
        lambda impl: [q for _, q in bo.iter_interaction_matrices(*layer(5)[0], chunk_bytes=20000, impl=impl)]
    ),
    "interaction_topk, K = 3": partial(topk, 3),
    "interaction_topk, K = 20": partial(topk, 20),
    "interaction_topk, K = 20, low rank": partial(topk, 20, directions=2),
    "interaction_topk, K = 20, global": partial(topk, 20, scope="global"),
    "interaction_topk, K = 20, weight tensor": lambda: topk(20, weight=torch.rand(3, 3)),
    "interaction_topk, K = 64": partial(topk, 64, scope="global"),
    "interaction_topk, K = 64, low rank": partial(topk, 64, directions=2, scope="global"),
    "interaction_topk, K = 64, basis": partial(topk, 64, features=5),
    "interaction_topk, K = 64, basis, low rank": partial(topk, 64, features=5, directions=2),
    "interaction_moments": partial(moments, 3),
    "interaction_moments, K = 64": partial(moments, 64),
    "interaction_moments, K = 64, basis, low rank": partial(moments, 64, features=5, directions=2),
    "rank1_linear, mask": lambda: rank1(bo.rank1_linear, torch.rand(5, 4)),
    "rank1_linear, delta and routing": lambda: rank1(bo.rank1_linear, **delta_and_routing()),
    "stochastic_rank1_linear": lambda: rank1(bo.stochastic_rank1_linear, torch.rand(5, 4), seed=1, samples=2),
    "stochastic_rank1_linear, delta and routing": lambda: rank1(
        bo.stochastic_rank1_linear, torch.rand(5, 4), seed=1, **{**delta_and_routing(), "delta": "uniform"}
    ),
    "stochastic_rank1_linear, source": lambda: rank1(
        bo.stochastic_rank1_linear, torch.rand(5, 4), source=torch.rand(4), acts=randn(5, 4, requires_grad=True)
    ),
    "stochastic_mask": lambda: partial(bo.stochastic_mask, torch.rand(5, 4), seed=1),
    "stochastic_delta": lambda: partial(bo.stochastic_delta, (5,), seed=1),
    "subset_routing": lambda: partial(bo.subset_routing, 3, (5,), seed=1),
    "rank1_sparse, sparse": partial(sparse, 900),
    "rank1_sparse, dense": partial(sparse, 6),
    "rank1_accumulate": accumulated,
    "rank1_accumulate, many rows": partial(accumulated, 7),
    "component_gates": lambda: partial(
        bo.component_gates, *(randn(*s, requires_grad=True) for s in ((5, 4), (4, 3), (4, 3), (4, 3), (4,)))
    ),
    "faithfulness_loss": lambda: partial(
        bo.faithfulness_loss, *(randn(*s, requires_grad=True) for s in ((2, 3), (3, 4), (4, 2)))
    ),
    "pooled_faithfulness_loss": lambda: partial(
        bo.pooled_faithfulness_loss, [tuple(randn(*s, requires_grad=True) for s in ((2, 3), (3, 4), (4, 2)))]
    ),
}

WITH_BACKWARD_KERNELS = (
    "gated", "interaction_matrices", "rank1_linear", "rank1_accumulate", "stochastic_rank1", "stochastic_gated",
    "component_gates",
)  # fmt: skip
TO_PYTORCH = "leaves these sizes to PyTorch"
CALLED = "a function as weight"
MANY_FEATURES = "more than 48 outputs of more than 65,536 inputs"

# Branches without a kernel: how to build the call, and what the error says.
REFUSED = {
    "interaction_topk, K = 64, many inputs": (partial(topk, 64, d=65_537, h=1), MANY_FEATURES),
    "interaction_topk, K = 20, weight function": (lambda: topk(20, weight=lambda k: torch.ones(3, 3)), CALLED),
    "interaction_topk, K = 64, basis, global, weight function": (
        lambda: topk(64, features=5, scope="global", weight=lambda k: torch.ones(5, 5)),
        CALLED,
    ),
    "interaction_topk, diagonals": (partial(topk, 3, score="self"), 'score="self" reads diagonals'),
    "rank1_linear, no mask": (rank1, "without mask, delta and routing"),
}


@pytest.mark.parametrize("call", (matrices(64), moments(3)))
def test_what_a_choice_leaves_to_pytorch_raises(call):
    with tuning.using(interaction_matrices=config.LIBRARY), pytest.raises(RuntimeError, match=TO_PYTORCH):
        call(impl="triton")


@pytest.fixture(params=ARCHITECTURES)
def architecture(request, monkeypatch):
    """The tables of a real device, whose kernels are interpreted all the same."""
    monkeypatch.setattr(config, "architecture", lambda device: request.param)
    return request.param


def launches(call):
    """The kernels launched by a call, and by its gradients."""
    with counted(interpreted=False) as forward:
        y = call(impl="triton")
    with counted(interpreted=False) as backward:
        if isinstance(y, torch.Tensor) and y.requires_grad:
            y.sum().backward()
    return forward, backward


@pytest.mark.parametrize("branch", BRANCHES)
def test_every_branch_launches(branch, architecture):
    forward, _ = launches(BRANCHES[branch]())
    assert forward, f"{branch} launched nothing with the tables of {architecture}"


@pytest.mark.parametrize("branch", [name for name in BRANCHES if name.startswith(WITH_BACKWARD_KERNELS)])
def test_backward_launches(branch, architecture):
    _, backward = launches(BRANCHES[branch]())
    assert backward, f"the backward of {branch} launched nothing with the tables of {architecture}"


@pytest.mark.parametrize("branch", REFUSED)
def test_branches_without_a_kernel_raise(branch, architecture):
    build, message = REFUSED[branch]
    call = build()
    with counted() as launched, pytest.raises(RuntimeError, match=f'impl="triton" cannot run: .*{message}'):
        call(impl="triton")
    assert not launched


@pytest.mark.parametrize("branch", [name for name in REFUSED if "function" not in name and "inputs" not in name])
def test_branches_without_a_kernel_run_pytorch_unless_asked(branch, monkeypatch):
    """Called with what the wrapper passes on for "auto" on a GPU; with a function as weight, kernels form matrices.

    Not of many inputs, which take too long here.
    """
    monkeypatch.setattr(_impl, "resolve", lambda impl, t: impl)
    call = REFUSED[branch][0]()
    with counted() as launched:
        torch.testing.assert_close(call(impl="auto"), call(impl="torch"))
    assert not launched


def test_auto_may_choose_the_library():
    w, v, c = layer(20)[0]
    op = bo.interaction.matrices.interaction_op
    with tuning.using(interaction_matrices=config.LIBRARY):
        with counted() as launched:
            torch.testing.assert_close(op(w, v, c, None, False, "auto"), op(w, v, c, None, False, "torch"))
        assert not launched
        with pytest.raises(RuntimeError, match=TO_PYTORCH):
            op(w, v, c, None, False, "triton")


@pytest.mark.parametrize(
    ("arch", "dtype", "rows", "d_in"), (("sm_90", torch.bfloat16, 2, 5), ("gfx942", torch.float32, 5, 2))
)
def test_auto_leaves_wide_weights_to_the_library(arch, dtype, rows, d_in, monkeypatch):
    """Values and gradients; asked for by name, the kernels run all the same."""
    monkeypatch.setattr(config, "architecture", lambda device: arch)
    monkeypatch.setattr(config, "WIDE_WEIGHTS", config.Threshold(4, "small"))
    tensors = [randn(*s, dtype=dtype, requires_grad=True) for s in ((rows, 4), (d_in, 4), (4, 2))]
    for impl, launched in (("auto", set()), ("triton", {"accumulate_kernel", "accumulate_backward_kernel"})):
        with counted() as names:
            bo.rank1.accumulate.accumulate_op(*tensors, None, impl).sum().backward()
        assert set(names) == launched


def test_empty_sizes_need_no_launch():
    assert bo.interaction_topk(*layer(64, h=0)[0], 2, impl="triton").values.eq(0).all()
    assert bo.interaction_matrices(*layer(0)[0], impl="triton").shape == (0, 3, 3)
    assert bo.gated_bilinear(randn(0, 3), randn(4, 3), randn(4, 3), impl="triton").shape == (0, 4)


def test_transforms_raise():
    """They differentiate the reference."""
    x, w = randn(5, 3), randn(4, 3)
    with pytest.raises(RuntimeError, match=r'impl="triton" cannot run: torch.func transforms'):
        torch.func.grad(lambda x: bo.gated_bilinear(x, w, w, impl="triton").sum())(x)


def test_every_op_that_claims_kernels_is_here():
    claims = {name for name, op in environment.public_ops().items() if environment.has_impl(op)}
    assert claims == {name.partition(",")[0] for name in BRANCHES}


def test_the_report_names_every_branch_without_a_kernel():
    """By the reasons that the errors give."""
    reported = environment.report()["branches"]
    for branch, (build, _) in REFUSED.items():
        with pytest.raises(RuntimeError) as error:
            build()(impl="triton")
        reason = str(error.value).removeprefix('impl="triton" cannot run: ')
        assert any(reason.startswith(r) for r in reported[branch.partition(",")[0]]), reason


if __name__ == "__main__":  # the table: `TRITON_INTERPRET=1 python tests/test_launches.py [architecture]`
    arch = sys.argv[1] if len(sys.argv) > 1 else "interpreter"
    config.architecture = lambda device: arch
    for name, build in BRANCHES.items():
        forward, backward = launches(build())
        print(f"{name:60} {len(forward):3} {len(backward):3}  {' '.join(sorted({*forward, *backward}))}")
