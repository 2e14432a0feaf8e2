"""Kernels of the interaction matrices Q_k = sum_h C_kh 1/2 (w_h v_h^T + v_h w_h^T).

Many directions: one GEMM of all directions by a tile of pairs i <= j, Q[k, ij] = sum_h C_kh S_h(ij). The Khatri-Rao
factor S_h(ij) = 1/2 (w_hi v_hj + v_hi w_hj) is generated in registers: half the products of one matrix at a time. Few
directions: one GEMM per direction, sum_h (C_kh [w | v]_hi) [v | w]_hj. Each pair is computed once and stored to both
triangles, so that Q_k is bitwise symmetric.
"""

import triton
import triton.language as tl
from torch import Tensor

from bilinear_ops.composite.blockwise import blocks
from bilinear_ops.composite.interaction import matrices as composite
from bilinear_ops.composite.interaction.matrices import unpack_symmetric
from bilinear_ops.kernels import config, tuning
from bilinear_ops.kernels import launching as via
from bilinear_ops.kernels.records import PairTile, Tile
from bilinear_ops.kernels.tile import INTERPRET, column_quarters

SUBTILES = tl.constexpr(4)  # of the epilogue over directions: column_quarters
MIXED = 1 << 26  # elements of a block of mixtures of low-rank directions: few and large GEMMs


@triton.jit
def load_rows(ptr, stride_r, row, rows, h, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr):
    """BLOCK_R rows from `row` and BLOCK_H columns from `h` of a padded matrix; row 0 stands for rows past the last."""
    r = row + tl.arange(0, BLOCK_R)
    r = tl.where(r < rows, r, 0).to(tl.int64)
    tile = tl.load(ptr + r[:, None] * stride_r + h + tl.arange(0, BLOCK_H)[None, :])
    return tile.to(tl.float32) if INTERPRET else tile  # [BLOCK_R, BLOCK_H]


@triton.jit
def store_pairs(q_ptr, stride_qk, tile, i, j, k, D, K, PACKED: tl.constexpr, ABOVE: tl.constexpr):
    """Store Q_k[i, j] to the packed layout, or to both triangles; i, j and k broadcast to the tile.

    ABOVE says that i < j in all of the tile: no mask then depends on i and j, and stores are 16 bytes wide.
    """
    q = q_ptr + k.to(tl.int64) * stride_qk
    i = i.to(tl.int64)
    j = j.to(tl.int64)
    tile = tile.to(q_ptr.dtype.element_ty)
    inside = (j < D) & (k < K)
    if ABOVE:
        tl.store(q + (i * D + j), tile, mask=inside)
        tl.store(q + (j * D + i), tile, mask=inside)
    elif PACKED:
        tl.store(q + (i * D - i * (i - 1) // 2 + j - i), tile, mask=inside & (i <= j))
    else:
        tl.store(q + (i * D + j), tile, mask=inside & (i <= j))
        tl.store(q + (j * D + i), tile, mask=inside & (i < j))


@triton.jit
def pair_products(
    w_ptr, v_ptr, stride_w,
    c_ptr, stride_c,
    i, j, k, D, K,
    H: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """BLOCK_I x BLOCK_J pairs from (i, j) of BLOCK_K directions from k; rows of w, v [D, H], c [K, H] end in zeros."""
    acc = tl.zeros((BLOCK_I * BLOCK_J, BLOCK_K), tl.float32)
    for h in range(0, H, BLOCK_H):
        w_i = load_rows(w_ptr, stride_w, i, D, h, BLOCK_I, BLOCK_H).to(tl.float32)
        v_i = load_rows(v_ptr, stride_w, i, D, h, BLOCK_I, BLOCK_H).to(tl.float32)
        w_j = load_rows(w_ptr, stride_w, j, D, h, BLOCK_J, BLOCK_H).to(tl.float32)
        v_j = load_rows(v_ptr, stride_w, j, D, h, BLOCK_J, BLOCK_H).to(tl.float32)
        c = load_rows(c_ptr, stride_c, k, K, h, BLOCK_K, BLOCK_H)
        s = w_i[:, None, :] * v_j[None, :, :] + v_i[:, None, :] * w_j[None, :, :]
        s = s.reshape(BLOCK_I * BLOCK_J, BLOCK_H).to(c.dtype)
        acc = tl.dot(s, c.T, acc, input_precision=PRECISION)
    return acc  # [BLOCK_I * BLOCK_J, BLOCK_K]


@triton.jit
def interaction_pairs_kernel(
    w_ptr, v_ptr, stride_w,
    c_ptr, stride_c,
    q_ptr, stride_qk,
    D, K, tiles_j, tiles_k,
    H: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A program computes BLOCK_I x BLOCK_J pairs of BLOCK_K directions; rows of w, v [D, H] and c [K, H] end in zeros.

    H is a compile-time constant: with a run-time extent every wgmma waits for the previous one.
    """
    pid = tl.program_id(0)
    k0 = pid % tiles_k * BLOCK_K
    i0 = pid // tiles_k // tiles_j * BLOCK_I
    j0 = pid // tiles_k % tiles_j * BLOCK_J
    if j0 + BLOCK_J <= i0:  # below the diagonal
        return
    acc = pair_products(
        w_ptr, v_ptr, stride_w, c_ptr, stride_c, i0, j0, k0, D, K, H, PRECISION, BLOCK_I, BLOCK_J, BLOCK_K, BLOCK_H
    )
    i = (i0 + tl.arange(0, BLOCK_I))[:, None, None]
    j = (j0 + tl.arange(0, BLOCK_J))[None, :, None]
    quarters = column_quarters(acc)  # fewer live registers in the epilogue
    above = j0 >= i0 + BLOCK_I
    for part in tl.static_range(SUBTILES):
        k = (k0 + part * (BLOCK_K // SUBTILES) + tl.arange(0, BLOCK_K // SUBTILES))[None, None, :]
        tile = quarters[part].reshape(BLOCK_I, BLOCK_J, BLOCK_K // SUBTILES)
        if above and not PACKED:
            store_pairs(q_ptr, stride_qk, tile, i, j, k, D, K, PACKED, True)
        else:
            store_pairs(q_ptr, stride_qk, tile, i, j, k, D, K, PACKED, False)


@triton.jit
def interaction_direction_kernel(
    x_ptr, y_ptr, stride_x,
    c_ptr, stride_c,
    q_ptr, stride_qk,
    D, tiles,
    H: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A program computes a BLOCK x BLOCK tile of one direction's matrix: x = [w | v], y = [v | w] [D, H], c [K, H]."""
    i0 = tl.program_id(0) // tiles * BLOCK
    j0 = tl.program_id(0) % tiles * BLOCK
    k = tl.program_id(1)
    if j0 < i0:
        return
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for h in range(0, H, BLOCK_H):
        x = load_rows(x_ptr, stride_x, i0, D, h, BLOCK, BLOCK_H)
        y = load_rows(y_ptr, stride_x, j0, D, h, BLOCK, BLOCK_H)
        c = tl.load(c_ptr + k.to(tl.int64) * stride_c + h + tl.arange(0, BLOCK_H)).to(tl.float32)
        acc = tl.dot((x.to(tl.float32) * c[None, :]).to(y.dtype), y.T, acc, input_precision=PRECISION)
    i = (i0 + tl.arange(0, BLOCK))[:, None]
    j = (j0 + tl.arange(0, BLOCK))[None, :]
    k = tl.full((1, 1), k, tl.int32)
    if j0 > i0 and not PACKED:
        store_pairs(q_ptr, stride_qk, acc, i, j, k, D, tl.num_programs(1), PACKED, True)
    else:
        store_pairs(q_ptr, stride_qk, acc, i, j, k, D, tl.num_programs(1), PACKED, False)


def interaction_matrices(
    w: Tensor, v: Tensor, c: Tensor, u: Tensor | None, packed: bool, *, library: bool = True
) -> Tensor:
    """The matrices of directions c [K, h], or u c with u [K, o] and c [o, h]: [K, d, d], or packed [K, d(d+1)/2].

    RuntimeError where only the library's products are left to choose and `library` forbids them.
    """
    if u is not None:
        return _factored(w, v, c, u, packed, library)
    (h, d), directions = w.shape, c.shape[0]
    shape = (directions, d * (d + 1) // 2) if packed else (directions, d, d)

    def run(tile: Tile | PairTile | None) -> Tensor:
        if tile is None:
            return composite.interaction_matrices(w, v, c, None, packed)
        q = w.new_empty(shape)
        if isinstance(tile, PairTile):
            _by_pairs(w, v, c, q, tile)
        else:
            _by_direction(w, v, c, q, tile)
        return q

    if w.numel() == 0 or directions == 0:
        return run(config.LIBRARY)
    tiles = config.interaction_matrices(config.architecture(w.device), w.dtype, directions)
    return via.launch("interaction_matrices", w, (tuning.bucket(directions), d, h, packed), tiles, run, library=library)


def workspace(directions: int, o: int, packed: bool, w: Tensor) -> int:
    """Peak elements of `interaction_matrices` beside arguments and result, with the table's tiles; o = 0: no u."""
    h, d = w.shape
    if o and composite.two_stage(directions, o, h):
        stage = o * (d * (d + 1) // 2)
        mixture = 0 if packed else 2 * min(directions * d * d, max(d * d, MIXED))
        return stage + max(workspace(o, 0, True, w), mixture)
    product = directions * h if o else 0
    (tile,) = config.interaction_matrices(config.architecture(w.device), w.dtype, directions)
    if tile is None:
        return product + composite.workspace(directions, 0, packed, w)
    return product + (2 * d + directions) * _columns(h, tile)


def _factored(w: Tensor, v: Tensor, p: Tensor, u: Tensor, packed: bool, library: bool) -> Tensor:
    """The matrices of the directions u p, or the mixtures by u of the packed matrices of p, whichever is cheaper."""
    directions, d = u.shape[0], w.shape[1]
    if not composite.two_stage(directions, *p.shape):
        return interaction_matrices(w, v, u @ p, None, packed, library=library)
    stage = interaction_matrices(w, v, p, None, True, library=library)  # [o, d(d+1)/2]
    if packed:
        return u @ stage
    q = w.new_empty(directions, d, d)
    for a, b in blocks(directions, d * d, MIXED):
        q[a:b] = unpack_symmetric(u[a:b] @ stage, d)
    return q


def _by_pairs(w: Tensor, v: Tensor, c: Tensor, q: Tensor, tile: PairTile) -> None:
    (h, d), directions = w.shape, c.shape[0]
    padded = _columns(h, tile)
    wt, vt, half = padded_rows(padded, w.t()), padded_rows(padded, v.t()), padded_rows(padded, c).mul_(0.5)
    tiles_i, tiles_j = triton.cdiv(d, tile.block_i), triton.cdiv(d, tile.block_j)
    tiles_k = triton.cdiv(directions, tile.block_k)
    interaction_pairs_kernel[(tiles_i * tiles_j * tiles_k,)](
        wt, vt, padded, half, padded, q, q.stride(0), d, directions, tiles_j, tiles_k,
        H=padded, PACKED=q.dim() == 2, PRECISION=via.accurate_precision(w),
        BLOCK_I=tile.block_i, BLOCK_J=tile.block_j, BLOCK_K=tile.block_k, BLOCK_H=tile.block_h, **tile.launch(),
    )  # fmt: skip


def _by_direction(w: Tensor, v: Tensor, c: Tensor, q: Tensor, tile: Tile) -> None:
    (h, d), directions = w.shape, c.shape[0]
    padded = _columns(h, tile)
    x, y, half = (
        padded_rows(padded, w.t(), v.t()),
        padded_rows(padded, v.t(), w.t()),
        padded_rows(padded, c, c).mul_(0.5),
    )
    tiles = triton.cdiv(d, tile.block_m)
    interaction_direction_kernel[(tiles * tiles, directions)](
        x, y, padded, half, padded, q, q.stride(0), d, tiles,
        H=padded, PACKED=q.dim() == 2, PRECISION=via.accurate_precision(w),
        BLOCK=tile.block_m, BLOCK_H=tile.block_k, **tile.launch(),
    )  # fmt: skip


def _columns(h: int, tile: Tile | PairTile) -> int:
    """Columns of the padded operands: the contraction, of length h for pairs and 2 h for one direction at a time."""
    length, block = (h, tile.block_h) if isinstance(tile, PairTile) else (2 * h, tile.block_k)
    return triton.cdiv(length, block) * block


def padded_rows(columns: int, *parts: Tensor) -> Tensor:
    """The parts side by side, each row filled up with zeros, so that loads of the contraction need no mask."""
    padded, start = parts[0].new_zeros(parts[0].shape[0], columns), 0
    for t in parts:
        padded[:, start : start + t.shape[1]] = t
        start += t.shape[1]
    return padded
