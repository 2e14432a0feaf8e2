"""Quadratic and eigenvector forms, a block of tokens and outputs at a time (docs/math.md 2; [P] eq. 2-3).

At chosen (token, output) pairs, pairs of one output share one small GEMM.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bilinear_ops.composite.blockwise import blocks, items_per_block, recompute, widen
from bilinear_ops.composite.interaction.matrices import unpack_symmetric
from bilinear_ops.composite.limits import limits


def quadratic_form(x: Tensor, q: Tensor) -> Tensor:
    """x^T Q_k x: x [N, d], q [K, d, d] or packed [K, d(d+1)/2] -> [N, K]."""
    dtype = x.dtype
    x, q = widen(x, q)
    return _blockwise(_quadratic_block, x, x.shape[1], q).to(dtype)


def _quadratic_block(x: Tensor, q: Tensor) -> Tensor:
    if q.dim() == 2:
        q = unpack_symmetric(q, x.shape[1])
    qx = (x @ q.flatten(0, 1).t()).unflatten(1, q.shape[:2])  # [n, k, d]
    return (qx @ x.unsqueeze(2)).squeeze(2)


def eigen_form(x: Tensor, values: Tensor, vectors: Tensor, reduce: str) -> Tensor:
    """values (vectors . x)^2 summed, accumulated or kept over r: x [N, d], vectors [K, r, d] -> [N, K(, r)]."""
    dtype = x.dtype
    x, values, vectors = widen(x, values, vectors)
    block = {"sum": _eigen_sum, "cumsum": _eigen_cumsum, "none": _eigen_terms}[reduce]
    return _blockwise(block, x, values.shape[1], vectors, values).to(dtype)


def _eigen_activations(x: Tensor, vectors: Tensor) -> Tensor:
    """(v . x)^2: [n, k, r]."""
    z = (x @ vectors.flatten(0, 1).t()).unflatten(1, vectors.shape[:2])
    return z.square_()


def _eigen_sum(x: Tensor, vectors: Tensor, values: Tensor) -> Tensor:
    return (_eigen_activations(x, vectors) * values).sum(2)


def _eigen_cumsum(x: Tensor, vectors: Tensor, values: Tensor) -> Tensor:
    return (_eigen_activations(x, vectors) * values).cumsum(2)


def _eigen_terms(x: Tensor, vectors: Tensor, values: Tensor) -> Tensor:
    return _eigen_activations(x, vectors) * values


def _blockwise(f, x: Tensor, width: int, *per_output: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    """f over blocks of x's rows and of outputs such that rows * outputs * width stays within the block."""
    outputs = per_output[0].shape[0]
    if not x.shape[0] or not outputs:
        return f(x, *per_output)
    per_column = min(x.shape[0], items_per_block(width)) * width
    strips = []
    for a, b in blocks(x.shape[0], width):
        columns = blocks(outputs, per_column)
        strips.append(torch.cat([recompute(f, x[a:b], *(t[i:j] for t in per_output)) for i, j in columns], 1))
    return torch.cat(strips)


def eigen_pairs(x: Tensor, values: Tensor, vectors: Tensor, t: Tensor, k: Tensor, reduce: str) -> Tensor:
    """values[k] (vectors[k] . x[t])^2, summed or accumulated over r: x [M, d], vectors [K, r, d] -> [N] or [N, r]."""
    dtype, r = x.dtype, values.shape[1]
    x, values = widen(x, values)
    out = x.new_empty(k.shape[0], *([] if reduce == "sum" else [r]))
    for outputs, pairs, valid, z in _activations(x, vectors, t, k):
        terms = z.square_().mul_(values[outputs].unsqueeze(1))
        if reduce != "none":
            terms = terms.sum(2) if reduce == "sum" else terms.cumsum(2)
        out[pairs[valid]] = terms[valid]
    return out.to(dtype)


def eigen_pairs_backward(
    dout: Tensor, x: Tensor, values: Tensor, vectors: Tensor, t: Tensor, k: Tensor, reduce: str, need: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dvalues, dvectors), each empty unless needed: dz = 2 g values z of the term values z^2."""
    need_x, need_values, need_vectors = need
    dtype = x.dtype
    dout, x, values = widen(dout, x, values)
    if reduce == "sum":
        dout = dout.unsqueeze(1).expand(-1, values.shape[1])
    elif reduce == "cumsum":
        dout = dout.flip(1).cumsum(1).flip(1)
    dx = x.new_zeros(x.shape) if need_x else x.new_empty(0)
    dvalues = values.new_zeros(values.shape) if need_values else x.new_empty(0)
    dvectors = x.new_zeros(vectors.shape) if need_vectors else x.new_empty(0)
    for outputs, pairs, valid, z in _activations(x, vectors, t, k):
        g = dout[pairs] * valid.unsqueeze(2)  # [outputs, m, r]
        if need_values:
            _add_rows(dvalues, outputs, (g * z * z).sum(1))
        dz = z.mul_(g).mul_(2 * values[outputs].unsqueeze(1))
        if need_vectors:
            _add_rows(dvectors, outputs, dz.mT @ x[t[pairs]])
        if need_x:
            _add_rows(dx, t[pairs].flatten(), (dz @ vectors[outputs].to(dz.dtype)).flatten(0, 1))
    return dx.to(dtype), dvalues.to(dtype), dvectors.to(dtype)


def _activations(x: Tensor, vectors: Tensor, t: Tensor, k: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(outputs [b], their pairs [b, m], which of these are no padding, z = vectors . x [b, m, r]) until all are done.

    Outputs come in order of their number of pairs, so that padding a block to its largest costs little; an output
    with very many pairs comes more than once.
    """
    _, r, d = vectors.shape
    if k.numel() == 0:
        return
    most = items_per_block(d, limits.eigenvectors)
    order = k.argsort(stable=True)
    _, group, count = k[order].unique_consecutive(return_inverse=True, return_counts=True)
    place = torch.arange(k.numel(), device=k.device) - (count.cumsum(0) - count)[group]
    _, count = (group * k.numel() + place // most).unique_consecutive(return_counts=True)
    start = count.cumsum(0) - count
    by_count = count.argsort(stable=True)
    start, count = start[by_count], count[by_count]
    sizes, done = count.tolist(), 0
    space = vectors.new_empty(limits.eigenvectors + r * d)
    while done < len(sizes):
        stop = done + min(len(sizes) - done, items_per_block(r * d, limits.eigenvectors))
        while stop > done + 1 and (stop - done) * sizes[stop - 1] * (d + r) > 2 * limits.eigenvectors:
            stop = done + (stop - done) // 2
        slot = torch.arange(sizes[stop - 1], device=k.device)  # [m]
        valid = slot < count[done:stop, None]
        pairs = order[start[done:stop, None] + torch.where(valid, slot, 0)]
        outputs = k[pairs[:, 0]]
        gathered = space[: outputs.numel() * r * d].view(outputs.numel(), r, d)
        torch.index_select(vectors, 0, outputs, out=gathered)
        yield outputs, pairs, valid, x[t[pairs]] @ gathered.to(x.dtype).mT
        done = stop


def _add_rows(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """total[index] += rows, repeated indices added up in a fixed order."""
    if total.device.type == "cpu":
        total.index_add_(0, index, rows)
    else:
        total.index_put_((index,), rows, accumulate=True)  # sorts; index_add_ is atomic there
