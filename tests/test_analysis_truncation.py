"""Layers cut down to eigenvectors, and the curves and correlations that say what is left, against their definitions."""

import math

import pytest
import torch
from analysis_inputs import layer

import bilinear_ops as bo
from bilinear_ops.analysis import (
    interaction_eigh,
    truncate,
    truncation,
    truncation_correlation,
    truncation_curve,
)
from bilinear_ops.testing import randn


def cut_tensor(cut):
    """B of a quadratic layer, [o, d, d]."""
    q = torch.einsum("kr,kri,krj->kij", cut.values, cut.vectors, cut.vectors)
    return q if cut.outputs is None else torch.einsum("ok,kij->oij", cut.outputs, q)


@pytest.mark.parametrize("directions", [None, 5, 7])
@pytest.mark.parametrize("refit", [False, True])
def test_all_eigenvectors_are_the_layer(directions, refit):
    w, v, p = layer(8, 20, 5)
    x = randn(3, 11, 8, dtype=torch.float64)
    directions = None if directions is None else randn(directions, 5, dtype=torch.float64)
    cut = truncate(w, v, p, 8, directions=directions, refit=refit)
    torch.testing.assert_close(cut(x), bo.gated_mlp(x, w, v, p), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("directions", [None, 7])
@pytest.mark.parametrize("n", [1, 3])
def test_refit_is_the_nearest(n, directions):
    w, v, p = layer(8, 20, 5)
    directions = None if directions is None else randn(directions, 5, dtype=torch.float64)
    whole = bo.interaction_matrices(w, v, p)
    plain, fitted = (truncate(w, v, p, n, directions=directions, refit=refit) for refit in (False, True))
    squares = torch.einsum("ri,rj->rij", fitted.vectors[:, 0], fitted.vectors[:, 0]).flatten(1)
    nearest = torch.linalg.lstsq(squares.t(), whole.flatten(1).t()).solution.t()
    torch.testing.assert_close(cut_tensor(fitted).flatten(1), nearest @ squares, rtol=1e-8, atol=1e-8)
    assert (cut_tensor(fitted) - whole).norm() < 0.95 * (cut_tensor(plain) - whole).norm()


def test_the_bound_on_the_error_holds():
    w, v, p = layer(8, 20, 3)
    x = torch.nn.functional.normalize(randn(200, 8, dtype=torch.float64), dim=1)
    pairs = interaction_eigh(w, v, p, 3)
    error = (truncate(w, v, p, 3)(x) - bo.gated_mlp(x, w, v, p)).abs().amax(0)
    assert (error <= pairs.next_abs).all() and (error > 0.3 * pairs.next_abs).all()


def test_gradients_of_a_cut_layer():
    w, v, p = layer(4, 6, 2, grad=True)
    x = randn(5, 4, dtype=torch.float64)
    for refit in (False, True):
        assert torch.autograd.gradcheck(lambda w, v, p, r=refit: truncate(w, v, p, 1, refit=r)(x), (w, v, p))


def test_directions_must_span():
    w, v, p = layer(8, 20, 5)
    with pytest.raises(ValueError, match="directions must span the layer.s outputs"):
        truncate(w, v, p, 2, directions=randn(4, 5, dtype=torch.float64))
    assert truncate(w, v, p, 2, directions=randn(4, 5, dtype=torch.float64), refit=True).outputs.shape == (5, 8)
    with pytest.raises(RuntimeError, match=r"directions must have shape \[K, o=5\]"):
        truncate(w, v, p, 2, directions=randn(5, 4, dtype=torch.float64))


def pearson(a, b):
    a, b = a - a.mean(), b - b.mean()
    return (a * b).sum() / (a.norm() * b.norm())


@pytest.fixture(params=[1 << 21, 30])
def block(request, monkeypatch):
    """All tokens at once, and a few at a time."""
    made = truncation.blocks
    monkeypatch.setattr(truncation, "blocks", lambda total, per_item: made(total, per_item, request.param))


def forms(x, pairs, r):
    return torch.stack(
        [(x @ pairs.vectors[k, :r].t()).square() @ pairs.values[k, :r] for k in range(len(pairs.values))], 1
    )


def test_accuracies(block):
    w, v, p = layer(8, 20, 5)
    x, pairs = randn(50, 8, dtype=torch.float64), interaction_eigh(w, v, p)
    labels = bo.gated_mlp(x, w, v, p).argmax(1)
    curve = truncation_curve(x, pairs, labels)
    expected = [(forms(x, pairs, r).argmax(1) == labels).float().mean() for r in range(1, 9)]
    torch.testing.assert_close(curve, torch.stack(expected))
    assert curve[-1] == 1 and curve[0] < 1


@pytest.mark.parametrize("active_only", [False, True])
def test_correlations(active_only, block):
    w, v, p = layer(8, 20, 5)
    x, pairs = randn(50, 8, dtype=torch.float64), interaction_eigh(w, v, p, 4)
    target = bo.gated_mlp(x, w, v, p).clamp_min(0)
    corr, count = truncation_curve(x, pairs, target, active_only=active_only)
    for k in range(5):
        rows = target[:, k] != 0 if active_only else torch.ones(50, dtype=torch.bool)
        assert count[k] == rows.sum()
        for r in range(4):
            torch.testing.assert_close(corr[k, r], pearson(forms(x, pairs, r + 1)[rows, k], target[rows, k]))


def test_correlations_of_sparse_activations(block):
    w, v, p = layer(8, 20, 5)
    x, pairs = randn(50, 8, dtype=torch.float64), interaction_eigh(w, v, p, 4)
    indices = torch.stack([torch.randperm(4)[:2] for _ in range(50)])  # output 4 is never active
    acts = randn(50, 2, dtype=torch.float64)
    corr, count = truncation_correlation(x, pairs, indices, acts)
    assert count.sum() == 100 and count[4] == 0 and corr[4].isnan().all()
    for k in range(4):
        tokens, place = (indices == k).nonzero(as_tuple=True)
        for r in range(4):
            torch.testing.assert_close(corr[k, r], pearson(forms(x, pairs, r + 1)[tokens, k], acts[tokens, place]))
    dense = torch.zeros(50, 5, dtype=torch.float64).scatter_(1, indices, acts)
    torch.testing.assert_close(truncation_curve(x, pairs, dense, active_only=True).corr, corr, equal_nan=True)


def test_what_does_not_vary_has_no_correlation():
    w, v, p = layer(8, 20, 5)
    x, pairs = randn(50, 8, dtype=torch.float64), interaction_eigh(w, v, p, 2)
    assert truncation_curve(x, pairs, torch.full((50, 5), 0.1).double()).corr.isnan().all()
    assert math.isnan(truncation_curve(x[:0], pairs, torch.zeros(0, dtype=torch.int64))[0])


def test_errors():
    w, v, p = layer(8, 20, 5)
    x, pairs = randn(6, 8, dtype=torch.float64), interaction_eigh(w, v, p, 2)
    labels = torch.zeros(6, dtype=torch.int64)
    with pytest.raises(TypeError, match="eig must be EigenPairs, got tuple"):
        truncation_curve(x, (pairs.values, pairs.vectors), labels)
    with pytest.raises(IndexError, match="target must be at least 0 and below 5"):
        truncation_curve(x, pairs, labels + 5)
    with pytest.raises(ValueError, match="active_only needs a target"):
        truncation_curve(x, pairs, labels, active_only=True)
    with pytest.raises(TypeError, match="target must be float64"):
        truncation_curve(x, pairs, labels.int())
    with pytest.raises(RuntimeError, match=r"target must have shape \[T=6, K=5\]"):
        truncation_curve(x, pairs, x)
    with pytest.raises(TypeError, match="indices must be an int64 tensor"):
        truncation_correlation(x, pairs, labels[:, None].int(), x[:, :1])
    with pytest.raises(RuntimeError, match=r"indices must have shape \[6, 2\]"):
        truncation_correlation(x, pairs, labels[:, None], x[:, :2])


def test_refitting_what_is_not_finite_gives_nan():
    w, v, p = layer(4, 6, 3)
    v[0, 0] = torch.nan
    assert truncate(w, v, p, 2, refit=True).outputs.isnan().all()
