"""Frobenius inner products of bilinear tensors from factors, a tile of neuron pairs at a time (docs/math.md 2)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bilinear_ops.composite.blockwise import blocks, recompute, widen
from bilinear_ops.composite.limits import limits


def neuron_gram(w: Tensor, v: Tensor, w2: Tensor | None, v2: Tensor | None) -> Tensor:
    """1/2 [(W W2^T)(V V2^T) + (W V2^T)(V W2^T)]: [h, h2], bitwise symmetric where w2, v2 are None."""
    dtype = w.dtype
    w, v, w2, v2 = widen(w, v, w2, v2)
    other = (w if w2 is None else w2, v if v2 is None else v2)
    parts = [recompute(_products, w[a:b], v[a:b], *other) for a, b in blocks(w.shape[0], other[0].shape[0])]
    gram = torch.cat(parts) if parts else _products(w, v, *other)
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
    first, second = (list(neuron_tiles(*layer, limits.neurons)) for layer in ((w1, v1, p1), (w2, v2, p2)))
    tiles = [recompute(_inner_tile, *a, *b) for a in first for b in second]
    return torch.stack(tiles or [_inner_tile(w1, v1, p1, w2, v2, p2)]).double().sum().to(dtype)


def neuron_tiles(w: Tensor, v: Tensor, p: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The layer of some neurons after another, `size` of them at a time."""
    for a, b in blocks(w.shape[0], 1, size):
        yield w[a:b], v[a:b], p[:, a:b]


def _inner_tile(w1: Tensor, v1: Tensor, p1: Tensor, w2: Tensor, v2: Tensor, p2: Tensor) -> Tensor:
    return ((p1.t() @ p2) * _products(w1, v1, w2, v2)).sum()
