"""What the kernels share: the order of tiles; loads and stores of tiles through descriptors or pointers."""

import triton
import triton.language as tl
from triton import knobs
from triton.language.target_info import is_cuda

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
def load_halves(
    src, stride_r, row, col, rows, cols, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, DESCRIPTOR: tl.constexpr
):
    """The tiles at (row, col) of both halves of a matrix [rows, 2, cols], zero outside."""
    if DESCRIPTOR:
        both = src.load([row, 0, col])
        if INTERPRET:
            both = both.to(tl.float32)
        first, second = both.permute(0, 2, 1).split()
    else:
        first = load_tile(src, stride_r, 1, row, col, rows, cols, BLOCK_R, BLOCK_C, False)
        second = load_tile(src + cols, stride_r, 1, row, col, rows, cols, BLOCK_R, BLOCK_C, False)
    return first, second  # [BLOCK_R, BLOCK_C]


@triton.jit
def store_halves(dst, stride_r, row, col, rows, cols, first, second, DESCRIPTOR: tl.constexpr):
    """Store tiles at (row, col) of both halves of a matrix [rows, 2, cols], clipped to it."""
    if DESCRIPTOR:
        dst.store([row, 0, col], narrow(tl.join(first, second), dst.dtype).permute(0, 2, 1))
    else:
        store_tile(dst, stride_r, row, col, rows, cols, first, False)
        store_tile(dst + cols, stride_r, row, col, rows, cols, second, False)


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


@triton.jit
def column_eighths(tile):
    """[BLOCK_R, 8 n] -> eight [BLOCK_R, n], from left to right."""
    left, right = column_halves(tile)
    return column_quarters(left) + column_quarters(right)


@triton.jit
def in_one_layout(x, y, z):
    """Three fp32 tiles as they are, of which the compiler then computes whatever depends on them once."""
    if not INTERPRET and is_cuda():
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $3; mov.b32 $1, $4; mov.b32 $2, $5;", "=&f,=&f,=&f,f,f,f", [x, y, z],
            (tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    return x, y, z
