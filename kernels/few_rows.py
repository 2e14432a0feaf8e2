"""The gated layer's forward for few rows, whose tiles alone would leave most of a device idle.

The contraction is split as well: each program sums one part of it for one tile, so that every weight is read once and
by as many programs as the device runs. A second kernel adds the parts, in order, and applies the gate.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bilinear_ops.kernels import config, tuning
from bilinear_ops.kernels import launching as via
from bilinear_ops.kernels.activation import gate
from bilinear_ops.kernels.records import RowTile, Tile
from bilinear_ops.kernels.tile import load_tile, store_tile


@triton.jit
def gated_split_kernel(
    x, stride_xm, stride_xd,
    w, stride_wh, stride_wd,
    v, stride_vh, stride_vd,
    parts_ptr,
    M, H, D, SPAN, SPLITS,
    PRECISION: tl.constexpr, DESCRIPTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program stores one part of a and z, over SPAN elements of the contraction, for all rows and BLOCK_H columns.

    parts is [SPLITS, 2, M, H]; SPAN is a multiple of BLOCK_D.
    """
    h = tl.program_id(0) // SPLITS * BLOCK_H
    split = tl.program_id(0) % SPLITS
    first = split * SPAN
    b_a = tl.zeros((BLOCK_H, BLOCK_M), tl.float32)  # transposed: tensor cores take 64 rows at least, columns from 16
    b_z = tl.zeros((BLOCK_H, BLOCK_M), tl.float32)
    for d in range(first, min(first + SPAN, D), BLOCK_D):
        b_x = load_tile(x, stride_xm, stride_xd, 0, d, M, D, BLOCK_M, BLOCK_D, DESCRIPTOR)
        b_w = load_tile(w, stride_wh, stride_wd, h, d, H, D, BLOCK_H, BLOCK_D, DESCRIPTOR)
        b_v = load_tile(v, stride_vh, stride_vd, h, d, H, D, BLOCK_H, BLOCK_D, DESCRIPTOR)
        b_a = tl.dot(b_w, b_x.T, b_a, input_precision=PRECISION)
        b_z = tl.dot(b_v, b_x.T, b_z, input_precision=PRECISION)
    parts_ptr += split.to(tl.int64) * 2 * M * H
    store_tile(parts_ptr, H, 0, h, M, H, b_a.T, False)
    store_tile(parts_ptr + M * H, H, 0, h, M, H, b_z.T, False)


@triton.jit
def gated_sum_kernel(
    parts_ptr,
    b_w_ptr, b_v_ptr, beta_ptr, limit_ptr, offset_ptr,
    hid, stride_hm,
    a, z, stride_am,
    M, H,
    SPLITS: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A program adds the parts of one tile [BLOCK_M, BLOCK_H], and stores hid, and a and z unless they are None."""
    beta = None if beta_ptr is None else tl.load(beta_ptr)
    limit = None if limit_ptr is None else tl.load(limit_ptr)
    offset = None if offset_ptr is None else tl.load(offset_ptr)
    tiles_h = tl.cdiv(H, BLOCK_H)
    m = tl.program_id(0) // tiles_h * BLOCK_M
    h = tl.program_id(0) % tiles_h * BLOCK_H
    columns = h + tl.arange(0, BLOCK_H)
    size = tl.cast(M, tl.int64) * H
    parts_a, parts_z = (), ()
    for split in tl.static_range(SPLITS):  # all loads before the first sum, which would wait for each
        part_ptr = parts_ptr + 2 * split * size
        part_a = load_tile(part_ptr, H, 1, m, h, M, H, BLOCK_M, BLOCK_H, False)
        part_z = load_tile(part_ptr + size, H, 1, m, h, M, H, BLOCK_M, BLOCK_H, False)
        parts_a, parts_z = parts_a + (part_a,), parts_z + (part_z,)  # type: ignore[assignment]
    b_a = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    b_z = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    if b_w_ptr is not None:
        b_a += tl.load(b_w_ptr + columns, mask=columns < H, other=0.0).to(tl.float32)[None, :]
    if b_v_ptr is not None:
        b_z += tl.load(b_v_ptr + columns, mask=columns < H, other=0.0).to(tl.float32)[None, :]
    for split in tl.static_range(SPLITS):
        b_a += parts_a[split]
        b_z += parts_z[split]
    store_tile(hid, stride_hm, m, h, M, H, gate(b_a, b_z, beta, limit, offset, ACTIVATION), False)
    if a is not None:
        store_tile(a, stride_am, m, h, M, H, b_a, False)
        store_tile(z, stride_am, m, h, M, H, b_z, False)


def partial_sums(x: Tensor, w: Tensor, v: Tensor, tile: Tile, key: via.Key) -> Tensor:
    """a and z as sums of the parts [splits, 2, m, h], in fp32, for no more rows than a tile has."""
    (m, d), h = x.shape, w.shape[0]
    span = config.span(tile, m, h, d, config.processors(x.device))
    splits = -(-d // span)
    parts = x.new_empty(splits, 2, m, h, dtype=torch.float32)
    plan = via.planned(key)
    if isinstance(plan, via.Plan):
        plan.launch(x, w, v, parts)
        return parts
    descriptor = config.has_descriptors(config.architecture(x.device)) and via.describable(x, w, v)
    weight = (tile.block_n, tile.block_k)
    via.start(
        key, tile, gated_split_kernel, (-(-h // tile.block_n) * splits,),
        via.described(x, (tile.block_m, tile.block_k), descriptor), *x.stride(),
        via.described(w, weight, descriptor), *w.stride(),
        via.described(v, weight, descriptor), *v.stride(),
        parts, m, h, d, span, splits,
        PRECISION=via.precision(x.dtype), DESCRIPTOR=descriptor,
        BLOCK_M=tile.block_m, BLOCK_H=tile.block_n, BLOCK_D=tile.block_k,
    )  # fmt: skip
    return parts


def gate_of_sums(
    parts: Tensor,
    b_w: Tensor | None,
    b_v: Tensor | None,
    activation: str,
    numbers: tuple[Tensor | None, ...],
    hid: Tensor,
    a: Tensor | None,
    z: Tensor | None,
    key: via.Key,
) -> None:
    """Write hid [m, h] and, unless None, a and z, which have one row stride, from the parts [splits, 2, m, h]."""
    splits, _, m, h = parts.shape
    key = (*key, tuning.state("gated_sum_kernel", hid))
    plan = via.planned(key)
    if isinstance(plan, via.Plan):
        plan.launch(parts, b_w, b_v, *numbers, hid, a, z)
        return

    def run(tile: RowTile) -> None:
        via.start(
            key, tile, gated_sum_kernel, (via.tiles(tile, m, h),),
            parts, b_w, b_v, *numbers, hid, h, a, z, 0 if a is None else a.stride(0), m, h,
            SPLITS=splits, ACTIVATION=activation, BLOCK_M=tile.rows, BLOCK_H=tile.columns,
        )  # fmt: skip

    tiles = config.tiles("gated_sum_kernel", config.architecture(hid.device), hid.dtype)
    via.launch("gated_sum_kernel", hid, (tuning.bucket(m), h, splits), tiles, run)
