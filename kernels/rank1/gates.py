"""Kernels of gate networks: one small MLP for each subcomponent, of its own activation, a hidden unit at a time.

So nothing of [tokens, C, H] exists. Weights come as [H, C], so that the loads of a unit are contiguous.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bilinear_ops.kernels import config, tuning
from bilinear_ops.kernels import launching as via
from bilinear_ops.kernels.activation import act, act_with_grad
from bilinear_ops.kernels.records import RowTile
from bilinear_ops.kernels.tile import load_tile, store_tile


@triton.jit
def load_unit(ptr, j, column, C, COLUMNS: tl.constexpr):
    """The weights [1, COLUMNS] of hidden unit j, in fp32."""
    columns = column + tl.arange(0, COLUMNS)
    return tl.load(ptr + j * C + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def component_gates_kernel(
    acts_ptr, stride_am, stride_ac,
    w1_ptr, b1_ptr, w2_ptr, b2_ptr,
    out_ptr,
    M, C, H,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program computes one tile [ROWS, COLUMNS] of the logits [M, C]."""
    tiles_c = tl.cdiv(C, COLUMNS)
    row = tl.program_id(0).to(tl.int64) // tiles_c * ROWS
    column = tl.program_id(0) % tiles_c * COLUMNS
    a = load_tile(acts_ptr, stride_am, stride_ac, row, column, M, C, ROWS, COLUMNS, False).to(tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32) + load_unit(b2_ptr, 0, column, C, COLUMNS)
    for j in range(H):
        unit = a * load_unit(w1_ptr, j, column, C, COLUMNS) + load_unit(b1_ptr, j, column, C, COLUMNS)
        total += act(unit, None, "gelu") * load_unit(w2_ptr, j, column, C, COLUMNS)
    store_tile(out_ptr, C, row, column, M, C, total, False)


@triton.jit
def component_gates_backward_kernel(
    dlogits_ptr, stride_dm, stride_dc,
    acts_ptr, stride_am, stride_ac,
    w1_ptr, b1_ptr, w2_ptr,
    dacts_ptr, dw1_ptr, db1_ptr, dw2_ptr,
    M, C, H,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program stores one tile of dacts [M, C], and the sums over its tokens of dw1, db1, dw2: [tiles of M, H, C].

    Each may be None.
    """
    tiles_c = tl.cdiv(C, COLUMNS)
    tile_m = tl.program_id(0).to(tl.int64) // tiles_c
    row = tile_m * ROWS
    column = tl.program_id(0) % tiles_c * COLUMNS
    a = load_tile(acts_ptr, stride_am, stride_ac, row, column, M, C, ROWS, COLUMNS, False).to(tl.float32)
    d = load_tile(dlogits_ptr, stride_dm, stride_dc, row, column, M, C, ROWS, COLUMNS, False).to(tl.float32)
    dacts = tl.zeros((ROWS, COLUMNS), tl.float32)
    for j in range(H):
        w1 = load_unit(w1_ptr, j, column, C, COLUMNS)
        f, df = act_with_grad(a * w1 + load_unit(b1_ptr, j, column, C, COLUMNS), None, "gelu")
        df = d * load_unit(w2_ptr, j, column, C, COLUMNS) * df
        dacts += df * w1
        place = tile_m * H + j
        if dw1_ptr is not None:
            store_sum(dw1_ptr, place, column, C, df * a)
        if db1_ptr is not None:
            store_sum(db1_ptr, place, column, C, df)
        if dw2_ptr is not None:
            store_sum(dw2_ptr, place, column, C, d * f)
    if dacts_ptr is not None:
        store_tile(dacts_ptr, C, row, column, M, C, dacts, False)


@triton.jit
def store_sum(ptr, row, column, C, tile):
    """Store the sum over a tile's tokens to a row of a matrix with C columns; past the last token d is 0."""
    columns = column + tl.arange(0, tile.shape[1])
    tl.store(ptr + row * C + columns, tl.sum(tile, 0), mask=columns < C)


def component_gates(acts: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Logits [M, C] of acts [M, C] in the wider of the two dtypes."""
    (m, c), h = acts.shape, w1.shape[1]
    logits = acts.new_empty(m, c, dtype=torch.promote_types(acts.dtype, w1.dtype))
    units = _by_unit(w1, b1, w2)

    def run(tile: RowTile) -> None:
        component_gates_kernel[(triton.cdiv(m, tile.rows) * triton.cdiv(c, tile.columns),)](
            acts, *acts.stride(), *units, b2.contiguous(), logits, m, c, h,
            ROWS=tile.rows, COLUMNS=tile.columns, **tile.launch(),
        )  # fmt: skip

    if logits.numel():
        tiles = config.tiles("component_gates_kernel", config.architecture(acts.device), acts.dtype)
        via.launch("component_gates_kernel", acts, (tuning.bucket(m), c, h), tiles, run)
    return logits


def component_gates_backward(
    dlogits: Tensor, acts: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, need: list[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of acts, w1, b1, w2 and b2, each None unless needed.

    Partial sums over the tokens of a tile are added in order, in fp32.
    """
    need_acts, *need_units, need_b2 = need
    (m, c), h = acts.shape, w1.shape[1]
    units = _by_unit(w1, b1, w2)
    dacts = acts.new_empty(m, c) if need_acts else None

    def run(tile: RowTile) -> list[Tensor | None]:
        tiles_m = triton.cdiv(m, tile.rows)
        partial = [
            torch.empty(tiles_m, h, c, dtype=torch.float32, device=acts.device) if n else None for n in need_units
        ]
        if m * c:
            component_gates_backward_kernel[(tiles_m * triton.cdiv(c, tile.columns),)](
                dlogits, *dlogits.stride(), acts, *acts.stride(), *units, dacts, *partial, m, c, h,
                ROWS=tile.rows, COLUMNS=tile.columns, **tile.launch(),
            )  # fmt: skip
        return partial

    partial = [None] * 3
    if need_acts or any(need_units):
        tiles = config.tiles("component_gates_backward_kernel", config.architecture(acts.device), acts.dtype)
        partial = via.launch("component_gates_backward_kernel", acts, (tuning.bucket(m), c, h), tiles, run)
    dunits = (None if t is None else t.sum(0).t().to(w1.dtype).contiguous() for t in partial)
    return dacts, *dunits, dlogits.sum(0, dtype=torch.float32).to(w1.dtype) if need_b2 else None


def _by_unit(*weights: Tensor) -> tuple[Tensor, ...]:
    """The weights [C, H] as contiguous [H, C]."""
    return tuple(t.t().contiguous() for t in weights)
