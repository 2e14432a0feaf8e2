"""What the kernels share: the order of tiles; loads and stores of tiles through descriptors or pointers."""

import triton
import triton.language as tl
from triton import knobs

# The interpreter computes bf16 on raw bits, wrongly; there every tile is widened as it is loaded.
INTERPRET = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def grouped(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """The (m, n) of a tile, GROUP_M rows of tiles at a time, so that neighbours share operands in L2."""
    first_m = tile // (GROUP_M * tiles_n) * GROUP_M
    group_m = min(tiles_m - first_m, GROUP_M)
    within = tile % (GROUP_M * tiles_n)
    return first_m + within % group_m, within // group_m


@triton.jit
def load_tile(
    src, stride_r, stride_c, row, col, rows, cols,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """The tile at (row, col), zero outside [rows, cols]; `src` is a descriptor or a pointer with its strides."""
    if DESCRIPTOR:
        tile = src.load([row, col])
    else:
        r = row + tl.arange(0, BLOCK_R).to(tl.int64)
        c = col + tl.arange(0, BLOCK_C).to(tl.int64)
        inside = (r < rows)[:, None] & (c < cols)[None, :]
        tile = tl.load(src + r[:, None] * stride_r + c[None, :] * stride_c, mask=inside, other=0.0)
    if INTERPRET:
        tile = tile.to(tl.float32)
    return tile  # [BLOCK_R, BLOCK_C]


@triton.jit
def narrow(tile, dtype: tl.constexpr):
    """The tile in `dtype`, rounded to nearest even, also in the interpreter, which truncates to bf16 by itself."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = tile.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        tile = tl.where(tile == tile, rounded.to(tl.float32, bitcast=True), float("nan"))
    return tile.to(dtype)


@triton.jit
def store_tile(dst, stride_r, row, col, rows, cols, tile, DESCRIPTOR: tl.constexpr):
    """Store a tile at (row, col) of a row-major matrix in the matrix's dtype, clipped to [rows, cols]."""
    if DESCRIPTOR:
        dst.store([row, col], narrow(tile, dst.dtype))
    else:
        r = row + tl.arange(0, tile.shape[0]).to(tl.int64)
        c = col + tl.arange(0, tile.shape[1])
        inside = (r < rows)[:, None] & (c < cols)[None, :]
        tl.store(dst + r[:, None] * stride_r + c[None, :], narrow(tile, dst.dtype.element_ty), mask=inside)


@triton.jit
def column_halves(tile):
    """[BLOCK_R, 2 n] -> two [BLOCK_R, n], in registers."""
    return tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def column_quarters(tile):
    """[BLOCK_R, 4 n] -> four [BLOCK_R, n], from left to right."""
    left, right = column_halves(tile)
    first, second = column_halves(left)
    third, fourth = column_halves(right)
    return first, second, third, fourth
