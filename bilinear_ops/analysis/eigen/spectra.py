"""Eigenpairs of a bilinear layer's interaction matrices: the public function and its choices ([P] eq. 2-3)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilinear_ops import _op
from bilinear_ops._check import check_integers, check_layer, check_reals
from bilinear_ops._sharding import gathered, over_directions, sharded
from bilinear_ops.analysis.eigen.eigensolvers import Solution, compress, extremes_first, plan, solve
from bilinear_ops.analysis.eigen.gradient import differentiable
from bilinear_ops.analysis.eigen.operators import product
from bilinear_ops.analysis.progress import progress_bar
from bilinear_ops.analysis.singular import fix_signs
from bilinear_ops.composite.blockwise import widen
from bilinear_ops.results import Directions, Result, coefficients

WHICH = ("abs", "positive", "negative", "both")
METHODS = ("auto", "dense", "iterative")


class EigenPairs(
    Result,
    NamedTuple(
        "EigenPairs",
        [
            ("values", Tensor),
            ("vectors", Tensor),
            ("residuals", Tensor),
            ("converged", Tensor),
            ("next_abs", Tensor),
        ],
    ),
):
    """Eigenpairs of K symmetric matrices, and their accuracy.

    Args:
        values: `[K, n]`.
        vectors: `[K, n, d]`, unit rows.
        residuals: `[K, n]`, |Q u - lambda u|.
        converged: `[K]`, bool: the search ended, and every residual is within tol of the largest |lambda|.
        next_abs: `[K]`, the largest |lambda| left out; |error in x^T Q x| <= next_abs |x|^2.
    """

    __slots__ = ()


@sharded("K", over="K", w="h d", v="h d", c="K h", basis="d F")
@_op.without_autocast
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
    chunk_bytes: int = 1 << 28,
    progress: bool = False,
    group: Any = None,
) -> EigenPairs:
    """The leading eigenpairs of Q_k = sum_h C_kh sym(w_h v_h^T), one matrix an output direction ([P] eq. 2-3).

    Differentiable once, in values and vectors; no gradient of Q is formed. If returned eigenvalues are equal, gradients
    are right for losses that depend on the space spanned by their eigenvectors. If an eigenvalue left out equals one
    returned, the eigenvectors have no gradient.

    Args:
        w, v, c: as for `interaction_matrices`.
        n: number of eigenpairs; None for all (for "both", half of them from each end).
        which: "abs" for the largest by magnitude, "positive" for the algebraically largest, "negative" for the
            algebraically smallest, in each case the most extreme first; "both" for the n largest, then the n smallest.
        basis: D `[d, F]`: eigenpairs of D^T Q_k D, in the feature basis (or with an embedding folded in).
        method: "dense" forms each Q_k and decomposes it; "iterative" finds the leading pairs by products with Q_k (and
            is dense if the subspace of the iteration would be the whole space); "auto" takes the cheaper one, and
            "dense" for directions that did not converge.
        tol: largest residual |Q u - lambda u| of a converged pair, relative to the largest |lambda| of its matrix.
        chunk_bytes: limit on the workspace; directions are solved in chunks of at least one.
        progress: show a progress bar over the directions, of many ranks on the first; needs tqdm.
        group: process group whose ranks all call with the same tensors: each does its share of the directions, and
            every one gets the whole result. Directions sharded as DTensors leave the result sharded.

    Returns:
        `EigenPairs`: eigenvectors are rows, with the largest-magnitude component positive. The iterative method
        estimates `next_abs` from above, by the pairs next to those returned. For a matrix that is not finite,
        eigenpairs are NaN and `converged` is False.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices; in backward, a gradient that does not exist, or
            create_graph=True.
        TypeError: an argument that is not a floating-point tensor, or n not an int.
        ValueError: unknown which or method; n, tol or chunk_bytes out of range.
        ModuleNotFoundError: progress without tqdm.
    """
    sizes = check_layer(w, v, c, basis)
    d = sizes["d"] if basis is None else sizes["F"]
    if which not in WHICH:
        raise ValueError(f"which must be one of {', '.join(WHICH)}, got {which!r}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    check_reals(tol=tol)
    if not tol > 0:
        raise ValueError(f"tol must be positive, got {tol}")
    most = d // 2 if which == "both" else d
    n = most if n is None else n
    check_integers(n=n, chunk_bytes=chunk_bytes)
    if chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes must be positive, got {chunk_bytes}")
    if not 0 <= n <= most:
        raise ValueError(f'n must be from 0 to {most} for {d} dimensions and which="{which}", got {n}')

    if group is not None:
        whole, shared = over_directions(group, w)
        found = interaction_eigh(
            whole(w), whole(v), shared(c), n, which=which, basis=whole(basis), method=method, tol=tol,
            chunk_bytes=chunk_bytes, progress=progress,
        )  # fmt: skip
        return gathered(found)
    dtype = w.dtype
    w, v, basis = widen(w, v, basis)
    c = Directions(*widen(*c)) if isinstance(c, Directions) else widen(c)[0]
    count = 2 * n if which == "both" else n
    order = partial(extremes_first, n=n, which=which)
    with torch.no_grad():
        layer = compress(w, v, basis, count)
    h, d = layer.w.shape
    way = plan(method, sizes["K"], h, d, count)
    rows, parts = c.u if isinstance(c, Directions) else c, []
    with progress_bar(len(rows), "direction", progress) as advance:
        for few in rows.split(max(1, chunk_bytes // (way.workspace * w.itemsize))):
            part = Directions(few, c.p) if isinstance(c, Directions) else few
            with torch.no_grad():
                solution = solve(layer, part, count, order, tol, way, refine=method == "auto")
            parts.append(_examined(solution, partial(product, w, v, coefficients(part), basis=basis), tol))
            advance(len(few))
    joined = (torch.cat(t) for t in zip(*parts, strict=True))
    return EigenPairs(*(t if t.dtype == torch.bool else t.to(dtype) for t in joined))


def _examined(solution: Solution, multiply: Callable[[Tensor], Tensor], tol: float) -> EigenPairs:
    """The pairs with residuals and derivatives of the layer as given, in whichever coordinates it was solved."""
    values, vectors = solution.values, fix_signs(solution.vectors)
    products = multiply(vectors)
    residuals = (products.detach() - values.unsqueeze(2) * vectors).norm(dim=2)
    converged = solution.found & (residuals <= tol * solution.largest.unsqueeze(1)).all(1)
    if products.requires_grad:
        values, vectors = differentiable(products, values, vectors, multiply)
    return EigenPairs(values, vectors, residuals, converged, solution.next_abs)
