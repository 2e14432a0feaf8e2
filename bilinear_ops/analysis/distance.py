"""How far apart two bilinear layers are as functions, whatever weights represent them."""

from __future__ import annotations

import torch
from torch import Tensor

from bilinear_ops import _op
from bilinear_ops._check import check
from bilinear_ops.composite.blockwise import blocks, recompute, widen
from bilinear_ops.interaction.matrices import interaction_matrices


@_op.without_autocast
def layer_distance(w1: Tensor, v1: Tensor, p1: Tensor, w2: Tensor, v2: Tensor, p2: Tensor) -> Tensor:
    """|B1 - B2|_F^2 of two bilinear layers' tensors, a faithfulness that does not depend on the representation.

    From the residual: sum_k |Q_k|^2 of the layer ([w1; w2], [v1; v2], [p1, -p2]), some outputs at a time. As a
    difference of inner products it would be 0 in float32 at a relative distance of 1e-4.

    Args:
        w1, v1, p1: `[h1, d]`, `[h1, d]` and `[o, h1]`, the first layer.
        w2, v2, p2: `[h2, d]`, `[h2, d]` and `[o, h2]`, the second.

    Returns:
        0-dim, differentiable in every tensor, in w1's dtype or float32 for half precision.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices.
        TypeError: an argument that is not a floating-point tensor.
    """
    check(w1=(w1, "h1 d"), v1=(v1, "h1 d"), p1=(p1, "o h1"), w2=(w2, "h2 d"), v2=(v2, "h2 d"), p2=(p2, "o h2"))
    w1, v1, p1, w2, v2, p2 = widen(w1, v1, p1, w2, v2, p2)
    w, v, p = torch.cat([w1, w2]), torch.cat([v1, v2]), torch.cat([p1, -p2], 1)
    total = w.new_zeros((), dtype=torch.float64)
    for start, stop in blocks(p.shape[0], w.shape[1] ** 2):
        total = total + recompute(_squares, w, v, p[start:stop])
    return total.to(w.dtype)


def _squares(w: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return interaction_matrices(w, v, p).square().sum(dtype=torch.float64)
