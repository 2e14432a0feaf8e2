"""The drop-ins against that code's formulas, written out here: values, gradients and state_dicts."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bilinear_ops as bo
from bilinear_ops.testing import randn

pd = bo.integrations.parameter_decomposition


class Theirs(nn.Module):
    """What a component module of that code computes."""

    def __init__(self, c, v_dim, u_dim, bias=None):
        super().__init__()
        self.V, self.U = nn.Parameter(torch.randn(v_dim, c)), nn.Parameter(torch.randn(c, u_dim))
        if bias is not None:
            self.register_buffer("bias", bias)

    def forward(self, x, mask=None, weight_delta_and_mask=None, component_acts_cache=None):
        tokens = not x.is_floating_point()
        acts = self.V[x] if tokens else x.to(self.V.dtype) @ self.V
        if component_acts_cache is not None:
            component_acts_cache["pre_detach"] = acts
            acts = component_acts_cache["post_detach"] = acts.detach().requires_grad_(True)
        y = (acts if mask is None else acts * mask) @ self.U
        if weight_delta_and_mask is not None:
            delta, share = weight_delta_and_mask
            y = y + share[..., None] * (delta[x] if tokens else x @ delta.t())
        return y + self.bias if hasattr(self, "bias") else y


def linear_pair():
    bias = randn(4)
    theirs, ours = Theirs(7, 6, 4, bias), pd.LinearComponents(C=7, d_in=6, d_out=4, bias=bias)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def close(found, expected):
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def assert_same(theirs, ours, tensors, *args, **options):
    """Values, and gradients of the components and of `tensors`."""
    results = []
    for module in (theirs, ours):
        y = module(*args, **options)
        torch.manual_seed(1)
        wanted = [module.V, module.U, *tensors]
        results.append((y, *torch.autograd.grad(y, wanted, torch.randn_like(y), allow_unused=True)))
    close(results[1], results[0])


MASKS = {
    "none": lambda: None,
    "float": lambda: torch.rand(2, 5, 7, requires_grad=True),
    "shared": lambda: torch.rand(7, requires_grad=True),
    "bool": lambda: torch.rand(2, 5, 7) < 0.5,
    "int": lambda: torch.randint(3, (2, 5, 7)),
    "several": lambda: torch.rand(3, 2, 5, 7, requires_grad=True),
    "two dimensions of several": lambda: torch.rand(3, 2, 2, 5, 7, requires_grad=True),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_linear_masks(mask):
    theirs, ours = linear_pair()
    x, mask = randn(2, 5, 6, requires_grad=True), mask()
    trained = [x] + ([mask] if mask is not None and mask.requires_grad else [])
    assert_same(theirs, ours, trained, x, mask)
    torch.testing.assert_close(ours.weight, (theirs.V @ theirs.U).t())


def test_linear_delta():
    theirs, ours = linear_pair()
    x, mask = randn(2, 5, 6, requires_grad=True), torch.rand(2, 5, 7, requires_grad=True)
    delta, share = randn(4, 6, requires_grad=True), torch.rand(2, 5, requires_grad=True)
    assert_same(theirs, ours, [x, mask, delta, share], x, mask, (delta, share))


def test_inputs_of_another_dtype():
    theirs, ours = linear_pair()
    x = randn(2, 5, 6).double()
    close([ours(x, torch.rand(2, 5, 7).fill_(0.5))], [theirs(x.float(), torch.full((7,), 0.5))])
    assert ours(x).dtype == torch.float32


@pytest.mark.parametrize("kind", ("linear", "embedding"))
def test_cache_cuts_the_graph(kind):
    if kind == "linear":
        theirs, ours = linear_pair()
        x = randn(2, 5, 6)
    else:
        theirs, ours = Theirs(7, 11, 4), pd.EmbeddingComponents(7, 11, 4)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randint(11, (2, 5))
    mask, dy, results = torch.rand(2, 5, 7), randn(2, 5, 4), []
    for module in (theirs, ours):
        cache = {}
        y = module(x, mask, component_acts_cache=cache)
        found = torch.autograd.grad(y, (cache["post_detach"], module.U, module.V), dy, allow_unused=True)
        assert found[2] is None  # V is reached through pre_detach alone
        results.append((y, cache["pre_detach"], *found[:2]))
        assert cache["post_detach"].is_leaf and cache["pre_detach"].grad_fn is not None
    close(results[1], results[0])


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("delta", (False, True))
def test_embedding(mask, delta):
    theirs, ours = Theirs(7, 11, 4), pd.EmbeddingComponents(C=7, vocab_size=11, embedding_dim=4)
    ours.load_state_dict(theirs.state_dict())
    tokens, mask = torch.randint(11, (2, 5)), mask()
    trained = [mask] if mask is not None and mask.requires_grad else []
    pair = None
    if delta:
        pair = (randn(11, 4, requires_grad=True), torch.rand(2, 5, requires_grad=True))
        trained += pair
    assert_same(theirs, ours, trained, tokens, mask, pair)
    torch.testing.assert_close(ours.weight, theirs.V @ theirs.U)


def test_state_dicts_load_either_way():
    theirs, ours = linear_pair()
    theirs.load_state_dict(pd.LinearComponents(7, 6, 4, bias=randn(4)).state_dict())
    assert set(ours.state_dict()) == set(theirs.state_dict()) == {"V", "U", "bias"}
    assert set(pd.ComponentLinear(nn.Linear(6, 4), 7).state_dict()) == {"V", "U", "bias", "W_target"}
    assert set(pd.EmbeddingComponents(7, 11, 4).state_dict()) == {"V", "U"}


@pytest.mark.parametrize("routed", (False, True))
@pytest.mark.parametrize("bias", (False, True))
def test_component_linear_of_the_runner(bias, routed):
    linear = nn.Linear(6, 4, bias=bias)
    site = pd.ComponentLinear(linear, 7)
    x = randn(2, 5, 6, requires_grad=True)
    close([site(x)], [linear(x)])
    assert torch.equal(site.last_input, x) and not site.last_input.requires_grad and site.last_output is None
    site.mode, site.cache_output = "component", True
    site.mask, site.delta_mask = torch.rand(2, 5, 7, requires_grad=True), torch.rand(2, 5, requires_grad=True)
    routing = torch.rand(2, 5) < 0.5
    site.routing_mask = routing if routed else None
    y = ((x @ site.V) * site.mask) @ site.U + (linear.bias.detach() if bias else 0)
    y = y + site.delta_mask[..., None] * F.linear(x, linear.weight.detach() - (site.V @ site.U).t())
    if routed:
        y = torch.where(routing[..., None], y, F.linear(x, linear.weight.detach(), linear.bias))
    dy, trained = randn(2, 5, 4), (x, site.V, site.U, site.mask, site.delta_mask)
    found = site(x)
    close((found, *torch.autograd.grad(found, trained, dy)), (y, *torch.autograd.grad(y, trained, dy)))
    torch.testing.assert_close(site.last_output, found.detach())
    site.mask = None
    with pytest.raises(RuntimeError, match="needs mask and delta_mask"):
        site(x)


def test_losses_with_annealing():
    sites = {"a": pd.ComponentLinear(nn.Linear(6, 4), 7), "b": pd.ComponentLinear(nn.Linear(4, 9), 5)}
    parameters = [p for site in sites.values() for p in (site.V, site.U)]
    deltas = [site.weight_delta() for site in sites.values()]
    expected = sum(d.square().sum() for d in deltas) / sum(d.numel() for d in deltas)
    found = pd.faithfulness_loss(sites)
    close((found, *torch.autograd.grad(found, parameters)), (expected, *torch.autograd.grad(expected, parameters)))
    for step in range(3):
        p, eps, beta, world = 2.0 + (0.4 - 2.0) * step / 2, 1e-12, 0.5, 3
        ci = {n: (torch.rand(2, 5, s.C) + 0.05).requires_grad_() for n, s in sites.items()}
        expected = torch.zeros(())
        for values in ci.values():
            powers = (values + eps).pow(p)
            total = powers.sum((0, 1))
            mean = total / math.prod(powers.shape[:-1])
            expected = expected + (mean + beta * mean * torch.log2(1 + total * world)).sum()
        found = pd.importance_minimality_loss(ci, p, eps, beta, world)
        leaves = list(ci.values())
        close((found, *torch.autograd.grad(found, leaves)), (expected, *torch.autograd.grad(expected, leaves)))


def test_initialisation():
    for module in (pd.LinearComponents(400, 300, 200), pd.ComponentLinear(nn.Linear(300, 200), 400)):
        assert abs(module.V.std() * 300**0.5 - 1) < 0.02 and abs(module.U.std() * 400**0.5 - 1) < 0.02


def test_sources_repeated_along_the_batch():
    """The convention's last row: a batch viewed as repeats of the sources, over which they broadcast."""
    x, read, write, gates, sources = randn(6, 5, 3), randn(3, 7), randn(7, 4), torch.rand(6, 5, 7), torch.rand(2, 5, 7)
    expected = bo.rank1_linear(x, read, write, gates + (1 - gates) * sources.repeat(3, 1, 1))
    viewed = (x.view(3, 2, 5, 3), read, write, gates.view(3, 2, 5, 7))
    found = bo.stochastic_rank1_linear(*viewed, source=sources)
    torch.testing.assert_close(found[0].view(6, 5, 4), expected)
