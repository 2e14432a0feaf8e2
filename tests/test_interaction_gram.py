"""Inner products of neurons and of layers against the tensor formed in full."""

import pytest
import torch

import bilinear_ops as bo
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


@pytest.mark.parametrize(("h", "h2", "d"), [(1, 1, 1), (5, 7, 3), (17, 2, 4), (0, 3, 2), (3, 0, 2), (3, 4, 0)])
def test_neuron_gram(h, h2, d):
    w, v, w2, v2 = doubles((h, d), (h, d), (h2, d), (h2, d))
    neurons, others = tensor(w, v, torch.eye(h).double()), tensor(w2, v2, torch.eye(h2).double())
    close(bo.neuron_gram(w, v, w2, v2), torch.einsum("hij,gij->hg", neurons, others))
    own = bo.neuron_gram(w, v)
    close(own, torch.einsum("hij,gij->hg", neurons, neurons))
    assert torch.equal(own, own.t())


def test_neuron_gram_is_symmetric_to_the_bit(monkeypatch):
    monkeypatch.setattr(limits, "block", 130 * 43)  # rows in blocks, where a library's products differ in the last bit
    w, v = randn(130, 65), randn(130, 65)
    own = bo.neuron_gram(w, v)
    assert torch.equal(own, own.t())


@pytest.mark.parametrize("tile", [2, 1024])
@pytest.mark.parametrize(("h1", "h2", "d", "o"), [(1, 1, 1, 1), (5, 7, 3, 4), (6, 4, 2, 1)])
def test_layer_inner(h1, h2, d, o, tile, monkeypatch):
    monkeypatch.setattr(limits, "neurons", tile)
    first, second = doubles((h1, d), (h1, d), (o, h1)), doubles((h2, d), (h2, d), (o, h2))
    close(bo.layer_inner(*first, *second), (tensor(*first) * tensor(*second)).sum())
    w, v, p = first
    norm = ((p.t() @ p) * bo.neuron_gram(w, v)).sum()
    close(norm, tensor(w, v, p).square().sum())
    close(bo.layer_inner(*first, *first), norm)


def test_gram_gradients(monkeypatch):
    monkeypatch.setattr(limits, "neurons", 2)
    monkeypatch.setattr(limits, "block", 4)
    first, second = doubles((3, 2), (3, 2), (2, 3), grad=True), doubles((4, 2), (4, 2), (2, 4), grad=True)
    for f, tensors in (
        (bo.layer_inner, first + second),
        (bo.neuron_gram, first[:2]),
        (bo.neuron_gram, first[:2] + second[:2]),
    ):
        assert torch.autograd.gradcheck(f, tensors)
        assert torch.autograd.gradgradcheck(f, tensors)
