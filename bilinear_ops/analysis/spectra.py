"""Eigenpairs of a bilinear layer's interaction matrices: the public function ([P] eq. 2-3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bilinear_ops import _dispatch
from bilinear_ops.composite.blocks import widen
from bilinear_ops.interaction import check_layer, interaction_matrices
from bilinear_ops.reference.interaction import Directions

WHICH = ("abs", "positive", "negative", "both")
METHODS = ("auto", "dense")


class EigenPairs(NamedTuple):
    """Eigenpairs of K symmetric matrices, and how far they can be trusted."""

    values: Tensor  # [K, n]
    vectors: Tensor  # [K, n, d], unit rows
    residuals: Tensor  # [K, n]: |Q u - lambda u|
    converged: Tensor  # [K], bool: every residual is within tol of the largest |lambda|
    next_abs: Tensor  # [K]: the largest |lambda| left out: |error in x^T Q x| <= next_abs |x|^2


@_dispatch.without_autocast
def interaction_eigh(
    w: Tensor,
    v: Tensor,
    c: Tensor | Directions,
    n: int | None = None,
    *,
    which: str = "abs",
    basis: Tensor | None = None,
    method: str = "auto",
    tol: float = 1e-4,
) -> EigenPairs:
    """The leading eigenpairs of Q_k = sum_h C_kh sym(w_h v_h^T), one matrix an output direction ([P] eq. 2-3).

    Args:
        w, v, c: as for `interaction_matrices`.
        n: how many; all of them for None (of each end half, for "both").
        which: "abs" for the largest by magnitude, "positive" for the algebraically largest, "negative" for the
            smallest, each falling by how extreme they are; "both" for n largest, then n smallest.
        basis: `[d, F]`: eigenvectors of D^T Q_k D, in the feature basis; an embedding folded in.
        method: "dense" or "auto".
        tol: the residual |Q u - lambda u|, relative to the largest |lambda| of its matrix, that counts as converged.

    Returns:
        `EigenPairs`: eigenvectors are rows, with the largest-magnitude component positive.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices.
        TypeError: an argument that is not a floating-point tensor.
        ValueError: unknown which or method, n or tol out of range.
    """
    sizes = check_layer(w, v, c, basis)
    d = sizes["d"] if basis is None else sizes["F"]
    if which not in WHICH:
        raise ValueError(f"which must be one of {', '.join(WHICH)}, got {which!r}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not tol > 0:
        raise ValueError(f"tol must be positive, got {tol}")
    most = d // 2 if which == "both" else d
    n = most if n is None else n
    if not 0 <= n <= most:
        raise ValueError(f'n must be from 0 to {most} for {d} dimensions and which="{which}", got {n}')
    dtype = w.dtype
    w, v, basis = widen(w, v, basis)
    c = Directions(*widen(*c)) if isinstance(c, Directions) else widen(c)[0]
    if basis is not None:
        w, v = w @ basis, v @ basis
    found = _dense(interaction_matrices(w, v, c), n, which, tol)
    return EigenPairs(*(t if t.dtype == torch.bool else t.to(dtype) for t in found))


def _dense(q: Tensor, n: int, which: str, tol: float) -> EigenPairs:
    every, columns = torch.linalg.eigh(q)
    order = _order(every.detach(), n, which)
    count = 2 * n if which == "both" else n
    chosen, rest = order[:, :count], order[:, count:]
    values = every.gather(1, chosen)
    vectors = columns.mT.gather(1, chosen.unsqueeze(2).expand(-1, -1, q.shape[1]))
    vectors = _fix_signs(vectors)
    residuals = (vectors @ q - values.unsqueeze(2) * vectors).detach().norm(dim=2)
    largest = _largest(every.detach())
    converged = (residuals <= tol * largest.unsqueeze(1)).all(1)
    return EigenPairs(values, vectors, residuals, converged, _largest(every.detach().gather(1, rest)))


def _order(values: Tensor, n: int, which: str) -> Tensor:
    """Indices that put the wanted eigenvalues of each row first: [K, m] -> [K, m]."""
    if which == "abs":
        return values.abs().argsort(dim=1, descending=True, stable=True)
    rising = values.argsort(dim=1, stable=True)
    if which == "negative":
        return rising
    falling = rising.flip(1)
    if which == "positive":
        return falling
    return torch.cat([falling[:, :n], rising[:, : values.shape[1] - n]], 1)


def _fix_signs(vectors: Tensor) -> Tensor:
    """Each row with its largest-magnitude component positive."""
    if not vectors.numel():
        return vectors
    peak = vectors.detach().abs().argmax(2, keepdim=True)
    return vectors * vectors.detach().gather(2, peak).sign()


def _largest(values: Tensor) -> Tensor:
    """The largest magnitude of each row, 0 of an empty one."""
    return values.abs().amax(1) if values.shape[1] else values.new_zeros(values.shape[0])
