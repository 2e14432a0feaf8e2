"""Calls of the gated op past the dispatcher give what the dispatcher would: for tensors that it rewrites, too."""

import pytest
import torch
from torch.testing import assert_close

import bilinear_ops as bo
from bilinear_ops import reference
from bilinear_ops.testing import randn

M, D, H, OUT = 5, 4, 6, 3
IMPLS = pytest.mark.parametrize("impl", ("torch", "triton"))


def operands() -> tuple[torch.Tensor, ...]:
    shapes = ((M, D), (H, D), (H, D), (OUT, H))
    return tuple(randn(*shape, requires_grad=True) for shape in shapes)


def negated(*shape: int) -> torch.Tensor:
    t = torch.complex(randn(*shape), randn(*shape)).conj().imag
    assert t.is_neg()
    return t


@IMPLS
def test_batched_gradients(impl):
    tensors, dys = operands(), randn(2, M, OUT)
    found, expected = (
        torch.autograd.grad(y, tensors, dys, is_grads_batched=True)
        for y in (
            bo.gated_mlp(*tensors, activation="silu", impl=impl),
            reference.gated_mlp(*tensors, activation="silu"),
        )
    )
    for g, e in zip(found, expected, strict=True):
        assert_close(g, e)


def test_vectorised_jacobian():
    x, *weights = operands()
    found, expected = (
        torch.autograd.functional.jacobian(lambda t, f=f: f(t, *weights), x, vectorize=True)
        for f in (lambda *t: bo.gated_mlp(*t, impl="torch"), reference.gated_mlp)
    )
    assert_close(found, expected)


@IMPLS
def test_a_gradient_that_is_lazily_negated(impl):
    tensors, dy = operands(), negated(M, OUT)
    found = torch.autograd.grad(bo.gated_mlp(*tensors, impl=impl), tensors, dy)
    for g, e in zip(found, torch.autograd.grad(reference.gated_mlp(*tensors), tensors, dy), strict=True):
        assert_close(g, e)


@IMPLS
def test_a_gradient_that_is_lazily_zero(impl):
    tensors, seen = operands(), []
    y = bo.gated_mlp(*tensors, impl=impl)
    y.register_hook(lambda dy: seen.append(dy._is_zerotensor()))
    found = torch.autograd.grad(y.sgn().sum(), tensors)
    assert seen == [True]
    assert all(g is not None and not g.any() for g in found)


@IMPLS
def test_a_slope_that_is_lazily_negated(impl):
    tensors, beta = operands(), negated()
    found = bo.gated_mlp(*tensors, activation="swish", beta=beta, impl=impl)
    assert_close(found, reference.gated_mlp(*tensors, activation="swish", beta=beta))


def test_another_ops_implementation_records_no_derivative():
    """Like PyTorch's own ops there: else its result holds the graph of weights that it closes over."""
    x, *weights = operands()

    @torch.library.custom_op("bilinear_ops_tests::layer", mutates_args=())
    def layer(x: torch.Tensor) -> torch.Tensor:
        return bo.gated_mlp(x, *weights, impl="torch")

    assert not layer(x.detach()).requires_grad
