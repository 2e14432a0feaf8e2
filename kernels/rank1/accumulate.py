"""Kernels of weights summed from gated rank-1 subcomponents: W_b = base + sum_c g_bc l_c r_c^T.

Forward: one product with R for each b, whose other operand is gated as it is loaded. Backward: dW_b R and dW_b^T L^T,
multiplied by the gates and summed over b in registers. So nothing of [B, C, d] exists, which a library's product needs
in memory.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from bilinear_ops.composite.rank1 import accumulate as composite
from bilinear_ops.kernels import config, tuning
from bilinear_ops.kernels import launching as via
from bilinear_ops.kernels.records import Tile
from bilinear_ops.kernels.tile import load_tile, store_tile

T = TypeVar("T")
WAVES = 4  # of programs a multiprocessor, beyond which longer sums are preferred to more partial ones


@triton.jit
def accumulate_kernel(
    gates_ptr, stride_gb, stride_gc,
    read_ptr, stride_ri, stride_rc,
    write_ptr, stride_lc, stride_lo,
    base_ptr, stride_bb, stride_bo, stride_bi,
    out_ptr,
    O, I, C,
    PRECISION: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program computes one tile [BLOCK_O, BLOCK_I] of one weight; those of a weight are neighbours."""
    tiles_i = tl.cdiv(I, BLOCK_I)
    tiles = tl.cdiv(O, BLOCK_O) * tiles_i
    b = (tl.program_id(0) // tiles).to(tl.int64)
    o = tl.program_id(0) % tiles // tiles_i * BLOCK_O
    i = tl.program_id(0) % tiles_i * BLOCK_I
    product = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for c in range(0, C, BLOCK_C):
        g = load_gates(gates_ptr + b * stride_gb, stride_gc, c, C, BLOCK_C)
        b_write = load_tile(write_ptr, stride_lo, stride_lc, o, c, O, C, BLOCK_O, BLOCK_C, False)
        b_read = load_tile(read_ptr, stride_rc, stride_ri, c, i, C, I, BLOCK_C, BLOCK_I, False)
        gated = (b_write.to(tl.float32) * g[None, :]).to(b_read.dtype)
        product = tl.dot(gated, b_read, product, input_precision=PRECISION)
    if base_ptr is not None:
        p_base = base_ptr + b * stride_bb
        product += load_tile(p_base, stride_bo, stride_bi, o, i, O, I, BLOCK_O, BLOCK_I, False).to(tl.float32)
    store_tile(out_ptr + b * O * I, I, o, i, O, I, product, False)


@triton.jit
def load_gates(ptr, stride_c, c, C, BLOCK_C: tl.constexpr):
    """BLOCK_C gates of one weight from c on, in fp32 and 0 past the last: [BLOCK_C]."""
    columns = c + tl.arange(0, BLOCK_C).to(tl.int64)
    return tl.load(ptr + columns * stride_c, mask=columns < C, other=0.0).to(tl.float32)


@triton.jit
def accumulate_backward_kernel(
    dw_ptr, stride_wb, stride_wr, stride_wk,
    factor_ptr, stride_fk, stride_fc,
    other_ptr, stride_er, stride_ec,
    gates_ptr, stride_gb, stride_gc,
    sums_ptr, dgates_ptr,
    B, R, K, C, SPAN,
    PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program forms one tile [BLOCK_R, BLOCK_C] of P_b = dW_b F for SPAN weights b, one after the other.

    dW_b is [R, K], F [K, C]. sums [spans, R, C] gets sum_b g_b * P_b over the span, dgates [tiles of R, B, C] the sum
    over the tile's rows of P_b * E with E [R, C]; either may be None.
    """
    tiles_c = tl.cdiv(C, BLOCK_C)
    tile_r = tl.program_id(0) // tiles_c
    r = tile_r * BLOCK_R
    c = tl.program_id(0) % tiles_c * BLOCK_C
    span = tl.program_id(1).to(tl.int64)
    columns = c + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for n in range(SPAN):
        b = span * SPAN + n
        rows, subcomponents = tl.where(b < B, R, 0), tl.where(b < B, C, 0)  # none past the last weight
        product = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for k in range(0, K, BLOCK_K):
            p_dw = dw_ptr + b * stride_wb
            b_dw = load_tile(p_dw, stride_wr, stride_wk, r, k, rows, K, BLOCK_R, BLOCK_K, False)
            b_factor = load_tile(factor_ptr, stride_fk, stride_fc, k, c, K, C, BLOCK_K, BLOCK_C, False)
            product = tl.dot(b_dw, b_factor, product, input_precision=PRECISION)
        if sums_ptr is not None:
            p_gates = gates_ptr + b * stride_gb
            total += product * load_gates(p_gates, stride_gc, c, subcomponents, BLOCK_C)[None, :]
        if dgates_ptr is not None:  # E is read again for each b: held, it takes registers that the products need
            b_other = load_tile(other_ptr, stride_er, stride_ec, r, c, R, C, BLOCK_R, BLOCK_C, False).to(tl.float32)
            p_dgates = dgates_ptr + (tile_r.to(tl.int64) * B + b) * C + columns
            tl.store(p_dgates, tl.sum(product * b_other, 0), mask=columns < subcomponents)
    if sums_ptr is not None:
        store_tile(sums_ptr + span * R * C, C, r, c, R, C, total, False)


def rank1_accumulate(
    gates: Tensor, read: Tensor, write: Tensor, base: Tensor | None, *, library: bool = True
) -> Tensor:
    """base + sum_c g_c l_c r_c^T [rows, d_out, d_in] of gates [rows, C]; base has the result's sizes or 1.

    `library` lets the table of tiles leave the sizes to the library's products; without it a kernel runs.
    """
    (rows, c), d_in, d_out = gates.shape, read.shape[0], write.shape[1]

    def run(tile: Tile | None) -> Tensor:
        if tile is None:
            return composite.rank1_accumulate(gates, read, write, base)
        weights = read.new_empty(rows, d_out, d_in)
        wide = None if base is None else base.expand(weights.shape)
        tiles = triton.cdiv(d_out, tile.block_m) * triton.cdiv(d_in, tile.block_n)
        accumulate_kernel[(rows * tiles,)](
            gates, *gates.stride(), read, *read.stride(), write, *write.stride(),
            wide, *((0, 0, 0) if wide is None else wide.stride()), weights, d_out, d_in, c,
            PRECISION=via.accurate_precision(read),
            BLOCK_O=tile.block_m, BLOCK_I=tile.block_n, BLOCK_C=tile.block_k, **tile.launch(),
        )  # fmt: skip
        return weights

    if rows * d_out * d_in == 0:
        return run(config.LIBRARY)
    return _launch("accumulate_kernel", gates, read, write, run, library)


def rank1_accumulate_backward(
    dweights: Tensor, gates: Tensor, read: Tensor, write: Tensor, need: list[bool], *, library: bool = True
) -> tuple[Tensor | None, ...]:
    """Gradients of gates, read and write, each None unless needed."""
    need_gates, need_read, need_write = need

    def run(tile: Tile | None) -> tuple[Tensor | None, ...]:
        if tile is None:
            return composite.rank1_accumulate_backward(dweights, gates, read, write, need)
        dwrite, dgates = contract(dweights, read, write.t(), gates, tile, need_write, need_gates)
        dread, _ = contract(dweights.mT, write.t(), read, gates, tile, need_read, False)
        return (
            None if dgates is None else dgates.to(gates.dtype),
            None if dread is None else dread.to(read.dtype),
            None if dwrite is None else dwrite.t().to(write.dtype).contiguous(),
        )

    if dweights.numel() == 0 or gates.shape[1] == 0:
        return run(config.LIBRARY)
    return _launch("accumulate_backward_kernel", gates, read, write, run, library)


def _launch(
    kernel: str, gates: Tensor, read: Tensor, write: Tensor, run: Callable[[Tile | None], T], library: bool
) -> T:
    (rows, c), d_in, d_out = gates.shape, read.shape[0], write.shape[1]
    arch = config.architecture(read.device)
    choose = partial(config.accumulate, rows=rows, d_in=d_in) if library else config.tiles
    shape = (tuning.bucket(rows), d_out, d_in, c)
    return via.launch(kernel, read, shape, choose(kernel, arch, read.dtype), run, library=library)


def contract(
    dw: Tensor, factor: Tensor, other: Tensor, gates: Tensor, tile: Tile, summed: bool, reduced: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Of P_b = dw_b factor, dw [B, R, K], the sum of g_b * P_b [R, C] and the column sums of P_b * other [B, C].

    Partial sums of both are added in order, in fp32; None unless `summed`, None unless `reduced`.
    """
    if not (summed or reduced):
        return None, None
    (b, r, k), c = dw.shape, factor.shape[1]
    tiles_r, tiles_c = triton.cdiv(r, tile.block_m), triton.cdiv(c, tile.block_n)
    span = triton.cdiv(b, max(1, WAVES * config.processors(dw.device) // (tiles_r * tiles_c)))
    spans = triton.cdiv(b, span)
    sums = torch.empty(spans, r, c, dtype=torch.float32, device=dw.device) if summed else None
    dgates = torch.empty(tiles_r, b, c, dtype=torch.float32, device=dw.device) if reduced else None
    accumulate_backward_kernel[(tiles_r * tiles_c, spans)](
        dw, *dw.stride(), factor, *factor.stride(), other, *other.stride(), gates, *gates.stride(), sums, dgates,
        b, r, k, c, span, PRECISION=via.accurate_precision(factor),
        BLOCK_R=tile.block_m, BLOCK_C=tile.block_n, BLOCK_K=tile.block_k, **tile.launch(),
    )  # fmt: skip
    return None if sums is None else sums.sum(0), None if dgates is None else dgates.sum(0)
