"""Kernel of the squared difference between a weight and its subcomponents: a GEMM that stores one number per tile."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bilinear_ops.kernels import config
from bilinear_ops.kernels import launching as via
from bilinear_ops.kernels.records import Tile
from bilinear_ops.kernels.tile import load_tile


@triton.jit
def squared_difference_kernel(
    weight_ptr, stride_wo, stride_wi,
    read_ptr, stride_ri, stride_rc,
    write_ptr, stride_lc, stride_lo,
    partial_ptr,
    O, I, C,
    PRECISION: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program reduces one tile [BLOCK_O, BLOCK_I] of W - (R L)^T to its sum of squares."""
    tiles_i = tl.cdiv(I, BLOCK_I)
    o = tl.program_id(0) // tiles_i * BLOCK_O
    i = tl.program_id(0) % tiles_i * BLOCK_I
    product = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for c in range(0, C, BLOCK_C):
        b_write = load_tile(write_ptr, stride_lo, stride_lc, o, c, O, C, BLOCK_O, BLOCK_C, False)
        b_read = load_tile(read_ptr, stride_rc, stride_ri, c, i, C, I, BLOCK_C, BLOCK_I, False)
        product = tl.dot(b_write, b_read, product, input_precision=PRECISION)
    b_weight = load_tile(weight_ptr, stride_wo, stride_wi, o, i, O, I, BLOCK_O, BLOCK_I, False).to(tl.float32)
    residual = b_weight - product  # 0 outside the weight: both terms are
    tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.sum(residual * residual, 1)))


def squared_difference(weight: Tensor, read: Tensor, write: Tensor) -> Tensor:
    """sum (W - (R L)^T)^2 in fp32; the partial sums of the tiles are added in order, in fp64."""
    (o, i), c = weight.shape, read.shape[1]
    arch = config.architecture(weight.device)

    def run(tile: Tile) -> Tensor:
        programs = triton.cdiv(o, tile.block_m) * triton.cdiv(i, tile.block_n)
        partial = torch.empty(programs, dtype=torch.float32, device=weight.device)
        if programs:
            squared_difference_kernel[(programs,)](
                weight, *weight.stride(), read, *read.stride(), write, *write.stride(), partial, o, i, c,
                PRECISION=config.accurate_precision(arch),
                BLOCK_O=tile.block_m, BLOCK_I=tile.block_n, BLOCK_C=tile.block_k, **tile.launch(),
            )  # fmt: skip
        return partial

    tiles = config.tiles("squared_difference_kernel", arch, weight.dtype)
    partial = via.launch("squared_difference_kernel", weight, (o, i, c), tiles, run)
    return partial.sum(dtype=torch.float64).to(torch.float32)
