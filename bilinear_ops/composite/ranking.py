"""The strongest interactions and the moments of interaction matrices, streamed: a tile at a time (algorithms.md).

A feature basis is entered through d: D^T (Q_k D), half of whose tiles suffice. `matrices` forms the Q_k [K, d, d].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bilinear_ops.composite.blocks import blocks, widen
from bilinear_ops.composite.entries import interaction_diagonal

TILE = 1 << 21  # elements of a tile of scores: 8 MB in fp32
MATRICES = 1 << 24  # elements of the interaction matrices held at a time: 64 MB in fp32

Matrices = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], Tensor]
Weight = Tensor | Callable[[int], Tensor] | None


def interaction_topk(
    w: Tensor,
    v: Tensor,
    c: Tensor,
    u: Tensor | None,
    basis: Tensor | None,
    weight: Weight,
    n: int,
    score: str,
    scope: str,
    matrices: Matrices,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(values, k, i, j), `[K, n]` or for scope "global" `[n]`; ranked in fp32 or better."""
    dtype = w.dtype
    w, v, c, u, basis = widen(w, v, c, u, basis)
    outputs = (c if u is None else u).shape[0]
    features = (w if basis is None else basis).shape[1]
    per_output = scope == "output"
    factor = 2.0 if score in ("cross", "pair") else 1.0
    chosen = [] if per_output else [_Best(n, 1, features, w)]
    for k0, k1, tiles in _score_tiles(w, v, c, u, basis, score, matrices):
        best = _Best(n, k1 - k0, features, w) if per_output else chosen[0]
        for j0, tile in tiles:  # [m, j, i], i up to the last j
            scale = None if weight is None else _weight_tile(weight, k0, k1, j0, tile, score)
            values, rank = _rank(tile, scale, j0, score)
            best.add(values, rank, k0, j0, score == "self")
        if per_output:
            chosen.append(best)
    values = torch.cat([best.values for best in chosen]) if chosen else w.new_empty(0)
    key = torch.cat([best.key for best in chosen]) if chosen else w.new_empty(0, dtype=torch.int64)
    if per_output:
        values, key = values.view(outputs, n), key.view(outputs, n)
    k, pair = key // max(1, features * features), key % max(1, features * features)
    return (values * factor).to(dtype), k, pair // max(1, features), pair % max(1, features)


def interaction_moments(
    w: Tensor, v: Tensor, c: Tensor, u: Tensor | None, basis: Tensor | None, matrices: Matrices
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(sum, squares, cubes, fourths, max) over i <= j, `[K]`: the first two in closed form, the others streamed."""
    w, v, c, u, basis = widen(w, v, c, u, basis)
    outputs = (c if u is None else u).shape[0]
    moments = w.new_zeros(5, outputs, dtype=torch.float64)
    gram = None if basis is None else basis @ basis.t()
    total = w.new_ones(w.shape[1]) if basis is None else basis.sum(1)
    for k0, k1, q in _matrix_chunks(w, v, c, u, matrices):
        mixed = q if gram is None else q @ gram
        moments[0, k0:k1] = ((q @ total) @ total).double()
        moments[1, k0:k1] = (mixed * mixed.mT).sum((1, 2), dtype=torch.float64)
        for a, b, j0, tile in _tiles(q, basis):
            part = moments[:, k0 + a : k0 + b]
            square, corner = tile[:, :, j0:], tile[:, :, :j0]
            diagonal = square.diagonal(dim1=1, dim2=2)
            part[0] += diagonal.sum(1)
            part[1] += diagonal.square().sum(1)
            part[2:4] += _third_and_fourth(corner.flatten(1))
            part[2:4] += 0.5 * (_third_and_fourth(square.flatten(1)) + _third_and_fourth(diagonal))
            torch.maximum(part[4], tile.abs().amax((1, 2)).double(), out=part[4])
    moments[:2] *= 0.5  # all pairs and the diagonal once more are the pairs i <= j twice
    moments = moments.to(w.dtype)
    return moments[0].clone(), moments[1].clone(), moments[2].clone(), moments[3].clone(), moments[4].clone()


def _third_and_fourth(t: Tensor) -> Tensor:
    """The sums of cubes and of fourth powers: [m, entries] -> [2, m]."""
    square = t * t
    return torch.stack(((square * t).sum(1), square.square_().sum(1))).double()


def _matrix_chunks(
    w: Tensor, v: Tensor, c: Tensor, u: Tensor | None, matrices: Matrices
) -> Iterator[tuple[int, int, Tensor]]:
    outputs, d = (c if u is None else u).shape[0], w.shape[1]
    for a, b in blocks(outputs, d * d, MATRICES):
        yield a, b, matrices(w, v, c[a:b], None, False) if u is None else matrices(w, v, c, u[a:b], False)


def _tiles(q: Tensor, basis: Tensor | None) -> Iterator[tuple[int, int, int, Tensor]]:
    """(first and last output, first column, tile [m, j, i]) with i up to the tile's last column: every pair i <= j."""
    features = q.shape[2] if basis is None else basis.shape[1]
    for a, b in blocks(q.shape[0], features * features, TILE):
        for j0, j1 in blocks(features, (b - a) * features, TILE):
            if basis is None:
                yield a, b, j0, q[a:b, j0:j1, :j1]
            else:
                rows = basis[:, j0:j1].t() @ q[a:b]  # [m, j, d]
                yield a, b, j0, (rows.flatten(0, 1) @ basis[:, :j1]).unflatten(0, rows.shape[:2])


def _score_tiles(
    w: Tensor, v: Tensor, c: Tensor, u: Tensor | None, basis: Tensor | None, score: str, matrices: Matrices
) -> Iterator[tuple[int, int, Iterator[tuple[int, Tensor]]]]:
    """Groups of outputs with their tiles; a "self" score needs only the diagonals, as one tile of one column."""
    if score == "self":
        outputs, features = (c if u is None else u).shape[0], (w if basis is None else basis).shape[1]
        for a, b in blocks(outputs, features, TILE):
            part = u[a:b] @ c if u is not None else c[a:b]
            yield a, b, iter([(0, interaction_diagonal(w, v, part, basis).unsqueeze(2))])
        return
    for start, _, q in _matrix_chunks(w, v, c, u, matrices):
        features = q.shape[2] if basis is None else basis.shape[1]
        for a, b in blocks(q.shape[0], features * features, TILE):
            yield start + a, start + b, ((j0, tile) for _, _, j0, tile in _tiles(q[a:b], basis))


def _rank(tile: Tensor, weight: Tensor | None, j0: int, score: str) -> tuple[Tensor, Tensor]:
    """A tile's values, up to the common factor, and their ranks, -1 where there is no candidate."""
    rank = tile.abs() if weight is None else (tile * weight).abs_()
    if score == "self":
        return tile, rank
    diagonal = rank[:, :, j0:].diagonal(dim1=1, dim2=2)
    if score == "pair":  # Q_ii counts once where 2 Q_ij counts both triangles
        tile = tile.clone()
        tile[:, :, j0:].diagonal(dim1=1, dim2=2).mul_(0.5)
        diagonal.mul_(0.5)
    elif score == "cross":
        diagonal.fill_(-1)
    square = rank[:, :, j0:]
    above = torch.ones(square.shape[1:], dtype=torch.bool, device=tile.device).triu_(1)  # i > j
    square.masked_fill_(above, -1)
    return tile, rank


def _weight_tile(
    weight: Tensor | Callable[[int], Tensor], k0: int, k1: int, j0: int, tile: Tensor, score: str
) -> Tensor:
    if not isinstance(weight, Tensor):
        weight = torch.stack([weight(k) for k in range(k0, k1)])
    elif weight.dim() == 3:
        weight = weight[k0:k1]
    if score == "self":
        return weight.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    return weight[..., : tile.shape[2], j0 : j0 + tile.shape[1]].mT


class _Best:
    """The n candidates of largest rank of each group of outputs so far, in order; ties go to the smallest key."""

    def __init__(self, n: int, groups: int, features: int, like: Tensor) -> None:
        self.n, self.groups, self.features = n, groups, features
        self.values, self.rank = like.new_empty(0), like.new_empty(0)
        self.key = like.new_empty(0, dtype=torch.int64)  # (k F + i) F + j
        self.group = like.new_empty(0, dtype=torch.int64)
        self.floor = like.new_full((groups,), 0.0)  # what a candidate has to reach

    def add(self, values: Tensor, rank: Tensor, k0: int, j0: int, diagonal: bool) -> None:
        """Offer a tile [m, j, i] of outputs from k0 and columns from j0, its rank -1 where there is no candidate."""
        if self.n == 0 or rank.numel() == 0:
            return
        rows = rank.amax(2)  # NaN wins, as it does in a sort
        self._raise_floor(rows if rows.numel() >= self.groups * self.n else rank)
        of_output = self.floor.view(-1, 1).expand(-1, rows.shape[0] // self.groups).reshape(-1, 1)
        m, j = (~(rows < of_output)).nonzero(as_tuple=True)
        candidates = rank[m, j]  # [rows, i]
        row, i = (~(candidates < of_output[m])).nonzero(as_tuple=True)
        m, j = m[row], j[row]
        first, second = (j, j) if diagonal else (i, j + j0)
        self._merge(
            values[m, j, i],
            candidates[row, i],
            ((m + k0) * self.features + first) * self.features + second,
            m if self.groups > 1 else torch.zeros_like(m),
        )

    def _raise_floor(self, rank: Tensor) -> None:
        """The n-th largest of some candidates bounds the n-th largest of all from below."""
        rank = rank.reshape(self.groups, -1)
        if rank.shape[1] >= self.n:
            self._raise_to(rank.topk(self.n, 1).values[:, -1])

    def _raise_to(self, floor: Tensor) -> None:
        self.floor = torch.maximum(self.floor, floor.nan_to_num(nan=torch.inf, posinf=torch.inf))

    def _merge(self, values: Tensor, rank: Tensor, key: Tensor, group: Tensor) -> None:
        values, rank = torch.cat((self.values, values)), torch.cat((self.rank, rank))
        key, group = torch.cat((self.key, key)), torch.cat((self.group, group))
        order = key.argsort()
        order = order[rank[order].argsort(descending=True, stable=True)]
        order = order[group[order].argsort(stable=True)]
        ordered = group[order]
        start = torch.searchsorted(ordered, torch.arange(self.groups, device=group.device))
        place = torch.arange(ordered.numel(), device=group.device) - start[ordered]
        order = order[place < self.n]
        self.values, self.rank, self.key, self.group = values[order], rank[order], key[order], group[order]
        last = self.rank[(place == self.n - 1)[place < self.n]]
        if last.numel() == self.groups:
            self._raise_to(last)
