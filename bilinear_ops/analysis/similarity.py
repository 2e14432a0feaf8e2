"""Similarity of two bilinear layers, from their weights ([P] 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from bilinear_ops._check import check
from bilinear_ops.interaction.gram import layer_inner

MEASURES = ("frobenius", "gaussian")


def layer_similarity(
    w1: Tensor, v1: Tensor, p1: Tensor, w2: Tensor, v2: Tensor, p2: Tensor, *, measure: str = "frobenius"
) -> Tensor:
    """The cosine similarity of two bilinear layers, 1 for equal functions; no third-order tensor is formed.

    Computed in float64.

    Args:
        w1, v1, p1: `[h1, d]`, `[h1, d]` and `[o, h1]`, the first layer.
        w2, v2, p2: `[h2, d]`, `[h2, d]` and `[o, h2]`, the second.
        measure: "frobenius" compares the tensors B1 and B2; "gaussian" compares the outputs on standard normal inputs,
            by E[y1 . y2] = sum_o 2 <Q1, Q2> + tr Q1 tr Q2.

    Returns:
        A 0-dim tensor in w1's dtype, float32 for half precision; NaN if a layer is zero.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices.
        TypeError: an argument that is not a floating-point tensor.
        ValueError: unknown measure.
    """
    check(w1=(w1, "h1 d"), v1=(v1, "h1 d"), p1=(p1, "o h1"), w2=(w2, "h2 d"), v2=(v2, "h2 d"), p2=(p2, "o h2"))
    if measure not in MEASURES:
        raise ValueError(f"measure must be one of {', '.join(MEASURES)}, got {measure!r}")
    inner = layer_inner if measure == "frobenius" else _gaussian_inner
    first, second = [t.double() for t in (w1, v1, p1)], [t.double() for t in (w2, v2, p2)]
    norms = inner(*first, *first).sqrt() * inner(*second, *second).sqrt()
    return (inner(*first, *second) / norms).to(torch.promote_types(w1.dtype, torch.float32))


def _gaussian_inner(w1: Tensor, v1: Tensor, p1: Tensor, w2: Tensor, v2: Tensor, p2: Tensor) -> Tensor:
    traces1, traces2 = p1 @ (w1 * v1).sum(1), p2 @ (w2 * v2).sum(1)  # tr Q of every output
    return 2 * layer_inner(w1, v1, p1, w2, v2, p2) + traces1 @ traces2
