"""A layer as a sum of squares, more of them than it has dimensions, of which each output uses few ([P] App. I.1, 6)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bilinear_ops import _op
from bilinear_ops._check import check, check_finite, check_integers, check_reals
from bilinear_ops.analysis.progress import progress_bar
from bilinear_ops.gated import gated_mlp
from bilinear_ops.interaction.gram import layer_inner
from bilinear_ops.results import Layer, Result

ROUNDING = (1e-2, 1e-3)  # of the corner of |a|, sqrt(a^2 + r^2), in units of the layer's norm
KEPT = 5  # corners of the last rounding: smaller outputs are zero
HISTORY = 20  # of L-BFGS


class SparseDecomposition(
    Result,
    NamedTuple(
        "SparseDecomposition",
        [
            ("vectors", Tensor),  # [terms, d], unit rows
            ("outputs", Tensor),  # [o, terms], many of them 0
            ("error", Tensor),  # 0-dim: |B - B_terms| / |B|
        ],
    ),
):
    """y = outputs @ (vectors @ x)^2, the strongest terms first; unused ones, whose outputs are 0, last."""

    __slots__ = ()


@_op.without_autocast
@torch.no_grad()
def sparse_decompose(
    w: Tensor,
    v: Tensor,
    p: Tensor,
    terms: int,
    *,
    penalty: float = 3e-3,
    steps: int = 200,
    restarts: int = 4,
    progress: bool = False,
) -> SparseDecomposition:
    """Fit B by sum_r outputs_r (x) u_r u_r^T, with few outputs for each u_r and more terms than dimensions if need be.

    Eigenvectors of one output are orthogonal, which the features of a layer need not be. Minimises
    1/2 |B - B_terms|^2 + penalty |B| sum |outputs|, then once more without the penalty over the outputs that are not
    zero. Both by L-BFGS, in float64 and without B: the products of B with the terms are the layer's outputs at the u_r.
    The best of several fits from random vectors (the same in every call); a local optimum. With more terms than a layer
    was made of, others than those often fit as well and are found instead. Not differentiable.

    Args:
        w, v, p: `[h, d]`, `[h, d]` and `[o, h]`.
        terms: number of vectors.
        penalty: of an output's magnitude, relative to |B|. More makes fewer outputs, and a larger error.
        steps: maximal number of L-BFGS steps of each stage.
        restarts: number of fits.
        progress: show a progress bar over the fits; needs tqdm.

    Returns:
        `SparseDecomposition(vectors, outputs, error)` in w's dtype, float32 for half precision. NaN error if |B| is 0.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices.
        TypeError: an argument that is not a floating-point tensor; terms, steps or restarts not an int.
        ValueError: negative terms, steps or penalty; restarts below 1; weights that are not finite.
        ModuleNotFoundError: progress without tqdm.
    """
    check(w=(w, "h d"), v=(v, "h d"), p=(p, "o h"))
    check_integers(terms=terms, steps=steps, restarts=restarts)
    check_reals(penalty=penalty)
    if min(terms, steps) < 0 or not penalty >= 0:
        raise ValueError(f"terms, steps and penalty must not be negative, got {terms}, {steps} and {penalty}")
    if restarts < 1:
        raise ValueError(f"restarts must be at least 1, got {restarts}")
    check_finite(w=w, v=v, p=p)
    dtype = torch.promote_types(w.dtype, torch.float32)
    layer = w.detach().double(), v.detach().double(), p.detach().double()
    norm = layer_inner(*layer, *layer).clamp_min(0).sqrt()
    unit = layer[0], layer[1], layer[2] / norm.where(norm > 0, 1)
    generator = torch.Generator().manual_seed(0)
    fits = []
    with progress_bar(restarts, "fit", progress) as advance:
        for _ in range(restarts):
            start = torch.randn(terms, w.shape[1], dtype=torch.float64, generator=generator).to(w.device)
            fits.append(_fit(unit, F.normalize(start, dim=1), penalty, steps))
            advance(1)
    u, a, squares, _ = min(fits, key=lambda fit: fit[3].item())
    order = a.norm(dim=0).argsort(descending=True, stable=True)
    error = squares.clamp_min(0).sqrt() if norm > 0 else norm / norm
    return SparseDecomposition(u[order].to(dtype), (norm * a[:, order]).to(dtype), error.to(dtype))


def _fit(layer: Layer, u: Tensor, penalty: float, steps: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Vectors, outputs, |B - B_terms|^2, and what the fit is judged by, for a layer of norm 1."""
    a = gated_mlp(u, *layer).t() @ torch.linalg.pinv((u @ u.t()).square(), hermitian=True)
    for rounding in ROUNDING if penalty else ():
        u, a = _descend(layer, u, a, steps, penalty=penalty, rounding=rounding)
    used = a.abs() > KEPT * ROUNDING[-1] if penalty else torch.ones_like(a, dtype=torch.bool)
    u, a = _descend(layer, u, a.where(used, 0), steps, used=used)
    squares = 1 + 2 * _squares(layer, u, a)
    return u, a, squares, 0.5 * squares + penalty * a.abs().sum()


def _squares(layer: Layer, u: Tensor, a: Tensor) -> Tensor:
    """1/2 |B - B_terms|^2 - 1/2 |B|^2 for unit vectors u."""
    return 0.5 * (a * (a @ (u @ u.t()).square())).sum() - (a * gated_mlp(u, *layer).t()).sum()


def _descend(
    layer: Layer,
    u: Tensor,
    a: Tensor,
    steps: int,
    *,
    penalty: float = 0.0,
    rounding: float = 0.0,
    used: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """L-BFGS over u, whose rows are scaled to unit norm, and a, where `used`."""
    if not (steps and a.numel() and u.numel()):
        return u, a
    u, a = u.clone().requires_grad_(), a.clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [u, a], max_iter=steps, history_size=HISTORY, tolerance_grad=1e-12, tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def objective() -> Tensor:
        solver.zero_grad()
        kept = a if used is None else a.where(used, 0)
        loss = _squares(layer, F.normalize(u, dim=1), kept)
        if penalty:
            loss = loss + penalty * ((kept.square() + rounding**2).sqrt() - rounding).sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(objective)
    return F.normalize(u.detach(), dim=1), a.detach() if used is None else a.detach().where(used, 0)
