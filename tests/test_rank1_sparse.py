"""Sparse subcomponents against their reference in float64, on both ways through every product."""

import pytest
import torch
from torch import Tensor

import bilinear_ops as bo
from bilinear_ops import testing
from bilinear_ops.composite.limits import limits
from bilinear_ops.composite.rank1 import sparse as composite
from bilinear_ops.kernels.rank1 import sparse as kernels
from bilinear_ops.testing import randn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MANY_SIZES = (*DTYPES[:2], pytest.param(DTYPES[2], marks=pytest.mark.slow))  # bfloat16 stands for both that round
IMPLS = ("torch", "triton")


@pytest.fixture(params=("gathered", "dense"))
def way(request, monkeypatch):
    """Rows gathered, or a dense product and a gather of it, whatever the cost model prefers."""
    cost = 0 if request.param == "gathered" else 10**9
    for module in (composite, kernels):
        monkeypatch.setattr(module, "GATHER_COST", cost)
    monkeypatch.setattr(composite, "COPY_COST", 0)
    monkeypatch.setattr(limits, "active_rows", 64)


def inputs(tokens: int, k: int, c: int, d_in: int, d_out: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, read, write, gates, bias; then indices."""
    x, read = randn(tokens, d_in, dtype=dtype), randn(d_in, c, dtype=dtype, scale=max(d_in, 1) ** -0.5)
    write, bias = randn(c, d_out, dtype=dtype), randn(d_out, dtype=dtype)
    return [x, read, write, torch.rand(tokens, k).to(dtype), bias, torch.randint(max(c, 1), (tokens, k))]


def sparse(module, indices: Tensor, **options):
    return lambda x, read, write, gates, bias: module.rank1_sparse(x, read, write, indices, gates, bias, **options)


def assert_right(tensors: list[Tensor], impl: str, dy: Tensor | None = None) -> None:
    *tensors, indices = tensors
    x, write = tensors[0], tensors[2]
    dy = randn(*x.shape[:-1], write.shape[1], dtype=x.dtype) if dy is None else dy
    ours = testing.gradients(sparse(bo, indices, impl=impl), tensors, dy)
    eager = testing.gradients(sparse(bo.reference, indices), tensors, dy)
    gold = testing.gradients(sparse(bo.reference, indices), [t.double() for t in tensors], dy.double())
    for what, *results in zip(("y", "dx", "dread", "dwrite", "dgates", "dbias"), ours, eager, gold, strict=True):
        testing.assert_no_worse(*results, what=what)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", MANY_SIZES)
@pytest.mark.parametrize("shape", list(testing.shapes("tokens k c d_in d_out", base=5, mixed=2, sizes=(1, 7, 17))))
def test_sizes(shape, dtype, impl, way):
    assert_right(inputs(**shape, dtype=dtype), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", testing.LAYOUTS)
def test_layouts(kind, impl, way):
    tensors = [t if t.dim() == 1 else testing.layout(t, kind) for t in inputs(9, 3, 20, 12, 8)[:-1]]
    indices = torch.randint(20, (3, 9)).t()
    assert_right([*tensors, indices], impl, testing.layout(randn(9, 8), kind))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("empty", ("tokens", "k", "d_in", "d_out"))
def test_empty(empty, impl):
    assert_right(inputs(**{**dict(tokens=3, k=2, c=4, d_in=5, d_out=2), empty: 0}), impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_equals_dense(impl, way):
    """Gates scattered into a mask, repeated indices counted twice, int32 indices, leading dimensions."""
    x, read, write, gates, bias, indices = inputs(6, 3, 20, 12, 8)
    indices[0] = 7
    mask = torch.zeros(6, 20).scatter_add_(1, indices, gates)
    expected = bo.reference.rank1_linear(x, read, write, mask, bias).view(2, 3, 8)
    x, gates, indices = x.view(2, 3, 12), gates.view(2, 3, 3), indices.view(2, 3, 3).int()
    torch.testing.assert_close(bo.rank1_sparse(x, read, write, indices, gates, bias, impl=impl), expected)


def test_gradcheck():
    *tensors, indices = inputs(3, 2, 6, 4, 5, torch.float64)
    tensors = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(sparse(bo, indices), tensors)
    assert torch.autograd.gradgradcheck(sparse(bo, indices), tensors)


@pytest.mark.parametrize("impl", IMPLS)
def test_given_activations(impl, way):
    """The op with its own activations, whose gradient reaches x and read through them alone."""
    *tensors, indices = inputs(9, 3, 20, 12, 8)
    x, read, write, gates, bias = tensors
    dy = randn(9, 8)

    def given(x, read, write, gates, bias, impl=impl):
        acts = (x @ read).gather(1, indices)
        return bo.rank1_sparse(x, read, write, indices, gates, bias, acts=acts, impl=impl)

    expected = testing.gradients(sparse(bo.reference, indices), tensors, dy)
    for got, wanted in zip(testing.gradients(given, tensors, dy), expected, strict=True):
        torch.testing.assert_close(got, wanted)
    wide = [t.double().requires_grad_() for t in (randn(9, 3), write, gates)]

    def of_acts(acts, write, gates):
        return bo.rank1_sparse(x.double(), read.double(), write, indices, gates, acts=acts)

    assert torch.autograd.gradcheck(of_acts, wide, fast_mode=True)
    assert torch.autograd.gradgradcheck(of_acts, wide, fast_mode=True)
    with pytest.raises(RuntimeError, match=r"acts must have shape \[9, 3\], got \[9, 20\]"):
        bo.rank1_sparse(x, read, write, indices, gates, acts=x @ read)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("wanted", range(5))
def test_needed_gradients_only(wanted, impl):
    *tensors, indices = inputs(5, 2, 6, 4, 3)
    full = testing.gradients(sparse(bo, indices, impl=impl), tensors, torch.ones(5, 3))[1:]
    leaves = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
    sparse(bo, indices, impl=impl)(*leaves).backward(torch.ones(5, 3))
    assert [t.grad is not None for t in leaves] == [i == wanted for i in range(5)]
    torch.testing.assert_close(leaves[wanted].grad, full[wanted])


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl):
    *tensors, indices = inputs(5, 2, 6, 4, 3)
    x, read, write, gates, bias = (t.requires_grad_() for t in tensors)
    torch.library.opcheck(bo.rank1.sparse.sparse_op, (x, read, write, gates, bias, None, indices, impl))
    acts = randn(5, 2, requires_grad=True)
    torch.library.opcheck(bo.rank1.sparse.sparse_op, (x, read, write, gates, bias, acts, indices, impl))
    for given, need in ((None, [True] * 5 + [False]), (acts, [False, False, True, True, False, True])):
        acts = None if given is None else given.detach()
        args = (randn(5, 3), randn(5, 2), *(t.detach() for t in tensors), acts, indices, need, impl)
        torch.library.opcheck(bo.rank1.sparse.sparse_backward_op, args)


@pytest.mark.parametrize("module", (composite, kernels))
def test_nothing_outside_the_outputs(module, way):
    x, read, _, gates, _, indices = (
        t if t.dtype == torch.int64 else testing.guarded(t) for t in inputs(5, 3, 9, 13, 7)
    )
    with testing.GuardedAllocations() as allocations:
        results = module.sparse_dots(x, read.t(), indices), module.sparse_sums(gates, read.t(), indices)
    allocations.check()
    assert all(t.isfinite().all() for t in results)


ERRORS = {
    "high index": (dict(indices=torch.full((5, 2), 6)), IndexError, r"indices must lie in \[0, 6\), got 6 to 6"),
    "low index": (dict(indices=torch.full((5, 2), -1)), IndexError, r"indices must lie in \[0, 6\), got -1 to -1"),
    "float indices": (dict(indices=randn(5, 2)), TypeError, "indices must be an int64 or int32 tensor, got torch.fl"),
    "k of gates": (dict(gates=randn(5, 3)), RuntimeError, r"gates must have shape \[5, 2\], got \[5, 3\]"),
    "tokens of indices": (
        dict(indices=torch.zeros(4, 2, dtype=torch.int64)),
        RuntimeError,
        r"indices must have shape \[5, 2\], got \[4, 2\]",
    ),
    "no gates": (dict(gates=None), TypeError, "gates must be a torch.Tensor, got NoneType"),
    "C of write": (dict(write=randn(7, 3)), RuntimeError, r"write must have shape \[c=6, o\], got \[7, 3\]"),
    "impl": (dict(impl="cuda"), ValueError, "impl must be"),
}


@pytest.mark.parametrize(("changes", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_bad_argument(changes, error, message):
    x, read, write, gates, _, indices = inputs(5, 2, 6, 4, 3)
    good = dict(x=x, read=read, write=write, indices=indices, gates=gates)
    with pytest.raises(error, match=message):
        bo.rank1_sparse(**{**good, **changes})
