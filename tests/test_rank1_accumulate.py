"""Accumulated weights against the sum written out."""

import pytest
import torch

import bilinear_ops as bo
from bilinear_ops import testing
from bilinear_ops.kernels.rank1 import accumulate as kernels
from bilinear_ops.testing import randn

# torch.compile and torch.func warn about PyTorch's own deprecations
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MANY_SIZES = (*DTYPES[:2], pytest.param(DTYPES[2], marks=pytest.mark.slow))  # bfloat16 stands for both that round
IMPLS = ("torch", "triton")
ON_BOTH = pytest.mark.parametrize("impl", IMPLS)


@ON_BOTH
@pytest.mark.parametrize("dtype", MANY_SIZES)
@pytest.mark.parametrize("base", (False, True))
@pytest.mark.parametrize("lead", ((), (1,), (3,), (2, 3), (40,), (5, 8), (0,)))
def test_accumulate(lead, base, dtype, impl):
    """Both orders of contraction: few rows of gates, and more rows than d_in."""
    gates, read, write = torch.rand(*lead, 17).to(dtype), randn(30, 17, dtype=dtype), randn(17, 23, dtype=dtype)
    tensors = [gates, read, write] + ([randn(23, 30, dtype=dtype)] if base else [])
    dy = randn(*lead, 23, 30, dtype=dtype)

    def accumulate(module, **options):
        return lambda g, r, w, b=None: module.rank1_accumulate(g, r, w, base=b, **options)

    def definition(g, r, w, b=None):
        pieces = torch.einsum("...c,coi->...oi", g, w[:, :, None] * r.t()[:, None, :])
        return pieces if b is None else pieces + b

    ours = testing.gradients(accumulate(bo, impl=impl), tensors, dy)
    # the two orders round their gradients differently, so each is held to eager code in its own
    eager = testing.gradients(definition if gates[..., 0].numel() > 30 else accumulate(bo.reference), tensors, dy)
    gold = testing.gradients(accumulate(bo.reference), [t.double() for t in tensors], dy.double())
    assert ours[0].is_contiguous()
    for what, *results in zip(("weights", "dgates", "dread", "dwrite", "dbase"), ours, eager, gold, strict=False):
        testing.assert_no_worse(*results, what=what)


def test_accumulate_by_hand():
    gates, read, write = torch.rand(2, 3).double(), randn(5, 3).double(), randn(3, 4).double()
    expected = torch.einsum("bc,ic,co->boi", gates, read, write)
    torch.testing.assert_close(bo.rank1_accumulate(gates, read, write), expected)
    torch.testing.assert_close(bo.reference.rank1_accumulate(gates, read, write), expected)


SMALL = (33, 37, 40)  # d_out, d_in, C: two tiles each way, with tails


def tensors_of(rows=3, sizes=SMALL, dtype=torch.float32, base=True):
    d_out, d_in, c = sizes
    found = [torch.rand(rows, c).to(dtype), randn(d_in, c, dtype=dtype), randn(c, d_out, dtype=dtype)]
    return found + ([randn(d_out, d_in, dtype=dtype)] if base else [])


def with_base(module, **options):
    return lambda g, r, w, b=None: module.rank1_accumulate(g, r, w, base=b, **options)


def assert_right(tensors, impl="triton"):
    lead = tensors[0].shape[:-1]
    dy = randn(*lead, tensors[2].shape[1], tensors[1].shape[0]).to(tensors[1].dtype)
    ours = testing.gradients(with_base(bo, impl=impl), tensors, dy)
    eager = testing.gradients(with_base(bo.reference), tensors, dy)
    gold = testing.gradients(with_base(bo.reference), [t.double() for t in tensors], dy.double())
    for what, *results in zip(("weights", "dgates", "dread", "dwrite", "dbase"), ours, eager, gold, strict=False):
        testing.assert_no_worse(*results, what=what)


@pytest.mark.parametrize("dtype", MANY_SIZES)
@pytest.mark.parametrize("shape", list(testing.shapes("o i c", mixed=4, sizes=(1, 17, 65, 130))), ids=str)
def test_kernel_sizes(shape, dtype):
    assert_right(tensors_of(2, tuple(shape.values()), dtype))


@ON_BOTH
@pytest.mark.parametrize("kind", testing.LAYOUTS)
def test_layouts(kind, impl):
    """Of every tensor, the gradient of the result included."""
    tensors = [testing.layout(t, kind) for t in tensors_of()]
    dy = testing.layout(randn(3, 33 * 37), kind).unflatten(1, (33, 37))
    got, expected = (
        testing.gradients(with_base(m, **o), tensors, dy) for m, o in ((bo, {"impl": impl}), (bo.reference, {}))
    )
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


@ON_BOTH
@pytest.mark.parametrize("empty", range(4))
def test_empty(empty, impl):
    sizes = [3, *SMALL]
    sizes[empty] = 0
    assert_right(tensors_of(sizes[0], tuple(sizes[1:])), impl)


@ON_BOTH
@pytest.mark.parametrize("shape", ((2, 3, 33, 37), (1, 3, 33, 37), (2, 1, 1, 37), (33, 1), (1, 1), ()), ids=str)
def test_base_broadcasts(shape, impl):
    gates, read, write = tensors_of(base=False)
    assert_right([torch.rand(2, 3, 40), read, write, randn(*shape)], impl)


@pytest.mark.parametrize("gates", (torch.float64, torch.float32, torch.bfloat16))
def test_gates_of_another_dtype(gates):
    tensors = tensors_of(dtype=torch.float16)
    assert_right([tensors[0].to(gates), *tensors[1:]])


def test_several_slabs_and_spans(small_limits, monkeypatch):
    """Sums over rows of gates in several parts, on both paths."""
    monkeypatch.setattr(kernels, "WAVES", 5)
    for impl in IMPLS:
        assert_right(tensors_of(7), impl)


@pytest.mark.parametrize(("impl", "rows"), (("torch", 3), ("torch", 80), ("triton", 3)))
@pytest.mark.parametrize("wanted", range(4))
def test_needed_gradients_only(wanted, rows, impl):
    tensors = tensors_of(rows)
    full = testing.gradients(with_base(bo, impl=impl), tensors, torch.ones(rows, 33, 37))[1:]
    leaves = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
    with_base(bo, impl=impl)(*leaves).backward(torch.ones(rows, 33, 37))
    assert [t.grad is not None for t in leaves] == [i == wanted for i in range(4)]
    torch.testing.assert_close(leaves[wanted].grad, full[wanted])


def test_touches_only_its_memory():
    """Nor is anything of [rows, C, d] allocated."""
    tensors = [testing.guarded(t) for t in tensors_of(9)]
    gates, read, write, base = tensors
    with testing.GuardedAllocations() as memory:
        weights = kernels.rank1_accumulate(gates, read, write, base[None])
        grads = kernels.rank1_accumulate_backward(weights, gates, read, write, [True] * 3)
    memory.check()
    assert all(t.isfinite().all() for t in (weights, *grads))
    assert sorted(t.numel() for t in memory.allocated)[-1] == weights.numel() < 9 * 40 * 37


@ON_BOTH
def test_saved_is_the_arguments(impl):
    tensors = [t.requires_grad_() for t in tensors_of()]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with_base(bo, impl=impl)(*tensors)
    assert {t.data_ptr() for t in saved} <= {t.data_ptr() for t in tensors}


@pytest.mark.parametrize("rows", (2, 5))
def test_gradcheck(rows):
    """In both orders of contraction."""
    tensors = [t.requires_grad_() for t in tensors_of(rows, (2, 3, 4), torch.float64)]
    assert torch.autograd.gradcheck(with_base(bo), tensors) and torch.autograd.gradgradcheck(with_base(bo), tensors)


@ON_BOTH
@pytest.mark.parametrize(("base", "need"), ((True, [True] * 4), (False, [False, True, False, False])), ids=str)
def test_opcheck(base, need, impl):
    tensors = tensors_of(5, (2, 3, 4), base=False)
    operand = randn(1, 2, 3) if base else None
    args = (*(t.requires_grad_() for t in tensors), operand, impl)
    torch.library.opcheck(bo.rank1.accumulate.accumulate_op, args)
    args = (randn(5, 2, 3), *(t.detach() for t in tensors), operand, need, impl)
    torch.library.opcheck(bo.rank1.accumulate.accumulate_backward_op, args)


@ON_BOTH
def test_compile(impl):
    """One graph, forward and backward, any number of rows."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(with_base(bo, impl=impl), fullgraph=True, backend=counter)
    for rows in (2, 3, 4):  # a number of rows above d_in may compile the other order
        tensors, dy = tensors_of(rows, (2, 9, 4)), randn(rows, 2, 9)
        torch.testing.assert_close(*(testing.gradients(f, tensors, dy) for f in (compiled, with_base(bo))))
    assert counter.frame_count <= 2


def test_transforms():
    tensors = tuple(tensors_of(5, (2, 3, 4)))
    tangents = tuple(torch.randn_like(t) for t in tensors)
    for transform in (
        lambda f: torch.func.jvp(f, tensors, tangents)[1],
        lambda f: torch.func.grad(lambda *t: f(*t).square().sum(), argnums=(0, 1, 2, 3))(*tensors),
        lambda f: torch.func.vmap(f, in_dims=(0, None, None, None))(torch.rand(3, 5, 4).fill_(0.5), *tensors[1:]),
    ):
        torch.testing.assert_close(transform(with_base(bo)), transform(with_base(bo.reference)))


def test_unknown_impl():
    with pytest.raises(ValueError, match="impl must be .*got 'cuda'"):
        with_base(bo, impl="cuda")(*tensors_of())
