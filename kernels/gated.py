"""Kernels of the gated layer: hid = a * act(z) with a = x w^T + b_w, z = x v^T + b_v, and its backward.

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
from bilinear_ops.kernels.activation import act, act_grad_beta, act_with_grad
from bilinear_ops.kernels.records import RowTile, Tile
from bilinear_ops.kernels.tile import column_quarters, grouped, load_tile, store_tile

SUBTILES = tl.constexpr(4)  # of the fused backward's epilogue: column_quarters


@triton.jit
def gated_forward_kernel(
    x, stride_xm, stride_xd,
    w, stride_wh, stride_wd,
    v, stride_vh, stride_vd,
    b_w_ptr, b_v_ptr, beta_ptr,
    hid, stride_hm,
    a, z, stride_am,
    M, H, D,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """A program computes every num_programs-th tile [BLOCK_M, BLOCK_H] of hid, and of a and z unless they are None."""
    beta = 0.0 if beta_ptr is None else tl.load(beta_ptr)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_h = tl.cdiv(H, BLOCK_H)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_h, tl.num_programs(0), flatten=False):
        tile_m, tile_h = grouped(tile, tiles_m, tiles_h, GROUP_M)
        m = tile_m * BLOCK_M
        h = tile_h * BLOCK_H
        b_a = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
        b_z = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
        for d in range(0, D, BLOCK_D):
            b_x = load_tile(x, stride_xm, stride_xd, m, d, M, D, BLOCK_M, BLOCK_D, DESCRIPTOR)
            b_w = load_tile(w, stride_wh, stride_wd, h, d, H, D, BLOCK_H, BLOCK_D, DESCRIPTOR)
            b_v = load_tile(v, stride_vh, stride_vd, h, d, H, D, BLOCK_H, BLOCK_D, DESCRIPTOR)
            b_a = tl.dot(b_x, b_w.T, b_a, input_precision=PRECISION)
            b_z = tl.dot(b_x, b_v.T, b_z, input_precision=PRECISION)
        columns = h + tl.arange(0, BLOCK_H)
        if b_w_ptr is not None:
            b_a += tl.load(b_w_ptr + columns, mask=columns < H, other=0.0).to(tl.float32)[None, :]
        if b_v_ptr is not None:
            b_z += tl.load(b_v_ptr + columns, mask=columns < H, other=0.0).to(tl.float32)[None, :]
        store_tile(hid, stride_hm, m, h, M, H, b_a * act(b_z, beta, ACTIVATION), DESCRIPTOR)
        if a is not None:
            store_tile(a, stride_am, m, h, M, H, b_a, DESCRIPTOR)
            store_tile(z, stride_am, m, h, M, H, b_z, DESCRIPTOR)


@triton.jit
def gated_backward_kernel(
    dy, stride_ym, stride_yo,
    p, stride_po, stride_ph,
    a, z, da, dz, stride_am,
    hid, stride_hm,
    dbeta_ptr, beta_ptr,
    M, H, O,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_O: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """A program computes every num_programs-th tile [BLOCK_M, BLOCK_H] of dhid = dy p, and stores da, dz and hid."""
    beta = 0.0 if beta_ptr is None else tl.load(beta_ptr)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_h = tl.cdiv(H, BLOCK_H)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_h, tl.num_programs(0), flatten=False):
        tile_m, tile_h = grouped(tile, tiles_m, tiles_h, GROUP_M)
        m = tile_m * BLOCK_M
        h = tile_h * BLOCK_H
        dhid = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
        for o in range(0, O, BLOCK_O):
            b_dy = load_tile(dy, stride_ym, stride_yo, m, o, M, O, BLOCK_M, BLOCK_O, DESCRIPTOR)
            b_p = load_tile(p, stride_po, stride_ph, o, h, O, H, BLOCK_O, BLOCK_H, DESCRIPTOR)
            dhid = tl.dot(b_dy, b_p, dhid, input_precision=PRECISION)
        quarters = column_quarters(dhid)  # fewer live registers in the epilogue
        for i in tl.static_range(SUBTILES):
            gate_backward_tile(
                quarters[i], m, h + i * (BLOCK_H // SUBTILES), tile * SUBTILES + i,
                a, z, da, dz, stride_am, hid, stride_hm, dbeta_ptr, beta, M, H, ACTIVATION, DESCRIPTOR,
            )  # fmt: skip


@triton.jit
def gate_backward_tile(
    dhid, m, h, part,
    a, z, da, dz, stride_am, hid, stride_hm, dbeta_ptr, beta, M, H,
    ACTIVATION: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """Store da = dhid act(z), dz = dhid a act'(z), hid = a act(z) of one tile, and the tile's part of dbeta."""
    BLOCK_M: tl.constexpr = dhid.shape[0]
    BLOCK_H: tl.constexpr = dhid.shape[1]
    b_a = load_tile(a, stride_am, 1, m, h, M, H, BLOCK_M, BLOCK_H, DESCRIPTOR).to(tl.float32)
    b_z = load_tile(z, stride_am, 1, m, h, M, H, BLOCK_M, BLOCK_H, DESCRIPTOR).to(tl.float32)
    f, df = act_with_grad(b_z, beta, ACTIVATION)
    b_da = dhid * f
    b_dz = dhid * b_a * df
    store_tile(da, stride_am, m, h, M, H, b_da, DESCRIPTOR)
    store_tile(dz, stride_am, m, h, M, H, b_dz, DESCRIPTOR)
    if hid is not None:
        store_tile(hid, stride_hm, m, h, M, H, b_a * f, DESCRIPTOR)
    if dbeta_ptr is not None:  # one part per tile; the launcher sums the parts in order
        tl.store(dbeta_ptr + part, tl.sum(dhid * b_a * act_grad_beta(b_z, beta, ACTIVATION)))


@triton.jit
def gate_kernel(
    a, z, stride_am, hid, stride_hm, beta_ptr, M, H,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A program computes one tile [BLOCK_M, BLOCK_H] of hid = a act(z)."""
    beta = 0.0 if beta_ptr is None else tl.load(beta_ptr)
    tiles_h = tl.cdiv(H, BLOCK_H)
    m = tl.program_id(0) // tiles_h * BLOCK_M
    h = tl.program_id(0) % tiles_h * BLOCK_H
    b_a = load_tile(a, stride_am, 1, m, h, M, H, BLOCK_M, BLOCK_H, False).to(tl.float32)
    b_z = load_tile(z, stride_am, 1, m, h, M, H, BLOCK_M, BLOCK_H, False).to(tl.float32)
    store_tile(hid, stride_hm, m, h, M, H, b_a * act(b_z, beta, ACTIVATION), False)


@triton.jit
def gate_backward_kernel(
    dhid, stride_gm, stride_gh,
    a, z, da, dz, stride_am,
    hid, stride_hm,
    dbeta_ptr, beta_ptr,
    M, H,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A program reads one tile [BLOCK_M, BLOCK_H] of dhid and stores da, dz and hid."""
    beta = 0.0 if beta_ptr is None else tl.load(beta_ptr)
    tiles_h = tl.cdiv(H, BLOCK_H)
    m = tl.program_id(0) // tiles_h * BLOCK_M
    h = tl.program_id(0) % tiles_h * BLOCK_H
    b_dhid = load_tile(dhid, stride_gm, stride_gh, m, h, M, H, BLOCK_M, BLOCK_H, False).to(tl.float32)
    gate_backward_tile(
        b_dhid, m, h, tl.program_id(0),
        a, z, da, dz, stride_am, hid, stride_hm, dbeta_ptr, beta, M, H, ACTIVATION, False,
    )  # fmt: skip


def row_blocks(x: Tensor, h: int) -> list[slice]:
    """The blocks of rows for which the backward is computed: one block of all rows."""
    return [slice(0, x.shape[0])]


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
    (m, d), h = x.shape, w.shape[0]
    arch = config.architecture(x.device)
    descriptor = config.has_descriptors(arch) and via.describable(x, w, v) and h * x.itemsize % 16 == 0
    b_w, b_v = (None if b is None else b.contiguous() for b in (b_w, b_v))

    def run(tile: Tile | None) -> tuple[Tensor, Tensor | None]:
        if tile is None:
            both = preactivations(x, w, v, b_w, b_v)
            return gate(both, beta, activation), both if save else None
        hid = x.new_empty(m, h)
        az = x.new_empty(m, 2 * h) if save else None
        a, z = (None, None) if az is None else az.chunk(2, 1)
        into = (tile.block_m, tile.block_n)
        weight = (tile.block_n, tile.block_k)
        gated_forward_kernel[(via.programs(tile, m, h, x.device),)](
            via.described(x, (tile.block_m, tile.block_k), descriptor), *x.stride(),
            via.described(w, weight, descriptor), *w.stride(),
            via.described(v, weight, descriptor), *v.stride(),
            b_w, b_v, via.scalar(beta),
            via.described(hid, into, descriptor), h,
            via.described(a, into, descriptor), via.described(z, into, descriptor), 2 * h,
            m, h, d,
            ACTIVATION=activation, PRECISION=via.precision(x.dtype), DESCRIPTOR=descriptor,
            BLOCK_M=tile.block_m, BLOCK_H=tile.block_n, BLOCK_D=tile.block_k, GROUP_M=tile.group_m,
            **tile.launch(),
        )  # fmt: skip
        return hid, az

    if m * h == 0:
        return run(config.LIBRARY)
    tiles = config.gated("gated_forward_kernel", arch, x.dtype, m, d, descriptor)
    return via.launch("gated_forward_kernel", x, (tuning.bucket(m), d, h, save, descriptor), tiles, run)


def gate(az: Tensor, beta: Tensor | None, activation: str) -> Tensor:
    """hid = a * act(z)  [M, h]."""
    a, z = az.chunk(2, 1)
    m, h = a.shape
    hid = az.new_empty(m, h)

    def run(tile: RowTile) -> None:
        gate_kernel[(triton.cdiv(m, tile.rows) * triton.cdiv(h, tile.columns),)](
            a, z, 2 * h, hid, h, via.scalar(beta), m, h,
            ACTIVATION=activation, BLOCK_M=tile.rows, BLOCK_H=tile.columns, **tile.launch(),
        )  # fmt: skip

    if m * h:
        tiles = config.tiles("gate_kernel", config.architecture(az.device), az.dtype)
        via.launch("gate_kernel", az, (tuning.bucket(m), h), tiles, run)
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
    """[da | dz] [M, 2h], and hid [M, h] and dbeta [] if needed, from dy of y = hid p^T, or from dhid if p is None."""
    m, h = az.shape[0], az.shape[1] // 2
    dadz = torch.empty_like(az)
    hid = az.new_empty(m, h) if need_hid else None
    if m * h == 0:
        parts = az.new_zeros(0, dtype=torch.float32) if need_beta else None
    elif p is None:
        parts = _gate_backward_alone(dy, az, dadz, hid, beta, activation, need_beta)
    else:
        parts = _fused_backward(dy, p, az, dadz, hid, beta, activation, need_beta)
    return dadz, hid, None if parts is None else parts.sum()


def _fused_backward(
    dy: Tensor,
    p: Tensor,
    az: Tensor,
    dadz: Tensor,
    hid: Tensor | None,
    beta: Tensor | None,
    activation: str,
    need_beta: bool,
) -> Tensor | None:
    """Write dadz and hid from dy [M, o]; return the tiles' parts of dbeta."""
    (m, o), h = dy.shape, p.shape[1]
    (a, z), (da, dz) = az.chunk(2, 1), dadz.chunk(2, 1)
    arch = config.architecture(az.device)
    matrices = (dy, p, a, z, da, dz) + (() if hid is None else (hid,))
    descriptor = config.has_descriptors(arch) and via.describable(*matrices)

    def run(tile: Tile | None) -> Tensor | None:
        if tile is None:
            return _gate_backward_alone(dy @ p, az, dadz, hid, beta, activation, need_beta)
        into = (tile.block_m, tile.block_n // SUBTILES.value)
        tiles = triton.cdiv(m, tile.block_m) * triton.cdiv(h, tile.block_n)
        parts = az.new_empty(tiles * SUBTILES.value, dtype=torch.float32) if need_beta else None
        gated_backward_kernel[(via.programs(tile, m, h, az.device),)](
            via.described(dy, (tile.block_m, tile.block_k), descriptor), *dy.stride(),
            via.described(p, (tile.block_k, tile.block_n), descriptor), *p.stride(),
            *(via.described(t, into, descriptor) for t in (a, z, da, dz)), 2 * h,
            via.described(hid, into, descriptor), h,
            parts, via.scalar(beta),
            m, h, o,
            ACTIVATION=activation, PRECISION=via.precision(az.dtype), DESCRIPTOR=descriptor,
            BLOCK_M=tile.block_m, BLOCK_H=tile.block_n, BLOCK_O=tile.block_k, GROUP_M=tile.group_m,
            **tile.launch(),
        )  # fmt: skip
        return parts

    tiles = config.gated("gated_backward_kernel", arch, az.dtype, m, o, descriptor)
    return via.launch("gated_backward_kernel", az, (tuning.bucket(m), h, o, descriptor), tiles, run)


def _gate_backward_alone(
    dhid: Tensor,
    az: Tensor,
    dadz: Tensor,
    hid: Tensor | None,
    beta: Tensor | None,
    activation: str,
    need_beta: bool,
) -> Tensor | None:
    """Write dadz and hid from dhid [M, h]; return the tiles' parts of dbeta."""
    m, h = dhid.shape
    (a, z), (da, dz) = az.chunk(2, 1), dadz.chunk(2, 1)

    def run(tile: RowTile) -> Tensor | None:
        tiles = triton.cdiv(m, tile.rows) * triton.cdiv(h, tile.columns)
        parts = az.new_empty(tiles, dtype=torch.float32) if need_beta else None
        gate_backward_kernel[(tiles,)](
            dhid, *dhid.stride(), a, z, da, dz, 2 * h, hid, h, parts, via.scalar(beta), m, h,
            ACTIVATION=activation, BLOCK_M=tile.rows, BLOCK_H=tile.columns, **tile.launch(),
        )  # fmt: skip
        return parts

    tiles = config.tiles("gate_backward_kernel", config.architecture(az.device), az.dtype)
    return via.launch("gate_backward_kernel", az, (tuning.bucket(m), h), tiles, run)
