"""Losses and gate functions of parameter decomposition (docs/math.md 3; [SPD])."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from bilinear_ops import _impl, _op, reference
from bilinear_ops._check import check, check_reals
from bilinear_ops._sharding import sharded
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
    return _squared_difference(weight, read, write, impl) / weight.numel()


@sharded("", over="o i", weight="o i", read="i c", write="c o")
def _squared_difference(weight: Tensor, read: Tensor, write: Tensor, impl: str) -> Tensor:
    """sum (W - (R L)^T)^2."""
    return squared_difference_op(weight, read, write, impl)


@_op.without_autocast
def pooled_faithfulness_loss(
    layers: Iterable[tuple[Tensor, Tensor, Tensor]], *, relative: bool = False, impl: str = "auto"
) -> Tensor:
    """`faithfulness_loss` of several layers, each counted by its number of elements.

    Args:
        layers: (weight, read, write) of each, as for `faithfulness_loss`.
        relative: divide by sum |W|^2 instead of by the number of elements: 1 where nothing is explained.
        impl: "auto", "triton" or "torch".

    Returns:
        0-dim, as `faithfulness_loss`; NaN for no layers.

    Raises:
        as `faithfulness_loss`.
    """
    layers = list(layers) if isinstance(layers, Iterable) else [layers]
    for layer in layers:
        if not isinstance(layer, tuple | list) or len(layer) != 3:
            raise TypeError(f"layers must be tuples (weight, read, write), got {type(layer).__name__}")
    if not layers:
        return torch.full((), torch.nan)
    squares = [faithfulness_loss(*layer, impl=impl) * layer[0].numel() for layer in layers]
    if not relative:
        return torch.stack(squares).sum() / sum(weight.numel() for weight, _, _ in layers)
    norms = [weight.square().sum(dtype=squares[0].dtype) for weight, _, _ in layers]
    return torch.stack(squares).sum() / torch.stack(norms).sum()


def importance_minimality(gates: Tensor, *, pnorm: float | Tensor, eps: float = 1e-12) -> Tensor:
    """Mean over tokens of (g + eps)^p for each subcomponent, the penalty that makes gates sparse ([SPD]).

    Args:
        gates: `[..., C]` causal importances, at least 0.
        pnorm: the exponent p, which the caller may anneal.
        eps: keeps the gradient finite at 0 for p below 1.

    Returns:
        `[C]` in float32, or float64 for float64 gates.

    Raises:
        TypeError: gates that are not a floating-point tensor, an option that is not a number.
        ValueError: an option that is NaN or out of range.
    """
    check(gates=(gates, "... c"))
    check_reals(pnorm=pnorm, eps=eps)
    return reference.importance_minimality(gates, pnorm=pnorm, eps=eps)


def smooth_l0(gates: Tensor, *, gamma: float | Tensor) -> Tensor:
    """Mean over tokens of g^2 / (g^2 + gamma^2) for each subcomponent: nearly the share of tokens with g above gamma.

    Flat at 0, unlike `importance_minimality` with p below 1, and bounded.

    Args:
        gates: `[..., C]` causal importances.
        gamma: the threshold, above 0, which the caller may anneal.

    Returns:
        `[C]` in float32, or float64 for float64 gates.

    Raises:
        TypeError: gates that are not a floating-point tensor, an option that is not a number.
        ValueError: an option that is NaN or out of range.
    """
    check(gates=(gates, "... c"))
    check_reals(positive=True, gamma=gamma)
    return reference.smooth_l0(gates, gamma=gamma)


def frequency_penalty(frequencies: Tensor, *, scale: float | Tensor, running: Tensor | None = None) -> Tensor:
    """sum_c f_c log2(1 + scale f'_c), which charges subcomponents more for each token the more often they are active.

    Two forms are in use: f' = f, the mean over this batch's tokens, and scale the number of tokens of all workers; or
    f' a running mean that gets no gradient, which `nn.FrequencyPenalty` keeps.

    Args:
        frequencies: `[C]` means over tokens, of `importance_minimality` or `smooth_l0`.
        scale: what f' is multiplied by.
        running: `[C]`, f' where it is not f.

    Returns:
        0-dim, in the dtype of frequencies.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices.
        TypeError: an argument that is not a floating-point tensor.
    """
    check(frequencies=(frequencies, "C"), running=(running, "? C"))
    check_reals(scale=scale)
    return reference.frequency_penalty(frequencies, scale=scale, running=running)


def lower_leaky_hard_sigmoid(x: Tensor, alpha: float = 0.01) -> Tensor:
    """clamp(x, 0, 1) for masks: at x <= 0 a negative gradient passes scaled by alpha, a positive one does not ([SPD]).

    Above 1 nothing passes. The rule is no derivative, so it is exempt from `torch.autograd.gradcheck`.

    Raises:
        TypeError: x that is not a floating-point tensor, alpha that is not a number.
        ValueError: alpha that is NaN.
    """
    check(x=(x, "..."))
    check_reals(alpha=alpha)
    return reference.lower_leaky_hard_sigmoid(x, alpha)


def upper_leaky_hard_sigmoid(x: Tensor, alpha: float = 0.01) -> Tensor:
    """clamp(x, 0, 1) that goes on as 1 + alpha (x - 1) above 1, for the minimality loss ([SPD]).

    Raises:
        TypeError: x that is not a floating-point tensor, alpha that is not a number.
        ValueError: alpha that is NaN.
    """
    check(x=(x, "..."))
    check_reals(alpha=alpha)
    return reference.upper_leaky_hard_sigmoid(x, alpha)


def launchers():
    """The kernels of this family, imported at the first launch."""
    from bilinear_ops.kernels.rank1 import losses

    return losses


def _forward(weight: Tensor, read: Tensor, write: Tensor, impl: str) -> Tensor:
    return (composite if impl == "torch" else launchers()).squared_difference(weight, read, write)


def _forward_fake(weight, read, write, impl):
    return weight.new_empty((), dtype=torch.promote_types(weight.dtype, torch.float32))


def _backward(
    dy: Tensor, weight: Tensor, read: Tensor, write: Tensor, need: list[bool], impl: str
) -> tuple[Tensor | None, ...]:
    """(dweight, dread, dwrite): three products of a band each, which the library computes best on every device."""
    return composite.squared_difference_backward(2 * dy, weight, read, write, need)


def _formula(weight: Tensor, read: Tensor, write: Tensor) -> Tensor:
    return reference.faithfulness_loss(weight, read, write) * weight.numel()


squared_difference_op, squared_difference_backward_op = _op.differentiable(
    "squared_difference(Tensor weight, Tensor read, Tensor write, str impl) -> Tensor",
    _forward,
    _forward_fake,
    _backward,
    _formula,
)
