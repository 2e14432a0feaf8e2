"""The gate of the gated layer with its backward by hand, so that nothing but [a | z] is kept.

Same two functions, same signatures, as `bilinear_ops.kernels.gated`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten

ACTIVATE: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}

CACHED_BYTES = 1 << 20  # of each matrix in a block of rows: several fit the last-level cache, and blocks are few

BLOCK_BYTES = 8 << 20  # of [da | dz] in a block of the backward's rows: an allocator uses such a block again and again


def row_blocks(x: Tensor, h: int) -> list[slice]:
    """Rows of x for which the backward is computed at a time; on CPU few, so that its temporaries stay small.

    All in half precision: there every block would round the sums over rows once more.
    """
    m = x.shape[0]
    rows = max(BLOCK_BYTES // max(2 * h * x.itemsize, 1), 128) * torch.get_num_threads()
    if m <= rows or x.itemsize < 4 or x.device.type != "cpu":
        return [slice(0, m)]
    return [slice(start, start + rows) for start in range(0, m, rows)]


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
    h = w.shape[0]
    az = x.new_empty(x.shape[0], 2 * h)
    for out, weight, bias in ((az[:, :h], w, b_w), (az[:, h:], v, b_v)):
        if bias is None:
            torch.mm(x, weight.t(), out=out)
        else:
            torch.addmm(bias, x, weight.t(), out=out)
    return az


def gate(az: Tensor, beta: Tensor | None, activation: str) -> Tensor:
    """hid = a * act(z)  [M, h]."""
    a, z = az.chunk(2, 1)
    hid = az.new_empty(a.shape)
    for b_hid, b_a, b_z in _row_blocks(hid, a, z):
        torch.mul(b_a, _activate(b_z, beta, activation), out=b_hid)
    return hid


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
    hid = dhid if p is not None else az.new_empty(a.shape)  # a block of dhid is read before its block of hid is written
    dadz = torch.empty_like(az)
    dbetas = []
    for b_dhid, b_a, b_z, b_da, b_dz, b_hid in _row_blocks(dhid, a, z, *dadz.chunk(2, 1), hid):
        b_act = _activate(b_z, beta, activation)
        torch.mul(b_dhid, b_act, out=b_da)
        torch.mul(b_dhid, b_a, out=b_dz)  # the gradient of act(z), turned into that of z in place
        if need_beta and beta is not None:
            dbetas.append(_beta_gradient(b_dz, b_z, beta))
        _activation_backward_(b_dz, b_z, b_act, beta, activation)
        if need_hid:
            torch.mul(b_a, b_act, out=b_hid)
    return dadz, hid if need_hid else None, torch.stack(dbetas).sum() if dbetas else None


def _row_blocks(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """The matrices in blocks of rows; on CPU blocks that stay in cache from one elementwise pass to the next."""
    m, h = tensors[0].shape
    rows = max(CACHED_BYTES // max(h * tensors[0].itemsize, 1), 1)
    if m <= rows or tensors[0].device.type != "cpu":
        return (tensors,)
    return zip(*(t.split(rows) for t in tensors), strict=True)


def _activate(z: Tensor, beta: Tensor | None, activation: str) -> Tensor:
    if activation == "identity":
        return z
    if activation == "swish":
        assert beta is not None
        return z * torch.sigmoid(beta * z)
    return ACTIVATE[activation](z)


def _activation_backward_(dz: Tensor, z: Tensor, act: Tensor, beta: Tensor | None, activation: str) -> None:
    """Multiply dz by act'(z) in place, through PyTorch's own fused backwards."""
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


def _beta_gradient(dact: Tensor, z: Tensor, beta: Tensor) -> Tensor:
    """sum dact * d act / d beta = sum dact * z^2 s (1 - s), s = sigmoid(beta z), in fp32 or better."""
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    s = torch.sigmoid(beta * z)
    return s.mul_(1 - s).mul_(z).mul_(z).mul_(dact).sum()
