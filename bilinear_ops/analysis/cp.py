"""A bilinear layer's tensor as a sum of fewer rank-1 terms, by alternating least squares on its factors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bilinear_ops._check import check, check_integers
from bilinear_ops.interaction.gram import layer_inner, neuron_gram

CG_TOLERANCE = 1e-13  # of the residual in the preconditioner's norm, where float64 has nothing left to gain


class CPDecomposition(NamedTuple):
    """A bilinear layer (w, v, p) of `rank` neurons, the strongest first, and how far it was from B at every step."""

    w: Tensor  # [rank, d], rows of norm 1
    v: Tensor  # [rank, d], rows of norm 1
    p: Tensor  # [o, rank]
    errors: Tensor  # [steps done + 1]: |B - B_rank| / |B|, falling; its first entry belongs to the start


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
) -> CPDecomposition:
    """B as sum_r p_r (x) sym(w_r v_r^T) with few terms, fitted in Frobenius norm: the best smaller bilinear layer.

    A step solves for w, p, v and p again, each by least squares with the others held (ALS). B is never formed; the
    cost of a step is that of a few products `[h, d] x [d, rank]`, in float64. No step raises the error: one that would
    is not taken, and ends the fit. The error is a difference of squares: below 1e-7 it is rounding. Not differentiable.

    Args:
        w, v, p: `[h, d]`, `[h, d]` and `[o, h]`, the layer.
        rank: number of terms, at most h unless `init` is given.
        init: (w, v) `[rank, d]` to start from, as `init=found[:2]` from an earlier fit; by default strong neurons of
            the layer that are unlike each other.
        steps: at most so many.
        inner_steps: iterations of conjugate gradients for w and for v, which start from their present values.
        tol: stop where a step lowers the error by less than this fraction of it.

    Returns:
        `CPDecomposition(w, v, p, errors)` in w's dtype, float32 for half precision. Errors are NaN where |B| is 0.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices.
        TypeError: an argument that is not a floating-point tensor.
        ValueError: a rank out of range, or negative steps, inner_steps or tol.
    """
    w0, v0 = (None, None) if init is None else init
    sizes = check(w=(w, "h d"), v=(v, "h d"), p=(p, "o h"), w0=(w0, "? r d"), v0=(v0, "? r d"))
    check_integers(rank=rank, steps=steps, inner_steps=inner_steps)
    if rank < 0 or rank != sizes.get("r", rank) or (init is None and rank > sizes["h"]):
        limit = f"between 0 and h={sizes['h']}" if init is None else f"{sizes['r']}, the rows of init"
        raise ValueError(f"rank must be {limit}, got {rank}")
    if min(steps, inner_steps, tol) < 0:
        raise ValueError(f"steps, inner_steps and tol must not be negative, got {steps}, {inner_steps} and {tol}")
    dtype = torch.promote_types(w.dtype, torch.float32)
    layer = w.double(), v.double(), p.double()
    squares = layer_inner(*layer, *layer)  # |B|^2
    a, b = _spread_neurons(*layer, rank) if w0 is None or v0 is None else (w0.double(), v0.double())
    a, b = _unit_rows(a), _unit_rows(b)
    c, fitted = _solve_down(*layer, a, b)
    errors = [_error(squares, fitted)]
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
        if errors[-2] - error <= tol * errors[-2]:
            break
    order = c.norm(dim=0).argsort(descending=True)
    found = a[order], b[order], c[:, order], torch.stack(errors)
    return CPDecomposition(*(t.to(dtype) for t in found))


def _spread_neurons(w: Tensor, v: Tensor, p: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Neurons whose matrices |p_h| sym(w_h v_h^T) lie farthest, one by one, from the span of those already chosen.

    This is the pivoted Cholesky factorisation of their Gram matrix, of which only the chosen columns are formed.
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
    """|B - B_rank| / |B| where B_rank is a projection of B, so that |B - B_rank|^2 = |B|^2 - |B_rank|^2."""
    return ((squares - fitted).clamp_min(0) / squares).sqrt()


def _solve_down(w: Tensor, v: Tensor, p: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The best output vectors [o, r] of the terms sym(a_r b_r^T), and |B_rank|^2 with them."""
    products = p @ neuron_gram(w, v, a, b)  # of B with the terms: [o, r]
    c = products @ torch.linalg.pinv(neuron_gram(a, b), hermitian=True)
    return c, (products * c).sum()


def _solve_up(w: Tensor, v: Tensor, p: Tensor, a: Tensor, b: Tensor, c: Tensor, steps: int) -> Tensor:
    """The best a [r, d] for given b [r, d] and c [o, r], by conjugate gradients on the normal equations from a.

    Those are 1/2 sum_s N_rs [(b_r . b_s) a_s + (b_r . a_s) b_s] = sum_h X_hr sym(w_h v_h^T) b_r, N = C^T C, X = P^T C.
    Their first part, N * B B^T on every column of a, bounds the whole from above and is the preconditioner.
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
