"""Quadratic and eigenvector forms ([P] eq. 2 and 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from bilinear_ops.reference.interaction.matrices import unpack_symmetric


def quadratic_form(x: Tensor, q: Tensor) -> Tensor:
    """x^T Q_k x: x [..., d], q [K, d, d] or packed [K, d(d+1)/2] -> [..., K]."""
    q = unpack_symmetric(q, x.shape[-1]) if q.dim() == 2 else q
    return torch.einsum("...i,kij,...j->...k", x, q, x)


def eigen_form(
    x: Tensor,
    values: Tensor,
    vectors: Tensor,
    *,
    pairs: tuple[Tensor, Tensor] | None = None,
    reduce: str = "sum",
) -> Tensor:
    """sum_i values[k, i] (vectors[k, i] . x)^2 ([P] eq. 3): [..., K], else [..., K, r]; with pairs [N] or [N, r]."""
    if pairs is None:
        terms = values * torch.einsum("...d,krd->...kr", x, vectors).square()
    else:
        t, k = pairs
        terms = values[k] * torch.einsum("nd,nrd->nr", x[t], vectors[k]).square()
    if reduce == "none":
        return terms
    return terms.sum(-1) if reduce == "sum" else terms.cumsum(-1)
