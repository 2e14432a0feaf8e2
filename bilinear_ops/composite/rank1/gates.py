"""Gate networks a block of tokens and one hidden unit at a time, so that nothing of [tokens, C, H] exists."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bilinear_ops.composite.blockwise import blocks, items_per_block
from bilinear_ops.composite.limits import limits

aten = torch.ops.aten


def component_gates(acts: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Logits [M, C] of acts [M, C] in the wider of the two dtypes."""
    logits = acts.new_empty(acts.shape, dtype=torch.promote_types(acts.dtype, w1.dtype))
    for block, columns, b_acts, unit in _blocks(acts, w1):
        total = torch.empty_like(unit).copy_(b2[columns])
        for b_w1, b_b1, b_w2 in _units(columns, unit.dtype, w1, b1, w2):
            torch.addcmul(b_b1, b_acts, b_w1, out=unit)
            total.addcmul_(aten.gelu(unit, out=unit), b_w2)
        logits[block, columns] = total
    return logits


def component_gates_backward(
    dlogits: Tensor, acts: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, need: list[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of acts, w1, b1, w2 and b2, each None unless needed."""
    need_acts, need_w1, need_b1, need_w2, need_b2 = need
    wide = _wide(acts, w1)
    dacts = torch.empty_like(acts, memory_format=torch.contiguous_format) if need_acts else None
    sums = {i: w1.new_zeros(w1.shape[::-1], dtype=wide) for i, n in enumerate((need_w1, need_b1, need_w2)) if n}
    for block, columns, b_acts, unit in _blocks(acts, w1):
        b_dlogits = dlogits[block, columns].to(wide)
        b_dacts = torch.zeros_like(b_acts) if dacts is not None else None
        scratch = torch.empty_like(unit)
        for j, (b_w1, b_b1, b_w2) in enumerate(_units(columns, wide, w1, b1, w2)):
            torch.addcmul(b_b1, b_acts, b_w1, out=unit)
            if need_w2:
                aten.gelu(unit, out=scratch)
                sums[2][j, columns] += scratch.mul_(b_dlogits).sum(0)
            if not (need_acts or need_w1 or need_b1):
                continue
            torch.mul(b_dlogits, b_w2, out=scratch)
            dunit = aten.gelu_backward(scratch, unit, grad_input=scratch)
            if b_dacts is not None:
                b_dacts.addcmul_(dunit, b_w1)
            if need_b1:
                sums[1][j, columns] += dunit.sum(0)
            if need_w1:
                sums[0][j, columns] += dunit.mul_(b_acts).sum(0)
        if dacts is not None and b_dacts is not None:
            dacts[block, columns] = b_dacts
    dw1, db1, dw2 = (sums[i].t().to(w1.dtype).contiguous() if i in sums else None for i in range(3))
    return dacts, dw1, db1, dw2, dlogits.sum(0, dtype=wide).to(w1.dtype) if need_b2 else None


def _wide(acts: Tensor, w1: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(acts.dtype, w1.dtype), torch.float32)


def _blocks(acts: Tensor, w1: Tensor) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """(rows, columns, acts there in fp32 or better, memory of that size), the same memory for every block."""
    wide = _wide(acts, w1)
    tokens, count = acts.shape
    width = max(min(limits.gate_columns, count), 1)
    height = max(min(items_per_block(width, limits.gate_elements), tokens), 1)
    memory = acts.new_empty(height * width, dtype=wide)
    for first, last in blocks(count, 1, width):
        for start, stop in blocks(tokens, 1, height):
            b_acts = acts[start:stop, first:last].to(wide)
            yield slice(start, stop), slice(first, last), b_acts, memory[: b_acts.numel()].view(b_acts.shape)


def _units(columns: slice, wide: torch.dtype, *weights: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The weights [columns] of one hidden unit after the other, each contiguous."""
    return zip(*(t[columns].t().to(wide).contiguous() for t in weights), strict=True)
