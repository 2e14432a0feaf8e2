"""The strongest interactions and the moments of interaction matrices, streamed: a tile at a time.

A feature basis is entered through d: D^T (Q_k D), half of whose tiles suffice; `matrices` forms the Q_k [K, d, d].
Without one, many outputs share the Khatri-Rao factor of a tile of pairs, and no Q_k is formed at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bilinear_ops.composite.blockwise import blocks, items_per_block, widen
from bilinear_ops.composite.interaction.entries import interaction_diagonal
from bilinear_ops.composite.interaction.matrices import products, tile_shape, two_stage
from bilinear_ops.composite.limits import limits

Matrices = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], Tensor]
Weight = Tensor | Callable[[int], Tensor] | None


def ranked_at_once(
    w: Tensor,
    v: Tensor,
    c: Tensor,
    u: Tensor | None,
    basis: Tensor | None,
    weight: Weight,
    n: int,
    score: str,
    scope: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """`interaction_topk` of a small layer on CPU, all pairs of some outputs in one sort: calls cost more there.

    None for larger layers, and where equal ranks or NaN leave an order that the sort does not decide.
    """
    (h, d), outputs = w.shape, (c if u is None else u).shape[0]
    features = d if basis is None else basis.shape[1]
    pairs = features if score == "self" else features * (features - 1) // 2
    if not w.is_cpu or min(h, d, n, outputs) == 0 or n >= pairs * (outputs if scope == "global" else 1):
        return None
    if outputs * max(d, features) * max(h, d, features) > limits.at_once:
        return None
    dtype = w.dtype
    if dtype.itemsize < 4:
        w, v, c, u, basis = widen(w, v, c, u, basis)
    held = d * h + 2 * features * features + (0 if basis is None else d * features)
    least = max(items_per_block(held, limits.sorted), n // pairs + 1 if scope == "global" else 1)
    parts = max(outputs // least, 1)  # each of at least so many outputs, which have more than n pairs
    rows, found = w.t().contiguous(), []
    for number in range(parts):
        start, stop = outputs * number // parts, outputs * (number + 1) // parts
        part = c[start:stop] if u is None else u[start:stop] @ c
        # no name here holds the matrices, which the ranking lets go
        best = _best_at_once(_twice_matrices(rows, v, part, basis), start, weight, n, score, scope)
        if best is None:
            return None
        found.append(best)
    values, _, *places = found[0]
    if len(found) > 1:
        values, rank, *places = (torch.cat(several) for several in zip(*found, strict=True))
        if scope == "global":
            first, order = rank.topk(n + 1)
            if not (first[1:] < first[:-1]).all():
                return None
            values, *places = (t[order[:n]] for t in (values, *places))
    k, i, j = places
    return values.to(dtype), k, i, j


def _twice_matrices(rows: Tensor, v: Tensor, c: Tensor, basis: Tensor | None) -> Tensor:
    """2 Q_k of some outputs; rows = W^T. In a basis their two triangles differ by rounding, and one is ranked."""
    d, h = rows.shape
    q = (c.unsqueeze(1) * rows).view(-1, h).mm(v).view(-1, d, d)
    q = q + q.mT
    return q if basis is None else basis.t() @ q @ basis


def _best_at_once(
    values: Tensor, first: int, weight: Weight, n: int, score: str, scope: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """(values, rank, k, i, j) of the outputs from `first` on; `values` are twice their matrices, and are changed."""
    outputs, features, _ = values.shape
    if score in ("self", "entry"):
        values *= 0.5
    elif score == "pair":  # Q_ii counts once where 2 Q_ij counts both triangles
        values.diagonal(dim1=1, dim2=2).mul_(0.5)
    if weight is None:
        rank = values.abs()
    elif isinstance(weight, Tensor):
        rank = (values * (weight if weight.dim() == 2 else weight[first : first + outputs])).abs_()
    else:
        rank = (values * torch.stack([weight(k) for k in range(first, first + outputs)])).abs_()
    if score == "self":
        values, rank = values.diagonal(dim1=1, dim2=2), rank.diagonal(dim1=1, dim2=2)
    else:
        rank = rank.triu_(int(score == "cross"))  # what is not ranked ties at 0 with the rest of its kind
    dim, most = (0, rank[0].numel()) if scope == "global" else (1, 0)
    best, place = rank.flatten(dim).topk(n + 1)
    if not (best[..., 1:] < best[..., :-1]).all():
        return None
    place = place[..., :n]
    values = values.flatten(dim).gather(-1, place)
    if scope == "global":
        k, place = first + place // most, place % most
    else:
        k = torch.arange(first * n, (first + outputs) * n).view(outputs, n) // n
    i, j = (place.contiguous(), place.clone()) if score == "self" else (place // features, place % features)
    return values, best[..., :n], k, i, j


class _Tile(NamedTuple):
    """Entries [m, r, s] of outputs from k, rows from r and columns from s on."""

    entries: Tensor
    k: int
    r: int
    s: int
    upper: bool = False  # the pairs i <= j are on and above the diagonal, not below


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
    space = w.new_empty(0)
    for group, tiles in _score_tiles(w, v, c, u, basis, score, matrices):
        if per_output:
            chosen.append(_Best(n, group, features, w))
        for tile in tiles:
            scale = None if weight is None else _weight_tile(weight, tile, score)
            if space.numel() < tile.entries.numel():
                space = w.new_empty(tile.entries.numel())
            values, rank = _rank(tile, scale, score, space)
            chosen[-1].add(tile._replace(entries=values), rank, score == "self")
        chosen[-1].merge()
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
    for k0, k1, q in _matrix_chunks(w, v, c, u, matrices, limits.matrices):
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
    w: Tensor, v: Tensor, c: Tensor, u: Tensor | None, matrices: Matrices, budget: int
) -> Iterator[tuple[int, int, Tensor]]:
    outputs, d = (c if u is None else u).shape[0], w.shape[1]
    for a, b in blocks(outputs, d * d, budget):
        yield a, b, matrices(w, v, c[a:b], None, False) if u is None else matrices(w, v, c, u[a:b], False)


def _tiles(q: Tensor, basis: Tensor | None) -> Iterator[tuple[int, int, int, Tensor]]:
    """(first and last output, first column, tile [m, j, i]) with i up to the tile's last column: every pair i <= j."""
    features = q.shape[2] if basis is None else basis.shape[1]
    for a, b in blocks(q.shape[0], features * features, limits.scores):
        for j0, j1 in blocks(features, (b - a) * features, limits.scores):
            if basis is None:
                yield a, b, j0, q[a:b, j0:j1, :j1]
            else:
                rows = basis[:, j0:j1].t() @ q[a:b]  # [m, j, d]
                yield a, b, j0, (rows.flatten(0, 1) @ basis[:, :j1]).unflatten(0, rows.shape[:2])


def _score_tiles(
    w: Tensor, v: Tensor, c: Tensor, u: Tensor | None, basis: Tensor | None, score: str, matrices: Matrices
) -> Iterator[tuple[int, Iterator[_Tile]]]:
    """Groups of outputs, how many and their tiles; a "self" score needs only the diagonals, as tiles of one column."""
    outputs = (c if u is None else u).shape[0]
    features = (w if basis is None else basis).shape[1]
    if score == "self":
        for a, b in blocks(outputs, features, limits.scores):
            part = c[a:b] if u is None else u[a:b] @ c
            yield b - a, iter([_Tile(interaction_diagonal(w, v, part, basis).unsqueeze(2), a, 0, 0)])
    elif w.numel() and not forms_matrices(outputs, basis, score):
        if u is not None and not two_stage(outputs, *c.shape):
            c, u = u @ c, None
        rows, columns = tile_shape(w)
        for a, b in blocks(outputs, rows * columns, limits.product):  # one product for each tile of pairs
            tiles = products(w, v, c[a:b], None) if u is None else products(w, v, c, u[a:b])
            yield b - a, (_Tile(t, k + first, i, j, upper=True) for first, _, i, j, t in tiles for k in (a,))
    else:
        # with a tile of scores and its ranks less than the two matrices [F, F] of a loop over outputs
        budget = limits.ranked if w.is_cpu else limits.matrices
        for start, _, q in _matrix_chunks(w, v, c, u, matrices, budget):
            for a, b in blocks(q.shape[0], features * features, limits.scores):
                yield b - a, (_Tile(t, k, j, 0) for _, _, j, t in _tiles(q[a:b], basis) for k in (start + a,))


def forms_matrices(outputs: int, basis: Tensor | None, score: str) -> bool:
    """Whether a ranking forms interaction matrices: not for diagonals, nor for tiles of pairs that outputs share."""
    return score != "self" and (basis is not None or outputs <= limits.loop_max)


def _rank(tile: _Tile, weight: Tensor | None, score: str, space: Tensor) -> tuple[Tensor, Tensor]:
    """A tile's values, up to the common factor, and in `space` their ranks, -1 where there is no candidate."""
    values, rows = tile.entries, tile.entries.shape[1]
    rank = space[: values.numel()].view(values.shape)
    if weight is None:
        torch.abs(values, out=rank)
    else:
        torch.mul(values, weight, out=rank).abs_()
    corner = tile.r - tile.s  # where the diagonal begins
    if score == "self" or corner < 0:
        return values, rank
    square = rank[:, :, corner : corner + rows]
    diagonal = square.diagonal(dim1=1, dim2=2)
    if score == "pair":  # Q_ii counts once where 2 Q_ij counts both triangles
        values = values.clone()
        values[:, :, corner : corner + rows].diagonal(dim1=1, dim2=2).mul_(0.5)
        diagonal.mul_(0.5)
    elif score == "cross":
        diagonal.fill_(-1)
    twice = torch.ones(square.shape[1:], dtype=torch.bool, device=rank.device)
    square.masked_fill_(twice.tril_(-1) if tile.upper else twice.triu_(1), -1)
    return values, rank


def _weight_tile(weight: Tensor | Callable[[int], Tensor], tile: _Tile, score: str) -> Tensor:
    outputs, rows, columns = tile.entries.shape
    if not isinstance(weight, Tensor):
        weight = torch.stack([weight(k) for k in range(tile.k, tile.k + outputs)])
    elif weight.dim() == 3:
        weight = weight[tile.k : tile.k + outputs]
    if score == "self":
        return weight.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    weight = weight if tile.upper else weight.mT  # read at i <= j
    return weight[..., tile.r : tile.r + rows, tile.s : tile.s + columns]


class _Best:
    """The n candidates of largest rank of each group of outputs so far, in order; ties go to the smallest key."""

    def __init__(self, n: int, groups: int, features: int, like: Tensor) -> None:
        self.n, self.groups, self.features = n, groups, features
        self.values, self.rank = like.new_empty(0), like.new_empty(0)
        self.key = like.new_empty(0, dtype=torch.int64)  # (k F + i) F + j
        self.group = like.new_empty(0, dtype=torch.int64)
        self.floor = like.new_zeros(groups)  # what a candidate has to reach
        self.pending: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def add(self, tile: _Tile, rank: Tensor, diagonal: bool) -> None:
        """Offer a tile whose rank [m, r, s] is -1 where there is no candidate."""
        if self.n == 0 or rank.numel() == 0:
            return
        rows = rank.amax(2)  # NaN wins, as it does in a sort
        if rows.numel() >= self.groups * self.n:
            self._raise_floor(rows)
        elif self.values.numel() == 0:
            self._raise_floor(rank)
        floor = self.floor.view(-1, 1).expand(-1, rows.shape[0] // self.groups).reshape(-1, 1)  # of each output
        m, r = (~(rows < floor)).nonzero(as_tuple=True)
        candidates = rank[m, r]  # [rows, s]
        row, s = (~(candidates < floor[m])).nonzero(as_tuple=True)
        m, r = m[row], r[row]
        one, other = r + tile.r, r if diagonal else s + tile.s
        i, j = torch.minimum(one, other), torch.maximum(one, other)
        key = ((m + tile.k) * self.features + i) * self.features + j
        group = m if self.groups > 1 else torch.zeros_like(m)
        self.pending.append((tile.entries[m, r, s], candidates[row, s], key, group))
        if sum(part[0].numel() for part in self.pending) >= max(limits.candidates, self.groups * self.n):
            self.merge()

    def merge(self) -> None:
        """Sort what was offered since into what is kept."""
        kept = (self.values, self.rank, self.key, self.group)
        values, rank, key, group = (torch.cat(parts) for parts in zip(kept, *self.pending, strict=True))
        self.pending.clear()
        order = key.argsort()
        order = order[rank[order].argsort(descending=True, stable=True)]
        order = order[group[order].argsort(stable=True)]
        ordered = group[order]
        start = torch.searchsorted(ordered, torch.arange(self.groups, device=group.device))
        place = torch.arange(ordered.numel(), device=group.device) - start[ordered]
        kept_places, order = place[place < self.n], order[place < self.n]
        self.values, self.rank, self.key, self.group = values[order], rank[order], key[order], group[order]
        last = self.rank[kept_places == self.n - 1]
        if self.n and last.numel() == self.groups:
            self._raise_to(last)

    def _raise_floor(self, rank: Tensor) -> None:
        """The n-th largest of some candidates bounds the n-th largest of all from below."""
        rank = rank.reshape(self.groups, -1)
        if rank.shape[1] >= self.n:
            self._raise_to(rank.topk(self.n, 1).values[:, -1])

    def _raise_to(self, floor: Tensor) -> None:
        self.floor = torch.maximum(self.floor, floor.nan_to_num(nan=torch.inf, posinf=torch.inf))
