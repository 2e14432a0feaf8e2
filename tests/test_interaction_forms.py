"""Inner products of bilinear tensors, quadratic and eigenvector forms: each equals its materialised definition."""

import pytest
import torch

import bilinear_ops as bo
from bilinear_ops.composite import blockwise
from bilinear_ops.composite.limits import limits
from bilinear_ops.testing import randn

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # in functorch


def doubles(*shapes, grad=False):
    return tuple(randn(*shape, dtype=torch.float64, requires_grad=grad) for shape in shapes)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def tensor(w, v, p):
    """B [o, d, d]."""
    b = torch.einsum("oh,hi,hj->oij", p, w, v)
    return (b + b.mT) / 2


@pytest.mark.parametrize("budget", [1, 20, 1 << 21])
@pytest.mark.parametrize(
    ("lead", "K", "d"), [((), 1, 1), ((5,), 3, 4), ((2, 3), 17, 2), ((0,), 3, 2), ((2,), 0, 2), ((2,), 3, 0)]
)
def test_quadratic_form(lead, K, d, budget, monkeypatch):
    monkeypatch.setattr(limits, "block", budget)
    x, q = doubles((*lead, d), (K, d, d))
    q = q + q.mT
    gold = torch.einsum("...i,kij,...j->...k", x, q, x)
    close(bo.quadratic_form(x, q), gold)
    close(bo.quadratic_form(x, bo.pack_symmetric(q)), gold)


def test_quadratic_form_takes_any_matrix():
    x, q = doubles((5, 3), (2, 3, 3), grad=True)
    close(bo.quadratic_form(x, q), bo.quadratic_form(x, (q + q.mT) / 2))
    (packed,) = doubles((2, 6), grad=True)
    for matrices in (q, packed):
        assert torch.autograd.gradcheck(bo.quadratic_form, (x, matrices))
        assert torch.autograd.gradgradcheck(bo.quadratic_form, (x, matrices))


SHAPES = {"sum": (), "cumsum": (3,), "none": (3,)}


@pytest.mark.parametrize("reduce", SHAPES)
@pytest.mark.parametrize("budget", [1, 20, 1 << 21])
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,)])
def test_eigen_form(lead, budget, reduce, monkeypatch):
    monkeypatch.setattr(limits, "block", budget)
    x, values, vectors = doubles((*lead, 4), (6, 3), (6, 3, 4))
    terms = values * torch.einsum("...d,krd->...kr", x, vectors) ** 2
    gold = {"sum": terms.sum(-1), "cumsum": terms.cumsum(-1), "none": terms}[reduce]
    got = bo.eigen_form(x, values, vectors, reduce=reduce)
    assert got.shape == (*lead, 6, *SHAPES[reduce])
    close(got, gold)


def test_eigen_form_is_the_quadratic_form():
    x, q = doubles((7, 5), (3, 5, 5))
    q = (q + q.mT) / 2
    values, vectors = torch.linalg.eigh(q)
    close(bo.eigen_form(x, values, vectors.mT), bo.quadratic_form(x, q))


@pytest.mark.parametrize("reduce", SHAPES)
@pytest.mark.parametrize("budget", [1, 30, 1 << 20])
@pytest.mark.parametrize("N", [0, 1, 40])
def test_eigen_form_pairs(N, budget, reduce, monkeypatch):
    """Blocks of one output, of several, outputs split in two, outputs without a pair and pairs that repeat."""
    monkeypatch.setattr(limits, "eigenvectors", budget)
    x, values, vectors = doubles((9, 4), (6, 3), (6, 3, 4))
    t, k = torch.randint(9, (N,)), torch.randint(5, (N,))
    k[: N // 2] = 2
    dense = bo.eigen_form(x, values, vectors, reduce=reduce)
    close(bo.eigen_form(x, values, vectors, pairs=(t, k), reduce=reduce), dense[t, k])


@pytest.mark.parametrize("reduce", SHAPES)
@pytest.mark.parametrize("pairs", [None, (torch.tensor([0, 1, 1, 0, 1]), torch.tensor([3, 0, 3, 3, 3]))])
@pytest.mark.parametrize("budget", [8, 1 << 20])
def test_eigen_form_gradients(pairs, budget, reduce, monkeypatch):
    monkeypatch.setattr(limits, "block", budget)
    monkeypatch.setattr(limits, "eigenvectors", budget)
    tensors = doubles((2, 3), (4, 2), (4, 2, 3), grad=True)

    def f(*tensors):
        return bo.eigen_form(*tensors, pairs=pairs, reduce=reduce)

    assert torch.autograd.gradcheck(f, tensors)
    assert torch.autograd.gradgradcheck(f, tensors)


def test_low_precision_is_summed_wide():
    x, q = randn(30, 8, dtype=torch.bfloat16), randn(3, 8, 8, dtype=torch.bfloat16)
    values, vectors = randn(3, 5, dtype=torch.bfloat16), randn(3, 5, 8, dtype=torch.bfloat16)
    w, v, p = randn(9, 8, dtype=torch.bfloat16), randn(9, 8, dtype=torch.bfloat16), randn(4, 9, dtype=torch.bfloat16)
    pairs = torch.arange(30), torch.arange(30) % 3
    for f, tensors in (
        (bo.quadratic_form, (x, q)),
        (bo.eigen_form, (x, values, vectors)),
        (lambda *t: bo.eigen_form(*t, pairs=pairs), (x, values, vectors)),
        (bo.neuron_gram, (w, v)),
        (bo.layer_inner, (w, v, p, w, v, p)),
    ):
        got, gold = f(*tensors), f(*(t.double() for t in tensors))
        assert got.dtype == torch.bfloat16
        assert (got - gold).abs().max() <= torch.finfo(torch.bfloat16).eps * gold.abs().max()


def test_backward_saves_no_large_intermediate():
    """[tokens, K, r] activations are computed again, not kept: what autograd saves is the arguments."""
    x, values, vectors = doubles((50, 4), (20, 10), (20, 10, 4), grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        bo.eigen_form(x, values, vectors)
    assert max(saved) <= vectors.numel() < 50 * 20 * 10


def test_registered_ops():
    x, values, vectors = doubles((9, 4), (6, 3), (6, 3, 4), grad=True)
    t, k = torch.randint(9, (5,)), torch.randint(6, (5,))
    ops = torch.ops.bilinear_ops
    torch.library.opcheck(ops.eigen_pairs.default, (x, values, vectors, t, k, "cumsum"))
    args = [a.detach() for a in (x, values, vectors)]
    (dout,) = doubles((5,))
    for need in ([True, False, True], [False, True, False]):
        torch.library.opcheck(ops.eigen_pairs_backward.default, (dout, *args, t, k, "sum", need))


def test_compiles_whole():
    x, values, vectors = doubles((9, 4), (6, 3), (6, 3, 4), grad=True)
    w, v, p = doubles((5, 4), (5, 4), (2, 5))
    pairs = torch.tensor([0, 8, 8]), torch.tensor([5, 5, 0])

    def everything(x, values, vectors):
        y = bo.eigen_form(x, values, vectors).sum() + bo.eigen_form(x, values, vectors, pairs=pairs).sum()
        y = y + bo.quadratic_form(x, bo.interaction_matrices(w, v, p, layout="packed")).sum()
        return y + bo.neuron_gram(w, v).sum() * bo.layer_inner(w, v, p, w, v, p)

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    found, expected = compiled(x, values, vectors), everything(x, values, vectors)
    close(found, expected)
    tensors = (x, values, vectors)
    for a, b in zip(torch.autograd.grad(found, tensors), torch.autograd.grad(expected, tensors), strict=True):
        close(a, b)


def test_transforms_use_the_reference():
    x, values, vectors = doubles((9, 4), (6, 3), (6, 3, 4))
    pairs = torch.tensor([0, 8, 8]), torch.tensor([5, 5, 0])
    w, v, p = doubles((5, 4), (5, 4), (2, 5))
    for f, argument in (
        (lambda x: bo.eigen_form(x, values, vectors), x),
        (lambda x: bo.eigen_form(x, values, vectors, pairs=pairs), x),
        (lambda w: bo.neuron_gram(w, v), w),
        (lambda w: bo.layer_inner(w, v, p, w, v, p), w),
        (lambda x: bo.quadratic_form(x, vectors[:, :, :3]), x[:, :3]),
    ):
        direction = torch.randn_like(argument)
        tangent = torch.func.jvp(f, (argument,), (direction,))[1]
        expected = torch.autograd.functional.jvp(f, argument, direction)[1]
        torch.testing.assert_close(tangent, expected)


def test_blocks_cover():
    assert list(blockwise.blocks(7, 2, 6)) == [(0, 3), (3, 6), (6, 7)]
    assert list(blockwise.blocks(2, 100, 6)) == [(0, 1), (1, 2)] and list(blockwise.blocks(0, 1)) == []


def pairs_of(t, k):
    return lambda x, values, vectors: bo.eigen_form(x, values, vectors, pairs=(torch.tensor(t), torch.tensor(k)))


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "reduce must be one of", lambda *t: bo.eigen_form(*t, reduce="mean")),
        (RuntimeError, r"vectors must have shape \[K=6, r=3, d=4\]", lambda x, a, b: bo.eigen_form(x, a, b[:5])),
        (RuntimeError, r"values must", lambda x, a, b: bo.eigen_form(x, a[0], b)),
        (IndexError, "t must be at least 0 and below 9", pairs_of([9], [0])),
        (IndexError, "k must be at least 0 and below 6", pairs_of([0], [6])),
        (RuntimeError, r"t must have shape \[2\]", pairs_of([0], [1, 1])),
        (TypeError, "k must be an int64 tensor", pairs_of([0], [1.0])),
        (RuntimeError, r"x must have shape \[M, d\]", lambda x, a, b: pairs_of([0], [0])(x[0], a, b)),
        (RuntimeError, r"q must have shape \[K, 10\] for d=4", lambda x, a, b: bo.quadratic_form(x, a)),
        (RuntimeError, r"q must have shape", lambda x, a, b: bo.quadratic_form(x, b)),
        (RuntimeError, r"v must have shape \[h=9, d=4\]", lambda x, a, b: bo.neuron_gram(x, x[:5])),
        (TypeError, "w2 must be given with v2", lambda x, a, b: bo.neuron_gram(x, x, None, x)),
        (RuntimeError, r"p2 must have shape \[o=4, h2=9\]", lambda x, a, b: bo.layer_inner(x, x, x.t(), x, x, x)),
    ],
)
def test_errors(error, message, call):
    with pytest.raises(error, match=message):
        call(*doubles((9, 4), (6, 3), (6, 3, 4)))
