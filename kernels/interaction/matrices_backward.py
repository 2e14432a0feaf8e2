"""Kernels of the gradients of the interaction matrices, from dQ [K, d, d].

Many directions: from g [K, ij] of the pairs i <= j, folded into strips of columns in the order in which they are read,
dC = g S^T with the Khatri-Rao factor S generated in registers, and dS = C^T g, which the product rule in w and v takes
up in registers too: each half the products of one matrix at a time. Few directions: G_k = sym(dQ_k) by w and by v, the
kernel of weights summed from rank-1 subcomponents. Partial sums are added in order.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from bilinear_ops.composite.blockwise import blocks
from bilinear_ops.composite.interaction import matrices as composite
from bilinear_ops.composite.interaction.matrices import pack_symmetric, unpack_symmetric
from bilinear_ops.kernels import config, tuning
from bilinear_ops.kernels import launching as via
from bilinear_ops.kernels.interaction.matrices import MIXED, interaction_matrices, load_rows, padded_rows
from bilinear_ops.kernels.rank1.accumulate import contract
from bilinear_ops.kernels.records import RowTile, Tile
from bilinear_ops.kernels.tile import narrow, store_tile

T = TypeVar("T")
STRIP = tl.constexpr(16)  # columns of a strip of the folded gradient
FOLDED = 1 << 30  # elements of the folded gradient of a block of directions
ROWS = 64  # the folded gradient has a multiple of so many, of which block_k of the weights' kernel is a divisor


@triton.jit
def strip_start(s):
    """Where strip s of a folded gradient's row begins: strip t has (t + 1) STRIP rows of STRIP pairs."""
    return s.to(tl.int64) * (s + 1) // 2 * (STRIP * STRIP)


@triton.jit
def interaction_strips_kernel(
    dq_ptr, stride_qk, stride_qi, stride_qj,
    g_ptr, stride_gk,
    D, K, tiles,
    PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program folds a tile of one direction's gradient: half of both triangles' sum at i <= j, else zero.

    Strips of STRIP columns lie one after the other, each with its rows from 0 to its own last column.
    """
    # a row of tiles from the diagonal on, followed by the row as far from the last as this one is from the first
    of_one = (tiles + 1) // 2 * (tiles + 1)
    k = (tl.program_id(0) // of_one).to(tl.int64)
    row, place = tl.program_id(0) % of_one // (tiles + 1), tl.program_id(0) % (tiles + 1)
    first = place < tiles - row
    i = (tl.where(first, row, tiles - 1 - row) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    j = (tl.where(first, row + place, place - 1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[None, :]
    inside = (i <= j) & (j < tl.where(k < K, D, 0))
    q = dq_ptr + k * stride_qk
    if PACKED:
        folded = tl.load(q + (i * D - i * (i - 1) // 2 + j - i) * stride_qi, mask=inside, other=0.0).to(tl.float32)
        folded *= 0.5
    else:
        above = tl.load(q + i * stride_qi + j * stride_qj, mask=inside, other=0.0).to(tl.float32)
        below = tl.load(q + j * stride_qi + i * stride_qj, mask=inside, other=0.0).to(tl.float32)
        folded = tl.where(i == j, 0.5 * above, 0.5 * above + 0.5 * below)
    s = j // STRIP
    place = strip_start(s) + i * STRIP + j % STRIP
    columns = (D + STRIP - 1) // STRIP * STRIP
    mask = (i // STRIP <= s) & (j < columns)
    tl.store(g_ptr + k * stride_gk + place, narrow(folded, g_ptr.dtype.element_ty), mask=mask)


@triton.jit
def interaction_coefficients_kernel(
    g_ptr, stride_g,
    w_ptr, v_ptr, stride_w,
    dc_ptr,
    H, K, strips, tiles_k, PARTS,
    PRECISION: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A program sums BLOCK_H neurons by BLOCK_K directions of dC^T = S^T g over every PARTS-th strip of the pairs.

    w, v [H, D] end in columns of zeros, g [K, pairs] is folded, dc [PARTS, H, K].
    """
    h = tl.program_id(0) // tiles_k * BLOCK_H
    k = tl.program_id(0) % tiles_k * BLOCK_K
    BLOCK_I: tl.constexpr = BLOCK_P // STRIP
    product = tl.zeros((BLOCK_H, BLOCK_K), tl.float32)
    total = tl.zeros((BLOCK_H, BLOCK_K), tl.float32)
    for n in range(0, tl.cdiv(strips - tl.program_id(1), PARTS)):
        s = tl.program_id(1) + n * PARTS
        w_j = load_rows(w_ptr, stride_w, h, H, s * STRIP, BLOCK_H, STRIP).to(tl.float32)
        v_j = load_rows(v_ptr, stride_w, h, H, s * STRIP, BLOCK_H, STRIP).to(tl.float32)
        if g_ptr.dtype.element_ty == tl.float32:  # sums of a strip, then of strips: one long sum would round too often
            total += product
            product = tl.zeros((BLOCK_H, BLOCK_K), tl.float32)
        for i in range(0, (s + 1) * STRIP, BLOCK_I):
            w_i = load_rows(w_ptr, stride_w, h, H, i, BLOCK_H, BLOCK_I).to(tl.float32)
            v_i = load_rows(v_ptr, stride_w, h, H, i, BLOCK_H, BLOCK_I).to(tl.float32)
            g = load_rows(g_ptr, stride_g, k, K, strip_start(s) + i * STRIP, BLOCK_K, BLOCK_P)
            pairs = w_i[:, :, None] * v_j[:, None, :] + v_i[:, :, None] * w_j[:, None, :]
            pairs = pairs.reshape(BLOCK_H, BLOCK_P).to(g.dtype)
            product = tl.dot(pairs, g.T, product, input_precision=PRECISION)
    product += total
    p_dc = dc_ptr + tl.program_id(1).to(tl.int64) * H * K
    store_tile(p_dc, K, h, k, H, K, product, False)


@triton.jit
def interaction_weights_kernel(
    g_ptr, stride_g,
    c_ptr, stride_c,
    w_ptr, v_ptr, stride_w,
    dw_ptr, dv_ptr,
    H, K, strips, PARTS,
    PRECISION: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program adds to dw and dv [PARTS, H, D] of BLOCK_H neurons what every PARTS-th strip of the pairs gives.

    Of a pair (i, j), dS_h = sum_k C_kh g_k is multiplied by v_j and w_j for column i and by v_i and w_i for column j.
    Rows of w, v [H, D] and c [H, K] end in zeros, as do the rows of g [K, pairs]. No other program adds to its part.
    """
    h = tl.program_id(0) * BLOCK_H
    BLOCK_I: tl.constexpr = BLOCK_P // STRIP
    part = tl.program_id(1).to(tl.int64) * H * stride_w
    for n in range(0, tl.cdiv(strips - tl.program_id(1), PARTS)):
        s = tl.program_id(1) + n * PARTS
        w_j = load_rows(w_ptr, stride_w, h, H, s * STRIP, BLOCK_H, STRIP).to(tl.float32)
        v_j = load_rows(v_ptr, stride_w, h, H, s * STRIP, BLOCK_H, STRIP).to(tl.float32)
        dw_j = tl.zeros((BLOCK_H, STRIP), tl.float32)
        dv_j = tl.zeros((BLOCK_H, STRIP), tl.float32)
        for i in range(0, (s + 1) * STRIP, BLOCK_I):
            w_i = load_rows(w_ptr, stride_w, h, H, i, BLOCK_H, BLOCK_I)  # ahead of the main loop, which hides it
            v_i = load_rows(v_ptr, stride_w, h, H, i, BLOCK_H, BLOCK_I)
            dw_i = load_rows(dw_ptr + part, stride_w, h, H, i, BLOCK_H, BLOCK_I)
            dv_i = load_rows(dv_ptr + part, stride_w, h, H, i, BLOCK_H, BLOCK_I)
            ds = tl.zeros((BLOCK_H, BLOCK_P), tl.float32)
            for k in range(0, K, BLOCK_K):
                c = load_rows(c_ptr, stride_c, h, H, k, BLOCK_H, BLOCK_K)
                g = load_rows(g_ptr, stride_g, k, K, strip_start(s) + i * STRIP, BLOCK_K, BLOCK_P)
                ds = tl.dot(c, g, ds, input_precision=PRECISION)
            ds = ds.reshape(BLOCK_H, BLOCK_I, STRIP)
            dw_j += tl.sum(ds * v_i.to(tl.float32)[:, :, None], 1)
            dv_j += tl.sum(ds * w_i.to(tl.float32)[:, :, None], 1)
            store_tile(dw_ptr + part, stride_w, h, i, H, stride_w, dw_i + tl.sum(ds * v_j[:, None, :], 2), False)
            store_tile(dv_ptr + part, stride_w, h, i, H, stride_w, dv_i + tl.sum(ds * w_j[:, None, :], 2), False)
        tl.debug_barrier()  # other threads may have stored what is loaded next
        dw_j += load_rows(dw_ptr + part, stride_w, h, H, s * STRIP, BLOCK_H, STRIP)
        dv_j += load_rows(dv_ptr + part, stride_w, h, H, s * STRIP, BLOCK_H, STRIP)
        store_tile(dw_ptr + part, stride_w, h, s * STRIP, H, stride_w, dw_j, False)
        store_tile(dv_ptr + part, stride_w, h, s * STRIP, H, stride_w, dv_j, False)
        tl.debug_barrier()


def interaction_matrices_backward(
    dq: Tensor, w: Tensor, v: Tensor, c: Tensor, u: Tensor | None, need: list[bool], *, library: bool = True
) -> tuple[Tensor | None, ...]:
    """(dw, dv, dc, du), each None unless needed; dq in either layout. `library` as for `interaction_matrices`."""
    if u is not None:
        return _factored_backward(dq, w, v, c, u, need, library)
    if w.numel() == 0 or dq.shape[0] == 0:
        return composite.interaction_matrices_backward(dq, w, v, c, None, need)
    arch, directions = config.architecture(w.device), dq.shape[0]
    if config.interaction_pairs(arch, w.dtype, directions):
        found = _by_pairs_backward(dq, w, v, c, need, library)
    else:
        found = _by_direction_backward(dq, w, v, c, need, library)
    return tuple(None if t is None else t.to(w.dtype).contiguous() for t in (*found, None))


def _factored_backward(
    dq: Tensor, w: Tensor, v: Tensor, p: Tensor, u: Tensor, need: list[bool], library: bool
) -> tuple[Tensor | None, ...]:
    """In the order of `_factored`, backwards."""
    need_w, need_v, need_p, need_u = need
    directions, d = u.shape[0], w.shape[1]
    if not composite.two_stage(directions, *p.shape):
        wanted = [need_w, need_v, need_p or need_u, False]
        dw, dv, dc, _ = interaction_matrices_backward(dq, w, v, u @ p, None, wanted, library=library)
        return (
            dw,
            dv,
            u.t() @ dc if need_p and dc is not None else None,
            dc @ p.t() if need_u and dc is not None else None,
        )
    stage = interaction_matrices(w, v, p, None, True, library=library) if need_u else None  # [o, d(d+1)/2]
    dstage = u.new_zeros(p.shape[0], d * (d + 1) // 2, dtype=torch.float32)
    du = torch.empty_like(u)
    for a, b in blocks(directions, d * d, MIXED):
        g = dq[a:b]
        if dq.dim() == 3:
            g = g + g.mT
            g.diagonal(dim1=1, dim2=2).mul_(0.5)
            g = pack_symmetric(g)
        if stage is not None:
            du[a:b] = g @ stage.t()
        dstage += u[a:b].t() @ g
    dw, dv, dp, _ = interaction_matrices_backward(
        dstage.to(w.dtype), w, v, p, None, [*need[:3], False], library=library
    )
    return dw, dv, dp, du if need_u else None


def _by_direction_backward(
    dq: Tensor, w: Tensor, v: Tensor, c: Tensor, need: list[bool], library: bool
) -> tuple[Tensor | None, ...]:
    """From G_k = sym(dQ_k): dC_k = sum_i W_i (V G_k)_i, dW = sum_k c_k * (V G_k), dV = sum_k c_k * (W G_k)."""
    need_w, need_v, need_c = need[:3]
    (h, d), directions = w.shape, dq.shape[0]

    def run(tile: Tile | None) -> tuple[Tensor | None, ...]:
        if tile is None:
            return composite.interaction_matrices_backward(dq, w, v, c, None, need)[:3]
        half = 0.5 * dq
        if dq.dim() == 2:
            half = unpack_symmetric(half, d)
            half.diagonal(dim1=1, dim2=2).mul_(2)
        else:
            half = half + half.mT
        dw, dc = contract(half, v.t(), w.t(), c, tile, need_w, need_c)
        dv, _ = contract(half, w.t(), v.t(), c, tile, need_v, False)
        return None if dw is None else dw.t(), None if dv is None else dv.t(), dc

    shape, kernel = (tuning.bucket(directions), d, d, h), "accumulate_backward_kernel"
    return via.launch(
        kernel, w, shape, config.tiles(kernel, config.architecture(w.device), w.dtype), run, library=library
    )


def _by_pairs_backward(
    dq: Tensor, w: Tensor, v: Tensor, c: Tensor, need: list[bool], library: bool
) -> tuple[Tensor | None, ...]:
    """From the folded gradient g of the pairs, a block of directions at a time: dC = g S^T, dS = C^T g."""
    need_w, need_v, need_c = need[:3]
    weights, coefficients = [], []
    for a, b in blocks(dq.shape[0], _pairs(w.shape[1]), FOLDED):
        block = dq[a:b], w, v, c[a:b]
        g = folded(dq[a:b], w.shape[1], w.dtype)
        if need_w or need_v:
            weights.append(_weights_of(g, *block, library))
        if need_c:
            coefficients.append(_coefficients_of(g, *block, library))
    dw, dv = (sum(parts[1:], parts[0]) for parts in zip(*weights, strict=True)) if weights else (None, None)
    return dw if need_w else None, dv if need_v else None, torch.cat(coefficients) if need_c else None


def _strips(d: int) -> int:
    return triton.cdiv(d, STRIP.value)


def _pairs(d: int) -> int:
    """Of all strips, those below the diagonal among them."""
    return _strips(d) * (_strips(d) + 1) // 2 * STRIP.value**2


def folded(dq: Tensor, d: int, dtype: torch.dtype) -> Tensor:
    """The gradient of the pairs in strips, with rows of zeros past the last direction: [rows, pairs]."""
    directions, packed = dq.shape[0], dq.dim() == 2
    rows = triton.cdiv(directions, ROWS) * ROWS
    g = dq.new_empty(rows, _pairs(d), dtype=dtype)

    def run(tile: RowTile) -> Tensor:
        tiles = triton.cdiv(d, tile.rows)
        interaction_strips_kernel[((tiles + 1) // 2 * (tiles + 1) * rows,)](
            dq, *dq.stride(), *([0] if packed else []), g, g.stride(0), d, directions, tiles,
            PACKED=packed, BLOCK=tile.rows, **tile.launch(),
        )  # fmt: skip
        return g

    kernel = "interaction_strips_kernel"
    tiles = config.tiles(kernel, config.architecture(dq.device), dtype)
    return via.launch(kernel, dq, (tuning.bucket(directions), d, packed), tiles, run)


def _parts(tiles: int, strips: int, device: torch.device) -> int:
    """Of the strips, so many that `tiles` programs for each fill the device once."""
    return max(1, min(strips, config.processors(device) // tiles))


def _weights_of(g: Tensor, dq: Tensor, w: Tensor, v: Tensor, c: Tensor, library: bool) -> tuple[Tensor, Tensor]:
    """dW and dV [h, d] in fp32."""
    (h, d), directions, strips = w.shape, dq.shape[0], _strips(w.shape[1])

    def run(tile: Tile | None) -> tuple[Tensor, Tensor]:
        if tile is None:
            dw, dv, *_ = composite.interaction_matrices_backward(dq, w, v, c, None, [True, True, False, False])
            return dw, dv
        columns = strips * STRIP.value
        wide, rows = [padded_rows(columns, t) for t in (w, v)], padded_rows(g.shape[0], c.t())
        tiles = triton.cdiv(h, tile.block_m)
        parts = _parts(tiles, strips, w.device)
        dw, dv = torch.empty(2, parts, h, columns, dtype=torch.float32, device=w.device).zero_()
        interaction_weights_kernel[(tiles, parts)](
            g, g.stride(0), rows, rows.stride(0), *wide, columns, dw, dv, h, g.shape[0], strips, parts,
            PRECISION=via.accurate_precision(w),
            BLOCK_H=tile.block_m, BLOCK_P=tile.block_n, BLOCK_K=tile.block_k, **tile.launch(),
        )  # fmt: skip
        return dw.sum(0)[:, :d], dv.sum(0)[:, :d]

    return _launch("interaction_weights_kernel", w, directions, run, library)


def _coefficients_of(g: Tensor, dq: Tensor, w: Tensor, v: Tensor, c: Tensor, library: bool) -> Tensor:
    """dC [K, h] in fp32."""
    h, directions, strips = w.shape[0], dq.shape[0], _strips(w.shape[1])

    def run(tile: Tile | None) -> Tensor:
        if tile is None:
            return composite.interaction_matrices_backward(dq, w, v, c, None, [False, False, True, False])[2]
        columns = strips * STRIP.value
        tiles_k = triton.cdiv(directions, tile.block_n)
        tiles = triton.cdiv(h, tile.block_m) * tiles_k
        parts = _parts(tiles, strips, w.device)
        dc = torch.empty(parts, h, directions, dtype=torch.float32, device=w.device)
        interaction_coefficients_kernel[(tiles, parts)](
            g, g.stride(0), padded_rows(columns, w), padded_rows(columns, v), columns, dc, h, directions,
            strips, tiles_k, parts, PRECISION=via.accurate_precision(w),
            BLOCK_H=tile.block_m, BLOCK_K=tile.block_n, BLOCK_P=tile.block_k, **tile.launch(),
        )  # fmt: skip
        return dc.sum(0).t()

    return _launch("interaction_coefficients_kernel", w, directions, run, library)


def _launch(kernel: str, w: Tensor, directions: int, run: Callable[[Tile | None], T], library: bool) -> T:
    (h, d), tiles = w.shape, config.tiles(kernel, config.architecture(w.device), w.dtype)
    return via.launch(kernel, w, (tuning.bucket(directions), d, h), tiles, run, library=library)
