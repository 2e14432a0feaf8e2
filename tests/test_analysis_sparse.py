"""Sparse decompositions find what was planted: more vectors than dimensions, of which each output uses some."""

import pytest
import torch
from analysis_inputs import close, layer, tensor
from torch.nn.functional import normalize

import bilinear_ops as bo
from bilinear_ops import analysis


def planted(d, terms, o, uses):
    """A layer whose neurons are mixtures of the terms' squares, the vectors, and the outputs [o, terms]."""
    u = normalize(torch.randn(terms, d).double(), dim=1)
    used = torch.zeros(o, terms).scatter(0, torch.rand(o, terms).argsort(0)[:uses], 1.0).double()
    outputs = used * torch.randn(o, terms).double().sign() * (1 + torch.rand(o, terms).double())
    # (u + e)(u - e) and e^2 add up to u^2: no neuron has a planted vector
    e = torch.randn(terms, d).double()
    return torch.cat([u + e, e]), torch.cat([u - e, e]), torch.cat([outputs, outputs], 1), u, outputs


def test_overcomplete_terms_are_found():
    w, v, p, u, outputs = planted(5, 7, 9, 3)
    close(tensor(w, v, p), torch.einsum("or,ri,rj->oij", outputs, u, u))
    found = analysis.sparse_decompose(w, v, p, 7)
    cosines = found.vectors @ u.t()
    match = cosines.abs().argmax(0)
    assert cosines.abs().amax(0).min() > 1 - 1e-4 and len(set(match.tolist())) == 7
    assert found.error < 1e-3
    close(found.outputs[:, match], outputs, 1e-2)
    assert (found.outputs[:, match][outputs == 0] == 0).float().mean() > 0.8, "unused outputs are zero"


def test_orthogonal_decompositions_cannot_find_them():
    """What joint diagonalisation leaves of overcomplete terms."""
    w, v, p, *_ = planted(5, 7, 9, 3)
    assert analysis.joint_diagonalise(w, v, p).share < 0.9


def test_error_and_outputs_are_those_of_the_layer_returned():
    w, v, p = layer(4, 6, 3)
    found = analysis.sparse_decompose(w, v, p, 5, steps=50, restarts=1)
    close(found.vectors.norm(dim=1), torch.ones(5).double())
    b = tensor(w, v, p)
    fitted = torch.einsum("or,ri,rj->oij", found.outputs, found.vectors, found.vectors)
    close((b - fitted).norm() / b.norm(), found.error, 1e-6)
    assert (found.outputs.norm(dim=0).diff() <= 0).all()
    x = torch.randn(7, 4).double()
    layer_of_it = analysis.QuadraticLayer(torch.ones(5, 1).double(), found.vectors[:, None], found.outputs)
    close(layer_of_it(x), bo.quadratic_form(x, fitted))


@pytest.mark.ci
def test_a_penalty_trades_error_for_sparsity():
    w, v, p = layer(4, 6, 3)
    free, light, heavy = (
        analysis.sparse_decompose(w, v, p, 12, penalty=penalty, steps=100, restarts=2) for penalty in (0.0, 1e-3, 3e-2)
    )
    counts = [(f.outputs != 0).sum() for f in (free, light, heavy)]
    assert counts[0] == 36 and counts[0] > counts[1] > counts[2]
    assert free.error < 1e-5 and free.error < light.error + 1e-6 < heavy.error


def test_more_restarts_and_steps_never_lose():
    w, v, p = layer(5, 9, 4)

    def judged(**options):
        found = analysis.sparse_decompose(w, v, p, 4, penalty=0.0, **options)
        return found.error

    one, many = judged(restarts=1, steps=30), judged(restarts=4, steps=30)
    assert many <= one and judged(restarts=1, steps=0) > one


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_any_scale(scale):
    w, v, p = layer(4, 6, 3)
    found, expected = (analysis.sparse_decompose(s * w, s * v, s * p, 3, steps=20, restarts=1) for s in (scale, 1.0))
    close(found.error, expected.error, 1e-6)
    close(found.outputs / scale**3, expected.outputs, 1e-4)


@pytest.mark.parametrize(("d", "h", "o", "terms"), [(0, 4, 3, 2), (3, 0, 2, 2), (3, 4, 0, 2), (3, 4, 2, 0)])
def test_empty(d, h, o, terms):
    found = analysis.sparse_decompose(*layer(d, h, o), terms, steps=3)
    assert found.vectors.shape == (terms, d) and found.outputs.shape == (o, terms)
    assert found.error == 1 if terms == 0 else found.error.isnan()


def test_errors():
    w, v, p = layer(4, 6, 3)
    for terms, options in ((-1, {}), (2, {"steps": -1}), (2, {"penalty": -1.0})):
        with pytest.raises(ValueError, match="terms, steps and penalty must not be negative"):
            analysis.sparse_decompose(w, v, p, terms, **options)
    with pytest.raises(ValueError, match="restarts must be at least 1, got 0"):
        analysis.sparse_decompose(w, v, p, 2, restarts=0)
    with pytest.raises(ValueError, match="v must be finite"):
        analysis.sparse_decompose(w, v * torch.inf, p, 2)
