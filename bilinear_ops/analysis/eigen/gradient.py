"""Derivatives of some eigenpairs of a symmetric matrix, from matrix-vector products only.

From Q u_j = lambda_j u_j follow the differentials dlambda_j = u_j^T dQ u_j and du_j = (lambda_j - Q)^+ dQ u_j. A loss
with gradients a_j for lambda_j and b_j for u_j therefore has the gradient a_j u_j + (lambda_j - Q)^+ b_j for the
product Q u_j. Autograd propagates this gradient through the factors of Q.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm

from bilinear_ops import _op


def differentiable(
    products: Tensor, values: Tensor, vectors: Tensor, multiply: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return values and vectors, once differentiable as eigenpairs.

    Args:
        products: `[K, n, d]`, the products Q u with a graph; the vectors u are constants.
        values, vectors: `[K, n]` and `[K, n, d]` eigenpairs, constants.
        multiply: x `[K, n, d]` to Q x without a graph, for the backward pass.
    """
    return _EigenPairs.apply(products, values, vectors, multiply)


class _EigenPairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, products: Tensor, values: Tensor, vectors: Tensor, multiply: Any) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(values, vectors)
        ctx.multiply = multiply
        return values.clone(), vectors.clone()

    @staticmethod
    @_op.without_autocast
    def backward(ctx: Any, dvalues: Tensor | None, dvectors: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("eigenpairs are differentiable once, so their gradient takes no create_graph=True")
        values, vectors = ctx.saved_tensors
        gradient = torch.zeros_like(vectors) if dvalues is None else dvalues.unsqueeze(2) * vectors
        if dvectors is not None and vectors.numel():
            gradient += _resolvent(values, vectors, dvectors, ctx.multiply)
        return gradient, None, None, None


def _resolvent(values: Tensor, vectors: Tensor, dvectors: Tensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:
    """(lambda_j - Q)^+ dv_j: directly in the span of the known eigenvectors, by MINRES outside of it."""
    inside = dvectors @ vectors.mT  # [K, j, i]
    gaps = values.unsqueeze(2) - values.unsqueeze(1)
    nearly = 8 * torch.finfo(values.dtype).eps * values.abs().amax(1)[:, None, None]
    # equal eigenvalues determine only their common span; a loss that depends on the span has no such component
    inside = torch.where(gaps.abs() <= nearly, 0.0, inside / gaps)

    def outside(x: Tensor) -> Tensor:
        return x - (x @ vectors.mT) @ vectors

    def shifted(x: Tensor) -> Tensor:
        return outside(values.unsqueeze(2) * x - multiply(x))

    accuracy = torch.finfo(values.dtype).eps ** 0.75
    return inside @ vectors + _minres(
        shifted, outside(outside(dvectors)), accuracy * vector_norm(dvectors, dim=2, keepdim=True)
    )


def _minres(multiply: Callable[[Tensor], Tensor], b: Tensor, target: Tensor) -> Tensor:
    """x with |A x - b| <= target for symmetric A, one system for each row of [K, n, d] (Paige & Saunders 1975).

    Raises RuntimeError without convergence, for example if b has a component in the null space of A.
    """
    tiny = torch.finfo(b.dtype).tiny
    x, zero = torch.zeros_like(b), torch.zeros_like(b[..., :1])
    left = beta = vector_norm(b, dim=2, keepdim=True)  # left: |b - A x|
    q, q_before = b / beta.clamp_min(tiny), x
    step, step_before = x, x
    cos, sin, diagonal, far = zero - 1, zero, zero, zero
    for _ in range(10 * b.shape[2] + 100):
        active = left > target
        if not active.any():
            return x
        y = multiply(q) - beta * q_before
        alpha = (q * y).sum(2, keepdim=True)
        y = y - alpha * q
        beta = vector_norm(y, dim=2, keepdim=True)
        # the new column of the tridiagonal matrix after the last two rotations: far, near, diagonal
        far_now, near, diagonal = far, cos * diagonal + sin * alpha, sin * diagonal - cos * alpha
        radius = torch.hypot(diagonal, beta).clamp_min(tiny)
        step, step_before = (q - far_now * step_before - near * step) / radius, step
        far, next_diagonal = sin * beta, -cos * beta
        cos, sin = diagonal / radius, beta / radius
        x = torch.where(active, x + cos * left * step, x)
        left = torch.where(active & (radius > tiny), sin * left, left)
        diagonal, q, q_before = next_diagonal, y / beta.clamp_min(tiny), q
    raise RuntimeError("the eigenvectors' gradient did not converge: an eigenvalue left out nearly equals one found")
