"""Thick-restart Lanczos, in lockstep over many symmetric matrices (Wu & Simon 2000, with one vector a step).

Every matrix has a basis of as many vectors; one product extends all of them. The wanted Ritz pairs converge together
with two guards next to them, which show an eigenvalue about to be missed. A Krylov space holds one vector of each
eigenspace, so a pair counts as found only if it stands after the space went on from a fresh random vector.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm  # several times faster on rows than Tensor.norm

from bilinear_ops.analysis.operators import Operator

GUARDS = 2
FIRST = 12  # products, beyond the pairs' number, before a first look
STEPS = 8  # between looks at the Ritz pairs, each of which costs as much as a few products
MOST_LOOKS = 100  # as gaps of 1e-4 of the largest eigenvalue may need; given up as not converged beyond


class RitzPairs(NamedTuple):
    """The wanted pairs first, then the guards."""

    values: Tensor  # [K, n + guards]
    vectors: Tensor  # [K, n + guards, d]
    found: Tensor  # [K], bool
    residuals: Tensor  # [K, n + guards], as the recurrence has them


def subspace(n: int) -> int:
    """How many basis vectors each matrix keeps at most; there is nothing to iterate for where these are all."""
    return max(40, 3 * n + 24)


def lanczos(operator: Operator, like: Tensor, n: int, order: Callable[[Tensor], Tensor], tol: float) -> RitzPairs:
    """The first n eigenpairs of each matrix, with guards.

    Args:
        operator: K symmetric matrices.
        like: `[..., d]`, any tensor of the matrices' size, dtype and device; d is more than `subspace(n)`.
        n: how many are wanted.
        order: indices that put the eigenvalues `[K, m]` of each matrix in order, the wanted ones first.
        tol: residuals relative to the largest eigenvalue.
    """
    count, d = operator.count, like.shape[-1]
    kept, most = n + GUARDS, subspace(n)
    result = RitzPairs(
        like.new_zeros(count, kept),
        like.new_zeros(count, kept, d),
        like.new_zeros(count, dtype=torch.bool),
        like.new_zeros(count, kept),
    )
    rows = torch.arange(count, device=like.device)
    generator = torch.Generator(like.device).manual_seed(0)

    def fresh(basis: Tensor) -> Tensor:
        """A random unit vector orthogonal to each basis [K, m, d]: the same draw for all, whatever their number."""
        x = torch.randn(d, generator=generator, dtype=like.dtype, device=like.device).expand(len(basis), 1, d)
        for _ in range(3):
            x = _split(x, basis)[0]
            x = x / vector_norm(x, dim=2, keepdim=True)
        return x[:, 0]

    basis, t = like.new_zeros(count, most + 1, d), like.new_zeros(count, most, most)
    basis[:, 0] = fresh(basis[:, :0])
    before = like.new_full((count, kept), torch.inf)  # Ritz values that a fresh vector has yet to confirm
    m = 0
    for look in range(MOST_LOOKS):
        stop = min(most, kept + FIRST if m == 0 else m + STEPS)
        beta = _extend(operator, basis, t, m, stop, fresh)
        m = stop
        theta, s = torch.linalg.eigh(t[:, :m, :m])
        index = order(theta)
        theta, s = theta.gather(1, index), s.gather(2, index.unsqueeze(1).expand_as(s))
        bound = 0.5 * tol * theta.abs().amax(1, keepdim=True)  # half: what was left behind at `fresh` comes on top
        residuals = beta * s[:, -1, :kept].abs()
        converged = (residuals <= bound).all(1)
        confirmed = ((theta[:, :kept] - before).abs() <= bound).all(1)
        over = converged & confirmed if look < MOST_LOOKS - 1 else torch.ones_like(converged)
        if over.any():
            result.values[rows[over]] = theta[over, :kept]
            result.vectors[rows[over]] = s[over, :, :kept].mT @ basis[over, :m]
            result.found[rows[over]] = (converged & confirmed)[over]
            result.residuals[rows[over]] = residuals[over]
            rest = ~over
            rows, operator = rows[rest], operator.take(rest)
            basis, t, before, converged = basis[rest], t[rest], before[rest], converged[rest]
            theta, s = theta[rest], s[rest]
        if not len(rows):
            break
        before = torch.where(converged.unsqueeze(1), theta[:, :kept], before)
        if converged.any():
            basis[converged, m] = fresh(basis[converged, :m])
        if m == most:
            m = min(kept + max(4, kept // 2), most - STEPS)
            following = basis[:, most].clone()
            basis[:, :m] = s[:, :, :m].mT @ basis[:, :most]
            basis[:, m] = following
            t = torch.zeros_like(t)
            t.diagonal(dim1=1, dim2=2)[:, :m] = theta[:, :m]
    return result


def _extend(
    operator: Operator, basis: Tensor, t: Tensor, start: int, stop: int, fresh: Callable[[Tensor], Tensor]
) -> Tensor:
    """Multiply basis vectors start:stop, each product giving the next vector and a row of t = basis Q basis^T, whose
    lower triangle alone is kept.

    Returns the norm [K] of what the last product had outside of the basis.
    """
    eps = torch.finfo(basis.dtype).eps
    for m in range(start, stop):
        y = operator(basis[:, m : m + 1])
        size = vector_norm(y, dim=2)
        near = 0 if m == start else m - 1  # where, but for rounding errors, all of it is that is in the basis
        y, main = _split(y, basis[:, near : m + 1])
        y, inside = _split(y, basis[:, : m + 1])
        inside[:, :, near:] += main
        t[:, m, : m + 1] = inside[:, 0]
        beta = vector_norm(y, dim=2)
        ended = (beta <= 4 * eps * size)[:, 0]  # the space is invariant: go on from anywhere outside of it
        torch.div(y[:, 0], beta, out=basis[:, m + 1])
        if ended.any():
            basis[ended, m + 1] = fresh(basis[ended, : m + 1])
    return beta


def _split(y: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """y [K, 1, d] less its part in the span of the orthonormal basis [K, m, d], and that part's coefficients."""
    inside = torch.bmm(y, basis.mT)
    return torch.baddbmm(y, inside, basis, alpha=-1), inside
