"""The strongest interactions and moments against matrices formed in full."""

import pytest
import torch
from interaction_inputs import SIZES, close, in_full, layer

import bilinear_ops as bo
from bilinear_ops.composite.limits import limits
from bilinear_ops.interaction import ranking
from bilinear_ops.results import SCORES
from bilinear_ops.testing import randn

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # in functorch


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
    monkeypatch.setattr(limits, "scores", tile)
    monkeypatch.setattr(limits, "matrices", tile)
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
    monkeypatch.setattr(limits, "product", product)
    monkeypatch.setattr(limits, "khatri_rao", 16 * 16 * 3)
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


@pytest.mark.parametrize("tile", [1 << 21, 40])
@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_moments(size, factors, tile, monkeypatch):
    monkeypatch.setattr(limits, "scores", tile)
    w, v, c, basis = layer(*size, factors=factors)
    entries = bo.pack_symmetric(in_full(w, v, c, basis))
    moments = bo.interaction_moments(w, v, c, basis=basis)
    for power, got in zip((1, 2, 3, 4), moments, strict=False):
        scale = entries.abs().pow(power).sum(1)
        assert ((got - entries.pow(power).sum(1)).abs() <= 1e-12 * scale).all()
    close(moments.max_abs, entries.abs().amax(1))


@pytest.mark.parametrize("module", (bo, bo.reference), ids=("ours", "reference"))
def test_the_only_pair_of_each_output_is_ranked_across_them(module):
    w, v, c = (randn(*shape) for shape in ((3, 1), (3, 1), (5, 3)))
    values = bo.reference.interaction_matrices(w, v, c)[:, 0, 0]
    order = values.abs().argsort(descending=True)
    found = module.interaction_topk(w, v, c, 5, score="self", scope="global")
    assert found.k.tolist() == order.tolist() and not found.i.any() and not found.j.any()
    torch.testing.assert_close(found.values, values[order])


@pytest.mark.parametrize("kind", ("each output's", "one for all", "function"))
def test_candidates_of_a_shard_carry_what_ranks_them(kind):
    """The values times the weights of their own outputs, by which the shards' candidates are merged."""
    w, v, c = (randn(*shape) for shape in ((3, 4), (3, 4), (5, 3)))
    weights = torch.rand(5, 4, 4)
    given = {"each output's": weights, "one for all": weights[0], "function": lambda k: weights[k]}[kind]
    found = ranking._interaction_topk_candidates(w, v, c, 20, "cross", given, None, "torch")
    assert len(found.k.unique()) > 1
    scale = weights[0, found.i, found.j] if kind == "one for all" else weights[found.k, found.i, found.j]
    torch.testing.assert_close(found.rank, found.values.abs() * scale)


@pytest.mark.parametrize("factors", (False, True), ids=("coefficients", "directions"))
def test_the_candidates_of_all_shards_are_ranked(factors, monkeypatch):
    """Two shards stand for the group, the better candidates in the second."""
    monkeypatch.setattr(ranking, "gathered", lambda found: type(found)(*(t.view(2, -1).flip(0) for t in found)))
    w, v, u, p = (randn(*shape) for shape in ((6, 9), (6, 9), (5, 3), (3, 6)))
    c = bo.Directions(u, p) if factors else u @ p
    found = ranking._merged(w, v, c, 8, "cross", None, None, "torch")
    for one, other in zip(found, bo.interaction_topk(w, v, c, 8, scope="global"), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("n", (1, 2, 3))
@pytest.mark.parametrize("scope", ("output", "global"))
def test_a_few_over_many_merges(n, scope, small_limits):
    """What was kept bounds what is still offered by its last, never by another."""
    w, v, c = (randn(*shape) for shape in ((6, 9), (6, 9), (4, 6)))
    found, expected = (module.interaction_topk(w, v, c, n, scope=scope) for module in (bo, bo.reference))
    torch.testing.assert_close(found.values, expected.values)
    assert torch.equal(found.i, expected.i) and torch.equal(found.j, expected.j)


@pytest.mark.parametrize("shape", ((3, 9, 9), (5, 9, 9), (4, 8, 9), (8, 9)))
def test_weights_of_other_sizes_are_refused(shape):
    w, v, c = randn(6, 9), randn(6, 9), randn(4, 6)
    with pytest.raises(RuntimeError, match=r"weight must have shape \[9, 9\] or \[4, 9, 9\]"):
        bo.interaction_topk(w, v, c, 2, weight=torch.rand(shape))
