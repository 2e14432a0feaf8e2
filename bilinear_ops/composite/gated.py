"""The gate of the gated layer with its backward by hand, so that nothing but [a | z] is kept.

Same two functions, same signatures, as `bilinear_ops.kernels.gated`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bilinear_ops.composite.blockwise import blocks
from bilinear_ops.composite.limits import limits
from bilinear_ops.results import Gate

aten = torch.ops.aten

ACTIVATE: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu2": lambda z: F.relu(z).square_(),
    "relu6": F.relu6,
    "tanh": torch.tanh,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "silu_clamped": F.silu,
    "silu_bounded": lambda z: torch.tanh(z / 4).mul_(torch.sigmoid(z)).mul_(4),
}


def row_blocks(x: Tensor, h: int) -> list[slice | None]:
    """Rows of x for which the backward is computed at a time; on CPU few, so that its temporaries stay small.

    All, None, in half precision: there every block would round the sums over rows once more. Blocks have
    nearly one height: the library's product of a few rows that are left over sums less accurately.
    """
    m = x.shape[0]
    rows = max(limits.gradient_bytes // max(2 * h * x.itemsize, 1), limits.gradient_rows) * torch.get_num_threads()
    if m <= rows or x.itemsize < 4 or x.device.type != "cpu":
        return [None]
    return [slice(a, b) for a, b in blocks(m, 1, math.ceil(m / math.ceil(m / rows)))]


def gate_forward(
    x: Tensor,
    w: Tensor,
    v: Tensor,
    b_w: Tensor | None,
    b_v: Tensor | None,
    gate_of: Gate,
    save: bool,
) -> tuple[Tensor, Tensor | None]:
    """hid = gate(a, z) [M, h], and az = [a | z] [M, 2h] if `save`."""
    az = preactivations(x, w, v, b_w, b_v)
    hid = gate(az[:, : w.shape[0]], az[:, w.shape[0] :], gate_of)
    return hid, az if save else None


def preactivations(x: Tensor, w: Tensor, v: Tensor, b_w: Tensor | None, b_v: Tensor | None) -> Tensor:
    """[a | z] = [x w^T + b_w | x v^T + b_v]  [M, 2h]: one library GEMM of packed weights, or two into one buffer.

    No weight is copied.
    """
    packed = stacked(w, v)
    if packed is not None and b_w is None and b_v is None:
        return torch.mm(x, packed.t())
    if packed is not None and b_w is not None and b_v is not None:
        biases = stacked(b_w, b_v)
        if biases is not None:
            return torch.addmm(biases, x, packed.t())
    h = w.shape[0]
    az = x.new_empty(x.shape[0], 2 * h)
    for out, weight, bias in ((az[:, :h], w, b_w), (az[:, h:], v, b_v)):
        if bias is None:
            torch.mm(x, weight.t(), out=out)
        else:
            torch.addmm(bias, x, weight.t(), out=out)
    return az


def stacked(first: Tensor, second: Tensor) -> Tensor | None:
    """[first; second] where both lie like that in one storage, as the halves of a packed weight do: a view of it."""
    step = first.stride(0)
    if not (step > 0 and second.stride() == first.stride() and second.shape == first.shape and first.numel()):
        return None
    apart = second.storage_offset() - first.storage_offset()
    if apart != first.shape[0] * step or first.untyped_storage()._cdata != second.untyped_storage()._cdata:
        return None
    return first.as_strided((2 * first.shape[0], *first.shape[1:]), first.stride())


def gate(a: Tensor, z: Tensor, gate_of: Gate) -> Tensor:
    """hid [M, h] from pre-activations [M, h] of any strides."""
    hid = a.new_empty(a.shape)
    for b_hid, b_a, b_z in _row_blocks(hid, a, z):
        b_a, _, b_act = _factors(b_a, b_z, gate_of)
        torch.mul(b_a, b_act, out=b_hid)
    return hid


def gate_backward(
    dy: Tensor,
    p: Tensor | None,
    az: Tensor,
    gate_of: Gate,
    need_hid: bool,
    need_beta: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """[da | dz] [M, 2h], and hid [M, h] and dbeta [] if needed, from dy of y = hid p^T, or from dhid if p is None."""
    a, z = az.chunk(2, 1)
    dhid = dy if p is None else dy @ p
    hid = None  # a block of dhid is read before its block of hid is written
    if need_hid:
        hid = dhid if p is not None else az.new_empty(a.shape)
    dadz = torch.empty_like(az)
    da, dz = dadz.chunk(2, 1)
    dbeta = gate_gradients(dhid, a, z, gate_of, da, dz, hid, need_beta)
    return dadz, hid, dbeta


def gate_gradients(
    dhid: Tensor, a: Tensor, z: Tensor, gate_of: Gate, da: Tensor, dz: Tensor, hid: Tensor | None, need_beta: bool
) -> Tensor | None:
    """Write da, dz and, unless None, hid from dhid [M, h]; return dbeta if needed."""
    dbetas = []
    matrices = (dhid, a, z, da, dz) if hid is None else (dhid, a, z, da, dz, hid)
    for b_dhid, b_a, b_z, b_da, b_dz, *b_hid in _row_blocks(*matrices):
        factor, inside, b_act = _factors(b_a, b_z, gate_of)
        torch.mul(b_dhid, b_act, out=b_da)
        torch.mul(b_dhid, factor, out=b_dz)  # the gradient of act(z), turned into that of z in place
        if need_beta and gate_of.beta is not None:
            dbetas.append(_beta_gradient(b_dz, inside, gate_of.beta))
        _activation_backward_(b_dz, inside, b_act, gate_of.beta, gate_of.activation)
        _bounds_backward_(b_da, b_dz, b_a, b_z, gate_of)
        if b_hid:
            torch.mul(factor, b_act, out=b_hid[0])
    return torch.stack(dbetas).sum() if dbetas else None


def _factors(a: Tensor, z: Tensor, gate_of: Gate) -> tuple[Tensor, Tensor, Tensor]:
    """The linear factor of the gate, the argument of its activation, and the activation."""
    activation, beta, limit, offset = gate_of
    if limit is not None:
        a = a.clamp(min=-limit, max=limit)
        z = z if activation == "silu_clamped" else z.clamp(max=limit)
    act = _activate(z, beta, activation)
    if limit is not None and activation == "silu_clamped":
        act = act.clamp(max=limit)
    if activation == "silu_bounded":
        a = torch.tanh(a / 25).mul_(25)
    return a if offset is None else a + offset, z, act


def _bounds_backward_(da: Tensor, dz: Tensor, a: Tensor, z: Tensor, gate_of: Gate) -> None:
    """Multiply da and dz in place by the derivatives of the bounds on a and z: 0 outside a limit."""
    limit = gate_of.limit
    if limit is not None:
        da.masked_fill_(a.abs() > limit, 0)
        dz.masked_fill_((F.silu(z) if gate_of.activation == "silu_clamped" else z) > limit, 0)
    if gate_of.activation == "silu_bounded":
        da.mul_(1 - torch.tanh(_wide(a) / 25).square_())


def _row_blocks(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """The matrices in blocks of rows; on CPU blocks that stay in cache from one elementwise pass to the next."""
    m, h = tensors[0].shape
    rows = max(limits.cached_bytes // max(h * tensors[0].itemsize, 1), 1)
    if m <= rows or tensors[0].device.type != "cpu":
        return (tensors,)
    return (tuple(t[a:b] for t in tensors) for a, b in blocks(m, 1, rows))


def _activate(z: Tensor, beta: Tensor | None, activation: str) -> Tensor:
    if activation == "identity":
        return z
    if activation == "swish":
        assert beta is not None
        return z * torch.sigmoid(beta * z)
    return ACTIVATE[activation](z)


def _activation_backward_(dz: Tensor, z: Tensor, act: Tensor, beta: Tensor | None, activation: str) -> None:
    """Multiply dz by act'(z) in place, through PyTorch's own fused backwards."""
    if activation in ("silu", "silu_clamped"):
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
    elif activation == "relu2":
        dz.mul_(F.relu(z).mul_(2))
    elif activation == "relu6":
        aten.hardtanh_backward(dz, z, 0, 6, grad_input=dz)
    elif activation == "tanh":
        aten.tanh_backward(dz, act, grad_input=dz)
    elif activation == "mish":
        dz.copy_(aten.mish_backward(dz, z))
    elif activation == "hardswish":
        aten.hardswish_backward(dz, z, out=dz)
    elif activation == "silu_bounded":
        t, s = torch.tanh(_wide(z) / 4), torch.sigmoid(_wide(z))
        dz.mul_((1 - t.square()) * s + 4 * t * s * (1 - s))


def _wide(t: Tensor) -> Tensor:
    """t in fp32 or better."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _beta_gradient(dact: Tensor, z: Tensor, beta: Tensor) -> Tensor:
    """sum dact * d act / d beta = sum dact * z^2 s (1 - s), s = sigmoid(beta z), in fp32 or better."""
    z = _wide(z)
    s = torch.sigmoid(beta * z)
    return s.mul_(1 - s).mul_(z).mul_(z).mul_(dact).sum()
