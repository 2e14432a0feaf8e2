"""Kernel of the moments of the interaction matrices, which are never formed: tiles of pairs are summed in registers."""

from functools import partial
from typing import TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from bilinear_ops.composite.blockwise import blocks, widen
from bilinear_ops.composite.interaction import ranking as composite
from bilinear_ops.composite.interaction.matrices import two_stage
from bilinear_ops.kernels import config, tuning
from bilinear_ops.kernels import launching as via
from bilinear_ops.kernels.interaction.matrices import SUBTILES, interaction_matrices, padded_rows, pair_products
from bilinear_ops.kernels.records import PairTile
from bilinear_ops.kernels.tile import column_quarters

Moments: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
PARTS = 1 << 25  # elements of the tiles' sums of a block of directions: 128 MiB


@triton.jit
def both_sums(tile):
    """[i, j, k] -> [k] by way of the sums of rows, which round less than one long sum."""
    return tl.sum(tl.sum(tile, 1), 0)


@triton.jit
def interaction_moments_kernel(
    w_ptr, v_ptr, stride_w,
    c_ptr, stride_c,
    sums_ptr,
    D, K, tiles_j, tiles_k,
    H: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A program stores the power sums and the largest magnitude of a tile's pairs i <= j: sums [tiles, 5, K].

    The layout of the operands is that of `interaction_pairs_kernel`.
    """
    k0 = tl.program_id(0) % tiles_k * BLOCK_K
    pair = tl.program_id(0) // tiles_k
    i0 = pair // tiles_j * BLOCK_I
    j0 = pair % tiles_j * BLOCK_J
    if j0 + BLOCK_J <= i0:  # below the diagonal
        return
    acc = pair_products(
        w_ptr, v_ptr, stride_w, c_ptr, stride_c, i0, j0, k0, D, K, H, PRECISION, BLOCK_I, BLOCK_J, BLOCK_K, BLOCK_H
    )
    i = i0 + tl.arange(0, BLOCK_I * BLOCK_J) // BLOCK_J
    j = j0 + tl.arange(0, BLOCK_I * BLOCK_J) % BLOCK_J
    inside = ((i <= j) & (j < D))[:, None]
    quarters = column_quarters(acc)  # fewer live registers
    for part in tl.static_range(SUBTILES):
        k = k0 + part * (BLOCK_K // SUBTILES) + tl.arange(0, BLOCK_K // SUBTILES)
        q = tl.where(inside, quarters[part], 0.0).reshape(BLOCK_I, BLOCK_J, BLOCK_K // SUBTILES)
        square = q * q
        p = sums_ptr + pair.to(tl.int64) * 5 * K + k
        tl.store(p, both_sums(q), mask=k < K)
        tl.store(p + K, both_sums(square), mask=k < K)
        tl.store(p + 2 * K, both_sums(square * q), mask=k < K)
        tl.store(p + 3 * K, both_sums(square * square), mask=k < K)
        bits = tl.abs(q).to(tl.int32, bitcast=True)  # in the order of the magnitudes, NaN the largest
        tl.store(p + 4 * K, tl.max(tl.max(bits, 1), 0).to(tl.float32, bitcast=True), mask=k < K)


def interaction_moments(
    w: Tensor, v: Tensor, c: Tensor, u: Tensor | None, basis: Tensor | None, *, library: bool = True
) -> Moments:
    """(sum, squares, cubes, fourths, max) over i <= j, `[K]`, from fp32-accurate products.

    Few directions, low rank and many features are cheaper by way of the matrices; `library` is for these.
    """
    w, v, c, u, basis = widen(w, v, c, u, basis)
    (h, d), directions = w.shape, (c if u is None else u).shape[0]
    features = d if basis is None else basis.shape[1]
    arch, kernel = config.architecture(w.device), "interaction_moments_kernel"

    def formed() -> Moments:
        matrices = partial(interaction_matrices, library=library)
        return composite.interaction_moments(w, v, c, u, basis, matrices)

    if w.numel() == 0 or directions == 0 or features == 0 or u is not None and two_stage(directions, *c.shape):
        return formed()
    if not config.streams_moments(arch, w.dtype, directions, h, d, features):
        return formed()
    wide = w if basis is None else w @ basis, v if basis is None else v @ basis

    def run(tile: PairTile | None) -> Moments:
        return formed() if tile is None else _moments(*wide, c if u is None else u @ c, tile)

    shape = (tuning.bucket(directions), features, h)
    return via.launch(kernel, w, shape, config.tiles(kernel, arch, w.dtype), run, library=library)


def _moments(w: Tensor, v: Tensor, c: Tensor, tile: PairTile) -> Moments:
    d, padded = w.shape[1], triton.cdiv(w.shape[0], tile.block_h) * tile.block_h
    tiles_i, tiles_j = triton.cdiv(d, tile.block_i), triton.cdiv(d, tile.block_j)
    wt, vt, half = padded_rows(padded, w.t()), padded_rows(padded, v.t()), padded_rows(padded, c).mul_(0.5)
    found = []
    for a, b in blocks(c.shape[0], 5 * tiles_i * tiles_j, PARTS):
        sums = w.new_empty(tiles_i * tiles_j, 5, b - a).zero_()
        tiles_k = triton.cdiv(b - a, tile.block_k)
        interaction_moments_kernel[(tiles_i * tiles_j * tiles_k,)](
            wt, vt, padded, half[a:b], padded, sums, d, b - a, tiles_j, tiles_k,
            H=padded, PRECISION=via.accurate_precision(w),
            BLOCK_I=tile.block_i, BLOCK_J=tile.block_j, BLOCK_K=tile.block_k, BLOCK_H=tile.block_h, **tile.launch(),
        )  # fmt: skip
        powers = sums[:, :4].sum(0, dtype=torch.float64).to(w.dtype)
        found.append(torch.cat((powers, sums[:, 4:].amax(0))))
    total, squares, cubes, fourths, largest = torch.cat(found, 1)
    return total.clone(), squares.clone(), cubes.clone(), fourths.clone(), largest.clone()  # an op returns no views
