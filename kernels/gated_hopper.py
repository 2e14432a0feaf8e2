"""The gated forward with a role for every warp, on Hopper: a candidate of tuning that no GPU has run yet.

One warp copies tiles of x, w and v into a ring of stages in shared memory. Two warpgroups multiply them, half of the
rows each, and compute the gate while the copies for the next tile are under way. `gated` launches it for a RingTile.

Two barriers guard a stage: at `full` arrive the copies, at `empty` both warpgroups once they have multiplied it.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from bilinear_ops.kernels import launching as via
from bilinear_ops.kernels.activation import gate
from bilinear_ops.kernels.launching import Key
from bilinear_ops.kernels.records import RingTile
from bilinear_ops.kernels.tile import column_halves, grouped

WARPGROUPS = tl.constexpr(2)  # that multiply
REGISTERS = tl.constexpr(240)  # of a thread that multiplies: two accumulators take 128
COPYING_REGISTERS = tl.constexpr(24)

load_async = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # its name in Triton 3.6
store_async = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@gluon.jit
def gated_ring_kernel(
    x, w, v,
    b_w_ptr, b_v_ptr, beta_ptr, limit_ptr, offset_ptr,
    hid, a, z,
    M, H, D,
    ACTIVATION: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_H: gl.constexpr, BLOCK_D: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A program computes every num_programs-th tile [BLOCK_M, BLOCK_H] of hid, and of a and z unless they are None."""
    gl.static_assert(STAGES > 1)  # a stage is in use until the product after its own is issued
    stages_x = gl.allocate_shared_memory(x.dtype, [STAGES, BLOCK_M, BLOCK_D], x.layout)
    stages_wv = gl.allocate_shared_memory(w.dtype, [STAGES, 2 * BLOCK_H, BLOCK_D], w.layout)
    staged = gl.allocate_shared_memory(hid.dtype, [2 * WARPGROUPS, BLOCK_M // WARPGROUPS, BLOCK_H // 2], hid.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=WARPGROUPS)
    fence_async_shared()  # copies see the barriers through another proxy
    ring = (stages_x, stages_wv, full, empty)
    numbers = (b_w_ptr, b_v_ptr, beta_ptr, limit_ptr, offset_ptr)
    sizes = (M, H, D)
    blocks: gl.constexpr = (BLOCK_M, BLOCK_H, BLOCK_D, GROUP_M, STAGES)
    gl.warp_specialize(
        [
            (multiply, (0, ring, staged, numbers, (hid, a, z), sizes, ACTIVATION, blocks)),
            (multiply, (1, ring, staged, numbers, (hid, a, z), sizes, ACTIVATION, blocks)),
            (copy, ((x, w, v), ring, sizes, blocks)),
        ],
        [4, 1],
        [REGISTERS, COPYING_REGISTERS],
    )


@gluon.jit
def copy(operands, ring, sizes, blocks: gl.constexpr):
    """Fill the stages of the ring in turn, each as soon as it is empty."""
    x, w, v = operands
    stages_x, stages_wv, full, empty = ring
    M, H, D = sizes
    BLOCK_M: gl.constexpr = blocks[0]
    BLOCK_H: gl.constexpr = blocks[1]
    BLOCK_D: gl.constexpr = blocks[2]
    tiles_m = gl.cdiv(M, BLOCK_M)
    tiles_h = gl.cdiv(H, BLOCK_H)
    step = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_h, gl.num_programs(0)):
        tile_m, tile_h = grouped(tile, tiles_m, tiles_h, blocks[3])
        m = tile_m * BLOCK_M
        h = tile_h * BLOCK_H
        for d in range(0, D, BLOCK_D):
            stage, parity = place(step, blocks[4])
            mbarrier.wait(empty.index(stage), parity ^ 1)
            mbarrier.expect(full.index(stage), x.block_type.nbytes + w.block_type.nbytes + v.block_type.nbytes)
            load_async(x, [m, d], full.index(stage), stages_x.index(stage))
            load_async(w, [h, d], full.index(stage), stages_wv.index(stage).slice(0, BLOCK_H))
            load_async(v, [h, d], full.index(stage), stages_wv.index(stage).slice(BLOCK_H, BLOCK_H))
            step += 1


@triton.jit
def place(step, STAGES: tl.constexpr):
    """The stage of a step, and the parity of how often the stage was used before."""
    return step % STAGES, step // STAGES & 1


@gluon.jit
def multiply(
    WARPGROUP: gl.constexpr, ring, staged, numbers, outputs, sizes, ACTIVATION: gl.constexpr, blocks: gl.constexpr
):
    """Multiply a warpgroup's rows of every tile, and store their gate and, unless a is None, both factors."""
    stages_x, stages_wv, full, empty = ring
    b_w_ptr, b_v_ptr, beta_ptr, limit_ptr, offset_ptr = numbers
    hid, a, z = outputs
    M, H, D = sizes
    BLOCK_M: gl.constexpr = blocks[0]
    BLOCK_H: gl.constexpr = blocks[1]
    BLOCK_D: gl.constexpr = blocks[2]
    ROWS: gl.constexpr = BLOCK_M // WARPGROUPS
    ACCUMULATOR: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * BLOCK_H, 16])
    beta = None if beta_ptr is None else gl.load(beta_ptr)
    limit = None if limit_ptr is None else gl.load(limit_ptr)
    offset = None if offset_ptr is None else gl.load(offset_ptr)
    tiles_m = gl.cdiv(M, BLOCK_M)
    tiles_h = gl.cdiv(H, BLOCK_H)
    step = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_h, gl.num_programs(0)):
        tile_m, tile_h = grouped(tile, tiles_m, tiles_h, blocks[3])
        m = tile_m * BLOCK_M + WARPGROUP * ROWS
        h = tile_h * BLOCK_H
        b_w = bias(b_w_ptr, h, H, BLOCK_H)  # ahead of the main loop, where nothing waits for it
        b_v = bias(b_v_ptr, h, H, BLOCK_H)
        b_az = gl.zeros([ROWS, 2 * BLOCK_H], gl.float32, ACCUMULATOR)
        last = 0
        for d in range(0, D, BLOCK_D):
            stage, parity = place(step, blocks[4])
            mbarrier.wait(full.index(stage), parity)
            b_x = stages_x.index(stage).slice(WARPGROUP * ROWS, ROWS)
            b_az = warpgroup_mma(b_x, stages_wv.index(stage).permute((1, 0)), b_az, is_async=True)
            b_az = warpgroup_mma_wait(1, deps=(b_az,))  # for the product of the step before
            mbarrier.arrive(empty.index(last), count=1, pred=d > 0)
            last = stage
            step += 1
        b_az = warpgroup_mma_wait(0, deps=(b_az,))
        mbarrier.arrive(empty.index(last), count=1)
        b_a, b_z = b_az.reshape([ROWS, 2, BLOCK_H]).permute(0, 2, 1).split()
        b_a += gl.convert_layout(b_w, gl.SliceLayout(0, b_a.type.layout))[None, :]
        b_z += gl.convert_layout(b_v, gl.SliceLayout(0, b_z.type.layout))[None, :]
        a_parts = column_halves(b_a)  # fewer live registers
        z_parts = column_halves(b_z)
        for i in gl.static_range(2):
            col = h + i * (BLOCK_H // 2)
            this = staged.index(2 * WARPGROUP + i)
            other = staged.index(2 * WARPGROUP + 1 - i)
            if a is not None:
                store(a, m, col, a_parts[i], this)
                store(z, m, col, z_parts[i], other)
            store(hid, m, col, gate(a_parts[i], z_parts[i], beta, limit, offset, ACTIVATION), this)
    tma.store_wait(0)


@gluon.jit
def bias(ptr, h, H, BLOCK_H: gl.constexpr):
    """BLOCK_H numbers of a bias from `h` on, or zeros if there is none."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    b = gl.zeros([BLOCK_H], gl.float32, LAYOUT)
    if ptr is not None:
        columns = h + gl.arange(0, BLOCK_H, LAYOUT)
        b += gl.load(ptr + columns, mask=columns < H, other=0.0).to(gl.float32)
    return b


@gluon.jit
def store(dst, row, col, tile, staged):
    """Store a tile at (row, col) by a copy that is under way when this returns."""
    tma.store_wait(1)  # stores take turns in two buffers
    staged.store(tile.to(dst.dtype))
    fence_async_shared()
    store_async(dst, [row, col], staged)


def described(t: Tensor | None, *block: int) -> TensorDescriptor | None:
    """A descriptor of `t` with blocks of shape `block`, in the layout that wgmma reads."""
    if t is None:
        return None
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * t.itemsize, rank=2)
    return TensorDescriptor(t, list(t.shape), list(t.stride()), list(block), layout)


def start(
    key: Key, tile: RingTile, x: Tensor, w: Tensor, v: Tensor, numbers: tuple[Tensor | None, ...],
    hid: Tensor, a: Tensor | None, z: Tensor | None, activation: str,
) -> None:  # fmt: skip
    """Write hid [M, h] and, unless they are None, a and z; `numbers` are both biases, beta, limit and offset."""
    (m, d), h = x.shape, w.shape[0]
    rows = tile.block_m // WARPGROUPS.value
    via.start(
        key, tile, gated_ring_kernel, (via.programs(tile, m, h, x.device),),
        described(x, tile.block_m, tile.block_k),
        described(w, tile.block_n, tile.block_k), described(v, tile.block_n, tile.block_k),
        *numbers,
        *(described(t, rows, tile.block_n // 2) for t in (hid, a, z)),
        m, h, d,
        ACTIVATION=activation, BLOCK_M=tile.block_m, BLOCK_H=tile.block_n, BLOCK_D=tile.block_k,
        GROUP_M=tile.group_m, STAGES=tile.stages,
    )  # fmt: skip
