"""Interaction matrices and their gradients in the cheapest order of contraction (docs/math.md 2).

- loop: W^T (c_k * V) for one direction after another, 2 K h d^2 FLOPs: few directions.
- pairs: all directions at once for a tile of pairs i <= j, Q[:, ij] = C S_ij with the Khatri-Rao factor
  S_ij = 1/2 (w_i v_j + w_j v_i) formed on the fly, K h d^2 FLOPs.
- two-stage: as pairs, but C = U P is applied factor by factor, (o h + K o) d^2 FLOPs: low-rank directions.

`interaction_matrices` and `workspace` have the signatures of `bilinear_ops.kernels.interaction.matrices`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bilinear_ops.composite.blockwise import blocks, items_per_block, widen
from bilinear_ops.composite.limits import limits


def interaction_matrices(w: Tensor, v: Tensor, c: Tensor, u: Tensor | None, packed: bool) -> Tensor:
    """The matrices of directions c [K, h], or u c with u [K, o] and c [o, h]: [K, d, d], or packed [K, d(d+1)/2]."""
    h, d = w.shape
    outputs = (c if u is None else u).shape[0]
    q = w.new_empty(outputs, d * (d + 1) // 2) if packed else w.new_empty(outputs, d, d)
    if w.numel() == 0:
        return q.zero_()
    w, v, c, u = widen(w, v, c, u)
    if u is not None and not two_stage(outputs, *c.shape):
        c, u = u @ c, None
    if u is None and outputs <= limits.loop_max:
        _one_by_one(w, v, c, q)
    else:
        _by_pairs(w, v, c, u, q)
    return q


def pack_symmetric(q: Tensor) -> Tensor:
    """The entries i <= j row by row: [..., d, d] -> [..., d(d+1)/2]."""
    i, j = torch.triu_indices(q.shape[-1], q.shape[-1], device=q.device)
    return q[..., i, j]


def unpack_symmetric(t: Tensor, d: int) -> Tensor:
    """[..., d(d+1)/2] -> [..., d, d], bitwise equal to its transpose."""
    row = torch.arange(d, device=t.device)
    i, j = torch.minimum(row[:, None], row), torch.maximum(row[:, None], row)
    place = i * d - i * (i - 1) // 2 + j - i
    return t[..., place.flatten()].unflatten(-1, (d, d))


def interaction_matrices_backward(
    dq: Tensor, w: Tensor, v: Tensor, c: Tensor, u: Tensor | None, need: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dw, dv, dc, du), each empty unless needed; dq in either layout."""
    dtypes = [w.dtype if t is None else t.dtype for t in (w, v, c, u)]
    w, v, c, u = widen(w, v, c, u)
    factors = None
    if u is not None and not two_stage(dq.shape[0], *c.shape):
        factors, c, u = (u, c), u @ c, None
    if w.numel() == 0:
        dw, dv, dc, du = (torch.zeros_like(w if t is None else t) for t in (w, v, c, u))
    elif u is None and dq.shape[0] <= limits.loop_max:
        dw, dv, dc = _one_by_one_backward(dq, w, v, c, need)
        du = dc.new_empty(0)
    else:
        dw, dv, dc, du = _by_pairs_backward(dq, w, v, c, u, need)
    if factors is not None:
        dc, du = factors[0].t() @ dc, dc @ factors[1].t()
    dw, dv, dc, du = (
        g.to(dtype).contiguous() if needed else g.new_empty(0, dtype=dtype)
        for g, dtype, needed in zip((dw, dv, dc, du), dtypes, need, strict=True)
    )
    return dw, dv, dc, du


def two_stage(outputs: int, o: int, h: int) -> bool:
    """Whether applying u [K, o] after p [o, h] is cheaper than forming u p."""
    return outputs > limits.loop_max and o * (h + outputs) < outputs * h


def workspace(outputs: int, o: int, packed: bool, w: Tensor) -> int:
    """The most elements that `interaction_matrices` holds beside arguments and result; o is 0 without factors."""
    (h, d), half = w.shape, w.itemsize < 4
    copies = 2 * h * d + (2 * h * d + (o or outputs) * h + outputs * o if half else 0)
    if o and not two_stage(outputs, o, h):
        copies += outputs * h
    if outputs <= limits.loop_max:
        return copies + (1 + packed * min(outputs, items_per_block(d * d, limits.khatri_rao))) * d * d
    rows, columns = tile_shape(w)
    return copies + rows * columns * (h + o) + 2 * min(rows * columns * outputs, max(rows * columns, limits.product))


def tile_shape(w: Tensor) -> tuple[int, int]:
    """Rows and columns of a tile of pairs whose S fits; a GPU has no such cache, but wants few and large GEMMs."""
    h, d = w.shape
    rows, elements = min(limits.pair_rows, d), limits.khatri_rao * (1 if w.device.type == "cpu" else 32)
    return rows, min(d, max(rows, elements // max(1, rows * h)))


def pair_tiles(w: Tensor) -> Iterator[tuple[int, int, int, int]]:
    """Rectangles i0:i1 x j0:j1 that cover the pairs i <= j: with i0 == j0 from the diagonal on, others above it."""
    d = w.shape[1]
    rows, columns = tile_shape(w)
    for i0, i1 in blocks(d, 1, rows):
        for a, b in blocks(d - i0, 1, columns):
            yield i0, i1, i0 + a, i0 + b


def _one_by_one(w: Tensor, v: Tensor, c: Tensor, q: Tensor) -> None:
    h, d = w.shape
    half = 0.5 * w.t()
    scaled, m = torch.empty_like(v), w.new_empty(d, d)
    # matrices to be packed in groups: one copy for each row of them all
    for first, last in blocks(c.shape[0], d * d, limits.khatri_rao):
        chunk = q[first:last]
        full = chunk if q.dim() == 3 else w.new_empty(chunk.shape[0], d, d)
        for row, matrix in zip(c[first:last], full, strict=True):
            torch.mul(v, row.unsqueeze(1), out=scaled)
            torch.mm(half, scaled, out=m)
            torch.add(m, m.t(), out=matrix)  # a sum commutes: bitwise equal to its transpose
        if q.dim() == 2:
            for i, (a, b) in enumerate(_packed_rows(d)):
                chunk[:, a:b] = full[:, i, i:]


def _one_by_one_backward(dq: Tensor, w: Tensor, v: Tensor, c: Tensor, need: list[bool]) -> tuple[Tensor, ...]:
    """From G_k = sym(dQ_k): dC_k = sum_i W_i (V G_k)_i, dW += c_k * (V G_k), dV += c_k * (W G_k)."""
    need_w, need_v, need_c = need[0], need[1], any(need[2:])
    d = w.shape[1]
    dw, dv, dc = torch.zeros_like(w), torch.zeros_like(v), torch.zeros_like(c)
    for first, last in blocks(c.shape[0], d * d, limits.khatri_rao):
        full = chunk = dq[first:last]
        if dq.dim() == 2:
            full = w.new_zeros(chunk.shape[0], d, d)
            for i, (a, b) in enumerate(_packed_rows(d)):
                full[:, i, i:] = chunk[:, a:b]
        for k, g in enumerate(full, first):
            g = (0.5 * (g + g.t())).to(w.dtype)
            if need_w or need_c:
                vg = v @ g
                torch.sum(w * vg, 1, out=dc[k])
                dw.addcmul_(vg, c[k].unsqueeze(1))
            if need_v:
                dv.addcmul_(w @ g, c[k].unsqueeze(1))
    return dw, dv, dc


def _packed_rows(d: int) -> Iterator[tuple[int, int]]:
    """Where row i lies in the packed layout."""
    start = 0
    for i in range(d):
        yield start, start + d - i
        start += d - i


def _by_pairs(w: Tensor, v: Tensor, c: Tensor, u: Tensor | None, q: Tensor) -> None:
    for a, b, i0, j0, t in products(w, v, c, u):
        _store(q[a:b], t, i0, j0, w.shape[1])


def products(w: Tensor, v: Tensor, c: Tensor, u: Tensor | None) -> Iterator[tuple[int, int, int, int, Tensor]]:
    """(first and last direction, first row and column, their entries [k, i, j]) tile by tile of `pair_tiles`.

    Ignore the entries below the diagonal: they need not be bitwise equal to those above. The entries are
    overwritten by the next: memory taken and given back for each tile would scatter over an allocator's heap.
    """
    wt, vt = 0.5 * w.t().contiguous(), v.t().contiguous()  # [d, h]
    outputs, (rows, columns) = (c if u is None else u).shape[0], tile_shape(w)
    space, product = _space(w), w.new_empty(min(rows * columns * outputs, max(rows * columns, limits.product)))
    for i0, i1, j0, j1 in pair_tiles(w):
        s = _khatri_rao(wt, vt, i0, i1, j0, j1, space)
        left, right = (c, s.t()) if u is None else (u, c @ s.t())
        for a, b in blocks(outputs, s.shape[0], limits.product):
            entries = product[: (b - a) * s.shape[0]].view(b - a, -1)
            torch.mm(left[a:b], right, out=entries)
            yield a, b, i0, j0, entries.unflatten(1, (i1 - i0, j1 - j0))


def _space(w: Tensor) -> Tensor:
    """Where a tile of S is formed."""
    rows, columns = tile_shape(w)
    return w.new_empty(rows * columns * w.shape[0])


def _khatri_rao(wt: Tensor, vt: Tensor, i0: int, i1: int, j0: int, j1: int, space: Tensor) -> Tensor:
    """S [pairs, h] of a tile: w_i v_j + v_i w_j, the half being in w."""
    shape = (i1 - i0, j1 - j0, wt.shape[1])
    s = space[: shape[0] * shape[1] * shape[2]].view(shape)
    torch.mul(wt[i0:i1, None], vt[j0:j1], out=s)
    s.addcmul_(vt[i0:i1, None], wt[j0:j1])
    return s.view(-1, shape[2])


def _store(q: Tensor, t: Tensor, i0: int, j0: int, d: int) -> None:
    """Write a tile [K, rows, columns] of pairs to both triangles, or to its place in the packed layout."""
    rows, columns = t.shape[1:]
    if q.dim() == 2:
        for r in range(rows):
            i, j = i0 + r, max(j0, i0 + r)
            start = i * d - i * (i - 1) // 2 + j - i
            q[:, start : start + j0 + columns - j] = t[:, r, j - j0 :]
        return
    if i0 == j0:
        corner = t[:, :, :rows]
        corner = corner.triu() + corner.triu(1).mT
        q[:, i0 : i0 + rows, j0 : j0 + rows] = corner
        t, j0 = t[:, :, rows:], j0 + rows
    q[:, i0 : i0 + rows, j0 : j0 + t.shape[2]] = t
    q[:, j0 : j0 + t.shape[2], i0 : i0 + rows] = t.mT


def _load(dq: Tensor, i0: int, i1: int, j0: int, j1: int, d: int) -> Tensor:
    """The gradient [K, pairs] of a tile's pairs: both triangles' where both were written, none below the diagonal."""
    rows = i1 - i0
    if dq.dim() == 2:
        g = dq.new_zeros(dq.shape[0], rows, j1 - j0)
        for r in range(rows):
            i, j = i0 + r, max(j0, i0 + r)
            start = i * d - i * (i - 1) // 2 + j - i
            g[:, r, j - j0 :] = dq[:, start : start + j1 - j]
    else:
        g = dq[:, i0:i1, j0:j1] + dq[:, j0:j1, i0:i1].mT
        if i0 == j0:
            g[:, :, :rows].triu_()
            g[:, :, :rows].diagonal(dim1=1, dim2=2).mul_(0.5)
    return g.flatten(1)


def _by_pairs_backward(
    dq: Tensor, w: Tensor, v: Tensor, c: Tensor, u: Tensor | None, need: list[bool]
) -> tuple[Tensor, ...]:
    """From the gradient g [K, ij] of the pairs: dC = g S^T, dS = C^T g, and dS's product rule in W and V."""
    h, d = w.shape
    need_weights, need_c = need[0] or need[1], any(need[2:])
    wt, vt = 0.5 * w.t().contiguous(), v.t().contiguous()
    dwt, dvt, dc = torch.zeros_like(wt), torch.zeros_like(vt), torch.zeros_like(c)
    du = dc.new_empty(0) if u is None else torch.zeros_like(u)
    s_space, ds_space = _space(w), _space(w)
    for i0, i1, j0, j1 in pair_tiles(w):
        s = _khatri_rao(wt, vt, i0, i1, j0, j1, s_space)
        ds = ds_space[: s.numel()].view_as(s)
        if u is None:
            ds.zero_()
        else:
            stage, dstage = s @ c.t(), s.new_zeros(s.shape[0], c.shape[0])  # [pairs, o]
        for a, b in blocks(dq.shape[0], s.shape[0], limits.product):
            g = _load(dq[a:b], i0, i1, j0, j1, d).to(s.dtype)
            if u is not None:
                du[a:b].addmm_(g, stage)
                dstage.addmm_(g.t(), u[a:b])
                continue
            if need_c:
                dc[a:b].addmm_(g, s)
            if need_weights:
                ds.addmm_(g.t(), c[a:b])
        if u is not None:
            dc.addmm_(dstage.t(), s)
            torch.mm(dstage, c, out=ds)
        if not need_weights:
            continue
        ds = ds.view(i1 - i0, j1 - j0, h)
        dwt[i0:i1] += (ds * vt[j0:j1]).sum(1)
        dvt[i0:i1] += (ds * wt[j0:j1]).sum(1)
        for r in range(i1 - i0):
            dwt[j0:j1].addcmul_(ds[r], vt[i0 + r])
            dvt[j0:j1].addcmul_(ds[r], wt[i0 + r])
    return 0.5 * dwt.t(), dvt.t(), dc, du
