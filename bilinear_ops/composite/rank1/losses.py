"""Mean squared difference between a weight and its subcomponents, a band of output rows at a time (docs/math.md 3).

Through the residual, never through Gram matrices: those are wrong by factors where the fit is good.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bilinear_ops.composite.blockwise import blocks, items_per_block
from bilinear_ops.composite.limits import limits


def squared_difference(weight: Tensor, read: Tensor, write: Tensor) -> Tensor:
    """sum (W - (R L)^T)^2 in fp32 or better."""
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    for _, residual in _residuals(weight, read, write):
        total += residual.square().sum(dtype=torch.float64)
    return total.to(torch.promote_types(weight.dtype, torch.float32))


def squared_difference_backward(
    scale: Tensor, weight: Tensor, read: Tensor, write: Tensor, need: list[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of scale/2 sum (W - (R L)^T)^2 in weight, read and write, each None unless needed."""
    need_weight, need_read, need_write = need
    wide = torch.promote_types(weight.dtype, torch.float32)
    scale, wide_read, wide_write = scale.to(wide), read.to(wide), write.to(wide)
    dweight = weight.new_empty(weight.shape) if need_weight else None
    dread = wide_read.new_zeros(read.shape) if need_read else None
    dwrite = write.new_empty(write.shape) if need_write else None
    for band, residual in _residuals(weight, wide_read, wide_write):
        residual *= scale
        if dweight is not None:
            dweight[band] = residual
        if dread is not None:
            dread.addmm_(residual.t(), wide_write[:, band].t(), alpha=-1)
        if dwrite is not None:
            dwrite[:, band] = (residual @ wide_read).t().neg_()
    return dweight, None if dread is None else dread.to(read.dtype), dwrite


def _residuals(weight: Tensor, read: Tensor, write: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(slice of output rows, W - (R L)^T on them [band, d_in]), always into the same memory."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    read, write = read.to(wide), write.to(wide)
    rows, d_in = weight.shape
    height = min(items_per_block(d_in, limits.band), max(rows, 1))
    buffer = torch.empty(height, d_in, dtype=wide, device=weight.device)
    for a, b in blocks(rows, d_in, limits.band):
        band = slice(a, b)
        residual = buffer[: b - a].copy_(weight[band])
        yield band, residual.addmm_(write[:, band].t(), read.t(), alpha=-1)
