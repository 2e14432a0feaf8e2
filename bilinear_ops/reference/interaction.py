"""Quantities of the bilinear tensor B_oij = sum_h P_oh 1/2 (W_hi V_hj + W_hj V_hi) (docs/math.md 2; [P] 3.1).

Everything is formed in full, so these are for small sizes; indices and results of functions with a `basis` [d, F]
live in that feature basis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

LAYOUTS = ("full", "packed")
SCORES = ("cross", "self", "pair", "entry")
SCOPES = ("output", "global")
REDUCTIONS = ("sum", "cumsum", "none")


class Directions(NamedTuple):
    """Stands for the coefficients c = u p `[K, h]` wherever an op takes c, with the low-rank factors kept apart.

    Both factors get gradients.

    Args:
        u: `[K, o]` output directions, a row each.
        p: `[o, h]` down-projection.
    """

    u: Tensor
    p: Tensor


class TopInteractions(NamedTuple):
    """The strongest interactions: their scores and where they are, i <= j; all `[K, n]`, or `[n]` for global scope."""

    values: Tensor
    k: Tensor
    i: Tensor
    j: Tensor


class ActiveInteractions(NamedTuple):
    """Contributions `[T, b, a(a+1)/2]` of each token's active feature pairs i <= j to its active outputs k."""

    values: Tensor
    token: Tensor
    k: Tensor
    i: Tensor
    j: Tensor


class InteractionMoments(NamedTuple):
    """Power sums and the largest magnitude, `[K]` each, over the entries i <= j of every interaction matrix."""

    sum: Tensor
    squares: Tensor
    cubes: Tensor
    fourths: Tensor
    max_abs: Tensor


def coefficients(c: Tensor | Directions) -> Tensor:
    """c as one tensor [K, h]."""
    return c.u @ c.p if isinstance(c, Directions) else c


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
    """[..., d(d+1)/2] -> [..., d, d], equal to its transpose to the bit."""
    i, j = torch.triu_indices(d, d, device=t.device)
    position = torch.empty(d, d, dtype=torch.int64, device=t.device)
    position[i, j] = position[j, i] = torch.arange(i.numel(), device=t.device)
    return t[..., position.flatten()].unflatten(-1, (d, d))


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
    values = q[:, i, j] * score_factor(i, j, score)  # [K, pairs], in the order of (i, j)
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
    return ActiveInteractions(values, *active_indices(in_indices, out_indices))


def active_indices(in_indices: Tensor, out_indices: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(token, k, i, j) of every contribution, as views broadcast to [T, b, a(a+1)/2]."""
    p, q = torch.triu_indices(in_indices.shape[1], in_indices.shape[1], device=in_indices.device)
    i, j = torch.minimum(in_indices[:, p], in_indices[:, q]), torch.maximum(in_indices[:, p], in_indices[:, q])
    token = torch.arange(in_indices.shape[0], device=in_indices.device)
    shape = (*out_indices.shape, p.numel())
    return (
        token.view(-1, 1, 1).expand(shape),
        out_indices.unsqueeze(2).expand(shape),
        i.unsqueeze(1).expand(shape),
        j.unsqueeze(1).expand(shape),
    )


def interaction_moments(
    w: Tensor, v: Tensor, c: Tensor | Directions, *, basis: Tensor | None = None
) -> InteractionMoments:
    """Sums of the first four powers and the largest magnitude over the entries i <= j."""
    w, v = in_basis(w, v, basis)
    q = interaction_matrices(w, v, c, layout="packed").detach()
    q = q.to(torch.promote_types(q.dtype, torch.float32))
    largest = q.abs().amax(1) if q.shape[1] else q.new_zeros(q.shape[0])
    return InteractionMoments(q.sum(1), q.square().sum(1), q.pow(3).sum(1), q.pow(4).sum(1), largest)


def neuron_gram(w: Tensor, v: Tensor, w2: Tensor | None = None, v2: Tensor | None = None) -> Tensor:
    """Frobenius inner products of the neurons' matrices sym(w_h v_h^T): 1/2 [(W W2^T)(V V2^T) + (W V2^T)(V W2^T)]."""
    w2, v2 = w if w2 is None else w2, v if v2 is None else v2
    return 0.5 * ((w @ w2.t()) * (v @ v2.t()) + (w @ v2.t()) * (v @ w2.t()))


def layer_inner(w1: Tensor, v1: Tensor, p1: Tensor, w2: Tensor, v2: Tensor, p2: Tensor) -> Tensor:
    """<B1, B2> = sum (P1^T P2) * neuron_gram: a 0-dim tensor."""
    return ((p1.t() @ p2) * neuron_gram(w1, v1, w2, v2)).sum()


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


def in_basis(w: Tensor, v: Tensor, basis: Tensor | None) -> tuple[Tensor, Tensor]:
    """The two up-projections as functions of feature activations: W D and V D [h, F]."""
    return (w, v) if basis is None else (w @ basis, v @ basis)


def scored_pairs(f: int, score: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """(i, j), row by row, of the entries that a score ranks."""
    if score == "self":
        i = torch.arange(f, device=device)
        return i, i
    i, j = torch.triu_indices(f, f, offset=1 if score == "cross" else 0, device=device)
    return i, j


def score_factor(i: Tensor, j: Tensor, score: str) -> Tensor:
    """What a score multiplies Q_ij by: 2 where it counts the pair (i, j), (j, i) once."""
    return 1 + (i != j).long() if score in ("cross", "pair") else torch.ones_like(i)
