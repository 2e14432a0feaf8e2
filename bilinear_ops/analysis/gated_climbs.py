"""Climbs on a sphere to the strongest responses of a gated layer, from many starts ([A])."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bilinear_ops.gated import gate
from bilinear_ops.results import Layer

RESTARTS = 64  # random inputs
FACTORS = tuple(2.0**k for k in range(-3, 4))  # of the last angle: the angles that a line search tries
PATIENCE = 4  # steps in a row that gain too little; each makes the angles eight times smaller


class Gated(NamedTuple):
    """The activation of a layer, and the length of its inputs."""

    activation: str
    beta: float
    radius: float


def gated_starts(x: Tensor) -> Tensor:
    """x, -x, and random unit vectors."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(RESTARTS, x.shape[1], dtype=x.dtype, generator=generator).to(x.device)
    return torch.cat([x, -x, F.normalize(drawn, dim=1)])


def climb_gated(
    x: Tensor,
    layer: Layer,
    gated: Gated,
    steps: int,
    tol: float,
    advance: Callable[[int], object] = lambda n: None,
) -> tuple[Tensor, Tensor]:
    """Where climbs from unit vectors [m, d] end, and the strengths there; `advance` counts those ended.

    By conjugate gradients; along a great circle the pre-activations are combined, and no step goes down.
    """
    w, v, p = layer
    found, rows = x.clone(), torch.arange(len(x), device=x.device)
    slope, search = torch.zeros_like(x), torch.zeros_like(x)
    angle = torch.full_like(x[:, 0], 0.1)
    idle = torch.zeros_like(rows)
    for _ in range(steps):
        if not len(rows):
            break
        a, z = x @ w.t(), x @ v.t()
        before, new_slope = _slope(x, a, z, layer, gated)
        ratio = (new_slope * (new_slope - slope)).sum(1) / slope.square().sum(1)  # Polak and Ribiere's
        ratio = torch.where((idle == 0) & (ratio > 0) & ratio.isfinite(), ratio, 0)
        search = new_slope + ratio[:, None] * (search - (search * x).sum(1, keepdim=True) * x)
        search = torch.where(((search * new_slope).sum(1) > 0)[:, None], search, new_slope)
        slope, length = new_slope, search.norm(dim=1, keepdim=True)
        s = F.normalize(search, dim=1, eps=torch.finfo(x.dtype).tiny)
        a1, z1 = s @ w.t(), s @ v.t()

        angles = (angle[:, None] * angle.new_tensor(FACTORS)).clamp(max=math.pi / 2)
        heights = torch.stack([_strengths(a, z, a1, z1, t, p, gated) for t in angles.unbind(1)], 1)
        angles, heights = _with_vertex(angles, heights, lambda t: _strengths(a, z, a1, z1, t, p, gated))  # noqa: B023
        after, best = heights.max(1)
        gained = torch.where(after > before, after / before - 1, 0)
        t = torch.where(gained > 0, angles.gather(1, best[:, None])[:, 0], 0)
        angle = torch.where(t > 0, t, angles[:, 0])
        cos, sin = t.cos()[:, None], t.sin()[:, None]
        x, search = F.normalize(cos * x + sin * s, dim=1), length * (cos * s - sin * x)
        found[rows] = x
        idle = torch.where(gained <= tol, idle + 1, 0)
        on = idle < PATIENCE
        if not on.all():
            advance(len(rows) - int(on.sum()))
            rows, x, slope, search, angle, idle = (u[on] for u in (rows, x, slope, search, angle, idle))
    advance(len(rows))
    a, z = found @ w.t(), found @ v.t()
    return found, _strengths(a, z, a, z, torch.zeros_like(a[:, 0]), p, gated)


def _with_vertex(angles: Tensor, heights: Tensor, at: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The angles tried, and that of the parabola through the best and its neighbours."""
    middle = heights.argmax(1, keepdim=True).clamp(1, heights.shape[1] - 2)
    (t0, t1, t2), (y0, y1, y2) = ([u.gather(1, middle + k)[:, 0] for k in (-1, 0, 1)] for u in (angles, heights))
    rise, fall = (y1 - y0) * (t2 - t1), (y1 - y2) * (t1 - t0)
    vertex = (rise * (t1 + t2) + fall * (t0 + t1)) / (2 * (rise + fall))
    vertex = torch.where((vertex > t0) & (vertex < t2), vertex, t1)
    return torch.cat([angles, vertex[:, None]], 1), torch.cat([heights, at(vertex)[:, None]], 1)


def _strengths(a: Tensor, z: Tensor, a1: Tensor, z1: Tensor, t: Tensor, p: Tensor, gated: Gated) -> Tensor:
    """|y| / radius^2 [m] at the angles t [m]."""
    cos, sin = t.cos()[:, None], t.sin()[:, None]
    return _respond(cos * a + sin * a1, cos * z + sin * z1, p, gated).norm(dim=1) / gated.radius**2


def _respond(a: Tensor, z: Tensor, p: Tensor, gated: Gated) -> Tensor:
    return gate(gated.radius * a, gated.radius * z, activation=gated.activation, beta=gated.beta) @ p.t()


def _slope(x: Tensor, a: Tensor, z: Tensor, layer: Layer, gated: Gated) -> tuple[Tensor, Tensor]:
    """The strengths [m] and their gradients on the sphere [m, d]."""
    w, v, p = layer
    with torch.enable_grad():
        a, z = a.detach().requires_grad_(), z.detach().requires_grad_()
        strengths = _respond(a, z, p.detach(), gated).norm(dim=1) / gated.radius**2
        da, dz = torch.autograd.grad(strengths.sum(), (a, z))
    gradient = da @ w + dz @ v
    return strengths.detach(), gradient - (gradient * x).sum(1, keepdim=True) * x
