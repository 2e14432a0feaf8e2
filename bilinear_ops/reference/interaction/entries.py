"""Entries of interaction matrices at chosen places ([P] 3.1, 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from bilinear_ops.reference.interaction.matrices import in_basis
from bilinear_ops.results import ActiveInteractions, Directions, coefficients


def interaction_diagonal(w: Tensor, v: Tensor, c: Tensor | Directions, *, basis: Tensor | None = None) -> Tensor:
    """diag(Q_k) = C (W * V): [K, d], or [K, F] in a basis."""
    w, v = in_basis(w, v, basis)
    return coefficients(c) @ (w * v)


def interaction_entries(
    w: Tensor, v: Tensor, c: Tensor | Directions, k: Tensor, i: Tensor, j: Tensor, *, basis: Tensor | None = None
) -> Tensor:
    """Q_k[i, j] at index vectors [N] -> [N]."""
    w, v = in_basis(w, v, basis)
    pairs = 0.5 * (w[:, i] * v[:, j] + w[:, j] * v[:, i])  # [h, N]
    return (coefficients(c)[k].t() * pairs).sum(0)


def active_interactions(
    w: Tensor,
    v: Tensor,
    c: Tensor | Directions,
    basis: Tensor,
    in_indices: Tensor,
    in_acts: Tensor,
    out_indices: Tensor,
) -> ActiveInteractions:
    """act_i act_j times Q_ii, or 2 Q_ij off the diagonal: indices, acts [T, a], outputs [T, b] -> [T, b, a(a+1)/2].

    Summed over its pairs, an output's contributions are x^T Q_k x at x = sum_i act_i basis_i.
    """
    x = basis.t()[in_indices] * in_acts.unsqueeze(-1)  # [T, a, d]
    p, q = torch.triu_indices(x.shape[1], x.shape[1], device=x.device)
    a, b = x @ w.t(), x @ v.t()  # [T, a, h]
    pairs = a[:, p] * b[:, q] + torch.where((p == q).unsqueeze(1), 0, a[:, q] * b[:, p])  # [T, a(a+1)/2, h]
    values = coefficients(c)[out_indices] @ pairs.mT
    i, j = torch.minimum(in_indices[:, p], in_indices[:, q]), torch.maximum(in_indices[:, p], in_indices[:, q])
    token = torch.arange(x.shape[0], device=x.device)
    indices = torch.broadcast_tensors(token[:, None, None], out_indices[:, :, None], i[:, None], j[:, None])
    return ActiveInteractions(values, *indices)
