"""First-order gradients under create_graph=True, which `gradgradcheck` compares with themselves alone."""

import itertools

import pytest
import torch
from op_cases import CASES

import bilinear_ops as bo
from bilinear_ops.composite.limits import limits


def related(first, *others):
    """The first as it is and the others moved by its mean, so that all are computed from it."""
    return first, *(t + 0.1 * first.mean() for t in others)


@pytest.mark.parametrize("arguments", (lambda *t: t, related), ids=("independent", "related"))
@pytest.mark.parametrize("case", CASES)
def test_a_graph_of_the_gradients_changes_none(case, arguments):
    f, tensors = CASES[case]
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = f(bo, *arguments(*leaves))
    dy = torch.randn_like(y)
    plain = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    with_graph = torch.autograd.grad(y, leaves, dy, create_graph=True)
    torch.testing.assert_close([t.detach() for t in with_graph], list(plain), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", ("gated", "gated, swish"))
def test_small_layers_on_cpu_as_large_ones(case, monkeypatch):
    """Below the bound a layer runs eager PyTorch, above it the op: values and both orders of gradients agree."""
    f, tensors = CASES[case]
    results = []
    for bound in (-1, 1 << 28):
        monkeypatch.setattr(limits, "small_on_cpu", bound)
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = f(bo, *leaves)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(t.square().sum() for t in first), leaves)
        results.append([y, *first, *second])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_no_two_sites_share_draws():
    """Masks and deltas of any streams: where gates are 0 a mask is its uniform."""
    gates = torch.zeros(64, 1)
    draws = {}
    for stream in range(4):
        draws["mask", stream] = bo.stochastic_mask(gates, seed=3, stream=stream)[0, :, 0]
        draws["delta", stream] = bo.stochastic_delta((64,), seed=3, stream=stream)[0]
    for one, other in itertools.combinations(draws, 2):
        assert not (draws[one] == draws[other]).any(), (one, other)
