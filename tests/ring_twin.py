"""The arithmetic of `gated_ring_kernel` by one role, which Triton's interpreter can run."""

import triton
import triton.language as tl

from bilinear_ops.kernels.activation import gate
from bilinear_ops.kernels.gated import bias_tile
from bilinear_ops.kernels.gated_hopper import place
from bilinear_ops.kernels.tile import column_halves, grouped, load_tile, store_tile


@triton.jit
def twin_kernel(
    x, w, v,
    b_w_ptr, b_v_ptr, beta_ptr, limit_ptr, offset_ptr,
    hid, a, z, stride_am,
    ring_ptr, uses_ptr,
    M, H, D,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Copy the tiles of each step to their place in the ring, STAGES - 1 steps ahead of the product that reads them.

    `uses` counts the uses of each stage; it is negative once its parity was another than `place` says.
    """
    ROWS: tl.constexpr = BLOCK_M + 2 * BLOCK_H
    beta = None if beta_ptr is None else tl.load(beta_ptr)
    limit = None if limit_ptr is None else tl.load(limit_ptr)
    offset = None if offset_ptr is None else tl.load(offset_ptr)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(H, BLOCK_H)
    steps = tl.cdiv(tiles - tl.program_id(0), tl.num_programs(0)) * tl.cdiv(D, BLOCK_D)
    ring_ptr += tl.program_id(0) * STAGES * ROWS * BLOCK_D
    uses_ptr += tl.program_id(0) * STAGES
    b_az = tl.zeros((BLOCK_M, 2 * BLOCK_H), tl.float32)
    for step in range(0, steps + STAGES - 1):
        if step < steps:
            m, h, d = corner(step, M, H, D, BLOCK_M, BLOCK_H, BLOCK_D, GROUP_M)
            stage, parity = place(step, STAGES)
            uses = tl.load(uses_ptr + stage)
            tl.store(uses_ptr + stage, tl.where(uses & 1 == parity, uses + 1, -(1 << 20)))
            ring = ring_ptr + stage * ROWS * BLOCK_D
            b_x = load_tile(x, D, 1, m, d, M, D, BLOCK_M, BLOCK_D, False)
            b_w = load_tile(w, D, 1, h, d, H, D, BLOCK_H, BLOCK_D, False)
            b_v = load_tile(v, D, 1, h, d, H, D, BLOCK_H, BLOCK_D, False)
            store_tile(ring, BLOCK_D, 0, 0, ROWS, BLOCK_D, b_x, False)
            store_tile(ring, BLOCK_D, BLOCK_M, 0, ROWS, BLOCK_D, b_w, False)
            store_tile(ring, BLOCK_D, BLOCK_M + BLOCK_H, 0, ROWS, BLOCK_D, b_v, False)
        copied = step - (STAGES - 1)
        if copied >= 0:
            m, h, d = corner(copied, M, H, D, BLOCK_M, BLOCK_H, BLOCK_D, GROUP_M)
            stage, _ = place(copied, STAGES)
            ring = ring_ptr + stage * ROWS * BLOCK_D
            b_x = load_tile(ring, BLOCK_D, 1, 0, 0, ROWS, BLOCK_D, BLOCK_M, BLOCK_D, False)
            b_wv = load_tile(ring, BLOCK_D, 1, BLOCK_M, 0, ROWS, BLOCK_D, 2 * BLOCK_H, BLOCK_D, False)
            b_az = tl.dot(b_x, b_wv.T, tl.where(d == 0, 0.0, b_az), input_precision="ieee")
            if d + BLOCK_D >= D:
                b_a, b_z = b_az.reshape(BLOCK_M, 2, BLOCK_H).permute(0, 2, 1).split()
                a_parts = column_halves(b_a + bias_tile(b_w_ptr, h, H, BLOCK_M, BLOCK_H))
                z_parts = column_halves(b_z + bias_tile(b_v_ptr, h, H, BLOCK_M, BLOCK_H))
                for i in tl.static_range(2):
                    col = h + i * (BLOCK_H // 2)
                    store_tile(a, stride_am, m, col, M, H, a_parts[i], False)
                    store_tile(z, stride_am, m, col, M, H, z_parts[i], False)
                    b_hid = gate(a_parts[i], z_parts[i], beta, limit, offset, ACTIVATION)
                    store_tile(hid, H, m, col, M, H, b_hid, False)


@triton.jit
def corner(step, M, H, D, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_M: tl.constexpr):
    """Where the tiles of a program's step begin."""
    steps = tl.cdiv(D, BLOCK_D)
    tile = tl.program_id(0) + step // steps * tl.num_programs(0)
    tile_m, tile_h = grouped(tile, tl.cdiv(M, BLOCK_M), tl.cdiv(H, BLOCK_H), GROUP_M)
    return tile_m * BLOCK_M, tile_h * BLOCK_H, step % steps * BLOCK_D
