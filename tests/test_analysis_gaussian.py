"""Means of activations and of their derivatives, against sums over a fine grid."""

import math

import pytest
import torch
from analysis_inputs import close

from bilinear_ops.analysis import gaussian, quadratic
from bilinear_ops.reference.gated import activate

CASES = [(a, 1.0) for a in quadratic.FITTED if a != "swish"] + [("swish", b) for b in (1.7, 1.0, 0.0, -0.5)]
MEANS = torch.tensor([-45.0, -2.0, 0.0, 0.3, 5.0, 60.0], dtype=torch.float64)
GRID = torch.linspace(-10, 10, 200_001, dtype=torch.float64)


def weights():
    return (-0.5 * GRID.square()).exp() / math.sqrt(2 * math.pi) * (GRID[1] - GRID[0])


@pytest.mark.parametrize(("activation", "beta"), CASES)
@pytest.mark.parametrize("deviation", [0.01, 0.1, 1.0, 7.0, 100.0])
def test_derivative_means(activation, beta, deviation):
    """E act^(k)(z) is E[act(z) He_k(t)] / deviation^k, to 1e-6."""
    hermite = torch.stack([torch.ones_like(GRID), GRID, GRID**2 - 1, GRID**3 - 3 * GRID])
    values = activate(MEANS[:, None] + deviation * GRID, activation, beta)
    expected = (hermite * weights()) @ values.t() / deviation ** torch.arange(4.0, dtype=torch.float64)[:, None]
    s = torch.full_like(MEANS, deviation)
    found = torch.stack(gaussian.derivative_means(activation, torch.tensor(beta, dtype=torch.float64), MEANS, s))
    assert ((found - expected).abs() <= 1e-6 * expected.abs().clamp_min(1)).all()


@pytest.mark.parametrize(("activation", "beta"), CASES)
def test_without_a_deviation_the_means_are_the_values(activation, beta):
    z = MEANS.clone().requires_grad_()
    zero = torch.zeros_like(MEANS)
    found = gaussian.derivative_means(activation, torch.tensor(beta, dtype=torch.float64), MEANS, zero)
    value = activate(z, activation, beta)
    close(found[0], value.detach())
    (slope,) = torch.autograd.grad(value.sum(), z)
    smooth = MEANS != 0  # at the kinks of relu the derivative is a matter of taste
    close(found[1][smooth], slope[smooth])
    assert all(t.isfinite().all() for t in found)


@pytest.mark.parametrize(("activation", "beta"), CASES)
def test_derivative_means_are_differentiable(activation, beta):
    mean = torch.tensor([-1.3, 0.2, 2.5]).double().requires_grad_()
    deviation = torch.tensor([0.3, 2.0, 40.0]).double().requires_grad_()
    slope = torch.tensor(beta).double().requires_grad_(activation == "swish" and beta != 0)
    assert torch.autograd.gradcheck(
        lambda m, s, b: tuple(gaussian.derivative_means(activation, b, m, s)), (mean, deviation, slope)
    )


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("correlation", [-0.95, -0.3, 0.0, 0.6, 0.95])
def test_pair_means(activation, correlation):
    """E[f f] on a grid of the plane, and its derivatives by Price's theorem."""
    t = torch.linspace(-9, 9, 901, dtype=torch.float64)
    density = (-0.5 * t.square()).exp() / math.sqrt(2 * math.pi) * (t[1] - t[0])

    def direct(first, second, cov):
        z1 = first.sqrt() * t
        z2 = (cov / first) * z1[:, None] + (second - cov.square() / first).sqrt() * t
        return density @ (activate(z1, activation)[:, None] * activate(z2, activation)) @ density

    first, second = torch.tensor(1.7).double(), torch.tensor(0.6).double()
    at = [s.requires_grad_() for s in (first, second, correlation * (first * second).sqrt())]
    product, slopes, of_first, of_second = gaussian.pair_means(activation, *at)
    exact = direct(*at)
    loose = 1e-3 if activation == "relu" else 1e-9  # a grid misses the kinks by its step
    close(product, exact, loose)
    by_first, by_second, by_cov = torch.autograd.grad(product, at)
    close(by_cov, slopes, 1e-9)
    close(2 * by_first, of_first, 1e-9)
    close(2 * by_second, of_second, 1e-9)


def test_pairs_of_one_neuron():
    one = torch.tensor([0.0, 0.4, 3.0]).double().requires_grad_()
    product, slopes, of_first, _ = gaussian.pair_means("relu", one, one, one)
    close(product, one / 2)
    close(slopes[1:], torch.full((2,), 0.5).double())
    assert (of_first == 0).all()
    (gradient,) = torch.autograd.grad(product.sum(), one)
    close(gradient[1:], torch.full((2,), 0.5).double())
