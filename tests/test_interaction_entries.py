"""Diagonals, entries, the strongest and the active interactions and moments: each equals what the matrices give."""

import pytest
import torch
from interaction_inputs import SIZES, close, in_full, layer

import bilinear_ops as bo
from bilinear_ops.composite.limits import limits
from bilinear_ops.testing import assert_no_worse, randn

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # in functorch


@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_diagonal(size, factors):
    w, v, c, basis = layer(*size, factors=factors)
    close(bo.interaction_diagonal(w, v, c, basis=basis), in_full(w, v, c, basis).diagonal(dim1=1, dim2=2))


@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("n", [0, 1, 40])
@pytest.mark.parametrize("size", SIZES)
def test_entries(size, n, factors):
    w, v, c, basis = layer(*size, factors=factors)
    q = in_full(w, v, c, basis)
    k, i, j = (torch.randint(limit, (n,)) for limit in q.shape)
    close(bo.interaction_entries(w, v, c, k, i, j, basis=basis), q[k, i, j])


@pytest.mark.parametrize("budget", [1, 1 << 21])
@pytest.mark.parametrize("F", [None, 3, 30])
def test_entries_gradients(F, budget, monkeypatch):
    """Whole bases and gathered ones, in blocks and at once, repeated indices included."""
    monkeypatch.setattr(limits, "block", budget)
    w, v, c, basis = layer(2, 3, 4, F)
    k, i, j = torch.tensor([0, 1, 1, 1]), torch.tensor([2, 0, 0, 1]), torch.tensor([1, 2, 2, 1])
    tensors = tuple(t.requires_grad_() for t in (w, v, c) + (() if basis is None else (basis,)))

    def f(w, v, c, basis=None):
        return bo.interaction_entries(w, v, c, k, i, j, basis=basis)

    assert torch.autograd.gradcheck(f, tensors)
    assert torch.autograd.gradgradcheck(f, tensors)


def test_diagonal_gradients():
    w, v, (u, p), basis = layer(3, 2, 4, 5, factors=True)
    tensors = tuple(t.requires_grad_() for t in (w, v, u, p, basis))

    def f(w, v, u, p, basis):
        return bo.interaction_diagonal(w, v, bo.Directions(u, p), basis=basis)

    assert torch.autograd.gradcheck(f, tensors)
    assert torch.autograd.gradgradcheck(f, tensors)


@pytest.mark.parametrize("F", [None, 3, 70])
@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize(("T", "a", "b"), [(1, 1, 1), (6, 4, 3), (0, 2, 2), (3, 0, 2), (3, 2, 0)])
def test_active(T, a, b, factors, F):
    w, v, c, basis = layer(5, 4, 6, F or 8, factors=factors)
    basis = torch.eye(4, dtype=torch.float64) if F is None else basis
    acts = randn(T, a, dtype=torch.float64)
    inputs, outputs = torch.randint(basis.shape[1], (T, a)), torch.randint(5, (T, b))
    got = bo.active_interactions(w, v, c, basis, inputs, acts, outputs)
    assert all(t.shape == (T, b, a * (a + 1) // 2) for t in got)
    assert (got.i <= got.j).all()
    x = (basis.t()[inputs] * acts.unsqueeze(2)).sum(1)
    q = bo.interaction_matrices(w, v, c)
    close(got.values.sum(2), bo.quadratic_form(x, q).gather(1, outputs))
    if T * a * b == 0:
        return
    p, s = torch.triu_indices(a, a)
    scale = torch.where(p == s, 1, 2) * acts[:, p] * acts[:, s]
    close(got.values, in_full(w, v, c, basis)[got.k, got.i, got.j] * scale.unsqueeze(1))
    assert torch.equal(got.token[:, 0, 0], torch.arange(T))


@pytest.mark.parametrize("F", [3, 50])
def test_active_gradients(F):
    w, v, c, basis = layer(3, 2, 3, F)
    inputs, outputs = torch.randint(F, (2, 3)), torch.randint(3, (2, 2))
    tensors = tuple(t.requires_grad_() for t in (w, v, c, basis, randn(2, 3, dtype=torch.float64)))

    def f(w, v, c, basis, acts):
        return bo.active_interactions(w, v, c, basis, inputs, acts, outputs).values

    assert torch.autograd.gradcheck(f, tensors)
    assert torch.autograd.gradgradcheck(f, tensors)


def test_half_precision_is_summed_wide():
    w, v, c, _ = layer(3, 5, 200, dtype=torch.bfloat16)
    k, i, j = torch.tensor([0, 2]), torch.tensor([1, 4]), torch.tensor([3, 4])
    wide = [t.double() for t in (w, v, c)]
    for f in (bo.interaction_diagonal, lambda *t: bo.interaction_entries(*t, k, i, j)):
        gold = f(*wide)
        assert (f(w, v, c) - gold).abs().max() <= torch.finfo(torch.bfloat16).eps * gold.abs().max()
    assert bo.interaction_moments(w, v, c).sum.dtype == torch.float32
    eager = bo.reference.interaction_diagonal(*(t.float() for t in (w, v, c)))
    assert_no_worse(bo.interaction_diagonal(w.float(), v.float(), c.float()), eager, wide[2] @ (wide[0] * wide[1]))


def test_registered_ops():
    w, v, c, basis = layer(4, 3, 5, 6)
    ops = torch.ops.bilinear_ops
    for scope, n in (("global", 3), ("output", 2)):
        args = (w, v, c, None, basis, None, n, "pair", scope, "torch")
        torch.library.opcheck(ops.interaction_topk.default, args)
    torch.library.opcheck(ops.interaction_moments.default, (w, v, c, None, basis, "torch"))


def test_compiles_whole():
    w, v, c, basis = layer(4, 3, 5, 6)
    k = torch.tensor([0, 3, 1])
    acts = randn(2, 3, dtype=torch.float64)

    def everything(w, v, c, basis):
        total = bo.interaction_topk(w, v, c, 3, basis=basis).values.sum() + bo.interaction_moments(w, v, c).sum.sum()
        total = total + bo.interaction_diagonal(w, v, c, basis=basis).sum()
        total = total + bo.interaction_entries(w, v, c, k, k, k, basis=basis).sum()
        indices = torch.arange(6).view(2, 3)
        return total + bo.active_interactions(w, v, c, basis, indices, acts, indices[:, :1]).values.sum()

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    close(compiled(w, v, c, basis), everything(w, v, c, basis))


def test_transforms_use_the_reference():
    w, v, c, basis = layer(4, 3, 5, 6)
    k = torch.tensor([0, 3, 1])
    for f in (
        lambda c: bo.interaction_diagonal(w, v, c, basis=basis),
        lambda c: bo.interaction_entries(w, v, c, k, k, k, basis=basis),
        lambda c: bo.interaction_topk(w, v, c, 2, basis=basis).values,
        lambda c: bo.active_interactions(w, v, c, basis, k.view(1, 3), c[:1, :3], k.view(1, 3)).values * c[0, 0],
    ):
        jacobian = torch.func.jacrev(f)(c)
        expected = torch.autograd.functional.jacobian(f, c)
        torch.testing.assert_close(jacobian, expected)


def entries(w, v, c, **changed):
    index = {"k": [3], "i": [2], "j": [2]} | changed
    return bo.interaction_entries(w, v, c, *(torch.tensor(index[name]) for name in "kij"))


def active(w, v, c, inputs=((0, 1),), outputs=((1,),)):
    acts = torch.ones(1, 2, dtype=torch.float64)
    return bo.active_interactions(w, v, c, torch.eye(3).double(), torch.tensor(inputs), acts, torch.tensor(outputs))


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (IndexError, "k must be at least 0 and below 4", lambda *t: entries(*t, k=[4])),
        (IndexError, "k must be at least 0 and below 4", lambda *t: entries(*t, k=[-1])),
        (IndexError, "i must be at least 0 and below 3", lambda *t: entries(*t, i=[3])),
        (IndexError, "j must be at least 0 and below 3", lambda *t: entries(*t, j=[7])),
        (RuntimeError, r"i must have shape \[1\]", lambda *t: entries(*t, i=[1, 1])),
        (RuntimeError, r"k must have shape \[any\], got \[\]", lambda *t: entries(*t, k=1)),
        (TypeError, "k must be an int64 tensor, got torch.float32", lambda *t: entries(*t, k=[1.0])),
        (TypeError, "k must be an int64 tensor, got list", lambda *t: bo.interaction_entries(*t, [1], [1], [1])),
        (IndexError, "in_indices must be at least 0 and below 3", lambda *t: active(*t, inputs=((0, 3),))),
        (IndexError, "out_indices must be at least 0 and below 4", lambda *t: active(*t, outputs=((4,),))),
        (RuntimeError, r"in_indices must have shape \[1, 2\]", lambda *t: active(*t, inputs=((0,),))),
        (ValueError, "number of scored pairs, 3, got 4", lambda *t: bo.interaction_topk(*t, 4)),
        (ValueError, "number of scored pairs, 12, got 13", lambda *t: bo.interaction_topk(*t, 13, scope="global")),
        (ValueError, "number of scored pairs, 6, got -1", lambda *t: bo.interaction_topk(*t, -1, score="pair")),
        (ValueError, "score must be one of", lambda *t: bo.interaction_topk(*t, 1, score="best")),
        (ValueError, "scope must be one of", lambda *t: bo.interaction_topk(*t, 1, scope="all")),
        (RuntimeError, "weight must have shape", lambda *t: bo.interaction_topk(*t, 1, weight=t[0])),
        (RuntimeError, r"basis must have shape \[d=3, F\]", lambda *t: bo.interaction_topk(*t, 1, basis=t[0])),
        (RuntimeError, r"c must have shape \[K, h=5\]", lambda w, v, c: bo.interaction_moments(w, v, c[:, 1:])),
        (RuntimeError, r"v must have shape \[h=5, d=3\]", lambda w, v, c: bo.interaction_diagonal(w, v.t(), c)),
    ],
)
def test_errors(error, message, call):
    with pytest.raises(error, match=message):
        call(*layer(4, 3, 5)[:3])


@pytest.mark.parametrize("features", (0, 1))
def test_diagonal_of_few_features(features):
    w, v, c, basis = randn(4, 3), randn(4, 3), randn(5, 4), randn(3, features)
    found = bo.interaction_diagonal(w, v, c, basis=basis)
    assert found.shape == (5, features)
    torch.testing.assert_close(found, bo.reference.interaction_diagonal(w, v, c, basis=basis))
