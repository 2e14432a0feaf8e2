"""Masked rank-1 subcomponents without masks in memory: one sample and a slab of tokens at a time (docs/math.md 3).

Same functions, same signatures, as `bilinear_ops.kernels.rank1.masked`. With acts = x R, every sample is the product
(acts * (mask - delta)) L, for any kind of mask. The share of delta, delta * x W^T, is not formed here.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bilinear_ops.composite.blockwise import blocks
from bilinear_ops.composite.limits import limits
from bilinear_ops.composite.rank1.masks import blend, mask_site, sample_states, uniform_blocks
from bilinear_ops.results import Masks


def masked_apply(y: Tensor, acts: Tensor, write: Tensor, masks: Masks, beta: float) -> None:
    """y [S, M, d_out] becomes beta y + (acts * (mask - delta)) L: acts [M, C], write [C, d_out]."""
    for slab in _slabs(acts, masks):
        masked_acts = acts.new_empty(slab.stop - slab.start, acts.shape[1])
        for sample in range(masks.samples):
            for rows, g, r in _blocks(masks, sample, slab, acts.shape[1]):
                coefficient = _coefficient(masks, sample, rows, g, r)
                torch.mul(acts[rows], coefficient, out=masked_acts[_within(rows, slab)])
            torch.addmm(y[sample, slab], masked_acts, write, beta=beta, out=y[sample, slab])


def masked_apply_backward(
    dy: Tensor, acts: Tensor, write: Tensor, masks: Masks, need: list[bool]
) -> tuple[Tensor | None, ...]:
    """From dy [S, M, d_out] the gradients of acts, write, gates, source and delta, each None unless needed.

    The masks are drawn again, and each slab's gradient of the masked activations is overwritten by the masked
    activations themselves once it is used up.
    """
    need_acts, need_write, need_gates, need_source, need_delta = need
    wide = torch.promote_types(acts.dtype, torch.float32)
    dacts = acts.new_empty(acts.shape) if need_acts else None
    dwrite = write.new_zeros(write.shape, dtype=wide) if need_write else None
    dgates = _wide_zeros(masks.gates, wide) if need_gates else None
    dsource = _wide_zeros(masks.source, wide) if need_source and masks.source is not None else None
    ddelta = _wide_zeros(masks.delta, wide) if need_delta and masks.delta is not None else None
    for slab in _slabs(acts, masks):
        dslab = acts.new_zeros(slab.stop - slab.start, acts.shape[1], dtype=wide) if need_acts else None
        for sample in range(masks.samples):
            buffer = dy[sample, slab] @ write.t()  # [slab, C]
            for rows, g, r in _blocks(masks, sample, slab, acts.shape[1]):
                here = _within(rows, slab)
                coefficient = _coefficient(masks, sample, rows, g, r)
                dmasked = buffer[here].to(wide)
                if dslab is not None:
                    dslab[here].addcmul_(dmasked, coefficient.to(wide))
                dmask = _routed(dmasked * acts[rows], masks, rows)
                if dgates is not None:
                    _add_rows(dgates, rows, dmask if r is None else dmask * (1 - _draw(r, masks)))
                if dsource is not None:
                    _add_rows(dsource[sample % len(dsource)], rows, dmask * (1 - g))
                if ddelta is not None:
                    ddelta[sample, rows] -= dmask.sum(1)
                if need_write:
                    torch.mul(acts[rows], coefficient, out=buffer[here])
            if dwrite is not None:
                _add_product(dwrite, buffer.t(), dy[sample, slab])
        if dacts is not None and dslab is not None:
            dacts[slab] = dslab
    return dacts, None if dwrite is None else dwrite.to(acts.dtype), dgates, dsource, ddelta


def _slabs(acts: Tensor, masks: Masks) -> Iterator[slice]:
    """Slices of the tokens, none of which crosses the period of the gates."""
    tokens, columns = acts.shape
    period = masks.gates.shape[0] if masks.gates.shape[0] > 1 else max(tokens, 1)
    for start in range(0, tokens, period):
        for a, b in blocks(period, columns, limits.slab):
            yield slice(start + a, start + b)


def _blocks(masks: Masks, sample: int, slab: slice, columns: int) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """(token slice, gates, random numbers or source) for blocks small enough for the cache."""
    pieces: Iterator[tuple[slice, Tensor | None]] = _source_blocks(masks.source, sample, slab, columns)
    if masks.seed is not None:
        state = sample_states(masks.seed, mask_site(masks.stream), masks.samples)[sample]
        numbers = masks.row_numbers, masks.column_numbers
        pieces = iter(uniform_blocks(state, masks.seed.device, slab.start, slab.stop, columns, *numbers))
    for rows, r in pieces:
        gates = _rows(masks.gates, rows)
        yield rows, gates.to(torch.promote_types(gates.dtype, torch.float32)), r


def _source_blocks(
    source: Tensor | None, sample: int, slab: slice, columns: int
) -> Iterator[tuple[slice, Tensor | None]]:
    for a, b in blocks(slab.stop - slab.start, columns, 2 * limits.draws):
        rows = slice(slab.start + a, slab.start + b)
        yield rows, None if source is None else _rows(source[sample % source.shape[0]], rows)


def _coefficient(masks: Masks, sample: int, rows: slice, g: Tensor, r: Tensor | None) -> Tensor:
    """mask - delta  [rows, C], 0 for tokens routed past the subcomponents."""
    if r is None:
        mask = g
    elif masks.sampling == "binomial":
        mask = torch.where(r >= 0.5, 1, g)
    else:
        mask = blend(g, r)
    if masks.delta is not None:
        mask = mask - masks.delta[sample, rows, None]
    return _routed(mask, masks, rows)


def _draw(r: Tensor, masks: Masks) -> Tensor:
    """A uniform as the sampling uses it: dmask/dg = 1 - draw for every kind of mask."""
    return (r >= 0.5).to(r.dtype) if masks.sampling == "binomial" else r


def _routed(t: Tensor, masks: Masks, rows: slice) -> Tensor:
    return t if masks.routing is None else torch.where(masks.routing[rows, None], t, 0)


def _rows(t: Tensor, rows: slice) -> Tensor:
    """Those rows of a tensor whose rows repeat: none of our slices crosses its period."""
    start = rows.start % t.shape[0]
    return t[start : start + rows.stop - rows.start]


def _within(rows: slice, slab: slice) -> slice:
    return slice(rows.start - slab.start, rows.stop - slab.start)


def _add_rows(total: Tensor, rows: slice, values: Tensor) -> None:
    if total.shape[0] == 1:
        total += values.sum(0, keepdim=True)
    else:
        _rows(total, rows).add_(values)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _wide_zeros(t: Tensor, wide: torch.dtype) -> Tensor:
    return torch.zeros(t.shape, dtype=torch.promote_types(t.dtype, wide), device=t.device)
