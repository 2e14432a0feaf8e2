"""Losses and gate functions of parameter decomposition ([SPD])."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def faithfulness_loss(weight: Tensor, read: Tensor, write: Tensor) -> Tensor:
    """mean (W - (R L)^T)^2 in fp32 or better: -> []."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(dtype) - (read.to(dtype) @ write.to(dtype)).mT).square().mean()


def pooled_faithfulness_loss(layers: Iterable[tuple[Tensor, Tensor, Tensor]], *, relative: bool = False) -> Tensor:
    """sum_l |W_l - (R_l L_l)^T|^2 over the elements of all W_l, or over sum_l |W_l|^2: -> []."""
    layers = list(layers)
    squares = torch.stack([faithfulness_loss(*layer) * layer[0].numel() for layer in layers]).sum()
    if relative:
        return squares / torch.stack([weight.square().sum() for weight, _, _ in layers]).sum()
    return squares / sum(weight.numel() for weight, _, _ in layers)


def importance_minimality(gates: Tensor, *, pnorm: float | Tensor, eps: float = 1e-12) -> Tensor:
    """Mean over tokens of (g + eps)^p, in fp32 or better: gates [..., C] -> [C]."""
    gates = gates.to(torch.promote_types(gates.dtype, torch.float32))
    return torch.atleast_2d((gates + eps).pow(pnorm)).flatten(0, -2).mean(0)


def smooth_l0(gates: Tensor, *, gamma: float | Tensor) -> Tensor:
    """Mean over tokens of g^2 / (g^2 + gamma^2), in fp32 or better: gates [..., C] -> [C]."""
    squares = gates.to(torch.promote_types(gates.dtype, torch.float32)).square()
    return torch.atleast_2d(squares / (squares + gamma**2)).flatten(0, -2).mean(0)


def frequency_penalty(frequencies: Tensor, *, scale: float | Tensor, running: Tensor | None = None) -> Tensor:
    """sum_c f_c log2(1 + scale f'_c), f' = f or a running mean without gradient: frequencies [C] -> []."""
    other = frequencies if running is None else running.detach()
    return (frequencies * torch.log2(1 + scale * other)).sum()


def lower_leaky_hard_sigmoid(x: Tensor, alpha: float = 0.01) -> Tensor:
    """clamp(x, 0, 1), whose gradient at x <= 0 is `alpha` of a negative one, so that only growth leaks ([SPD])."""
    return _LowerLeakyHardSigmoid.apply(x, alpha)


class _LowerLeakyHardSigmoid(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, alpha: float) -> Tensor:
        return x.clamp(0, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        x, ctx.alpha = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        leak = ctx.alpha * dy.clamp(max=0)
        return torch.where(x <= 0, leak, torch.where(x <= 1, dy, 0)), None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, _: None) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.where((x > 0) & (x <= 1), dx, 0)


def upper_leaky_hard_sigmoid(x: Tensor, alpha: float = 0.01) -> Tensor:
    """clamp(x, 0, 1), going on as 1 + alpha (x - 1) above 1 ([SPD])."""
    return torch.where(x > 1, 1 + alpha * (x - 1), x.clamp(0, 1))
