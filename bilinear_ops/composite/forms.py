"""Quadratic and eigenvector forms, a block of tokens and outputs at a time (docs/math.md 2; [P] eq. 2-3)."""

from __future__ import annotations

import torch
from torch import Tensor

from bilinear_ops.composite.blocks import BLOCK, recompute, widen
from bilinear_ops.reference.interaction import unpack_symmetric


def quadratic_form(x: Tensor, q: Tensor) -> Tensor:
    """x^T Q_k x: x [N, d], q [K, d, d] or packed [K, d(d+1)/2] -> [N, K]."""
    dtype = x.dtype
    x, q = widen(x, q)
    return _blockwise(_quadratic_block, x, x.shape[1], q).to(dtype)


def _quadratic_block(x: Tensor, q: Tensor) -> Tensor:
    if q.dim() == 2:
        q = unpack_symmetric(q, x.shape[1])
    qx = (x @ q.flatten(0, 1).t()).unflatten(1, q.shape[:2])  # [n, k, d]
    return (qx @ x.unsqueeze(2)).squeeze(2)


def eigen_form(x: Tensor, values: Tensor, vectors: Tensor, reduce: str) -> Tensor:
    """values (vectors . x)^2 summed, accumulated or kept over r: x [N, d], vectors [K, r, d] -> [N, K(, r)]."""
    dtype = x.dtype
    x, values, vectors = widen(x, values, vectors)
    block = {"sum": _eigen_sum, "cumsum": _eigen_cumsum, "none": _eigen_terms}[reduce]
    return _blockwise(block, x, values.shape[1], vectors, values).to(dtype)


def _eigen_activations(x: Tensor, vectors: Tensor) -> Tensor:
    """(v . x)^2: [n, k, r]."""
    z = (x @ vectors.flatten(0, 1).t()).unflatten(1, vectors.shape[:2])
    return z.square_()


def _eigen_sum(x: Tensor, vectors: Tensor, values: Tensor) -> Tensor:
    return (_eigen_activations(x, vectors) * values).sum(2)


def _eigen_cumsum(x: Tensor, vectors: Tensor, values: Tensor) -> Tensor:
    return (_eigen_activations(x, vectors) * values).cumsum(2)


def _eigen_terms(x: Tensor, vectors: Tensor, values: Tensor) -> Tensor:
    return _eigen_activations(x, vectors) * values


def _blockwise(f, x: Tensor, width: int, *per_output: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    """f over blocks of x's rows and of outputs such that rows * outputs * width stays within the block."""
    rows = max(1, min(x.shape[0], BLOCK // max(1, width)))
    outputs = max(1, BLOCK // max(1, rows * width))
    split = [t.split(outputs) for t in per_output]
    return torch.cat(
        [torch.cat([recompute(f, part, *ts) for ts in zip(*split, strict=True)], 1) for part in x.split(rows)]
    )
