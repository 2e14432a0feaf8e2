"""Rank1Linear and Rank1Embedding: their ops, initialisation, frozen targets."""

import copy
import math

import pytest
import torch

import bilinear_ops as bo
from bilinear_ops.testing import randn


def test_linear_is_its_ops():
    module = bo.nn.Rank1Linear(6, 4, 9, weight=randn(4, 6), bias=randn(4))
    x, mask, delta, routing = randn(5, 6), torch.rand(5, 9), torch.rand(5), torch.arange(5) % 2 > 0
    read, write, bias, weight = module.read, module.write, module.bias, module.target
    expected = bo.reference.rank1_linear(x, read, write, mask, bias, weight=weight, delta=delta, routing=routing)
    torch.testing.assert_close(module(x, mask, delta=delta, routing=routing), expected)
    torch.testing.assert_close(module(x), x @ module.weight.t() + bias)
    options = dict(samples=2, seed=3, delta="uniform")
    expected = bo.reference.stochastic_rank1_linear(x, read, write, mask, bias, weight=weight, **options)
    torch.testing.assert_close(module.stochastic(x, mask, **options), expected)


def test_embedding_is_the_linear_layer_of_one_hot_tokens():
    weight = randn(11, 4)
    module = bo.nn.Rank1Embedding(11, 4, 9, weight=weight)
    tokens, mask, delta, routing = (
        torch.randint(11, (2, 5)),
        torch.rand(2, 5, 9),
        torch.rand(2, 5),
        torch.rand(2, 5) > 0.5,
    )
    x = torch.nn.functional.one_hot(tokens, 11).float()
    for options in ({}, {"delta": delta}, {"routing": routing}, {"delta": delta, "routing": routing}):
        expected = bo.reference.rank1_linear(x, module.read, module.write, mask, weight=weight.t(), **options)
        torch.testing.assert_close(module(tokens, mask, **options), expected)
        drawn = dict(options, samples=2, seed=3)
        expected = bo.reference.stochastic_rank1_linear(x, module.read, module.write, mask, weight=weight.t(), **drawn)
        torch.testing.assert_close(module.stochastic(tokens, mask, **drawn), expected)
    torch.testing.assert_close(module(tokens), module.weight[tokens])


@pytest.mark.parametrize("module", (bo.nn.Rank1Linear(300, 200, 400), bo.nn.Rank1Embedding(300, 200, 400)))
def test_initialisation_and_parameters(module):
    assert [name for name, _ in module.named_parameters()] == ["read", "write"]
    assert abs(module.read.std() * math.sqrt(300) - 1) < 0.02 and abs(module.write.std() * math.sqrt(400) - 1) < 0.02


def test_targets_are_frozen_and_saved():
    weight = randn(4, 6).requires_grad_()
    module = bo.nn.Rank1Linear(6, 4, 9, weight=weight)
    assert set(module.state_dict()) == {"read", "write", "target"} and not module.target.requires_grad
    fresh = bo.nn.Rank1Linear(6, 4, 9, weight=torch.zeros(4, 6))
    fresh.load_state_dict(module.state_dict())
    x = randn(5, 6)
    for other in (fresh, copy.deepcopy(module)):
        assert torch.equal(other(x, delta=torch.ones(5)), module(x, delta=torch.ones(5)))
    assert "c=9" in repr(module)


def test_errors():
    with pytest.raises(RuntimeError, match=r"weight must have shape \[4, 6\], got \[6, 4\]"):
        bo.nn.Rank1Linear(6, 4, 9, weight=randn(6, 4))
    with pytest.raises(RuntimeError, match=r"weight must have shape \[6, 4\], got \[4, 6\]"):
        bo.nn.Rank1Embedding(6, 4, 9, weight=randn(4, 6))
    with pytest.raises(ValueError, match="delta needs weight"):
        bo.nn.Rank1Linear(6, 4, 9)(randn(5, 6), delta=torch.ones(5))
    with pytest.raises(ValueError, match="routing needs weight"):
        bo.nn.Rank1Embedding(6, 4, 9)(torch.zeros(5).long(), routing=torch.ones(5).bool())


def test_from_linear():
    linear = torch.nn.Linear(6, 4)
    module = bo.nn.Rank1Linear.from_linear(linear, 9)
    x, routing = randn(5, 6), torch.zeros(5).bool()
    torch.testing.assert_close(module(x, routing=routing), linear(x))
    assert module.read.shape == (6, 9) and not module.target.requires_grad
    assert bo.nn.Rank1Linear.from_linear(torch.nn.Linear(6, 4, bias=False), 9).bias is None


@pytest.mark.parametrize(
    "options",
    (
        {},
        {"delta": "uniform"},
        {"delta": "uniform", "stream": 3},
        {"delta": torch.linspace(0, 1, 5), "sampling": "binomial"},
        {"routing": torch.arange(5) % 2 > 0},
        {"routing": torch.arange(5) % 2 > 0, "delta": "uniform"},
    ),
)
def test_stochastic_embedding_is_that_of_one_hot_tokens(options):
    module = bo.nn.Rank1Embedding(11, 4, 9, weight=randn(11, 4))
    tokens, gates = torch.randint(11, (2, 5)), torch.rand(2, 5, 9)
    options = dict(samples=3, seed=2, **options)
    x = torch.nn.functional.one_hot(tokens, 11).float()
    weight = module.target if options.keys() & {"delta", "routing"} else None
    expected = bo.stochastic_rank1_linear(x, module.read, module.write, gates, weight=weight, **options)
    found = module.stochastic(tokens, gates, **options)
    torch.testing.assert_close(found, expected)
    dy = randn(3, 2, 5, 4)
    for got, wanted in zip(
        *(torch.autograd.grad(y, (module.read, module.write), dy) for y in (found, expected)), strict=True
    ):
        torch.testing.assert_close(got, wanted)
    with pytest.raises(ValueError, match="delta needs weight"):
        bo.nn.Rank1Embedding(11, 4, 9).stochastic(tokens, gates, seed=1, delta="uniform")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tokens": torch.ones(5)}, TypeError, "tokens must be an int64 or int32 tensor, got torch.float32"),
        ({"tokens": [1, 2]}, TypeError, "tokens must be an int64 or int32 tensor, got list"),
        ({"tokens": torch.full((5,), 6)}, IndexError, "tokens must be at least 0 and below 6, got 6 to 6"),
        ({"tokens": torch.full((5,), -1)}, IndexError, "tokens must be at least 0 and below 6, got -1"),
        ({"tokens": torch.zeros(5, device="meta").long()}, RuntimeError, "tokens must be on the device of the module"),
        ({"mask": torch.ones(4, 9)}, RuntimeError, r"mask must broadcast to \[5, 9\], got \[4, 9\]"),
        ({"mask": torch.ones(2, 5, 9)}, RuntimeError, r"mask must broadcast to \[5, 9\], got \[2, 5, 9\]"),
        ({"mask": torch.ones(9).bool()}, TypeError, "mask must be float64"),
        ({"delta": torch.ones(4)}, RuntimeError, r"delta must broadcast to \[5\], got \[4\]"),
        ({"delta": 1.0}, TypeError, r"delta must be a torch\.Tensor, got float"),
        ({"routing": torch.ones(5)}, TypeError, "routing must be a bool tensor, got torch.float32"),
        ({"routing": torch.ones(4).bool()}, RuntimeError, r"routing must broadcast to \[5\], got \[4\]"),
    ],
)
def test_embedding_checks_like_the_linear_layer(options, error, message):
    module = bo.nn.Rank1Embedding(6, 4, 9, weight=randn(6, 4))
    with pytest.raises(error, match=message):
        module(**{"tokens": torch.zeros(5).long(), **options})


def test_embedding_takes_what_broadcasts():
    module = bo.nn.Rank1Embedding(6, 4, 9, weight=randn(6, 4))
    tokens, mask = torch.tensor([[1, 2, 5]]), torch.rand(9)
    expected = module(tokens, mask.expand(1, 3, 9), delta=torch.full((1, 3), 0.5))
    torch.testing.assert_close(module(tokens.int(), mask, delta=torch.tensor(0.5)), expected)
