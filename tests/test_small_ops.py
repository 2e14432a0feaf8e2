"""Stochastic steps and rankings of small layers on CPU take short ways: results, errors and memory are alike."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bilinear_ops as bo
from bench.harness.timing import peak_memory
from bilinear_ops.composite.interaction import ranking
from bilinear_ops.composite.limits import limits
from bilinear_ops.testing import randn

D, H, OUT = 4, 6, 3


def stochastic(sampling="continuous", samples=1, dtype=torch.float32, **options):
    """y and the gradients of a stochastic step of 7 tokens in sequences, whose gates repeat."""
    torch.manual_seed(1)
    drawn = randn(3, 7, D), randn(D, 8), randn(8, OUT), torch.rand(7, 8), randn(OUT)
    x, read, write, gates, bias = leaves = tuple(t.to(dtype).requires_grad_() for t in drawn)
    y = bo.stochastic_rank1_linear(
        x, read, write, gates, bias, samples=samples, seed=3, sampling=sampling, **options
    )  # fmt: skip
    return y, *torch.autograd.grad(y, leaves, torch.ones_like(y).cumsum(-1), allow_unused=True)


@pytest.mark.parametrize("samples", (1, 3))
@pytest.mark.parametrize("sampling", ("continuous", "binomial"))
@pytest.mark.parametrize(
    "options",
    (
        {},
        {"weight": randn(OUT, D).double(), "delta": "uniform"},
        {"weight": randn(OUT, D).double(), "routing": torch.rand(3, 7) < 0.5},
        {"acts": randn(3, 7, 8).double(), "stream": 2},
        {"row_numbers": torch.arange(21).view(3, 7).flip(0), "column_numbers": torch.arange(8).flip(0)},
    ),
    ids=("masks", "delta", "routing", "acts", "numbers"),
)
def test_masks_kept_or_drawn_again(options, sampling, samples, monkeypatch):
    """A small step keeps its masks, a larger one draws them twice: the same masks, and the same gradients.

    In float64, where sums that cancel say no less of the masks.
    """
    found, calls, op = [], [], bo.rank1.masked.rank1_op
    monkeypatch.setattr(bo.rank1.masked, "rank1_op", lambda *args: calls.append(1) or op(*args))
    for bound in (21 * 8 * samples, 21 * 8 * samples - 1):
        monkeypatch.setattr(limits, "kept_masks", bound)
        found.append(stochastic(sampling, samples, torch.float64, **options))
    assert len(calls) == 1
    for small, large in zip(*found, strict=True):
        torch.testing.assert_close(small, large, rtol=1e-12, atol=1e-12)


def test_a_kept_mask_is_the_mask_drawn(monkeypatch):
    """Bitwise what `stochastic_mask` returns, read through an identity."""
    monkeypatch.setattr(limits, "kept_masks", math.inf)
    gates, one = torch.rand(9, 6), torch.eye(6)
    for sampling in ("continuous", "binomial"):
        options = {"samples": 2, "seed": 5, "stream": 1, "sampling": sampling}
        masks = bo.stochastic_rank1_linear(torch.ones(9, 6), one, one, gates, **options)
        assert torch.equal(masks, bo.stochastic_mask(gates, **options))


def masked(**changes):
    """A stochastic layer of full gates under masks alone, whose arguments are checked at once where it is small."""
    torch.manual_seed(1)
    drawn = {"x": randn(3, 7, D), "read": randn(D, 8), "write": randn(8, OUT), "gates": torch.rand(3, 7, 8)}
    return bo.stochastic_rank1_linear(**{**drawn, "bias": randn(OUT), "samples": 2, "seed": 3, **changes})


@pytest.mark.parametrize("sampling", ("continuous", "binomial"))
@pytest.mark.parametrize("samples", (1, 2))
@pytest.mark.parametrize("tokens", ((7,), (3, 7)))
def test_masks_checked_at_once(tokens, samples, sampling, monkeypatch):
    """The same numbers as on the way through the op's checks, without a step of it."""
    given = {"x": randn(*tokens, D), "gates": torch.rand(*tokens, 8), "samples": samples, "sampling": sampling}
    found, checks, check = [], [], bo.rank1.masked.check
    monkeypatch.setattr(bo.rank1.masked, "check", lambda **arguments: checks.append(1) or check(**arguments))
    most = samples * math.prod(tokens) * 8
    for bound in (most, most - 1):
        monkeypatch.setattr(limits, "kept_masks", bound)
        found.append(masked(**given))
        assert len(checks) == (bound < most)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("bound", (0, -1), ids=("eager", "op"))
def test_no_subcomponents_leave_the_bias(bound, monkeypatch):
    monkeypatch.setattr(limits, "kept_masks", bound)
    bias = randn(OUT)
    y = masked(read=randn(D, 0), write=randn(0, OUT), gates=torch.rand(3, 7, 0), bias=bias)
    assert torch.equal(y, bias.expand(2, 3, 7, OUT))


@pytest.mark.parametrize(
    "changes",
    (
        {"read": randn(D + 1, 8)}, {"read": randn(D)}, {"write": randn(7, OUT)}, {"write": randn(8)},
        {"gates": torch.rand(3, 7, 9)}, {"gates": torch.rand(2, 3, 7, 8)}, {"gates": torch.ones(3, 7, 8).long()},
        {"gates": None}, {"gates": torch.rand(3, 7, 8).to_sparse()}, {"bias": randn(1)}, {"bias": randn(OUT, 1)},
        {"bias": randn(OUT, dtype=torch.float64)}, {"write": randn(8, OUT, dtype=torch.float64)},
        {"x": torch.ones(3, 7, D).long(), "read": torch.ones(D, 8).long()}, {"x": torch.tensor(1.0)},
        {"write": randn(8, OUT).to("meta")}, {"seed": None}, {"seed": 1.0}, {"seed": True},
        {"stream": 1.5}, {"samples": 0}, {"samples": True}, {"sampling": "none"}, {"impl": "none"},
        {"x": randn(3, 7, D).to_sparse()},
    ),
    ids=lambda c: f"{next(iter(c))} {getattr(next(iter(c.values())), 'shape', next(iter(c.values())))}",
)  # fmt: skip
def test_the_same_errors_under_masks(changes, monkeypatch):
    found = []
    for bound in (math.inf, -1):
        monkeypatch.setattr(limits, "kept_masks", bound)
        with pytest.raises((RuntimeError, TypeError, ValueError)) as caught:
            masked(**changes)
        found.append((caught.type, str(caught.value)))
    assert found[0] == found[1]


@pytest.mark.parametrize("given", (False, True), ids=("unseen", "counted"))
def test_flops_of_a_small_stochastic_step(given, monkeypatch):
    def run():
        with FlopCounterMode(display=False) as counter:
            stochastic(weight=randn(OUT, D), delta="uniform" if given else None)
        return counter.get_total_flops()

    counts = []
    for bound in (math.inf, -1):
        monkeypatch.setattr(limits, "kept_masks", bound)
        counts.append(run())
    assert counts[0] == counts[1] > 0


SCORES_AND_SCOPES = [(s, g) for s in ("cross", "self", "pair", "entry") for g in ("output", "global")]


@pytest.mark.parametrize(("score", "scope"), SCORES_AND_SCOPES)
@pytest.mark.parametrize("basis", (None, randn(D, 7)), ids=("inputs", "features"))
@pytest.mark.parametrize("weighted", (None, "matrix", "function"))
@pytest.mark.parametrize("factors", (False, True))
@pytest.mark.parametrize("held", (1 << 18, 1), ids=("whole", "one by one"))
def test_topk_at_once(held, factors, weighted, basis, score, scope, monkeypatch):
    monkeypatch.setattr(limits, "sorted", held)
    w, v, c, u = randn(H, D), randn(H, D), randn(5, H), randn(6, 5)
    features, n = D if basis is None else 7, 3 if scope == "output" else 9
    scale = torch.rand(6 if factors else 5, features, features)
    weight = {None: None, "matrix": scale, "function": lambda k: scale[k]}[weighted]
    streamed, merge = [], ranking._Best.merge
    monkeypatch.setattr(ranking._Best, "merge", lambda self: streamed.append(1) or merge(self))
    found = []
    for bound in (1 << 20, -1):
        monkeypatch.setattr(limits, "at_once", bound)
        directions = bo.Directions(u, c) if factors else c
        found.append(bo.interaction_topk(w, v, directions, n, score=score, scope=scope, weight=weight, basis=basis))
        assert bool(streamed) == (bound < 0)
    torch.testing.assert_close(found[0].values, found[1].values, rtol=1e-4, atol=1e-5)
    for one, other in zip(found[0][1:], found[1][1:], strict=True):
        assert torch.equal(one, other) and one.is_contiguous()


def test_ties_and_nan_are_ranked_by_the_stream(monkeypatch):
    """Equal ranks are in order of (k, i, j); a sort alone leaves them in any."""
    monkeypatch.setattr(limits, "at_once", 1 << 20)
    w, v, c = torch.ones(3, 5), torch.ones(3, 5), torch.ones(2, 3)
    top = bo.interaction_topk(w, v, c, 4, scope="global")
    assert top.i.tolist() == [0, 0, 0, 0] and top.j.tolist() == [1, 2, 3, 4] and top.k.tolist() == [0] * 4
    w[0, 2] = torch.nan
    top, expected = (m.interaction_topk(w, v, c, 4) for m in (bo, bo.reference))
    assert torch.equal(top.i, expected.i) and torch.equal(top.j, expected.j)


@pytest.mark.parametrize("at_once", (1 << 20, -1))
@pytest.mark.parametrize("scope", ("output", "global"))
@pytest.mark.parametrize(("outputs", "d", "h"), ((4, 32, 64), (32, 32, 128)))
def test_topk_takes_no_more_memory_than_the_formula(outputs, d, h, scope, at_once, monkeypatch):
    monkeypatch.setattr(limits, "at_once", at_once)
    w, v, c = randn(h, d), randn(h, d), randn(outputs, h)
    first = 0 if scope == "global" else 1

    def formula():
        q = torch.einsum("kh,hi,hj->kij", c, w, v)
        q = (q + q.mT).triu(1).flatten(first)
        best = q.abs().topk(10).indices
        return (q.gather(-1, best),)

    ours = peak_memory(lambda: tuple(bo.interaction_topk(w, v, c, 10, scope=scope)), w.device)
    assert 0 < ours <= peak_memory(formula, w.device)


@pytest.mark.parametrize(("outputs", "d", "h", "features", "most"), ((10, 512, 16, 2048, 1), (16, 128, 256, 256, 1.25)))
def test_a_ranking_over_features_takes_about_the_memory_of_a_loop(outputs, d, h, features, most, monkeypatch):
    """Matrices of a few outputs are held, beside a tile of scores or their ranks, not those of all.

    A small ranking takes a fifth more than a loop over outputs; with equal ranks it is streamed and takes far more.
    """
    monkeypatch.setattr(limits, "at_once", 1 << 20)
    w, v, c, basis = randn(h, d), randn(h, d), randn(outputs, h), randn(d, features)

    def formula():
        q = (w.t() * c[0]) @ v  # the memory of one output is that of the loop
        q = (basis.t() @ ((q + q.t()) @ basis)).tril(-1).flatten()
        return (q[q.abs().topk(100).indices],)

    ours = peak_memory(lambda: tuple(bo.interaction_topk(w, v, c, 100, scope="global", basis=basis)), w.device)
    assert 0 < ours <= most * peak_memory(formula, w.device)
