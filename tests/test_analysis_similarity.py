"""Similarity of layers against their tensors and against outputs on drawn inputs."""

import pytest
import torch
from analysis_inputs import close, doubles, layer, tensor

import bilinear_ops as bo
from bilinear_ops import analysis


@pytest.mark.parametrize(("h1", "h2", "d", "o"), [(1, 1, 1, 1), (5, 7, 3, 4), (17, 2, 4, 3)])
def test_layer_similarity(h1, h2, d, o):
    first, second = layer(d, h1, o), layer(d, h2, o)
    b1, b2 = tensor(*first), tensor(*second)
    close(analysis.layer_similarity(*first, *second), torch.cosine_similarity(b1.flatten(), b2.flatten(), 0))
    trace1, trace2 = (b.diagonal(dim1=1, dim2=2).sum(1) for b in (b1, b2))

    def gaussian(a, b, s, t):
        return 2 * (a * b).sum() + s @ t

    cosine = gaussian(b1, b2, trace1, trace2) / (
        gaussian(b1, b1, trace1, trace1).sqrt() * gaussian(b2, b2, trace2, trace2).sqrt()
    )
    close(analysis.layer_similarity(*first, *second, measure="gaussian"), cosine)


@pytest.mark.parametrize("measure", ["frobenius", "gaussian"])
def test_similarity_of_equal_functions_is_one(measure):
    w, v, p = layer(6, 20, 5)
    same = v.flip(0), 3 * w.flip(0), p.flip(1) / 3
    for other in ((w, v, p), same):
        close(analysis.layer_similarity(w, v, p, *other, measure=measure), torch.tensor(1.0).double(), 1e-14)
    close(analysis.layer_similarity(w, v, -p, *same, measure=measure), torch.tensor(-1.0).double(), 1e-14)


def test_gaussian_similarity_is_that_of_outputs_on_normal_inputs():
    first, second = layer(3, 4, 2), layer(3, 4, 2)
    x = torch.randn(400_000, 3, dtype=torch.float64)
    y1, y2 = bo.gated_mlp(x, *first), bo.gated_mlp(x, *second)
    drawn = (y1 * y2).sum() / (y1.norm() * y2.norm())
    assert abs(analysis.layer_similarity(*first, *second, measure="gaussian") - drawn) < 0.01
    assert abs(analysis.layer_similarity(*first, *second) - drawn) > 0.05


@pytest.mark.parametrize("measure", ["frobenius", "gaussian"])
def test_gradients(measure):
    first, second = layer(2, 3, 2, grad=True), layer(2, 1, 2, grad=True)
    assert torch.autograd.gradcheck(lambda *t: analysis.layer_similarity(*t, measure=measure), first + second)


@pytest.mark.parametrize(("d", "h", "o"), [(0, 4, 3), (3, 0, 2), (3, 4, 0), (0, 0, 0)])
def test_empty_sizes(d, h, o):
    w, v, p = layer(d, h, o)
    assert analysis.layer_similarity(w, v, p, w, v, p).isnan()


def test_errors():
    w, v, p = layer(5, 8, 4)
    with pytest.raises(ValueError, match="measure must be one of frobenius, gaussian, got 'cosine'"):
        analysis.layer_similarity(w, v, p, w, v, p, measure="cosine")
    with pytest.raises(RuntimeError, match=r"p2 must have shape \[o=4, h2=8\], got \[3, 8\]"):
        analysis.layer_similarity(w, v, p, w, v, p[:3])


def test_gaussian_similarity_of_affine_parts():
    """Against a rule of normal inputs that is exact to degree 5 in each, where products of outputs have degree 4."""
    d, o = 3, 4
    first, second = layer(d, 6, o), layer(d, 5, o)
    l1, l2, c1, c2 = doubles((o, d), (o, d), (o,), (o,))
    x = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0]).double()] * d) * 3**0.5  # Gauss and Hermite's nodes
    weights = torch.where(x == 0, 2 / 3, 1 / 6 * torch.ones_like(x)).prod(1)

    def inner(a, b):
        ya, yb = (bo.gated_mlp(x, *t[0]) + (0 if t[1] is None else x @ t[1].t()) + t[2] for t in (a, b))
        return (weights[:, None] * ya * yb).sum()

    zero = torch.zeros(o).double()
    for f, s in (((l1, c1), (l2, c2)), ((l1, None), (None, c2)), ((None, c1), (l2, None))):
        one = (first, f[0], zero if f[1] is None else f[1])
        two = (second, s[0], zero if s[1] is None else s[1])
        expected = inner(one, two) / (inner(one, one) * inner(two, two)).sqrt()
        close(analysis.layer_similarity(*first, *second, measure="gaussian", affine1=f, affine2=s), expected)


def test_a_biased_layer_is_compared_as_it_computes():
    w, v, p = layer(4, 6, 4)
    biases = doubles((6,), (6,), (4,))
    terms = analysis.bias_terms(w, v, p, *biases)
    residual = (terms.linear + torch.eye(4).double(), terms.constant)
    swapped = analysis.layer_similarity(w, v, p, v, w, p, measure="gaussian", affine1=residual, affine2=residual)
    close(swapped, torch.tensor(1.0).double())
    assert analysis.layer_similarity(w, v, p, w, v, p, measure="gaussian", affine1=residual) < 0.999
    with pytest.raises(ValueError, match="affine part needs"):
        analysis.layer_similarity(w, v, p, w, v, p, affine1=residual)
    with pytest.raises(TypeError, match=r"affine2 must be \(linear, constant\), got Tensor"):
        analysis.layer_similarity(w, v, p, w, v, p, measure="gaussian", affine2=w)
    with pytest.raises(RuntimeError, match=r"affine1\[0\] must have shape"):
        analysis.layer_similarity(w, v, p, w, v, p, measure="gaussian", affine1=(w, None))
