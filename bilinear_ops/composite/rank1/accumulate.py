"""Weights summed from gated rank-1 subcomponents, by whichever order of contraction needs the smaller workspace.

- many rows of gates: one product of the gates with all pieces l_c r_c^T [C, d_out d_in].
- few: one product of the gated L [rows, d_out, C] with R, a slab of rows at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bilinear_ops.composite.blockwise import blocks
from bilinear_ops.composite.limits import limits


def rank1_accumulate(gates: Tensor, read: Tensor, write: Tensor, base: Tensor | None) -> Tensor:
    """base + sum_c g_c l_c r_c^T [rows, d_out, d_in] of gates [rows, C]; base has the result's sizes or 1."""
    (rows, _), d_in, d_out = gates.shape, read.shape[0], write.shape[1]
    if rows > d_in:
        weights = (gates.to(read.dtype) @ _pieces(read, write).flatten(1)).view(rows, d_out, d_in)
    else:
        weights = read.new_empty(rows, d_out, d_in)
        for a, b in blocks(rows, write.numel(), limits.slab):
            torch.matmul(_gated(gates[a:b], write, read.dtype), read.t(), out=weights[a:b])
    return weights if base is None else weights.add_(base)


def rank1_accumulate_backward(
    dweights: Tensor, gates: Tensor, read: Tensor, write: Tensor, need: list[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of gates, read and write, each None unless needed."""
    by_pieces = gates.shape[0] > read.shape[0]
    dgates, dread, dwrite = (_by_pieces if by_pieces else _by_rows)(dweights, gates, read, write, need)
    return (
        None if dgates is None else dgates.to(gates.dtype),
        None if dread is None else dread.t().to(read.dtype).contiguous(),
        None if dwrite is None else dwrite.to(write.dtype).contiguous(),
    )


def _pieces(read: Tensor, write: Tensor) -> Tensor:
    """l_c r_c^T of every subcomponent: [C, d_out, d_in]."""
    return write[:, :, None] * read.t()[:, None, :]


def _gated(gates: Tensor, write: Tensor, dtype: torch.dtype) -> Tensor:
    """g_c l_c of every subcomponent and row of gates: [rows, d_out, C]."""
    return (gates[:, None, :] * write.t()).to(dtype)


def _by_pieces(
    dweights: Tensor, gates: Tensor, read: Tensor, write: Tensor, need: list[bool]
) -> tuple[Tensor | None, ...]:
    """(dgates [rows, C], dread [C, d_in], dwrite [C, d_out]): through the gradient of the pieces."""
    need_gates, need_read, need_write = need
    dweights = dweights.flatten(1)
    dgates = dread = dwrite = None
    if need_gates:
        dgates = dweights @ _pieces(read, write).flatten(1).t()
    if need_read or need_write:
        dpieces = (gates.to(read.dtype).t() @ dweights).view(*write.shape, read.shape[0])
        dread = torch.bmm(write[:, None, :], dpieces)[:, 0] if need_read else None
        dwrite = torch.bmm(dpieces, read.t()[:, :, None])[:, :, 0] if need_write else None
    return dgates, dread, dwrite


def _by_rows(
    dweights: Tensor, gates: Tensor, read: Tensor, write: Tensor, need: list[bool]
) -> tuple[Tensor | None, ...]:
    """(dgates [rows, C], dread [C, d_in], dwrite [C, d_out]): through dW_b R, a slab of rows at a time."""
    need_gates, need_read, need_write = need
    wide = torch.promote_types(torch.promote_types(gates.dtype, read.dtype), torch.float32)
    dgates = gates.new_empty(gates.shape, dtype=wide) if need_gates else None
    dread = read.new_zeros(read.shape[::-1], dtype=wide) if need_read else None
    dwrite = write.new_zeros(write.shape, dtype=wide) if need_write else None
    for a, b in blocks(gates.shape[0], write.numel(), limits.slab):
        if dread is not None:
            gated = _gated(gates[a:b], write, read.dtype)
            dread += gated.flatten(0, 1).t() @ dweights[a:b].flatten(0, 1)
        if dgates is None and dwrite is None:
            continue
        product = (dweights[a:b] @ read).to(wide)  # [slab, d_out, C]
        if dgates is not None:
            torch.sum(product * write.t(), 1, out=dgates[a:b])
        if dwrite is not None:
            dwrite += product.mul_(gates[a:b, None, :]).sum(0).t()
    return dgates, dread, dwrite
