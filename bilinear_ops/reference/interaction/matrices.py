"""Interaction matrices as [P] 3.1 writes them, formed in full."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bilinear_ops.results import Directions, coefficients


def interaction_matrices(w: Tensor, v: Tensor, c: Tensor | Directions, *, layout: str = "full") -> Tensor:
    """Q_k = sum_h C_kh 1/2 (w_h v_h^T + v_h w_h^T): w, v [h, d], c [K, h] -> [K, d, d], packed [K, d(d+1)/2]."""
    m = (coefficients(c).unsqueeze(1) * w.t()) @ v  # [K, d, d]
    q = 0.5 * (m + m.mT)
    return pack_symmetric(q) if layout == "packed" else q


def iter_interaction_matrices(
    w: Tensor, v: Tensor, c: Tensor | Directions, *, layout: str = "full", chunk_bytes: int
) -> Iterator[tuple[slice, Tensor]]:
    """The matrices in chunks of directions, (slice, matrices)."""
    c, d = coefficients(c), w.shape[1]
    size = d * (d + 1) // 2 if layout == "packed" else d * d
    step = max(1, chunk_bytes // max(1, size * w.element_size()))
    for start in range(0, c.shape[0], step):
        chunk = slice(start, min(start + step, c.shape[0]))
        yield chunk, interaction_matrices(w, v, c[chunk], layout=layout)


def pack_symmetric(q: Tensor) -> Tensor:
    """The entries i <= j row by row: [..., d, d] -> [..., d(d+1)/2], not scaled off the diagonal."""
    i, j = torch.triu_indices(q.shape[-1], q.shape[-1], device=q.device)
    return q[..., i, j]


def unpack_symmetric(t: Tensor, d: int) -> Tensor:
    """[..., d(d+1)/2] -> [..., d, d], bitwise equal to its transpose."""
    i, j = torch.triu_indices(d, d, device=t.device)
    position = torch.empty(d, d, dtype=torch.int64, device=t.device)
    position[i, j] = position[j, i] = torch.arange(i.numel(), device=t.device)
    return t[..., position.flatten()].unflatten(-1, (d, d))


def in_basis(w: Tensor, v: Tensor, basis: Tensor | None) -> tuple[Tensor, Tensor]:
    """The two up-projections as functions of feature activations: W D and V D [h, F]."""
    return (w, v) if basis is None else (w @ basis, v @ basis)
