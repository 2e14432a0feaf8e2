"""Single elements of interaction matrices, no matrix formed: a block of gathered rows at a time (docs/math.md 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from bilinear_ops.composite.blockwise import blocks, recompute, widen
from bilinear_ops.composite.limits import limits
from bilinear_ops.results import ActiveInteractions, Directions, coefficients


def interaction_diagonal(w: Tensor, v: Tensor, c: Tensor | Directions, basis: Tensor | None) -> Tensor:
    """C (W * V): [K, d], or [K, F] in a basis."""
    dtype = w.dtype
    w, v, basis = widen(w, v, basis)
    u, p = widen(*c) if isinstance(c, Directions) else (None, *widen(c))
    if basis is None:
        return _contract(w * v, p, u).to(dtype)
    ranges = blocks(basis.shape[1], w.shape[0])
    parts = [recompute(_diagonal_block, w, v, basis[:, a:b], p, u) for a, b in ranges]
    return (torch.cat(parts, 1) if parts else _diagonal_block(w, v, basis, p, u)).to(dtype)


def _diagonal_block(w: Tensor, v: Tensor, basis: Tensor, p: Tensor, u: Tensor | None) -> Tensor:
    return _contract((w @ basis) * (v @ basis), p, u)


def _contract(neurons: Tensor, p: Tensor, u: Tensor | None) -> Tensor:
    return p @ neurons if u is None else u @ (p @ neurons)


def interaction_entries(
    w: Tensor, v: Tensor, c: Tensor | Directions, k: Tensor, i: Tensor, j: Tensor, basis: Tensor | None
) -> Tensor:
    """1/2 sum_h C_kh (W_hi V_hj + W_hj V_hi) at index vectors [N] -> [N], summed in fp32 or better."""
    dtype = w.dtype
    w, v, rows, basis = widen(w, v, coefficients(c), basis)
    if basis is not None and basis.shape[1] <= k.shape[0] and w.shape[0] * basis.shape[1] <= limits.features:
        w, v, basis = w @ basis, v @ basis, None
    if basis is None:
        wt, vt, features = w.t().contiguous(), v.t().contiguous(), None  # a gathered row is contiguous
    else:
        wt, vt, features = w.t(), v.t(), basis.t().contiguous()
    # a block's gradient is as large as the weights, so a block should be too
    budget = max(limits.block, w.numel())
    ranges = blocks(k.shape[0], 5 * w.shape[0], budget)
    parts = [recompute(_entries_block, wt, vt, rows, features, k[a:b], i[a:b], j[a:b]) for a, b in ranges]
    return torch.cat(parts).to(dtype) if parts else _entries_block(wt, vt, rows, features, k, i, j).to(dtype)


def _entries_block(
    wt: Tensor, vt: Tensor, c: Tensor, features: Tensor | None, k: Tensor, i: Tensor, j: Tensor
) -> Tensor:
    if features is None:
        w_i, v_i, w_j, v_j = wt[i], vt[i], wt[j], vt[j]  # [n, h]
    else:
        x_i, x_j = features[i], features[j]
        w_i, v_i, w_j, v_j = x_i @ wt, x_i @ vt, x_j @ wt, x_j @ vt
    return 0.5 * (c[k] * torch.addcmul(w_i * v_j, w_j, v_i)).sum(1)


def active_interactions(
    w: Tensor,
    v: Tensor,
    c: Tensor | Directions,
    basis: Tensor,
    in_indices: Tensor,
    in_acts: Tensor,
    out_indices: Tensor,
) -> ActiveInteractions:
    """The contributions [T, b, a(a+1)/2] and their places: one small GEMM a token, its pairs with its outputs."""
    dtype = w.dtype
    w, v, c, basis, in_acts = widen(w, v, coefficients(c), basis, in_acts)
    tokens, active = in_indices.shape
    p, q = torch.triu_indices(active, active, device=w.device)
    scale = torch.where(p == q, 0.5, 1.0).to(w.dtype)  # w_i v_i is counted twice in w_i v_j + w_j v_i
    h, features = w.shape[0], basis.shape[1]
    if features <= in_indices.numel() and h * features <= limits.features:
        rows: tuple[Tensor, ...] = ((w @ basis).t().contiguous(), (v @ basis).t().contiguous())
    else:
        rows = (basis.t().contiguous(), w.t(), v.t())
    parts = [
        recompute(_active_block, c, scale, p, q, in_indices[a:b], in_acts[a:b], out_indices[a:b], *rows)
        for a, b in blocks(tokens, 4 * p.numel() * h)
    ]
    values = torch.cat(parts).to(dtype) if parts else w.new_zeros(*out_indices.shape, p.numel(), dtype=dtype)
    i, j = torch.minimum(in_indices[:, p], in_indices[:, q]), torch.maximum(in_indices[:, p], in_indices[:, q])
    token = torch.arange(tokens, device=w.device)
    places = torch.broadcast_tensors(token[:, None, None], out_indices[:, :, None], i[:, None], j[:, None])
    return ActiveInteractions(values, *places)


def _active_block(
    c: Tensor, scale: Tensor, p: Tensor, q: Tensor, indices: Tensor, acts: Tensor, outputs: Tensor, *rows: Tensor
) -> Tensor:
    acts = acts.unsqueeze(-1)
    if len(rows) == 2:
        a, b = rows[0][indices] * acts, rows[1][indices] * acts  # [t, a, h]
    else:
        x = rows[0][indices] * acts
        a, b = x @ rows[1], x @ rows[2]
    pairs = torch.addcmul(a[:, p] * b[:, q], a[:, q], b[:, p])  # [t, pairs, h]
    return (c[outputs] @ pairs.mT) * scale
