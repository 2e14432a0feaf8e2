"""The numbers of `bilinear_ops.reference.rank1.masks`, bitwise, whatever the tile: splitmix64 with random access."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bilinear_ops.kernels import config, tuning
from bilinear_ops.kernels import launching as via
from bilinear_ops.kernels.records import RowTile
from bilinear_ops.kernels.tile import store_tile

GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
MIX_2 = tl.constexpr(0x94D049BB133111EB)
PAIR_BITS = tl.constexpr(24)


@triton.jit
def mix(word):
    """splitmix64's finaliser on uint64."""
    word = (word ^ (word >> 30)) * MIX_1
    word = (word ^ (word >> 27)) * MIX_2
    return word ^ (word >> 31)


@triton.jit
def next_state(state, index):
    return mix(state + (index.to(tl.int64) + 1).to(tl.uint64) * GOLDEN)


@triton.jit
def sample_state(seed_ptr, site, sample):
    """The state of one sample of one site: uint64 []."""
    return next_state(next_state(tl.load(seed_ptr).to(tl.uint64), site), sample)


@triton.jit
def uniform_tile(state, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """float32 [ROWS, COLUMNS] in [0, 1), from an even column on; one word gives two columns."""
    rows = (tl.cast(row, tl.int64) + tl.arange(0, ROWS)).to(tl.uint64) << PAIR_BITS
    pairs = (column // 2 + 1 + tl.arange(0, COLUMNS // 2)).to(tl.uint64)
    words = mix((state + rows * GOLDEN)[:, None] + (pairs * GOLDEN)[None, :])  # [ROWS, COLUMNS / 2]
    low = unit(words.to(tl.uint32))
    high = unit((words >> 32).to(tl.uint32))
    return tl.join(low, high).reshape(ROWS, COLUMNS)


@triton.jit
def uniform_at(state, rows, columns):
    """float32 [ROWS, COLUMNS] in [0, 1) at int64 rows and columns in any order: a word for each."""
    pairs = (columns // 2 + 1).to(tl.uint64) * GOLDEN
    words = mix((state + (rows.to(tl.uint64) << PAIR_BITS) * GOLDEN)[:, None] + pairs[None, :])
    return unit(tl.where((columns % 2 == 1)[None, :], words >> 32, words).to(tl.uint32))


@triton.jit
def draw_uniforms(state, rows_ptr, columns_ptr, row, column, M, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The uniforms of one tile, at the numbers of its rows and columns where these are given."""
    if rows_ptr is None and columns_ptr is None:
        u = uniform_tile(state, row, column, ROWS, COLUMNS)
    else:
        rows = tl.cast(row, tl.int64) + tl.arange(0, ROWS)
        columns = tl.cast(column, tl.int64) + tl.arange(0, COLUMNS)
        if rows_ptr is not None:
            rows = tl.load(rows_ptr + rows, mask=rows < M, other=0)
        if columns_ptr is not None:
            columns = tl.load(columns_ptr + columns, mask=columns < C, other=0)
        u = uniform_at(state, rows, columns)
    return u


@triton.jit
def unit(half_word):
    """uint32 -> float32 in [0, 1): the top 24 bits as a signed number, scaled and shifted; every step is exact."""
    return (half_word.to(tl.int32, bitcast=True) >> 8).to(tl.float32) * 5.9604644775390625e-08 + 0.5


@triton.jit(do_not_specialize=["site"])
def uniform_kernel(
    seed_ptr, site, rows_ptr, columns_ptr, out_ptr, R, C,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program draws one tile [ROWS, COLUMNS] of one sample."""
    tiles_c = tl.cdiv(C, COLUMNS)
    row = tl.program_id(0).to(tl.int64) // tiles_c * ROWS
    column = tl.program_id(0) % tiles_c * COLUMNS
    sample = tl.program_id(1)
    state = sample_state(seed_ptr, site, sample)
    u = draw_uniforms(state, rows_ptr, columns_ptr, row, column, R, C, ROWS, COLUMNS)
    store_tile(out_ptr + sample.to(tl.int64) * R * C, C, row, column, R, C, u, False)


def uniform(
    seed: Tensor,
    site: int,
    samples: int,
    rows: int,
    columns: int,
    row_numbers: Tensor | None = None,
    column_numbers: Tensor | None = None,
) -> Tensor:
    """float32 [samples, rows, columns], uniform on the multiples of 2^-24 in [0, 1)."""
    out = torch.empty(samples, rows, columns, dtype=torch.float32, device=seed.device)

    def run(tile: RowTile) -> None:
        tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
        uniform_kernel[(tiles, samples)](
            seed,
            site,
            row_numbers,
            column_numbers,
            out,
            rows,
            columns,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            **tile.launch(fp_fusion=False),
        )

    if out.numel():
        tiles = config.tiles("uniform_kernel", config.architecture(seed.device), out.dtype)
        via.launch("uniform_kernel", out, (samples, tuning.bucket(rows), columns), tiles, run)
    return out
