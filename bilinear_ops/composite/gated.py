"""The gate of the gated layer with its backward by hand, so that nothing but [a | z] is kept.

Same two functions, same signatures, as `bilinear_ops.kernels.gated`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bilinear_ops.reference.gated import activate

aten = torch.ops.aten


def gate_forward(
    x: Tensor,
    w: Tensor,
    v: Tensor,
    b_w: Tensor | None,
    b_v: Tensor | None,
    beta: Tensor | None,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor | None]:
    """hid = a * act(z) [M, h], and az = [a | z] [M, 2h] if `save`."""
    az = preactivations(x, w, v, b_w, b_v)
    hid = gate(az, beta, activation)
    return hid, az if save else None


def preactivations(x: Tensor, w: Tensor, v: Tensor, b_w: Tensor | None, b_v: Tensor | None) -> Tensor:
    """[a | z] = [x w^T + b_w | x v^T + b_v]  [M, 2h]: two library GEMMs into one buffer; no weight is copied."""
    az = x.new_empty(x.shape[0], 2 * w.shape[0])
    for out, weight, bias in zip(az.chunk(2, 1), (w, v), (b_w, b_v), strict=True):
        if bias is None:
            torch.mm(x, weight.t(), out=out)
        else:
            torch.addmm(bias, x, weight.t(), out=out)
    return az


def gate(az: Tensor, beta: Tensor | None, activation: str) -> Tensor:
    """hid = a * act(z)  [M, h]."""
    a, z = az.chunk(2, 1)
    return a * z if activation == "identity" else _activate(z, beta, activation).mul_(a)


def gate_backward(
    dy: Tensor,
    p: Tensor | None,
    az: Tensor,
    beta: Tensor | None,
    activation: str,
    need_hid: bool,
    need_beta: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """[da | dz] [M, 2h], hid [M, h] and dbeta [] where needed, from the gradient of y = hid p^T, or of hid itself."""
    a, z = az.chunk(2, 1)
    dhid = dy if p is None else dy @ p
    dadz = torch.empty_like(az)
    da, dz = dadz.chunk(2, 1)
    act = _activate(z, beta, activation)  # [M, h]
    torch.mul(dhid, act, out=da)
    torch.mul(dhid, a, out=dz)  # the gradient of act(z), turned into that of z in place
    dbeta = _beta_gradient(dz, z, beta) if need_beta and beta is not None else None
    if activation == "silu":
        aten.silu_backward(dz, z, grad_input=dz)
    elif activation == "swish":
        assert beta is not None
        aten.silu_backward(dz, beta * z, grad_input=dz)  # act(z) = silu(beta z) / beta, so act'(z) = silu'(beta z)
    elif activation == "sigmoid":
        aten.sigmoid_backward(dz, act, grad_input=dz)
    elif activation == "relu":
        aten.threshold_backward(dz, z, 0, grad_input=dz)
    elif activation in ("gelu", "gelu_tanh"):
        aten.gelu_backward(dz, z, approximate="tanh" if activation == "gelu_tanh" else "none", grad_input=dz)
    hid = None if not need_hid else a * z if activation == "identity" else act.mul_(a)
    return dadz, hid, dbeta


def _activate(z: Tensor, beta: Tensor | None, activation: str) -> Tensor:
    return activate(z, activation, 1.0 if beta is None else beta)


def _beta_gradient(dact: Tensor, z: Tensor, beta: Tensor) -> Tensor:
    """sum dact * d act / d beta = sum dact * z^2 s (1 - s), s = sigmoid(beta z), in fp32 or better."""
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    s = torch.sigmoid(beta * z)
    return (s.mul_(1 - s).mul_(z).mul_(z).mul_(dact)).sum()
