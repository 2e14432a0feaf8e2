"""Search for eigenpairs of interaction matrices: coordinates, choice of a method, order of the pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bilinear_ops.analysis.eigen.krylov import GUARDS, STEPS, eigh, lanczos, subspace
from bilinear_ops.analysis.eigen.operators import Factored, Formed, Operator
from bilinear_ops.interaction.matrices import interaction_matrices
from bilinear_ops.results import Directions, coefficients

Order = Callable[[Tensor], Tensor]  # eigenvalues [K, m] -> indices [K, m], the wanted eigenvalues first


class Layer(NamedTuple):
    """Up-projections `[h, r]` in the basis of the orthonormal rows of lift `[r, d]`; in input coordinates if None."""

    w: Tensor
    v: Tensor
    lift: Tensor | None


def compress(w: Tensor, v: Tensor, basis: Tensor | None, count: int) -> Layer:
    """Express the layer in the span of its rows, if that is smaller than the input space.

    Some random dimensions are added to the span: their eigenvalues 0 may be among the wanted ones and the guards.
    """
    h, width = w.shape
    through_basis = basis is not None and width < 2 * h
    d = width if basis is None else basis.shape[1]
    if (width if through_basis else 2 * h) + count + GUARDS >= d:
        return Layer(w, v, None) if basis is None else Layer(w @ basis, v @ basis, None)
    if basis is None:
        rows = torch.cat([w, v])
    else:
        rows = basis if through_basis else torch.cat([w @ basis, v @ basis])
    generator = torch.Generator(w.device).manual_seed(0)
    more = torch.randn(count + GUARDS, d, generator=generator, dtype=w.dtype, device=w.device)
    lift, triangle = torch.linalg.qr(torch.cat([rows, more]).t())
    coordinates = triangle[:, : len(rows)].t()  # coordinates of the rows, zero along the added dimensions
    w, v = (w @ coordinates, v @ coordinates) if through_basis else (coordinates[:h], coordinates[h:])
    return Layer(w.contiguous(), v.contiguous(), lift.t())


class Plan(NamedTuple):
    """The method, and the workspace of a direction in elements."""

    iterative: bool
    form: bool  # whether to form Q, be it for products only
    workspace: int


def plan(method: str, outputs: int, h: int, d: int, count: int) -> Plan:
    """The cheapest plan for `outputs` matrices. The unit of cost is the time of a FLOP in a large product.

    The factors were measured on one core at d from 64 to 512. They exceed the operation counts of a step, 8 h d and
    2 d^2, because products with few vectors are slower.
    """
    m, steps = subspace(count), 24 + 4 * count
    forming = 2 * h * d * d
    dense = forming + _decomposition(d)
    with_factors, with_q = steps * 10 * h * d, forming + steps * 20 * d * d
    orthogonalising = steps * 30 * m * d
    calls = steps * 20_000_000 // max(1, outputs)  # about 0.2 ms a step, shared by all matrices
    iterations = min(with_factors, with_q) + orthogonalising + calls + steps // STEPS * _decomposition(m)
    if method == "dense" or m >= d or (method == "auto" and dense <= iterations):
        return Plan(False, True, _dense_workspace(d))
    form = with_q < with_factors
    return Plan(True, form, 2 * (m + count + GUARDS) * d + 8 * h + (2 * d * d if form else 0) + 1)


def _dense_workspace(d: int) -> int:
    """Elements for a direction: its matrix, its eigenvectors and the solver's workspace."""
    return 4 * d * d + 1


def _decomposition(d: int) -> int:
    return 6000 * d * d + 4 * d**3


class Solution(NamedTuple):
    """The eigenpairs that a method found."""

    values: Tensor  # [K, count]
    vectors: Tensor  # [K, count, d]
    found: Tensor  # [K], bool
    largest: Tensor  # [K]: the largest |lambda|
    next_abs: Tensor  # [K]: the largest |lambda| left out


def solve(
    layer: Layer, c: Tensor | Directions, count: int, order: Order, tol: float, plan: Plan, *, refine: bool
) -> Solution:
    """The first `count` eigenpairs; with `refine`, directions that did not converge are solved densely."""
    q = interaction_matrices(layer.w, layer.v, c) if plan.form else None
    if q is not None and not plan.iterative:
        solution = _dense(q, count, order)
    else:
        operator = Factored(layer.w, layer.v, coefficients(c)) if q is None else Formed(q)
        solution = _iterative(operator, layer.w, count, order, tol)
        missed = (~solution.found).nonzero()[:, 0] if refine else solution.found.new_empty(0, dtype=torch.int64)
        room = len(solution.found) * plan.workspace // _dense_workspace(layer.w.shape[1])
        for rows in missed.split(max(1, room)) if len(missed) else ():
            some = interaction_matrices(layer.w, layer.v, coefficients(c)[rows]) if q is None else q[rows]
            for t, better in zip(solution, _dense(some, count, order), strict=True):
                t[rows] = better
    return solution if layer.lift is None else solution._replace(vectors=solution.vectors @ layer.lift)


def _dense(q: Tensor, count: int, order: Order) -> Solution:
    values, columns = eigh(q)
    index = order(values)
    values = values.gather(1, index)
    vectors = columns.mT.gather(1, index[:, :count, None].expand(-1, -1, q.shape[2]))
    found = values.new_ones(len(q), dtype=torch.bool)
    return Solution(values[:, :count], vectors, found, largest(values), largest(values[:, count:]))


def _iterative(operator: Operator, like: Tensor, count: int, order: Order, tol: float) -> Solution:
    values, vectors, uncertain, found = lanczos(operator, like, count, order, tol)
    beyond = values[:, count:].abs() + uncertain[:, count:]
    return Solution(values[:, :count], vectors[:, :count], found, largest(values), largest(beyond))


def largest(values: Tensor) -> Tensor:
    """The largest magnitude of each row [K, m], 0 for an empty row."""
    return values.abs().amax(1) if values.shape[1] else values.new_zeros(len(values))


def extremes_first(values: Tensor, n: int, which: str) -> Tensor:
    """Indices [K, m] of eigenvalues [K, m]: the wanted ones first, then inwards from either end of the spectrum."""
    if which == "abs":
        return values.abs().argsort(dim=1, descending=True, stable=True)
    ascending = values.argsort(dim=1, stable=True)
    top, bottom = (0 if which == "negative" else n), (0 if which == "positive" else n)
    between = ascending[:, bottom : ascending.shape[1] - top]
    inwards = torch.stack([between, between.flip(1)], 2).flatten(1)[:, : between.shape[1]]
    return torch.cat([ascending.flip(1)[:, :top], ascending[:, :bottom], inwards], 1)
