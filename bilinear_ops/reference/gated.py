"""The gated bilinear layer as the papers write it ([P] eq. 1, [S]): plain PyTorch, differentiable, any dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bilinear_ops.results import ACTIVATIONS


def activate(z: Tensor, activation: str, beta: float | Tensor = 1.0) -> Tensor:
    """act(z); beta is the slope of swish, z sigmoid(beta z), and unused elsewhere."""
    if activation == "identity":
        return z
    if activation == "silu":
        return F.silu(z)
    if activation == "swish":
        return z * torch.sigmoid(beta * z)
    if activation == "sigmoid":
        return torch.sigmoid(z)
    if activation == "relu":
        return F.relu(z)
    if activation == "gelu":
        return F.gelu(z)
    if activation == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    if activation == "relu2":
        return F.relu(z).square()
    if activation == "relu6":
        return F.relu6(z)
    if activation == "tanh":
        return torch.tanh(z)
    if activation == "mish":
        return z * torch.tanh(F.softplus(z))
    if activation == "hardswish":
        return F.hardswish(z)
    if activation == "silu_clamped":
        return F.silu(z)
    if activation == "silu_bounded":
        return 4 * torch.tanh(z / 4) * torch.sigmoid(z)
    raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def gate(
    a: Tensor,
    z: Tensor,
    *,
    activation: str = "identity",
    beta: float | Tensor = 1.0,
    limit: float | Tensor | None = None,
    offset: float | Tensor | None = None,
) -> Tensor:
    """(clamp(a, -limit, limit) + offset) * act(min(z, limit)), for silu_clamped min(act(z), limit): a, z [..., h].

    silu_bounded has smooth bounds instead: 25 tanh(a / 25) * 4 tanh(z / 4) sigmoid(z).
    """
    if limit is not None:
        a = torch.clamp(a, min=-limit, max=limit)  # type: ignore[arg-type]
        if activation != "silu_clamped":
            z = z.clamp(max=limit)
    act = activate(z, activation, beta)
    if limit is not None and activation == "silu_clamped":
        act = act.clamp(max=limit)
    if activation == "silu_bounded":
        a = 25 * torch.tanh(a / 25)
    return (a if offset is None else a + offset) * act


def gated_bilinear(
    x: Tensor,
    w: Tensor,
    v: Tensor,
    b_w: Tensor | None = None,
    b_v: Tensor | None = None,
    *,
    activation: str = "identity",
    beta: float | Tensor = 1.0,
    limit: float | Tensor | None = None,
    offset: float | Tensor | None = None,
) -> Tensor:
    """(x w^T + b_w) * act(x v^T + b_v): x [..., d], w, v [h, d] -> [..., h]."""
    a, z = F.linear(x, w, b_w), F.linear(x, v, b_v)
    return gate(a, z, activation=activation, beta=beta, limit=limit, offset=offset)


def gated_mlp(
    x: Tensor,
    w: Tensor,
    v: Tensor,
    p: Tensor,
    b_w: Tensor | None = None,
    b_v: Tensor | None = None,
    b_p: Tensor | None = None,
    *,
    activation: str = "identity",
    beta: float | Tensor = 1.0,
    limit: float | Tensor | None = None,
    offset: float | Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The gated layer followed by its down-projection, its hidden units masked if asked: p [o, h] -> [..., o]."""
    hid = gated_bilinear(x, w, v, b_w, b_v, activation=activation, beta=beta, limit=limit, offset=offset)
    return F.linear(hid if mask is None else (hid * mask).to(hid.dtype), p, b_p)
