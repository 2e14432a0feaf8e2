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
    raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def gated_bilinear(
    x: Tensor,
    w: Tensor,
    v: Tensor,
    b_w: Tensor | None = None,
    b_v: Tensor | None = None,
    *,
    activation: str = "identity",
    beta: float | Tensor = 1.0,
) -> Tensor:
    """(x w^T + b_w) * act(x v^T + b_v): x [..., d], w, v [h, d] -> [..., h]."""
    return F.linear(x, w, b_w) * activate(F.linear(x, v, b_v), activation, beta)


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
    mask: Tensor | None = None,
) -> Tensor:
    """The gated layer followed by its down-projection, its hidden units masked if asked: p [o, h] -> [..., o]."""
    hid = gated_bilinear(x, w, v, b_w, b_v, activation=activation, beta=beta)
    return F.linear(hid if mask is None else (hid * mask).to(hid.dtype), p, b_p)
