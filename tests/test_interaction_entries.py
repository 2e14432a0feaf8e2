"""Diagonals, entries, the strongest and the active interactions and moments: each equals what the matrices give."""

import pytest
import torch

import bilinear_ops as bo
from bilinear_ops.composite import interaction, ranking
from bilinear_ops.reference.interaction import SCORES
from bilinear_ops.testing import assert_no_worse, randn

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # in functorch

SIZES = [(1, 1, 1, None), (1, 1, 1, 3), (3, 5, 7, None), (3, 5, 7, 4), (2, 3, 17, 12), (60, 4, 3, 6), (7, 17, 2, 65)]


def layer(K, d, h, F=None, dtype=torch.float64, factors=False):
    """w, v, coefficients and a basis."""
    c = bo.Directions(randn(K, 2, dtype=dtype), randn(2, h, dtype=dtype)) if factors else randn(K, h, dtype=dtype)
    basis = None if F is None else randn(d, F, dtype=dtype)
    return randn(h, d, dtype=dtype), randn(h, d, dtype=dtype), c, basis


def in_full(w, v, c, basis):
    """Q in the feature basis, from the third-order tensor [h, F, F]."""
    if basis is not None:
        w, v = w @ basis, v @ basis
    b = torch.einsum("hi,hj->hij", w, v)
    return torch.einsum("kh,hij->kij", c.u @ c.p if isinstance(c, bo.Directions) else c, (b + b.mT) / 2)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


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
    monkeypatch.setattr("bilinear_ops.composite.entries.BLOCK", budget)
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


def in_order(q, score, weight):
    """Every scored entry as (-rank, k, i, j, value), sorted: the definition of the ranking."""
    found = []
    for k, matrix in enumerate(q.tolist()):
        for i, row in enumerate(matrix):
            for j, value in enumerate(row[i:], i):
                if score == "self" and i != j or score == "cross" and i == j:
                    continue
                value *= 2 if i != j and score in ("cross", "pair") else 1
                scale = 1 if weight is None else weight[k, i, j].item() if weight.dim() == 3 else weight[i, j].item()
                found.append((-abs(value * scale), k, i, j, value))
    return sorted(found)


@pytest.mark.parametrize("tile", [1 << 21, 40])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("size", SIZES[:-1])
def test_topk(size, score, tile, monkeypatch):
    """Small integers make many ties; a small tile makes many tiles."""
    monkeypatch.setattr(ranking, "TILE", tile)
    monkeypatch.setattr(ranking, "MATRICES", tile)
    w, v, c, basis = (t if t is None else t.round() for t in layer(*size))
    q = in_full(w, v, c, basis)
    K, F = q.shape[:2]
    for weight in (None, torch.randint(4, (F, F)).double(), torch.randint(4, (K, F, F)).double()):
        ranked = in_order(q, score, weight)
        for n in {0, min(3, len(ranked)), len(ranked)}:
            top = bo.interaction_topk(w, v, c, n, score=score, scope="global", weight=weight, basis=basis)
            assert list(zip(*(t.tolist() for t in top[1:]), strict=True)) == [r[1:4] for r in ranked[:n]]
            close(top.values, torch.tensor([r[4] for r in ranked[:n]], dtype=torch.float64))
        for n in {0, min(2, len(ranked) // K), len(ranked) // K}:
            top = bo.interaction_topk(w, v, c, n, score=score, weight=weight, basis=basis)
            assert top.values.shape == (K, n)
            for k in range(K):
                expected = [r for r in ranked if r[1] == k][:n]
                assert list(zip(*(t[k].tolist() for t in top[1:]), strict=True)) == [r[1:4] for r in expected]
                close(top.values[k], torch.tensor([r[4] for r in expected], dtype=torch.float64))


@pytest.mark.parametrize("product", [700, 1 << 22])
@pytest.mark.parametrize("scope", ["output", "global"])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("factors", [False, True])
def test_topk_over_shared_tiles_of_pairs(factors, score, scope, product, monkeypatch):
    """Without a basis many outputs are ranked tile by tile of pairs, several tiles and groups of outputs here."""
    monkeypatch.setattr(ranking, "PRODUCT", product)
    monkeypatch.setattr(interaction, "TILE", 16 * 16 * 3)
    w, v, c, _ = layer(53, 37, 3, factors=factors)
    for weight in (None, torch.rand(37, 37, dtype=torch.float64)):
        got = bo.interaction_topk(w, v, c, 5, score=score, scope=scope, weight=weight)
        expected = bo.reference.interaction_topk(w, v, c, 5, score=score, scope=scope, weight=weight)
        close(got.values, expected.values)
        for a, b in zip(got[1:], expected[1:], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("scope", ["output", "global"])
@pytest.mark.parametrize("score", SCORES)
def test_topk_of_a_function_weight_is_that_of_its_tensor(score, scope):
    w, v, c, basis = layer(5, 4, 6, 9, factors=True)
    weight = torch.rand(5, 9, 9, dtype=torch.float64)
    options = {"score": score, "scope": scope, "basis": basis}
    called = bo.interaction_topk(w, v, c, 4, weight=lambda k: weight[k], **options)
    for got, expected, defined in zip(
        called,
        bo.interaction_topk(w, v, c, 4, weight=weight, **options),
        bo.reference.interaction_topk(w, v, c, 4, weight=weight, **options),
        strict=True,
    ):
        assert torch.equal(got, expected)
        torch.testing.assert_close(got, defined)


def test_topk_finds_nan_and_infinity():
    w, v, c, _ = layer(3, 4, 5)
    w[0, 2], c[:2, 0] = torch.inf, 0  # 0 inf is NaN in all of row 2 of the first two outputs
    top = bo.interaction_topk(w, v, c, 3, scope="global")
    assert top.values.isnan().all() and (top.i.eq(2) | top.j.eq(2)).all() and top.k.tolist() == [0, 0, 0]


@pytest.mark.parametrize("scope", ["output", "global"])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("F", [None, 6])
def test_topk_values_carry_gradients(F, score, scope):
    w, v, c, basis = layer(2, 4, 3, F)
    tensors = tuple(t.requires_grad_() for t in (w, v, c) + (() if basis is None else (basis,)))

    def f(w, v, c, basis=None):
        return bo.interaction_topk(w, v, c, 3, score=score, scope=scope, basis=basis).values

    close(f(*tensors), f(*(t.detach() for t in tensors)))
    assert torch.autograd.gradcheck(f, tensors)
    found = torch.autograd.grad(f(*tensors).square().sum(), tensors)
    top = bo.reference.interaction_topk(*tensors[:3], 3, score=score, scope=scope, basis=basis)
    for got, expected in zip(found, torch.autograd.grad(top.values.square().sum(), tensors), strict=True):
        close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_topk_in_low_precision(dtype):
    w, v, c, basis = layer(20, 16, 24, 40, dtype)
    top = bo.interaction_topk(w, v, c, 10, basis=basis)
    q = in_full(*(t.double() for t in (w, v, c, basis)))
    gold = 2 * q[top.k, top.i, top.j]
    assert (top.values - gold).abs().max() <= max(2e-6, torch.finfo(dtype).eps) * gold.abs().max()
    best = bo.reference.interaction_topk(*(t.double() for t in (w, v, c)), 10, basis=basis.double()).values
    torch.testing.assert_close(gold.abs().sum(1), best.abs().sum(1))


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


@pytest.mark.parametrize("tile", [1 << 21, 40])
@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_moments(size, factors, tile, monkeypatch):
    monkeypatch.setattr(ranking, "TILE", tile)
    w, v, c, basis = layer(*size, factors=factors)
    entries = bo.pack_symmetric(in_full(w, v, c, basis))
    moments = bo.interaction_moments(w, v, c, basis=basis)
    for power, got in zip((1, 2, 3, 4), moments, strict=False):
        scale = entries.abs().pow(power).sum(1)
        assert ((got - entries.pow(power).sum(1)).abs() <= 1e-12 * scale).all()
    close(moments.max_abs, entries.abs().amax(1))


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
