"""Kernels of the gated layer: hid = gate(a, z) with a = x w^T + b_w, z = x v^T + b_v, and its backward.

The forward is one persistent GEMM with two accumulators and the gate as its epilogue. The backward is the GEMM dy p
with the gate's derivative as its epilogue. Operands are read through tensor descriptors if hardware and layout allow,
else through pointers. Where library GEMMs are faster, the epilogues run as kernels of their own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bilinear_ops.composite.gated import preactivations
from bilinear_ops.kernels import config, tuning
from bilinear_ops.kernels import launching as via
from bilinear_ops.kernels.activation import gate as gate_of_tile
from bilinear_ops.kernels.activation import gate_grad_beta, gate_with_grad
from bilinear_ops.kernels.few_rows import gate_of_sums, partial_sums
from bilinear_ops.kernels.records import RingTile, RowTile, SplitTile, Tile
from bilinear_ops.kernels.tile import (
    column_eighths,
    column_quarters,
    grouped,
    in_one_layout,
    load_halves,
    load_tile,
    store_halves,
    store_tile,
)
from bilinear_ops.results import Gate

SUBTILES = tl.constexpr(8)  # of the fused backward's epilogue through descriptors: column_eighths


@triton.jit
def gated_forward_kernel(
    x, stride_xm, stride_xd,
    w, stride_wh, stride_wd,
    v, stride_vh, stride_vd,
    b_w_ptr, b_v_ptr, beta_ptr, limit_ptr, offset_ptr,
    hid, stride_hm,
    a, z, stride_am,
    M, H, D,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_M: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """A program computes every num_programs-th tile [BLOCK_M, BLOCK_H] of hid, and of a and z unless they are None."""
    beta = None if beta_ptr is None else tl.load(beta_ptr)
    limit = None if limit_ptr is None else tl.load(limit_ptr)
    offset = None if offset_ptr is None else tl.load(offset_ptr)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_h = tl.cdiv(H, BLOCK_H)
    tiles = tiles_m * tiles_h
    for tile in tl.range(
        tl.program_id(0), tiles, tl.num_programs(0), flatten=False, warp_specialize=WARP_SPECIALIZE
    ):  # fmt: skip
        tile_m, tile_h = grouped(tile, tiles_m, tiles_h, GROUP_M)
        m = tile_m * BLOCK_M
        h = tile_h * BLOCK_H
        b_a = bias_tile(b_w_ptr, h, H, BLOCK_M, BLOCK_H)  # ahead of the main loop, where nothing waits for it
        b_z = bias_tile(b_v_ptr, h, H, BLOCK_M, BLOCK_H)
        for d in range(0, D, BLOCK_D):
            b_x = load_tile(x, stride_xm, stride_xd, m, d, M, D, BLOCK_M, BLOCK_D, DESCRIPTOR)
            b_w = load_tile(w, stride_wh, stride_wd, h, d, H, D, BLOCK_H, BLOCK_D, DESCRIPTOR)
            b_v = load_tile(v, stride_vh, stride_vd, h, d, H, D, BLOCK_H, BLOCK_D, DESCRIPTOR)
            b_a = tl.dot(b_x, b_w.T, b_a, input_precision=PRECISION)
            b_z = tl.dot(b_x, b_v.T, b_z, input_precision=PRECISION)
        store_tile(hid, stride_hm, m, h, M, H, gate_of_tile(b_a, b_z, beta, limit, offset, ACTIVATION), DESCRIPTOR)
        if a is not None:
            store_tile(a, stride_am, m, h, M, H, b_a, DESCRIPTOR)
            store_tile(z, stride_am, m, h, M, H, b_z, DESCRIPTOR)


@triton.jit
def bias_tile(ptr, h, H, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr):
    """The bias of BLOCK_H columns from `h` on in every row, or zeros if there is none."""
    tile = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    if ptr is not None:
        columns = h + tl.arange(0, BLOCK_H)
        tile += tl.load(ptr + columns, mask=columns < H, other=0.0).to(tl.float32)[None, :]
    return tile  # [BLOCK_M, BLOCK_H]


@triton.jit
def gated_backward_kernel(
    dy, stride_ym, stride_yo,
    p, stride_po, stride_ph,
    az, dadz, stride_am,
    hid, stride_hm,
    dbeta_ptr, beta_ptr, limit_ptr, offset_ptr,
    M, H, O,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_O: tl.constexpr, GROUP_M: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """A program computes every num_programs-th tile [BLOCK_M, BLOCK_H] of dhid = dy p, and stores da, dz and hid.

    az = [a | z] and dadz = [da | dz] are [M, 2, H]: their halves travel together, or each would be waited for alone.
    """
    beta = None if beta_ptr is None else tl.load(beta_ptr)
    limit = None if limit_ptr is None else tl.load(limit_ptr)
    offset = None if offset_ptr is None else tl.load(offset_ptr)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_h = tl.cdiv(H, BLOCK_H)
    tiles = tiles_m * tiles_h
    for tile in tl.range(
        tl.program_id(0), tiles, tl.num_programs(0), flatten=False, warp_specialize=WARP_SPECIALIZE
    ):  # fmt: skip
        tile_m, tile_h = grouped(tile, tiles_m, tiles_h, GROUP_M)
        m = tile_m * BLOCK_M
        h = tile_h * BLOCK_H
        dhid = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
        for o in range(0, O, BLOCK_O):
            b_dy = load_tile(dy, stride_ym, stride_yo, m, o, M, O, BLOCK_M, BLOCK_O, DESCRIPTOR)
            b_p = load_tile(p, stride_po, stride_ph, o, h, O, H, BLOCK_O, BLOCK_H, DESCRIPTOR)
            dhid = tl.dot(b_dy, b_p, dhid, input_precision=PRECISION)
        # fewer live registers in the epilogue; through pointers, fewer and wider accesses
        parts = column_eighths(dhid) if DESCRIPTOR else column_quarters(dhid)
        COLUMNS: tl.constexpr = parts[0].shape[1]
        dbeta = tl.zeros((BLOCK_M,), tl.float32)
        for i in tl.static_range(BLOCK_H // COLUMNS):
            column = h + i * COLUMNS
            b_a, b_z = load_halves(az, stride_am, m, column, M, H, BLOCK_M, COLUMNS, DESCRIPTOR)
            part, b_a, b_z = in_one_layout(parts[i], b_a.to(tl.float32), b_z.to(tl.float32))
            b_hid, by_a, by_z = gate_with_grad(b_a, b_z, beta, limit, offset, ACTIVATION)
            store_halves(dadz, stride_am, m, column, M, H, part * by_a, part * by_z, DESCRIPTOR)
            if hid is not None:
                store_tile(hid, stride_hm, m, column, M, H, b_hid, DESCRIPTOR)
            if dbeta_ptr is not None:
                dbeta += tl.sum(gate_grad_beta(part, b_a, b_z, beta, limit, offset, ACTIVATION), 1)
        if dbeta_ptr is not None:  # one part per tile; the launcher sums the parts in order
            tl.store(dbeta_ptr + tile, tl.sum(dbeta))


@triton.jit
def gate_kernel(
    a, stride_am, stride_ah,
    z, stride_zm, stride_zh,
    hid, stride_hm,
    beta_ptr, limit_ptr, offset_ptr,
    M, H,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A program computes one tile [BLOCK_M, BLOCK_H] of hid."""
    beta = None if beta_ptr is None else tl.load(beta_ptr)
    limit = None if limit_ptr is None else tl.load(limit_ptr)
    offset = None if offset_ptr is None else tl.load(offset_ptr)
    tiles_h = tl.cdiv(H, BLOCK_H)
    m = tl.program_id(0) // tiles_h * BLOCK_M
    h = tl.program_id(0) % tiles_h * BLOCK_H
    b_a = load_tile(a, stride_am, stride_ah, m, h, M, H, BLOCK_M, BLOCK_H, False).to(tl.float32)
    b_z = load_tile(z, stride_zm, stride_zh, m, h, M, H, BLOCK_M, BLOCK_H, False).to(tl.float32)
    store_tile(hid, stride_hm, m, h, M, H, gate_of_tile(b_a, b_z, beta, limit, offset, ACTIVATION), False)


@triton.jit
def gate_backward_kernel(
    dhid, stride_gm, stride_gh,
    a, stride_am, stride_ah,
    z, stride_zm, stride_zh,
    da, dz, stride_dm,
    hid, stride_hm,
    dbeta_ptr, beta_ptr, limit_ptr, offset_ptr,
    M, H,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A program reads one tile [BLOCK_M, BLOCK_H] of dhid and stores da, dz and hid."""
    beta = None if beta_ptr is None else tl.load(beta_ptr)
    limit = None if limit_ptr is None else tl.load(limit_ptr)
    offset = None if offset_ptr is None else tl.load(offset_ptr)
    tiles_h = tl.cdiv(H, BLOCK_H)
    m = tl.program_id(0) // tiles_h * BLOCK_M
    h = tl.program_id(0) % tiles_h * BLOCK_H
    b_dhid = load_tile(dhid, stride_gm, stride_gh, m, h, M, H, BLOCK_M, BLOCK_H, False).to(tl.float32)
    b_a = load_tile(a, stride_am, stride_ah, m, h, M, H, BLOCK_M, BLOCK_H, False).to(tl.float32)
    b_z = load_tile(z, stride_zm, stride_zh, m, h, M, H, BLOCK_M, BLOCK_H, False).to(tl.float32)
    b_hid, by_a, by_z = gate_with_grad(b_a, b_z, beta, limit, offset, ACTIVATION)
    store_tile(da, stride_dm, m, h, M, H, b_dhid * by_a, False)
    store_tile(dz, stride_dm, m, h, M, H, b_dhid * by_z, False)
    if hid is not None:
        store_tile(hid, stride_hm, m, h, M, H, b_hid, False)
    if dbeta_ptr is not None:  # one part per tile; the launcher sums the parts in order
        dbeta = gate_grad_beta(b_dhid, b_a, b_z, beta, limit, offset, ACTIVATION)
        tl.store(dbeta_ptr + tl.program_id(0), tl.sum(dbeta))


def row_blocks(x: Tensor, h: int) -> list[slice | None]:
    """The blocks of rows for which the backward is computed: one block of all rows, None."""
    return [None]


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
    (m, d), h = x.shape, w.shape[0]
    b_w, b_v = (None if b is None else b.contiguous() for b in (b_w, b_v))
    numbers = _numbers(gate_of)
    key = via.plan_key("gated_forward_kernel", x, (gate_of.activation, save), x, w, v, b_w, b_v, *numbers)
    plan = config.LIBRARY if m * h == 0 else via.planned(key)
    if plan is config.LIBRARY:
        return _library_forward(x, w, v, b_w, b_v, gate_of, save)
    hid = x.new_empty(m, h)
    az = x.new_empty(m, 2 * h) if save else None
    a, z = (None, None) if az is None else az.chunk(2, 1)
    if isinstance(plan, via.Plan):
        plan.launch(x, w, v, b_w, b_v, *numbers, hid, a, z)
        return hid, az

    def split(tile: SplitTile) -> tuple[Tensor, Tensor | None]:
        parts = partial_sums(x, w, v, tile, (*key, tile, "parts"))
        gate_of_sums(parts, b_w, b_v, gate_of.activation, numbers, hid, a, z, (*key, tile, "sum"))
        return hid, az

    if isinstance(plan, SplitTile):
        return split(plan)
    arch = config.architecture(x.device)
    describable = via.describable(x, w, v)
    descriptor = config.has_descriptors(arch) and describable and h * x.itemsize % 16 == 0

    def run(tile: Tile | None) -> tuple[Tensor, Tensor | None]:
        if tile is None:
            via.keep(key, config.LIBRARY)
            return _library_forward(x, w, v, b_w, b_v, gate_of, save)
        if isinstance(tile, SplitTile):
            via.keep(key, tile)
            return split(tile)
        if isinstance(tile, RingTile):
            from bilinear_ops.kernels import gated_hopper  # in Gluon, which is experimental

            gated_hopper.start(key, tile, x, w, v, (b_w, b_v, *numbers), hid, a, z, gate_of.activation)
            return hid, az
        into = (tile.block_m, tile.block_n)
        weight = (tile.block_n, tile.block_k)
        via.start(
            key, tile, gated_forward_kernel, (via.programs(tile, m, h, x.device),),
            via.described(x, (tile.block_m, tile.block_k), descriptor), *x.stride(),
            via.described(w, weight, descriptor), *w.stride(),
            via.described(v, weight, descriptor), *v.stride(),
            b_w, b_v, *numbers,
            via.described(hid, into, descriptor), h,
            via.described(a, into, descriptor), via.described(z, into, descriptor), 2 * h,
            m, h, d,
            ACTIVATION=gate_of.activation, PRECISION=via.precision(x.dtype), DESCRIPTOR=descriptor,
            BLOCK_M=tile.block_m, BLOCK_H=tile.block_n, BLOCK_D=tile.block_k, GROUP_M=tile.group_m,
            WARP_SPECIALIZE=descriptor and config.warp_specialized(arch),
        )  # fmt: skip
        return hid, az

    tiles = config.gated("gated_forward_kernel", arch, x.dtype, m, h, d, descriptor, config.processors(x.device))
    if not describable:  # of loads of two bytes the split kernel spills
        tiles = tuple(tile for tile in tiles if not isinstance(tile, SplitTile))
    unproven = config.unproven("gated_forward_kernel", arch, x.dtype) if descriptor else ()
    shape = tuning.bucket(m), d, h, save, descriptor
    return via.launch("gated_forward_kernel", x, shape, tiles, run, unproven=unproven)


def _library_forward(
    x: Tensor, w: Tensor, v: Tensor, b_w: Tensor | None, b_v: Tensor | None, gate_of: Gate, save: bool
) -> tuple[Tensor, Tensor | None]:
    """Library GEMMs, and the gate as a kernel of its own."""
    az = preactivations(x, w, v, b_w, b_v)
    return gate(*az.chunk(2, 1), gate_of), az if save else None


def _numbers(gate_of: Gate) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """beta, limit and offset as kernels read them."""
    return via.scalar(gate_of.beta), via.scalar(gate_of.limit), via.scalar(gate_of.offset)


def gate(a: Tensor, z: Tensor, gate_of: Gate) -> Tensor:
    """hid [M, h] from pre-activations [M, h] of any strides."""
    m, h = a.shape
    hid = a.new_empty(m, h)
    if not m * h:
        return hid
    numbers = _numbers(gate_of)
    key = via.plan_key("gate_kernel", a, (gate_of.activation,), a, z, *numbers)
    plan = via.planned(key)
    if isinstance(plan, via.Plan):
        plan.launch(a, z, hid, *numbers)
        return hid

    def run(tile: RowTile) -> None:
        via.start(
            key, tile, gate_kernel, (via.tiles(tile, m, h),),
            a, *a.stride(), z, *z.stride(), hid, h, *numbers, m, h,
            ACTIVATION=gate_of.activation, BLOCK_M=tile.rows, BLOCK_H=tile.columns,
        )  # fmt: skip

    tiles = config.tiles("gate_kernel", config.architecture(a.device), a.dtype)
    via.launch("gate_kernel", a, (tuning.bucket(m), h), tiles, run)
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
    m, h = az.shape[0], az.shape[1] // 2
    dadz = torch.empty_like(az)
    hid = az.new_empty(m, h) if need_hid else None
    if m * h == 0:
        parts = az.new_zeros(0, dtype=torch.float32) if need_beta else None
    elif p is None:
        parts = _gate_parts(dy, *az.chunk(2, 1), gate_of, *dadz.chunk(2, 1), hid, need_beta)
    else:
        parts = _fused_backward(dy, p, az, dadz, hid, gate_of, need_beta)
    return dadz, hid, None if parts is None else parts.sum()


def gate_gradients(
    dhid: Tensor, a: Tensor, z: Tensor, gate_of: Gate, da: Tensor, dz: Tensor, hid: Tensor | None, need_beta: bool
) -> Tensor | None:
    """Write da, dz and, unless None, hid from dhid [M, h]; return dbeta if needed."""
    if not a.numel():
        return a.new_zeros((), dtype=torch.float32) if need_beta else None
    parts = _gate_parts(dhid, a, z, gate_of, da, dz, hid, need_beta)
    return None if parts is None else parts.sum()


def _fused_backward(
    dy: Tensor,
    p: Tensor,
    az: Tensor,
    dadz: Tensor,
    hid: Tensor | None,
    gate_of: Gate,
    need_beta: bool,
) -> Tensor | None:
    """Write dadz and hid from dy [M, o]; return the tiles' parts of dbeta."""
    (m, o), h = dy.shape, p.shape[1]
    numbers = _numbers(gate_of)
    options = gate_of.activation, hid is None, need_beta
    key = via.plan_key("gated_backward_kernel", az, options, dy, p, az, *numbers)
    plan = via.planned(key)

    def parts_of(tile: Tile) -> Tensor | None:
        return az.new_empty(via.tiles(tile, m, h), dtype=torch.float32) if need_beta else None

    def run(tile: Tile | None) -> Tensor | None:
        if tile is None:
            via.keep(key, config.LIBRARY)
            return _gate_parts(dy @ p, a, z, gate_of, da, dz, hid, need_beta)
        into = (tile.block_m, tile.block_n // SUBTILES.value)
        parts = parts_of(tile)
        via.start(
            key, tile, gated_backward_kernel, (via.programs(tile, m, h, az.device),),
            via.described(dy, (tile.block_m, tile.block_k), descriptor), *dy.stride(),
            via.described(p, (tile.block_k, tile.block_n), descriptor), *p.stride(),
            *(via.described(t, (into[0], 2, into[1]), descriptor) for t in halves), 2 * h,
            via.described(hid, into, descriptor), h,
            parts, *numbers,
            m, h, o,
            ACTIVATION=gate_of.activation, PRECISION=via.precision(az.dtype), DESCRIPTOR=descriptor,
            BLOCK_M=tile.block_m, BLOCK_H=tile.block_n, BLOCK_O=tile.block_k, GROUP_M=tile.group_m,
            WARP_SPECIALIZE=descriptor and config.warp_specialized(arch),
        )  # fmt: skip
        return parts

    if isinstance(plan, via.Plan):
        parts = parts_of(plan.tile)
        plan.launch(dy, p, az, dadz, hid, parts, *numbers)
        return parts
    (a, z), (da, dz) = az.chunk(2, 1), dadz.chunk(2, 1)
    if plan is config.LIBRARY:
        return run(config.LIBRARY)
    halves = az.view(m, 2, h), dadz.view(m, 2, h)
    arch = config.architecture(az.device)
    matrices = (dy, p, a, z, da, dz) + (() if hid is None else (hid,))
    descriptor = config.has_descriptors(arch) and via.describable(*matrices)
    tiles = config.gated("gated_backward_kernel", arch, az.dtype, m, h, o, descriptor, config.processors(az.device))
    return via.launch("gated_backward_kernel", az, (tuning.bucket(m), h, o, descriptor), tiles, run)


def _gate_parts(
    dhid: Tensor, a: Tensor, z: Tensor, gate_of: Gate, da: Tensor, dz: Tensor, hid: Tensor | None, need_beta: bool
) -> Tensor | None:
    """Write da, dz, which have one row stride, and hid from dhid [M, h]; return the tiles' parts of dbeta."""
    m, h = dhid.shape
    numbers = _numbers(gate_of)
    options = gate_of.activation, need_beta
    key = via.plan_key("gate_backward_kernel", a, options, dhid, a, z, da, dz, hid, *numbers)
    plan = via.planned(key)

    def parts_of(tile: RowTile) -> Tensor | None:
        return a.new_empty(via.tiles(tile, m, h), dtype=torch.float32) if need_beta else None

    def run(tile: RowTile) -> Tensor | None:
        parts = parts_of(tile)
        via.start(
            key, tile, gate_backward_kernel, (via.tiles(tile, m, h),),
            dhid, *dhid.stride(), a, *a.stride(), z, *z.stride(), da, dz, da.stride(0), hid, h,
            parts, *numbers, m, h,
            ACTIVATION=gate_of.activation, BLOCK_M=tile.rows, BLOCK_H=tile.columns,
        )  # fmt: skip
        return parts

    if isinstance(plan, via.Plan):
        parts = parts_of(plan.tile)
        plan.launch(dhid, a, z, da, dz, hid, parts, *numbers)
        return parts
    tiles = config.tiles("gate_backward_kernel", config.architecture(a.device), a.dtype)
    return via.launch("gate_backward_kernel", a, (tuning.bucket(m), h), tiles, run)
