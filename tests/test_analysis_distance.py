"""The distance of two layers against their tensors in float64, also where they nearly agree."""

import pytest
import torch

import bilinear_ops as bo
from bilinear_ops.analysis import distance
from bilinear_ops.composite import blockwise
from bilinear_ops.testing import randn


def tensor(w, v, p):
    q = torch.einsum("oh,hi,hj->oij", p, w, v)
    return (q + q.mT) / 2


def layers(h1=7, h2=5, d=6, o=4, dtype=torch.float64):
    return [t for h in (h1, h2) for t in (randn(h, d, dtype=dtype), randn(h, d, dtype=dtype), randn(o, h, dtype=dtype))]


@pytest.fixture(autouse=True)
def _one_output_a_block(monkeypatch):
    monkeypatch.setattr(distance, "blocks", lambda total, per_item: blockwise.blocks(total, per_item, 40))


@pytest.mark.parametrize("sizes", ((7, 5, 6, 4), (1, 1, 1, 1), (3, 0, 4, 2)))
def test_is_the_norm_of_the_difference(sizes):
    both = [t.requires_grad_() for t in layers(*sizes)]
    expected = (tensor(*both[:3]) - tensor(*both[3:])).square().sum()
    found = bo.analysis.layer_distance(*both)
    torch.testing.assert_close(found, expected)
    for got, wanted in zip(torch.autograd.grad(found, both), torch.autograd.grad(expected, both), strict=True):
        torch.testing.assert_close(got, wanted)


def test_of_another_representation():
    """The same function from scaled, exchanged and split neurons."""
    w, v, p = layers()[:3]
    other = (torch.cat([2 * v, w]), torch.cat([w, v]), torch.cat([p / 4, p / 2], 1))
    assert bo.analysis.layer_distance(w, v, p, *other) < 1e-25


@pytest.mark.parametrize("relative", (1e-2, 1e-3, 1e-4))
def test_near_agreement_in_float32(relative):
    """Right to 1e-3 where inner products cancel to nothing."""
    first = [t.float() for t in layers(128, 5, 64, 32)[:3]]
    second = [t + relative / 3**0.5 * randn(*t.shape) for t in first]
    gold = bo.analysis.layer_distance(*(t.double() for t in (*first, *second)))
    norm = bo.layer_inner(*(t.double() for t in (*first, *first)))
    assert 0.8 * relative < (gold / norm).sqrt() < 1.2 * relative
    assert abs(bo.analysis.layer_distance(*first, *second) - gold) < 1e-3 * gold
    difference = bo.layer_inner(*first, *first) + bo.layer_inner(*second, *second) - 2 * bo.layer_inner(*first, *second)
    assert relative > 1e-4 or abs(difference - gold) > 0.05 * gold


def test_gradcheck_dtypes_and_errors():
    both = [t.requires_grad_() for t in layers(2, 3, 3, 2)]
    assert torch.autograd.gradcheck(bo.analysis.layer_distance, both)
    assert torch.autograd.gradgradcheck(bo.analysis.layer_distance, both)
    assert bo.analysis.layer_distance(*layers(dtype=torch.bfloat16)).dtype == torch.float32
    with pytest.raises(RuntimeError, match=r"p2 must have shape \[o=4, h2=5\], got \[3, 5\]"):
        bo.analysis.layer_distance(*layers()[:5], randn(3, 5).double())
