"""A basis of input features folded into a layer, at the layer's own size however many features there are."""

from __future__ import annotations

import torch
from torch import Tensor


def fold(basis: Tensor | None, *rows: Tensor) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """`rows` `[..., d]` in the feature basis D `[d, F]`, and how to get back to the features.

    They are rows D, or for more features than dimensions their coordinates on an orthonormal basis of what D^T spans.
    That leaves all inner products as they are, and the first result `[F, d]` takes coordinates to features; None where
    there is nothing to do.
    """
    if basis is None:
        return None, rows
    d, features = basis.shape
    if features <= d:
        return None, tuple(t @ basis for t in rows)
    lift, triangle = torch.linalg.qr(basis.t())
    return lift, tuple(t @ triangle.t() for t in rows)
