"""Thick-restart Lanczos, in lockstep over many symmetric matrices (Wu & Simon 2000, with one vector a step).

All matrices have bases of equal size, extended by one shared product. The wanted Ritz pairs converge together with two
guard pairs next to them, which reveal an eigenvalue about to be missed. A Krylov space contains only one vector of each
eigenspace. So pairs count as found only if a second Krylov space, from a random vector orthogonal to them, does not
change them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm  # several times faster on rows than Tensor.norm

from bilinear_ops.analysis.eigen.operators import Operator

GUARDS = 2
FIRST = 12  # products beyond the number of pairs before the first look at the Ritz pairs
STEPS = 8  # products between looks, and to confirm pairs; a look costs as much as a few products
MOST_LOOKS = 100  # then reported as not converged


class RitzPairs(NamedTuple):
    """The wanted pairs first, then the guards."""

    values: Tensor  # [K, n + guards]
    vectors: Tensor  # [K, n + guards, d]
    residuals: Tensor  # [K, n + guards], from the recurrence
    found: Tensor  # [K], bool


def subspace(n: int) -> int:
    """The largest number of basis vectors of a matrix; iterating makes sense only for more dimensions than that."""
    return max(40, 3 * n + 24)


def eigh(q: Tensor) -> tuple[Tensor, Tensor]:
    """torch.linalg.eigh of lower triangles; NaN for a matrix that is not finite, where torch raises for the batch."""
    broken = ~q.isfinite().flatten(1).all(1)
    if not broken.any():
        return torch.linalg.eigh(q)
    values, vectors = torch.linalg.eigh(q.masked_fill(broken[:, None, None], 0.0))
    return values.masked_fill(broken[:, None], torch.nan), vectors.masked_fill(broken[:, None, None], torch.nan)


def lanczos(operator: Operator, like: Tensor, n: int, order: Callable[[Tensor], Tensor], tol: float) -> RitzPairs:
    """The first n eigenpairs of each matrix, with guards.

    Args:
        operator: K symmetric matrices.
        like: `[..., d]`, any tensor of the matrices' size, dtype and device; d is more than `subspace(n)`.
        n: how many are wanted.
        order: indices that put the eigenvalues `[K, m]` of each matrix in order, the wanted ones first.
        tol: residuals relative to the largest eigenvalue.
    """
    generator = torch.Generator(like.device).manual_seed(0)

    def fresh(basis: Tensor) -> Tensor:
        """A random unit vector orthogonal to each basis [K, m, d]; the draw does not depend on K."""
        x = torch.randn(basis.shape[2], generator=generator, dtype=like.dtype, device=like.device)
        x = x.expand(len(basis), 1, -1)
        for _ in range(3):
            x = _split(x, basis)[0]
            x = x / vector_norm(x, dim=2, keepdim=True)
        return x[:, 0]

    tol = 0.5 * tol  # each of the two spaces may contribute an error of this size
    nothing = like.new_zeros(operator.count, 0)
    pairs = _converge(operator, nothing, nothing.unsqueeze(2).expand(-1, -1, like.shape[-1]), n, order, tol, fresh)
    confirmed = torch.zeros_like(pairs.found)
    for _ in range(n + GUARDS):
        pending = pairs.found & ~confirmed
        if not pending.any():
            break
        before = pairs.values[pending]  # compared by magnitude: at equal magnitudes, either sign may come first
        again = _converge(operator.take(pending), before, pairs.vectors[pending], n, order, tol, fresh)
        same = (again.values.abs() - before.abs()).abs() <= tol * before.abs().amax(1, keepdim=True)
        confirmed[pending] = again.found & same.all(1)
        for t, better in zip(pairs, again, strict=True):
            t[pending] = better
    return pairs._replace(found=confirmed)


def _converge(
    operator: Operator,
    values: Tensor,
    vectors: Tensor,
    n: int,
    order: Callable[[Tensor], Tensor],
    tol: float,
    fresh: Callable[[Tensor], Tensor],
) -> RitzPairs:
    """Ritz pairs with residuals within tol of the largest value, from known pairs (or none) and a fresh vector."""
    (count, known, d), kept, most = vectors.shape, n + GUARDS, subspace(n)
    pairs = RitzPairs(
        vectors.new_zeros(count, kept),
        vectors.new_zeros(count, kept, d),
        vectors.new_zeros(count, kept),
        vectors.new_zeros(count, dtype=torch.bool),
    )
    rows = torch.arange(count, device=vectors.device)
    basis, t = vectors.new_zeros(count, most + 1, d), vectors.new_zeros(count, most, most)
    basis[:, :known], basis[:, known] = vectors, fresh(vectors)
    t.diagonal(dim1=1, dim2=2)[:, :known] = values
    scale = vector_norm(values, dim=1, keepdim=True)
    m, stop = known, kept + (STEPS if known else FIRST)
    for look in range(MOST_LOOKS):
        beta = _extend(operator, basis, t, m, stop, scale, fresh)
        m = stop
        theta, s = eigh(t[:, :m, :m])
        index = order(theta)
        theta, s = theta.gather(1, index), s.gather(2, index.unsqueeze(1).expand_as(s))
        residuals = beta * s[:, -1, :kept].abs()
        found = (residuals <= tol * theta.abs().amax(1, keepdim=True)).all(1)
        over = found | theta[:, 0].isnan() if look < MOST_LOOKS - 1 else torch.ones_like(found)
        if over.any():
            ritz = theta[over, :kept], s[over, :, :kept].mT @ basis[over, :m], residuals[over], found[over]
            for of_all, of_some in zip(pairs, ritz, strict=True):
                of_all[rows[over]] = of_some
            rest = ~over
            rows, operator = rows[rest], operator.take(rest)
            basis, t, theta, s, scale = basis[rest], t[rest], theta[rest], s[rest], scale[rest]
        if not len(rows):
            break
        if m == most:  # restart from the leading Ritz vectors and the next basis vector
            m = kept + max(4, kept // 2)
            following = basis[:, most].clone()
            basis[:, :m] = s[:, :, :m].mT @ basis[:, :most]
            basis[:, m] = following
            t.zero_().diagonal(dim1=1, dim2=2)[:, :m] = theta[:, :m]
        stop = min(most, m + STEPS)
    return pairs


def _extend(
    operator: Operator,
    basis: Tensor,
    t: Tensor,
    start: int,
    stop: int,
    scale: Tensor,
    fresh: Callable[[Tensor], Tensor],
) -> Tensor:
    """Multiply basis vectors start:stop. Each product gives the next vector and a row of t = basis Q basis^T.

    Only the lower triangle of t is written. `scale` [K, 1] is the largest norm of a product so far.
    Returns the norm [K, 1] of the last product's component outside of the basis.
    """
    eps = 32 * torch.finfo(basis.dtype).eps  # relative to a product, whose terms cancel
    for m in range(start, stop):
        y = operator(basis[:, m : m + 1])
        torch.maximum(scale, vector_norm(y, dim=2), out=scale)
        near = 0 if m == start else m - 1  # up to rounding, the product's component in the basis lies here
        y, main = _split(y, basis[:, near : m + 1])
        y, inside = _split(y, basis[:, : m + 1])
        inside[:, :, near:] += main
        t[:, m, : m + 1] = inside[:, 0]
        beta = vector_norm(y, dim=2)
        ended = (beta <= eps * scale)[:, 0]  # the space is invariant: continue from a random vector outside of it
        torch.div(y[:, 0], beta, out=basis[:, m + 1])
        if ended.any():
            basis[ended, m + 1] = fresh(basis[ended, : m + 1])
    return beta


def _split(y: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """y [K, 1, d] minus its projection on the orthonormal basis [K, m, d], and the projection's coefficients."""
    inside = torch.bmm(y, basis.mT)
    return torch.baddbmm(y, inside, basis, alpha=-1), inside
