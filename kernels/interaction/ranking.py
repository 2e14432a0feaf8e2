"""Kernels of the moments and of the strongest entries of the interaction matrices, none of which is formed.

Moments are sums over tiles of pairs, which stay in registers. A ranking keeps the strongest pair of every tile: the n
strongest pairs of a direction lie in the n tiles whose own strongest pairs are the strongest. Only these tiles are
computed again, pair by pair, and ranked. The two kernels round differently: which of two pairs is kept whose ranks
differ by rounding alone is undefined. Keys are distinct, so equal ranks are in the specification's order. No number is
read on the host.
"""

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
from bilinear_ops.kernels.interaction.matrices import (
    SUBTILES,
    interaction_matrices,
    load_rows,
    padded_rows,
    pair_products,
)
from bilinear_ops.kernels.records import PairTile
from bilinear_ops.kernels.tile import column_quarters

Moments: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
TopK: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]
PARTS = 1 << 25  # elements of the tiles' sums of a block of directions: 128 MiB
KEYS = 1 << 24  # of a block of tiles, and of pairs of a block of directions: 128 MiB
PLACES = 1 << 32  # a key's lower half is the number i * F + j, its upper half the rank's 31 bits
NOT_RANKED = tl.constexpr(-1)  # less than every key
NAN = tl.constexpr(0x7FC00000)  # a rank's bits: more than infinity's


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
    if not config.streams(arch, w.dtype, directions, h, d, features):
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


@triton.jit
def ranked(
    q, i, j, k, D, K,
    weight_ptr, stride_weight_k, stride_weight_i, stride_weight_j,
    TWICE: tl.constexpr, DIAGONAL: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    """(value, key) of Q_k[i, j]; a larger key is a larger |value * weight|, or an earlier pair of the same rank.

    i, j and k broadcast to the tile. TWICE: a pair off the diagonal counts twice. WEIGHT: dimensions of the weight.
    """
    inside = ((i <= j) if DIAGONAL else (i < j)) & (j < D)
    value = tl.where(i < j, 2.0 * q, q) if TWICE else q
    rank = value
    if WEIGHT:
        p = weight_ptr + i.to(tl.int64) * stride_weight_i + j.to(tl.int64) * stride_weight_j
        if WEIGHT == 2:
            rank = value * tl.load(p, mask=inside, other=0.0).to(tl.float32)
        else:
            p += k.to(tl.int64) * stride_weight_k
            rank = value * tl.load(p, mask=inside & (k < K), other=0.0).to(tl.float32)
    rank = tl.abs(rank)
    bits = tl.where(rank == rank, rank.to(tl.int32, bitcast=True), NAN)
    key = (bits.to(tl.int64) << 32) + (0xFFFFFFFF - (i.to(tl.int64) * D + j))
    return value, tl.where(inside, key, NOT_RANKED)


@triton.jit
def interaction_topk_kernel(
    w_ptr, v_ptr, stride_w,
    c_ptr, stride_c,
    weight_ptr, stride_weight_k, stride_weight_i, stride_weight_j,
    best_ptr,
    D, K, tiles_j, tiles_k, first,
    H: tl.constexpr, PRECISION: tl.constexpr,
    TWICE: tl.constexpr, DIAGONAL: tl.constexpr, WEIGHT: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A program stores the largest key of a tile's pairs: best [tiles from `first` on, K].

    The layout of the operands is that of `interaction_pairs_kernel`.
    """
    k0 = tl.program_id(0) % tiles_k * BLOCK_K
    pair = first + tl.program_id(0) // tiles_k
    i0 = pair // tiles_j * BLOCK_I
    j0 = pair % tiles_j * BLOCK_J
    if j0 + BLOCK_J <= i0:  # below the diagonal
        return
    acc = pair_products(
        w_ptr, v_ptr, stride_w, c_ptr, stride_c, i0, j0, k0, D, K, H, PRECISION, BLOCK_I, BLOCK_J, BLOCK_K, BLOCK_H
    )
    i = (i0 + tl.arange(0, BLOCK_I * BLOCK_J) // BLOCK_J)[:, None]
    j = (j0 + tl.arange(0, BLOCK_I * BLOCK_J) % BLOCK_J)[:, None]
    quarters = column_quarters(acc)  # fewer live registers
    for part in tl.static_range(SUBTILES):
        k = k0 + part * (BLOCK_K // SUBTILES) + tl.arange(0, BLOCK_K // SUBTILES)
        _, key = ranked(
            quarters[part], i, j, k[None, :], D, K, weight_ptr, stride_weight_k, stride_weight_i, stride_weight_j,
            TWICE, DIAGONAL, WEIGHT,
        )  # fmt: skip
        tl.store(best_ptr + (pair - first).to(tl.int64) * K + k, tl.max(key, 0), mask=k < K)


@triton.jit
def interaction_candidates_kernel(
    w_ptr, v_ptr, stride_w,
    c_ptr, stride_c,
    weight_ptr, stride_weight_k, stride_weight_i, stride_weight_j,
    k_ptr, tile_ptr,
    values_ptr, keys_ptr,
    D, K, H, tiles_j,
    PRECISION: tl.constexpr, TWICE: tl.constexpr, DIAGONAL: tl.constexpr, WEIGHT: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A program stores the values and keys of all pairs of one tile of one direction: [programs, BLOCK_J, BLOCK_I]."""
    program = tl.program_id(0).to(tl.int64)
    k = tl.load(k_ptr + program)
    tile = tl.load(tile_ptr + program).to(tl.int32)
    i0 = tile // tiles_j * BLOCK_I
    j0 = tile % tiles_j * BLOCK_J
    left = tl.zeros((BLOCK_J, BLOCK_I), tl.float32)
    right = tl.zeros((BLOCK_J, BLOCK_I), tl.float32)
    for h in range(0, H, BLOCK_H):
        c = tl.load(c_ptr + k * stride_c + h + tl.arange(0, BLOCK_H))[None, :]
        w_i = c * load_rows(w_ptr, stride_w, i0, D, h, BLOCK_I, BLOCK_H)
        v_i = c * load_rows(v_ptr, stride_w, i0, D, h, BLOCK_I, BLOCK_H)
        w_j = load_rows(w_ptr, stride_w, j0, D, h, BLOCK_J, BLOCK_H)
        v_j = load_rows(v_ptr, stride_w, j0, D, h, BLOCK_J, BLOCK_H)
        left = tl.dot(v_j, w_i.T, left, input_precision=PRECISION)
        right = tl.dot(w_j, v_i.T, right, input_precision=PRECISION)
    i = (i0 + tl.arange(0, BLOCK_I))[None, :]
    j = (j0 + tl.arange(0, BLOCK_J))[:, None]
    value, key = ranked(
        left + right, i, j, tl.full((1, 1), k, tl.int64), D, K,
        weight_ptr, stride_weight_k, stride_weight_i, stride_weight_j, TWICE, DIAGONAL, WEIGHT,
    )  # fmt: skip
    place = (program * BLOCK_J + tl.arange(0, BLOCK_J)[:, None]) * BLOCK_I + tl.arange(0, BLOCK_I)[None, :]
    tl.store(values_ptr + place, value)
    tl.store(keys_ptr + place, key)


def interaction_topk(
    w: Tensor,
    v: Tensor,
    c: Tensor,
    u: Tensor | None,
    basis: Tensor | None,
    weight: Tensor | None,
    n: int,
    score: str,
    scope: str,
    *,
    library: bool = True,
) -> TopK:
    """(values, k, i, j), `[K, n]` or for scope "global" `[n]`; ranked by fp32-accurate products.

    Many of all entries, few directions, low rank and many features are cheaper by way of the matrices; `library` is for
    these, and for what then forms none in kernels.
    """
    (h, d), directions = w.shape, (c if u is None else u).shape[0]
    features = d if basis is None else basis.shape[1]
    arch, kernel = config.architecture(w.device), "interaction_topk_kernel"

    def formed() -> TopK:
        matrices = partial(interaction_matrices, library=library)
        return composite.interaction_topk(w, v, c, u, basis, weight, n, score, scope, matrices)

    if min(n, h, d, directions) == 0 or features**2 > PLACES:
        return formed()
    forms = composite.forms_matrices(directions, basis, score)
    cheaper = forms and not config.streams(arch, torch.float32, directions, h, d, features)
    cheaper |= u is not None and two_stage(directions, *c.shape)
    few = config.few_tiles(arch, n, features, directions if scope == "global" else 1)
    if (cheaper or not few) and (library or forms):
        return formed()
    dtype = w.dtype
    w, v, c, u, basis = widen(w, v, c, u, basis)
    wide = (w, v) if basis is None else (w @ basis, v @ basis)

    def run(tile: PairTile | None) -> TopK:
        return formed() if tile is None else _topk(*wide, c if u is None else u @ c, weight, n, score, scope, tile)

    shape = (tuning.bucket(directions), features, h, 0 if weight is None else weight.dim())
    values, k, i, j = via.launch(kernel, w, shape, config.tiles(kernel, arch, w.dtype), run, library=library)
    return values.to(dtype), k, i, j


def _topk(
    w: Tensor, v: Tensor, c: Tensor, weight: Tensor | None, n: int, score: str, scope: str, tile: PairTile
) -> TopK:
    (h, features), directions = w.shape, c.shape[0]
    padded = triton.cdiv(h, tile.block_h) * tile.block_h
    wt, vt, half = padded_rows(padded, w.t()), padded_rows(padded, v.t()), padded_rows(padded, c).mul_(0.5)
    tiles_i, tiles_j = triton.cdiv(features, tile.block_i), triton.cdiv(features, tile.block_j)
    tiles, pairs = tiles_i * tiles_j, tile.block_i * tile.block_j
    strides = (0, 0, 0) if weight is None else (0, 0, *weight.stride())[-3:]
    options = {
        "TWICE": score != "entry",
        "DIAGONAL": score != "cross",
        "WEIGHT": 0 if weight is None else weight.dim(),
        "BLOCK_I": tile.block_i,
        "BLOCK_J": tile.block_j,
        "PRECISION": via.accurate_precision(w),
    }

    def best(first: int, last: int) -> tuple[Tensor, Tensor]:
        """The n largest keys of the tiles from `first` to `last`, and the tiles' numbers: [K, n or all tiles]."""
        keys = w.new_full((last - first, directions), NOT_RANKED.value, dtype=torch.int64)
        tiles_k = triton.cdiv(directions, tile.block_k)
        interaction_topk_kernel[((last - first) * tiles_k,)](
            wt, vt, padded, half, padded, weight, *strides, keys, features, directions, tiles_j, tiles_k, first,
            H=padded, BLOCK_K=tile.block_k, BLOCK_H=tile.block_h, **options, **tile.launch(),
        )  # fmt: skip
        top = keys.t().contiguous().topk(min(n, last - first), 1)
        return top.values, top.indices + first

    def candidates(k: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        """The values and the keys of all pairs of some tiles of directions: [tiles, pairs]."""
        kernel, count = "interaction_candidates_kernel", k.numel()
        values, keys = w.new_empty(count, pairs), k.new_empty(count, pairs)

        def run(again: PairTile) -> None:
            interaction_candidates_kernel[(count,)](
                wt, vt, padded, half, padded, weight, *strides, k, number, values, keys,
                features, directions, padded, tiles_j, BLOCK_H=again.block_h, **options, **again.launch(),
            )  # fmt: skip

        arch = config.architecture(w.device)
        shape = (tuning.bucket(count), features, h, options["WEIGHT"])
        via.launch(kernel, w, shape, config.tiles(kernel, arch, w.dtype), run)
        return values, keys

    keys = numbers = w.new_empty(directions, 0, dtype=torch.int64)
    for first, last in blocks(tiles, directions, KEYS):
        keys, numbers = (torch.cat(both, 1) for both in zip((keys, numbers), best(first, last), strict=True))
        top = keys.topk(min(n, keys.shape[1]), 1)
        keys, numbers = top.values, numbers.gather(1, top.indices)
    kept = keys.shape[1]  # n, or as many as there are tiles
    if scope == "global":
        # as the order (k, pair) is kept among equal ranks, the first n hold the n strongest pairs of all
        order = (keys >> 32).flatten().argsort(descending=True, stable=True)[:n]
        k, numbers = order // kept, numbers.flatten()[order]
        values, keys, of = w.new_empty(0), numbers.new_empty(0), numbers.new_empty(0)
        for a, b in blocks(k.numel(), 2 * pairs, KEYS):
            more = *(t.flatten() for t in candidates(k[a:b], numbers[a:b])), k[a:b].repeat_interleave(pairs)
            values, keys, of = (torch.cat(both) for both in zip((values, keys, of), more, strict=True))
            order = ((of << 32) + _place(keys)).argsort()
            order = order[(keys[order] >> 32).argsort(descending=True, stable=True)[:n]]
            values, keys, of = values[order], keys[order], of[order]
        place = _place(keys)
        return values, of, place // features, place % features
    found = []
    directions_of = torch.arange(directions, device=w.device).unsqueeze(1)
    for a, b in blocks(directions, 2 * kept * pairs, KEYS):
        values, keys = candidates(directions_of[a:b].repeat(1, kept).flatten(), numbers[a:b].flatten())
        top = keys.view(b - a, -1).topk(n, 1)
        found.append((values.view(b - a, -1).gather(1, top.indices), _place(top.values)))
    values, place = (torch.cat(parts) for parts in zip(*found, strict=True))
    return values, directions_of.repeat(1, n), place // features, place % features


def _place(keys: Tensor) -> Tensor:
    """i * features + j, of keys of ranked pairs."""
    return (PLACES - 1) - (keys & (PLACES - 1))
