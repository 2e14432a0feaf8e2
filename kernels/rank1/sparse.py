"""Kernels of sparse rank-1 subcomponents: dot products with gathered rows, and weighted sums of them.

Rows are the vectors of all subcomponents [C, d]; indices [M, k] are the active subcomponents of each token.
"""

import triton
import triton.language as tl
from torch import Tensor

from bilinear_ops.kernels import config, tuning
from bilinear_ops.kernels import launching as via
from bilinear_ops.kernels.records import RowTile

# An estimate without a receipt: a gathered multiply-add reads 2 bytes, so the dense product is faster above 1 / 200 of
# the rows.
GATHER_COST = 200


@triton.jit
def sparse_dots_kernel(
    x_ptr, stride_xm, stride_xd,
    rows_ptr, stride_rc,
    indices_ptr, out_ptr,
    K, D,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program computes <x_t, rows_i> for BLOCK_K active rows i of one token."""
    token = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    active = tl.load(indices_ptr + token * K + k, mask=k < K, other=0)
    total = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for first in range(0, D, BLOCK_D):
        d = (first + tl.arange(0, BLOCK_D)).to(tl.int64)
        b_x = tl.load(x_ptr + token * stride_xm + d * stride_xd, mask=d < D, other=0.0).to(tl.float32)
        inside = (k < K)[:, None] & (d < D)[None, :]
        rows = tl.load(rows_ptr + active[:, None] * stride_rc + d[None, :], mask=inside, other=0.0).to(tl.float32)
        total += rows * b_x[None, :]
    tl.store(out_ptr + token * K + k, tl.sum(total, 1).to(out_ptr.dtype.element_ty), mask=k < K)


@triton.jit
def sparse_sums_kernel(
    coefficients_ptr,
    rows_ptr, stride_rc,
    indices_ptr, out_ptr,
    K, D,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program computes BLOCK_D columns of sum_j coefficients_tj rows_i(tj) for one token."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for j in range(K):
        active = tl.load(indices_ptr + token * K + j)
        coefficient = tl.load(coefficients_ptr + token * K + j).to(tl.float32)
        total += coefficient * tl.load(rows_ptr + active * stride_rc + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * D + d, total.to(out_ptr.dtype.element_ty), mask=d < D)


def sparse_dots(x: Tensor, rows: Tensor, indices: Tensor) -> Tensor:
    """<x_t, rows_i> for the active rows i of each token: x [M, d] -> [M, k]."""
    (m, k), (count, d) = indices.shape, rows.shape
    if k * GATHER_COST > count:
        return (x @ rows.t()).gather(1, indices)
    rows = rows.contiguous()
    dots = x.new_empty(m, k)

    def run(tile: RowTile) -> None:
        sparse_dots_kernel[(m, triton.cdiv(k, tile.rows))](
            x, *x.stride(), rows, d, indices, dots, k, d, BLOCK_K=tile.rows, BLOCK_D=tile.columns, **tile.launch()
        )

    if dots.numel():
        tiles = config.tiles("sparse_dots_kernel", config.architecture(x.device), x.dtype)
        via.launch("sparse_dots_kernel", x, (tuning.bucket(m), k, d), tiles, run)
    return dots


def sparse_sums(coefficients: Tensor, rows: Tensor, indices: Tensor) -> Tensor:
    """sum_j coefficients_tj rows_i(tj): [M, k] -> [M, d]."""
    (m, k), d = indices.shape, rows.shape[1]
    rows = rows.contiguous()
    coefficients = coefficients.contiguous()
    sums = rows.new_empty(m, d)

    def run(tile: RowTile) -> None:
        block = tile.rows * tile.columns
        sparse_sums_kernel[(m, triton.cdiv(d, block))](
            coefficients, rows, d, indices, sums, k, d, BLOCK_D=block, **tile.launch()
        )

    if sums.numel():
        tiles = config.tiles("sparse_sums_kernel", config.architecture(rows.device), rows.dtype)
        via.launch("sparse_sums_kernel", rows, (tuning.bucket(m), k, d), tiles, run)
    return sums
