"""Gates, adversarial sources and the frequency penalty as modules."""

import copy

import pytest
import torch
import torch.nn.functional as F

import bilinear_ops as bo
from bilinear_ops.testing import randn


def test_scalar_gates_are_their_op():
    gates = bo.nn.Gates(0, 7, 5)
    acts = randn(3, 4, 7)
    logits = bo.reference.component_gates(acts, gates.w1, gates.b1, gates.w2, gates.b2)
    found = gates(acts)
    for got, expected in zip(
        found, (bo.lower_leaky_hard_sigmoid(logits), bo.upper_leaky_hard_sigmoid(logits), logits), strict=True
    ):
        torch.testing.assert_close(got, expected)
    assert (found.lower >= 0).all() and (found.lower <= 1).all() and (found.upper > 1).any()


def test_vector_gates_have_a_network_each():
    """Each subcomponent's logit is an MLP of the whole input, of its own weights alone."""
    gates = bo.nn.Gates(6, 7, 5, "vector")
    for p in gates.parameters():
        torch.nn.init.normal_(p)
    x = randn(3, 4, 6)
    logits = gates(x).logits
    w1 = gates.w1.view(7, 5, 6)
    for c in range(7):
        torch.testing.assert_close(
            logits[..., c], F.linear(F.gelu(F.linear(x, w1[c], gates.b1[c])), gates.w2[c], gates.b2[c])
        )


def test_shared_gates_are_one_network():
    gates = bo.nn.Gates(6, 7, 5, "shared")
    for p in gates.parameters():
        torch.nn.init.normal_(p)
    x = randn(3, 4, 6)
    network = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.GELU(), torch.nn.Linear(5, 7))
    network.load_state_dict({"0.weight": gates.w1, "0.bias": gates.b1, "2.weight": gates.w2, "2.bias": gates.b2})
    torch.testing.assert_close(gates(x).logits, network(x))


@pytest.mark.parametrize("kind", ("scalar", "vector", "shared"))
def test_gates_initialisation(kind):
    gates = bo.nn.Gates(50, 400, 40, kind)
    fan_in = 1 if kind == "scalar" else 50
    assert abs(gates.w1.std() / (2 / fan_in) ** 0.5 - 1) < 0.05 and abs(gates.w2.std() * 40**0.5 - 1) < 0.05
    assert not gates.b1.any() and not gates.b2.any() and kind in repr(gates)
    with pytest.raises(ValueError, match="kind must be one of scalar, vector, shared, got 'mlp'"):
        bo.nn.Gates(3, 4, 5, "mlp")


def reconstruction(source, x, read, write, gates, weight):
    y = bo.rank1_linear(
        x, read, write, gates + (1 - gates) * source[..., :-1], weight=weight, delta=source[..., -1].expand(5)
    )
    return (y - x @ weight.t()).square().sum()


@pytest.mark.parametrize("shape", ((), (5,)))
def test_sources_climb(shape):
    """Shared or one a token: the op's gradient is the formula's, and steps along it raise the loss within [0, 1]."""
    adversary = bo.nn.AdversarialSource(4, shape, generator=torch.Generator().manual_seed(1))
    x, read, write, gates, weight = randn(5, 3), randn(3, 4), randn(4, 2), torch.rand(5, 4), randn(2, 3)
    delta = adversary.delta.expand(1, 5)
    y = bo.stochastic_rank1_linear(x, read, write, gates, weight=weight, delta=delta, source=adversary.masks)
    (gradient,) = torch.autograd.grad((y - x @ weight.t()).square().sum(), adversary.source)
    leaf = adversary.source.detach().requires_grad_()
    loss = reconstruction(leaf, x, read, write, gates, weight)
    (expected,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(gradient, expected)
    adversary.ascend(gradient, 0.01)
    assert reconstruction(adversary.source, x, read, write, gates, weight) > loss
    adversary.ascend(gradient, 100.0)
    assert adversary.source.min() == 0 and adversary.source.max() == 1


def test_sign_steps():
    adversary = bo.nn.AdversarialSource(2)
    before = adversary.source.detach().clone()
    adversary.ascend(torch.tensor([3.0, -2.0, 0.0]), 0.01)
    torch.testing.assert_close(adversary.source.detach(), (before + torch.tensor([0.01, -0.01, 0])).clamp(0, 1))


def test_adam_steps_are_those_of_torch():
    adversary = bo.nn.AdversarialSource(3, (2,), rule="adam", betas=(0.5, 0.9), eps=1e-6)
    with torch.no_grad():
        adversary.source.fill_(0.5)
    twin = adversary.source.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([twin], lr=0.02, betas=(0.5, 0.9), eps=1e-6, maximize=True)
    for _ in range(4):
        twin.grad = randn(2, 4)
        optimizer.step()
        adversary.ascend(twin.grad, 0.02)
    torch.testing.assert_close(adversary.source, twin)
    with pytest.raises(ValueError, match="rule must be one of sign, adam, got 'sgd'"):
        bo.nn.AdversarialSource(3, rule="sgd")


def test_sources_are_saved_moved_and_no_parameters():
    adversary = bo.nn.AdversarialSource(3, (2,), rule="adam")
    adversary.ascend(randn(2, 4), 0.1)
    assert not list(adversary.parameters())
    other = bo.nn.AdversarialSource(3, (2,), rule="adam")
    other.load_state_dict(adversary.state_dict())
    for moved in (copy.deepcopy(adversary), other.double().float()):
        assert torch.equal(moved.source, adversary.source) and moved.source.is_leaf and moved.source.requires_grad
        moved.ascend(torch.ones(2, 4), 0.1)
    assert other.steps == 2


def test_frequency_penalty_keeps_a_running_mean():
    penalty = bo.nn.FrequencyPenalty(3, scale=10.0, decay=0.9)
    first, second = (torch.rand(3, requires_grad=True) for _ in range(2))
    torch.testing.assert_close(penalty(first), (first * torch.log2(1 + 10 * first.detach())).sum())
    running = 0.9 * first.detach() + 0.1 * second.detach()
    loss = penalty(second)
    torch.testing.assert_close(loss, (second * torch.log2(1 + 10 * running)).sum())
    (gradient,) = torch.autograd.grad(loss, second)
    torch.testing.assert_close(gradient, torch.log2(1 + 10 * running))
    penalty.eval()(first)
    torch.testing.assert_close(penalty.running, running)
