"""Inputs to which a bilinear layer has the strongest response, and the strength of a response ([A])."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bilinear_ops._check import check, check_integers
from bilinear_ops.analysis.singular import fix_signs, hosvd
from bilinear_ops.gated import gated_mlp

SEEDS = 64  # climbs, if the output directions have that many Ritz vectors
SEED_KRYLOV, STEP_KRYLOV = 24, 6  # dimensions of the Krylov spaces of a seed and of an alternating step
SAME = 0.99  # |cosine| from which two end points count as one maximum


class StrongestDirections(NamedTuple):
    """Unit inputs `[m, d]` at distinct local maxima of |B(x, x)|, and the maxima `[m]`, descending."""

    vectors: Tensor
    strengths: Tensor


@torch.no_grad()
def strongest_directions(
    w: Tensor, v: Tensor, p: Tensor, n: int, *, steps: int = 500, tol: float = 1e-10
) -> StrongestDirections:
    """Unit inputs at local maxima of a bilinear layer's response |B(x, x)|, the largest found first ([A]).

    Climbs by the symmetric higher-order power method, x <- B(x, B(x, x)) normalised, from the top eigenvectors of
    the strongest output directions (`hosvd`). If such a step would lower |B(x, x)|, x moves to the top Ritz vector of a
    Krylov space of Q_u with u = B(x, x) instead, which never does. The result is deterministic. The first maximum is
    not guaranteed to be the global one. Not differentiable; `strength` is, at the vectors found.

    Args:
        w, v, p: `[h, d]`, `[h, d]` and `[o, h]`.
        n: maximal number of directions; fewer are returned if fewer distinct maxima were found.
        steps: maximal number of steps of a climb.
        tol: a climb ends once a step gains less than this fraction.

    Returns:
        `StrongestDirections(vectors, strengths)` in w's dtype, float32 for half precision. Of x and -x, which are one
        maximum, the one whose largest component is positive.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices.
        TypeError: an argument that is not a floating-point tensor.
        ValueError: negative n, steps or tol.
    """
    check(w=(w, "h d"), v=(v, "h d"), p=(p, "o h"))
    check_integers(n=n, steps=steps)
    if min(n, steps, tol) < 0:
        raise ValueError(f"n, steps and tol must not be negative, got {n}, {steps} and {tol}")
    dtype = torch.promote_types(w.dtype, torch.float32)
    w, v, p = w.double(), v.double(), p.double()
    x = _seeds(w, v, p, max(SEEDS, 2 * n))
    climbing = torch.arange(len(x), device=x.device)
    for _ in range(steps):
        before = x[climbing]
        after, gained = _climb(before, w, v, p)
        x[climbing] = after
        climbing = climbing[gained > tol]
        if not len(climbing):
            break
    strengths = _strengths(x, w, v, p)
    chosen = _distinct(x, strengths, n)
    return StrongestDirections(fix_signs(x[chosen]).to(dtype), strengths[chosen].to(dtype))


def _seeds(w: Tensor, v: Tensor, p: Tensor, count: int) -> Tensor:
    """About `count` unit vectors [m, d]: the strongest eigenvectors of the strongest output directions."""
    (h, d), o = w.shape, p.shape[0]
    outputs = min(count, o, h)
    if not outputs or not d:
        return w.new_empty(0, d)
    c = hosvd(w, v, p, outputs).U.t() @ p
    start = torch.randn(outputs, d, dtype=w.dtype, generator=torch.Generator().manual_seed(0)).to(w.device)
    vectors = _krylov(F.normalize(start, dim=1), w, v, c, SEED_KRYLOV)
    return vectors[:, : -(-count // outputs)].flatten(0, 1)


def _climb(x: Tensor, w: Tensor, v: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """One step from unit vectors [m, d], and the fraction gained by each [m], negative by rounding errors only."""
    y = gated_mlp(x, w, v, p)
    strength = y.norm(dim=1)
    c = y @ p
    after = F.normalize(_apply(x, w, v, c), dim=1)
    reached = _strengths(after, w, v, p)
    down = reached < strength
    if down.any():
        after[down] = _krylov(x[down], w, v, c[down], STEP_KRYLOV)[:, 0]
        reached = _strengths(after, w, v, p)
    return after, reached / strength - 1


def _strengths(x: Tensor, w: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return gated_mlp(x, w, v, p).norm(dim=1)


def _apply(x: Tensor, w: Tensor, v: Tensor, c: Tensor) -> Tensor:
    """Q_k x_k [m, d], one x for each of the interaction matrices with coefficients c [m, h]."""
    return 0.5 * ((c * (x @ v.t())) @ w + (c * (x @ w.t())) @ v)


def _krylov(x: Tensor, w: Tensor, v: Tensor, c: Tensor, dimension: int) -> Tensor:
    """Ritz vectors [m, n, d] of Q_k on span{x, Q x, Q^2 x, ...}, by descending |Ritz value|; x [m, d] of unit norm.

    If that space has fewer than n dimensions, the missing vectors and their Ritz values are zero.
    """
    basis, images = x[:, None], _apply(x, w, v, c)[:, None]  # [m, n, d]
    while basis.shape[1] < min(dimension, x.shape[1]):
        new = images[:, -1:]
        length = new.norm(dim=2, keepdim=True)
        for _ in range(2):
            new = new - (new @ basis.mT) @ basis
        rest = new.norm(dim=2, keepdim=True)
        new = torch.where(rest > 1e-10 * length, new / rest, 0)
        basis = torch.cat([basis, new], 1)
        images = torch.cat([images, _apply(new[:, 0], w, v, c)[:, None]], 1)
    small = basis @ images.mT
    values, mixtures = torch.linalg.eigh(0.5 * (small + small.mT))
    order = values.abs().argsort(1, descending=True)
    mixtures = mixtures.mT.gather(1, order[:, :, None].expand_as(mixtures))
    return F.normalize(mixtures @ basis, dim=2)


def _distinct(x: Tensor, strengths: Tensor, n: int) -> Tensor:
    """Indices of the n strongest vectors with positive strength, no two the same up to sign."""
    chosen: list[int] = []
    cosines = (x @ x.t()).abs()
    for i in strengths.argsort(descending=True, stable=True).tolist():
        if len(chosen) < n and strengths[i] > 0 and not (cosines[i, chosen] > SAME).any():
            chosen.append(i)
    return torch.tensor(chosen, dtype=torch.int64, device=x.device)


def strength(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The strength |fn(x)| / |x|^2 of a response; for a bilinear layer it depends on the direction of x only ([A]).

    Args:
        fn: from `[..., d]` to `[..., o]`.
        x: `[..., d]`.

    Returns:
        `[...]`, differentiable; float32 for half precision. NaN at x = 0.

    Raises:
        TypeError: x that is not a floating-point tensor.
    """
    check(x=(x, "... d"))
    y = fn(x)
    wide = torch.promote_types(y.dtype, torch.float32)
    return y.to(wide).norm(dim=-1) / x.to(wide).square().sum(-1)
