"""Products of interaction matrices with vectors, matrix-free or with matrices formed (docs/math.md 2)."""

from __future__ import annotations

from copy import copy
from typing import Protocol

import torch
from torch import Tensor


def product(w: Tensor, v: Tensor, c: Tensor, x: Tensor, basis: Tensor | None = None) -> Tensor:
    """Q_k x for x [K, n, d], n vectors for each direction; differentiable in every argument, no Q formed."""
    if basis is not None:
        return product(w, v, c, x @ basis.t()) @ basis
    c = 0.5 * c.unsqueeze(1)
    return (c * (x @ v.t())) @ w + (c * (x @ w.t())) @ v


class Operator(Protocol):
    """K symmetric matrices, known by their products with vectors."""

    count: int

    def __call__(self, x: Tensor) -> Tensor:
        """[K, n, d] -> [K, n, d]."""

    def take(self, rows: Tensor) -> Operator:
        """The operator of the directions that a mask [K] selects."""


class Factored:
    """The matrices of (w, v, c), by two products shared by all directions: 8 h d FLOPs a vector."""

    def __init__(self, w: Tensor, v: Tensor, c: Tensor) -> None:
        self.rows = torch.cat([w, v])  # [2h, d]
        self.c, self.count = 0.5 * c.t(), len(c)  # [h, K]

    def __call__(self, x: Tensor) -> Tensor:
        z = (self.rows @ x.flatten(0, 1).t()).view(2, len(self.c), *x.shape[:2])
        z = z.flip(0).mul_(self.c.unsqueeze(2)).flatten(2).flatten(0, 1)  # the products with w return through v
        return (z.t() @ self.rows).view(x.shape)  # twice as fast for few vectors as with rows [K n, 2h]

    def take(self, rows: Tensor) -> Factored:
        taken = copy(self)
        taken.c, taken.count = self.c[:, rows], int(rows.sum())
        return taken


class Formed:
    """The matrices formed in full: 2 d^2 FLOPs a vector."""

    def __init__(self, q: Tensor) -> None:
        self.q, self.count = q, len(q)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.q)

    def take(self, rows: Tensor) -> Formed:
        return Formed(self.q[rows])
