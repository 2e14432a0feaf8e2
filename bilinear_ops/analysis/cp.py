"""CP decomposition of a bilinear layer's tensor, by alternating least squares on the layer's factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bilinear_ops._check import check, check_finite, check_integers, check_reals
from bilinear_ops.analysis.bases import fold
from bilinear_ops.analysis.progress import progress_bar
from bilinear_ops.interaction.gram import layer_inner, neuron_gram
from bilinear_ops.results import Layer, Result

CG_TOLERANCE = 1e-13  # relative residual in the preconditioner's norm: the accuracy of float64


class CPDecomposition(
    Result,
    NamedTuple(
        "CPDecomposition",
        [
            ("w", Tensor),  # [rank, d], rows of norm 1; [rank, F] in a basis
            ("v", Tensor),  # as w
            ("p", Tensor),  # [o, rank]
            (
                "errors",
                Tensor,
            ),  # [steps done + 1]: |B - B_rank| / |B|, descending; first that of the initial terms
        ],
    ),
):
    """A bilinear layer (w, v, p) of `rank` neurons, the strongest first, and its error after every step."""

    __slots__ = ()


@torch.no_grad()
def cp_decompose(
    w: Tensor,
    v: Tensor,
    p: Tensor,
    rank: int,
    *,
    init: tuple[Tensor, Tensor] | None = None,
    steps: int = 100,
    inner_steps: int = 10,
    tol: float = 1e-6,
    restarts: int = 0,
    basis: Tensor | None = None,
    progress: bool = False,
) -> CPDecomposition:
    """Fit B by sum_r p_r (x) sym(w_r v_r^T) with `rank` terms: a smaller bilinear layer, near in Frobenius norm.

    A step solves for w, p, v and p again, each by least squares with the others fixed (ALS). The result is a local
    optimum, which depends on `init`; `restarts` fits from other neurons too and keeps the best. B is never formed: a
    step costs a few products `[h, d] x [d, rank]` in float64. A step that would raise the error is discarded and ends
    the fit. The error is computed from a difference of squares and is rounding noise below 1e-7. Not differentiable.

    Args:
        w, v, p: `[h, d]`, `[h, d]` and `[o, h]`, the layer.
        rank: number of terms, at most h unless `init` is given.
        init: initial (w, v), `[rank, d]` each (in a basis F for d), such as `init=found[:2]` of an earlier fit. By
            default, neurons of the layer chosen to be strong and to differ from each other.
        steps: maximal number of steps.
        inner_steps: iterations of conjugate gradients for w and for v, from their current values.
        tol: stop once a step lowers the error by less than this fraction.
        restarts: number of further fits, each from neurons of the layer drawn at random (the same in every call). The
            fit of the lowest error is returned.
        basis: D `[d, F]`: fits the tensor in the feature basis, whose matrices are D^T Q_k D.
        progress: show a progress bar over the steps; needs tqdm.

    Returns:
        `CPDecomposition(w, v, p, errors)` in w's dtype, float32 for half precision. Errors are NaN if |B| is 0.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices.
        TypeError: an argument that is not a floating-point tensor.
        ValueError: a rank out of range, above h with restarts; negative steps, inner_steps, restarts or tol; weights
            that are not finite.
        ModuleNotFoundError: progress without tqdm.
    """
    w0, v0 = (None, None) if init is None else init
    rows = "? r d" if basis is None else "? r F"
    sizes = check(w=(w, "h d"), v=(v, "h d"), p=(p, "o h"), basis=(basis, "? d F"), w0=(w0, rows), v0=(v0, rows))
    check_reals(tol=tol)
    check_integers(rank=rank, steps=steps, inner_steps=inner_steps, restarts=restarts)
    if rank < 0 or rank != sizes.get("r", rank) or (init is None and rank > sizes["h"]):
        limit = f"between 0 and h={sizes['h']}" if init is None else f"{sizes['r']}, the rows of init"
        raise ValueError(f"rank must be {limit}, got {rank}")
    if min(steps, inner_steps, restarts) < 0 or not tol >= 0:
        given = f"{steps}, {inner_steps}, {restarts} and {tol}"
        raise ValueError(f"steps, inner_steps, restarts and tol must not be negative, got {given}")
    if restarts and rank > sizes["h"]:
        raise ValueError(f"rank must be at most h={sizes['h']} with restarts, got {rank}")
    optional = {"w0": w0, "v0": v0, "basis": basis}
    check_finite(w=w, v=v, p=p, **{name: t for name, t in optional.items() if t is not None})
    dtype = torch.promote_types(w.dtype, torch.float32)
    lift, (w, v) = fold(None if basis is None else basis.double(), w.double(), v.double())
    layer = w, v, p.double()
    squares = layer_inner(*layer, *layer)  # |B|^2
    initial = [t.double() if lift is None else t.double() @ lift for t in (w0, v0) if t is not None]
    starts = [(initial[0], initial[1]) if initial else _spread_neurons(*layer, rank)]
    starts += [_random_neurons(*layer, rank, seed) for seed in range(restarts)]
    with progress_bar(steps * len(starts), "step", progress) as advance:
        fits = [_fit(layer, squares, a, b, steps, inner_steps, tol, advance) for a, b in starts]
    a, b, c, errors = min(fits, key=lambda fit: fit[3][-1].nan_to_num(0).item())
    a, b = (a, b) if lift is None else (a @ lift.t(), b @ lift.t())
    order = c.norm(dim=0).argsort(descending=True)
    return CPDecomposition(*(t.to(dtype) for t in (a[order], b[order], c[:, order], errors)))


def _fit(
    layer: Layer,
    squares: Tensor,
    a: Tensor,
    b: Tensor,
    steps: int,
    inner_steps: int,
    tol: float,
    advance: Callable[[int], object],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Alternating least squares from (a, b): terms a, b, c and the error after every step."""
    a, b = _unit_rows(a), _unit_rows(b)
    c, fitted = _solve_down(*layer, a, b)
    errors = [_error(squares, fitted)]
    left = steps
    for _ in range(steps):
        a_new = _unit_rows(_solve_up(*layer, a, b, c, inner_steps))
        c_new, _ = _solve_down(*layer, a_new, b)
        b_new = _unit_rows(_solve_up(*layer, b, a_new, c_new, inner_steps))
        c_new, fitted = _solve_down(*layer, a_new, b_new)
        error = _error(squares, fitted)
        if not error < errors[-1]:
            break
        a, b, c = a_new, b_new, c_new
        errors.append(error)
        left -= 1
        advance(1)
        if errors[-2] - error <= tol * errors[-2]:
            break
    advance(left)
    return a, b, c, torch.stack(errors)


def _random_neurons(w: Tensor, v: Tensor, p: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Neurons drawn by the norms |p_h| |sym(w_h v_h^T)| of their terms, without those of zero if there are others."""
    norms = p.norm(dim=0) * (0.5 * ((w * w).sum(1) * (v * v).sum(1) + (w * v).sum(1).square())).sqrt()
    chances = torch.rand(len(norms), dtype=norms.dtype, generator=torch.Generator().manual_seed(seed))
    chosen = (chances.to(w.device).log() / norms).topk(rank).indices  # Efraimidis and Spirakis's weighted sample
    return w[chosen], v[chosen]


def _spread_neurons(w: Tensor, v: Tensor, p: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Choose neurons one by one, each the farthest from the span of those chosen, by |p_h| sym(w_h v_h^T).

    This is a pivoted Cholesky factorisation of the neurons' Gram matrix; only its chosen columns are formed.
    """
    weight = p.norm(dim=0)
    rest = 0.5 * weight.square() * ((w * w).sum(1) * (v * v).sum(1) + (w * v).sum(1).square())
    factor = w.new_zeros(len(w), rank)
    chosen = []
    for k in range(rank):
        i = int(rest.argmax())
        chosen.append(i)
        column = weight[i] * weight * neuron_gram(w, v, w[i, None], v[i, None])[:, 0] - factor[:, :k] @ factor[i, :k]
        if rest[i] > 0:
            factor[:, k] = column / rest[i].sqrt()
        rest = (rest - factor[:, k].square()).clamp_min(0)
    return w[chosen], v[chosen]


def _unit_rows(t: Tensor) -> Tensor:
    return torch.nn.functional.normalize(t, dim=1)


def _error(squares: Tensor, fitted: Tensor) -> Tensor:
    """|B - B_rank| / |B| for a projection B_rank of B, for which |B - B_rank|^2 = |B|^2 - |B_rank|^2."""
    return ((squares - fitted).clamp_min(0) / squares).sqrt()


def _solve_down(w: Tensor, v: Tensor, p: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The least-squares output vectors [o, r] of the terms sym(a_r b_r^T), and the resulting |B_rank|^2."""
    products = p @ neuron_gram(w, v, a, b)  # inner products of B with the terms: [o, r]
    c = products @ torch.linalg.pinv(neuron_gram(a, b), hermitian=True)
    return c, (products * c).sum()


def _solve_up(w: Tensor, v: Tensor, p: Tensor, a: Tensor, b: Tensor, c: Tensor, steps: int) -> Tensor:
    """The least-squares a [r, d] for given b [r, d] and c [o, r], by conjugate gradients on the normal equations.

    They read 1/2 sum_s N_rs [(b_r . b_s) a_s + (b_r . a_s) b_s] = sum_h X_hr sym(w_h v_h^T) b_r with N = C^T C and
    X = P^T C. Their first term N * B B^T / 2 is the preconditioner; the whole operator is at most twice as large.
    """
    n, x = 0.5 * (c.t() @ c), 0.5 * (p.t() @ c)
    first = n * (b @ b.t())
    inverse = torch.linalg.pinv(first, hermitian=True)

    def normal(a: Tensor) -> Tensor:
        return first @ a + (n * (b @ a.t())) @ b

    right = (x * (v @ b.t())).t() @ w + (x * (w @ b.t())).t() @ v
    residual = right - normal(a)
    direction = step = inverse @ residual
    size, enough = (residual * step).sum(), CG_TOLERANCE**2 * (right * (inverse @ right)).sum()
    for _ in range(steps):
        if not size > enough:
            break
        image = normal(direction)
        scale = size / (direction * image).sum()
        a = a + scale * direction
        residual = residual - scale * image
        step = inverse @ residual
        size, before = (residual * step).sum(), size
        direction = step + size / before * direction
    return a
