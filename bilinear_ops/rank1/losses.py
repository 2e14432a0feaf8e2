"""Losses and gate functions of parameter decomposition (docs/math.md 3; [SPD])."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bilinear_ops import _impl, _op, reference
from bilinear_ops._check import check
from bilinear_ops.composite.rank1 import losses as composite


@_op.without_autocast
def faithfulness_loss(weight: Tensor, read: Tensor, write: Tensor, *, impl: str = "auto") -> Tensor:
    """mean (W - (R L)^T)^2, how far the subcomponents are from summing to the weight ([SPD]).

    Always in float32 or better and through the residual, of which only a band or tile exists at a time.

    Args:
        weight: `[d_out, d_in]`.
        read, write: `[d_in, C]` and `[C, d_out]` subcomponents.
        impl: "auto", "triton" or "torch".

    Returns:
        0-dim, float32, or float64 for float64 tensors; NaN for an empty weight.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices, or impl="triton" where it cannot run.
        TypeError: an argument that is not a floating-point tensor.
        ValueError: unknown impl.
    """
    check(weight=(weight, "o i"), read=(read, "i c"), write=(write, "c o"))
    impl = _impl.resolve(impl, weight)
    if _impl.needs_reference():
        return reference.faithfulness_loss(weight, read, write)
    return squared_difference_op(weight, read, write, impl) / weight.numel()


def importance_minimality(gates: Tensor, *, pnorm: float | Tensor, eps: float = 1e-12) -> Tensor:
    """Mean over tokens of (g + eps)^p for each subcomponent, the penalty that makes gates sparse ([SPD]).

    Args:
        gates: `[..., C]` causal importances, at least 0.
        pnorm: the exponent p, which the caller may anneal.
        eps: keeps the gradient finite at 0 for p below 1.

    Returns:
        `[C]` in float32, or float64 for float64 gates.

    Raises:
        TypeError: gates that are not a floating-point tensor.
    """
    check(gates=(gates, "... c"))
    return reference.importance_minimality(gates, pnorm=pnorm, eps=eps)


def lower_leaky_hard_sigmoid(x: Tensor, alpha: float = 0.01) -> Tensor:
    """clamp(x, 0, 1) for masks: at x <= 0 a negative gradient passes scaled by alpha, a positive one does not ([SPD]).

    Above 1 nothing passes. The rule is no derivative, so it is exempt from `torch.autograd.gradcheck`.

    Raises:
        TypeError: x that is not a floating-point tensor.
    """
    check(x=(x, "..."))
    return reference.lower_leaky_hard_sigmoid(x, alpha)


def upper_leaky_hard_sigmoid(x: Tensor, alpha: float = 0.01) -> Tensor:
    """clamp(x, 0, 1) that goes on as 1 + alpha (x - 1) above 1, for the minimality loss ([SPD]).

    Raises:
        TypeError: x that is not a floating-point tensor.
    """
    check(x=(x, "..."))
    return reference.upper_leaky_hard_sigmoid(x, alpha)


def launchers():
    """The kernels' side, imported at the first launch."""
    from bilinear_ops.kernels.rank1 import losses

    return losses


def _backend(impl: str) -> Any:
    return launchers() if impl == "triton" else composite


def _forward(weight: Tensor, read: Tensor, write: Tensor, impl: str) -> Tensor:
    return _backend(impl).squared_difference(weight, read, write)


def _forward_fake(weight: Any, read: Any, write: Any, impl: str) -> Any:
    return weight.new_empty((), dtype=torch.promote_types(weight.dtype, torch.float32))


def _backward(
    scale: Tensor, weight: Tensor, read: Tensor, write: Tensor, need: list[bool], impl: str
) -> tuple[Tensor, ...]:
    # three products of one band each, which the library does best on every device
    grads = composite.squared_difference_backward(scale, weight, read, write, need)
    return tuple(_op.or_empty(t, weight) for t in grads)


def _backward_fake(scale: Any, weight: Any, read: Any, write: Any, need: list[bool], impl: str) -> Any:
    return tuple(t.new_empty(t.shape if n else 0) for t, n in zip((weight, read, write), need, strict=True))


squared_difference_op = _op.register(
    "squared_difference(Tensor weight, Tensor read, Tensor write, str impl) -> Tensor", _forward, _forward_fake
)
squared_difference_backward_op = _op.register(
    "squared_difference_backward(Tensor scale, Tensor weight, Tensor read, Tensor write, bool[] need, str impl) "
    "-> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    weight, read, write = ctx.saved_tensors
    need = list(ctx.needs_input_grad[:3])
    if torch.is_grad_enabled():  # create_graph=True
        wide = torch.promote_types(weight.dtype, torch.float32)
        residual = 2 * dy * (weight.to(wide) - (read.to(wide) @ write.to(wide)).t())  # [d_out, d_in]
        grads = (residual, -residual.t() @ write.to(wide).t(), -read.to(wide).t() @ residual.t())
        return *(g.to(weight.dtype) if n else None for g, n in zip(grads, need, strict=True)), None
    grads = squared_difference_backward_op(2 * dy, weight, read, write, need, ctx.impl)
    return *(g if n else None for g, n in zip(grads, need, strict=True)), None


_op.register_autograd(squared_difference_op, _autograd, _setup_context)
