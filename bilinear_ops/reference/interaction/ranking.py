"""The strongest interactions and moments over all of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bilinear_ops.reference.interaction.matrices import in_basis, interaction_matrices
from bilinear_ops.results import Directions, InteractionMoments, TopInteractions


def interaction_topk(
    w: Tensor,
    v: Tensor,
    c: Tensor | Directions,
    n: int,
    *,
    score: str = "cross",
    scope: str = "output",
    weight: Tensor | Callable[[int], Tensor] | None = None,
    basis: Tensor | None = None,
) -> TopInteractions:
    """The n scores largest by magnitude, times `weight` if given; ties go to the smallest (k, i, j)."""
    w, v = in_basis(w, v, basis)
    q = interaction_matrices(w, v, c)
    outputs, f = q.shape[0], q.shape[1]
    i, j = scored_pairs(f, score, q.device)
    twice = (i != j) if score in ("cross", "pair") else torch.zeros_like(i)  # a pair counts Q_ij and Q_ji
    values = q[:, i, j] * (1 + twice.long())  # [K, pairs], in the order of (i, j)
    rank = values.detach().abs()
    if weight is not None:
        if not isinstance(weight, Tensor):
            weight = torch.stack([weight(k) for k in range(outputs)]) if outputs else q
        rank = (rank * weight[..., i, j]).abs()
    if scope == "global":
        order = rank.flatten().argsort(descending=True, stable=True)[:n]
        k, pair = order // max(1, i.numel()), order % max(1, i.numel())
        return TopInteractions(values[k, pair], k, i[pair], j[pair])
    pair = rank.argsort(dim=1, descending=True, stable=True)[:, :n]
    k = torch.arange(outputs, device=q.device).unsqueeze(1).expand(outputs, n)
    return TopInteractions(values.gather(1, pair), k.contiguous(), i[pair], j[pair])


def interaction_moments(
    w: Tensor, v: Tensor, c: Tensor | Directions, *, basis: Tensor | None = None
) -> InteractionMoments:
    """Sums of the first four powers and the largest magnitude over the entries i <= j."""
    w, v = in_basis(w, v, basis)
    q = interaction_matrices(w, v, c, layout="packed").detach()
    q = q.to(torch.promote_types(q.dtype, torch.float32))
    largest = q.abs().amax(1) if q.shape[1] else q.new_zeros(q.shape[0])
    return InteractionMoments(q.sum(1), q.square().sum(1), q.pow(3).sum(1), q.pow(4).sum(1), largest)


def scored_pairs(f: int, score: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """(i, j), row by row, of the entries that a score ranks."""
    if score == "self":
        i = torch.arange(f, device=device)
        return i, i
    i, j = torch.triu_indices(f, f, offset=1 if score == "cross" else 0, device=device)
    return i, j
