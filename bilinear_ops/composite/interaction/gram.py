"""Frobenius inner products of bilinear tensors from factors, a tile of neuron pairs at a time (docs/math.md 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from bilinear_ops.composite.blockwise import BLOCK, recompute, widen

TILE = 1024  # neurons on each side of a tile of `layer_inner`


def neuron_gram(w: Tensor, v: Tensor, w2: Tensor | None, v2: Tensor | None) -> Tensor:
    """1/2 [(W W2^T)(V V2^T) + (W V2^T)(V W2^T)]: [h, h2], bitwise symmetric where w2, v2 are None."""
    dtype = w.dtype
    w, v, w2, v2 = widen(w, v, w2, v2)
    other = (w if w2 is None else w2, v if v2 is None else v2)
    step = max(1, BLOCK // max(1, other[0].shape[0]))
    parts = [recompute(_products, a, b, *other) for a, b in zip(w.split(step), v.split(step), strict=True)]
    gram = torch.cat(parts)
    if w2 is None and v2 is None:
        gram = 0.5 * (gram + gram.t())  # a library GEMM need not be symmetric in the last bit
    return gram.to(dtype)


def _products(w: Tensor, v: Tensor, w2: Tensor, v2: Tensor) -> Tensor:
    straight = (w @ w2.t()) * (v @ v2.t())
    return 0.5 * torch.addcmul(straight, w @ v2.t(), v @ w2.t())


def layer_inner(w1: Tensor, v1: Tensor, p1: Tensor, w2: Tensor, v2: Tensor, p2: Tensor) -> Tensor:
    """sum (P1^T P2) * neuron_gram, no [h1, h2] array in memory; tiles are added up in float64."""
    dtype = w1.dtype
    w1, v1, p1, w2, v2, p2 = widen(w1, v1, p1, w2, v2, p2)
    first = zip(w1.split(TILE), v1.split(TILE), p1.split(TILE, 1), strict=True)
    second = list(zip(w2.split(TILE), v2.split(TILE), p2.split(TILE, 1), strict=True))
    tiles = [recompute(_inner_tile, *a, *b) for a in first for b in second]
    return torch.stack(tiles).double().sum().to(dtype)


def _inner_tile(w1: Tensor, v1: Tensor, p1: Tensor, w2: Tensor, v2: Tensor, p2: Tensor) -> Tensor:
    return ((p1.t() @ p2) * _products(w1, v1, w2, v2)).sum()
