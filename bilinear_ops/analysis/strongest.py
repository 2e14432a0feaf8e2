"""Inputs to which a layer has the strongest response, and the strength of a response ([A])."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bilinear_ops import _op
from bilinear_ops._check import check, check_finite, check_integers, check_reals
from bilinear_ops.analysis.gated_climbs import Gated, climb_gated, gated_starts
from bilinear_ops.analysis.gates import respond
from bilinear_ops.analysis.progress import progress_bar
from bilinear_ops.analysis.singular import fix_signs
from bilinear_ops.composite.blockwise import widen
from bilinear_ops.gated import gate, gated_mlp
from bilinear_ops.results import Layer, Result

SAMPLES = 512  # random inputs whose outputs show the strongest output directions
OUTPUTS, RITZ = 64, 4  # output directions that give seeds, and seeds of each
KRYLOV = 8  # least dimension of the Krylov spaces of the seeds
# After so many steps, so many climbs go on. In random layers (d = 512) the strengths of seeds say nothing of those of
# their maxima (correlation 0.05), those after six steps do (0.6), and after nine they are almost the same (0.98).
ROUNDS = ((7, 64), (3, 24))
SCREENING = 1e-5  # `tol` in float32, where it decides which climbs are finished in float64
SAME = 0.99  # |cosine| from which two end points count as one maximum
SCREENED = 30  # steps of all climbs of a gated layer, after which those that differ go on
ANGLES, NEWTON = 32, 4  # a line search: angles tried, and Newton steps from the best of them


class StrongestDirections(
    Result,
    NamedTuple(
        "StrongestDirections",
        [
            ("vectors", Tensor),
            ("strengths", Tensor),
        ],
    ),
):
    """Unit inputs `[m, d]` at distinct local maxima of the strength, and the maxima `[m]`, descending."""

    __slots__ = ()


@_op.without_autocast
@torch.no_grad()
def strongest_directions(
    w: Tensor,
    v: Tensor,
    p: Tensor,
    n: int,
    *,
    activation: str = "identity",
    beta: float = 1.0,
    radius: float | None = None,
    steps: int = 500,
    tol: float = 1e-10,
    progress: bool = False,
) -> StrongestDirections:
    """Unit inputs at local maxima of a bilinear layer's response |B(x, x)|, the largest found first ([A]).

    Climbs by conjugate gradients on the sphere, from the top eigenvectors of the output directions in which random
    inputs have the strongest outputs. Along a great circle B(x, x) is an ellipse, so each step ends at the next maximum
    of |B(x, x)| on its circle and none goes down. Many climbs begin in float32, the strongest of them go on, and about
    twice n are finished in float64. The result is deterministic. The first maximum is not guaranteed to be the global
    one. Not differentiable; `strength` is, at the vectors found.

    The strength of a gated layer depends on the length of its input too. With an activation, climbs start from the
    bilinear layer's maxima, their negatives and random inputs, all of length `radius`.

    Args:
        w, v, p: `[h, d]`, `[h, d]` and `[o, h]`.
        n: maximal number of directions; fewer are returned if fewer distinct maxima were found.
        activation, beta: as for `gated_mlp`, a layer without biases.
        radius: |x|, needed with an activation and of no effect without.
        steps: maximal number of steps of a climb in float32, and again in float64.
        tol: a climb ends once two steps in a row gain less than this fraction.
        progress: show a progress bar over the climbs; needs tqdm.

    Returns:
        `StrongestDirections(vectors, strengths)` in w's dtype, float32 for half precision; a strength is |y| / |x|^2.
        Of x and -x, which are one maximum, the one whose largest component is positive; with an activation, both.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices.
        TypeError: an argument that is not a floating-point tensor, or n or steps not an int.
        ValueError: negative n, steps or tol; weights that are not finite; an unknown activation, a beta without swish;
            a radius that is missing or not above 0.
        ModuleNotFoundError: progress without tqdm.
    """
    sizes = check(w=(w, "h d"), v=(v, "h d"), p=(p, "o h"))
    check_integers(n=n, steps=steps)
    check_reals(tol=tol)
    if min(n, steps) < 0 or not tol >= 0:
        raise ValueError(f"n, steps and tol must not be negative, got {n}, {steps} and {tol}")
    check_finite(w=w, v=v, p=p)
    gated = _checked_gate(activation, beta, radius, w)
    dtype = torch.promote_types(w.dtype, torch.float32)
    if not (n and all(sizes.values())):
        return StrongestDirections(w.new_empty(0, sizes["d"], dtype=dtype), w.new_empty(0, dtype=dtype))
    layer = w.double(), v.double(), p.double()
    narrow = [_unit_scale(t).float() for t in layer]
    x = _best_climbs(narrow[0], narrow[1], narrow[2], n, steps, progress).double()
    if gated is not None:
        x, strengths = _best_gated_climbs(x, layer, gated, n, steps, tol, progress)
        chosen = _distinct(x, strengths, n, signed=True)
        return StrongestDirections(x[chosen].to(dtype), strengths[chosen].to(dtype))
    with progress_bar(len(x), "climb", progress) as advance:
        x = _climb(x, *layer, steps, tol, advance)
    strengths = _strengths(x, *layer)
    chosen = _distinct(x, strengths, n)
    return StrongestDirections(fix_signs(x[chosen]).to(dtype), strengths[chosen].to(dtype))


def _checked_gate(activation: str, beta: float, radius: float | None, w: Tensor) -> Gated | None:
    """None for a bilinear layer."""
    check_reals(beta=beta)
    if radius is not None:
        check_reals(radius=radius)
        check_reals(positive=True, radius=float(radius))
    gate(w[:0], w[:0], activation=activation, beta=beta)  # refuses what no layer takes
    if activation == "identity":
        return None
    if radius is None:
        raise ValueError(f"radius is needed with activation={activation!r}, whose strength depends on it")
    return Gated(activation, float(beta), float(radius))


def _unit_scale(t: Tensor) -> Tensor:
    """t with 1 as its largest magnitude: fourth powers of a layer's scale would leave the range of float32."""
    return t / t.abs().max().clamp_min(torch.finfo(t.dtype).tiny)


def _best_climbs(w: Tensor, v: Tensor, p: Tensor, n: int, steps: int, progress: bool) -> Tensor:
    """The end points [m, d] of the climbs most likely to reach the strongest maxima, as found in float32."""
    x = _seeds(w, v, p, max(OUTPUTS, n))
    with progress_bar(len(x), "seed", progress) as advance:
        for taken, keep in ROUNDS:
            taken = min(taken, steps)
            x, before = _climb(x, w, v, p, taken, 0.0), len(x)
            x = x[_distinct(x, _strengths(x, w, v, p), max(keep, 4 * n))]
            advance(before - len(x))
            steps -= taken
        x = _climb(x, w, v, p, steps, SCREENING, advance)
        return x[_distinct(x, _strengths(x, w, v, p), 2 * n)]


def _best_gated_climbs(
    x: Tensor, layer: Layer, gated: Gated, n: int, steps: int, tol: float, progress: bool
) -> tuple[Tensor, Tensor]:
    """The end points [m, d] of climbs from the bilinear layer's and from random inputs, and the strengths there."""
    x = gated_starts(x)
    with progress_bar(len(x), "climb", progress) as advance:
        few, before = min(steps, SCREENED), len(x)
        x, strengths = climb_gated(x, layer, gated, few, tol)
        x = x[_distinct(x, strengths, max(16, 8 * n), signed=True)]
        advance(before - len(x))
        return climb_gated(x, layer, gated, steps - few, tol, advance)


def _seeds(w: Tensor, v: Tensor, p: Tensor, outputs: int) -> Tensor:
    """Unit vectors [m, d]: top eigenvectors of the output directions that are strongest at random inputs."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(SAMPLES, w.shape[1], dtype=w.dtype, generator=generator).to(w.device)
    y = gated_mlp(inputs, w, v, p)
    outputs = min(outputs, p.shape[0])
    count = max(RITZ, -(-OUTPUTS // outputs))
    u = torch.linalg.eigh((y.t() @ y).double()).eigenvectors.flip(1)[:, :outputs].to(w.dtype)
    start = torch.randn(outputs, w.shape[1], dtype=w.dtype, generator=generator).to(w.device)
    vectors = _krylov(F.normalize(start, dim=1), w, v, u.t() @ p, max(KRYLOV, count))
    return vectors[:, :count].flatten(0, 1)


def _climb(
    x: Tensor,
    w: Tensor,
    v: Tensor,
    p: Tensor,
    steps: int,
    tol: float,
    advance: Callable[[int], object] = lambda n: None,
) -> Tensor:
    """Where climbs from unit vectors [m, d] end, by conjugate gradients on the sphere; `advance` counts those ended.

    Outputs of a new x are combined from those of the old one and of the direction: a step costs seven products.
    """
    found, rows = x.clone(), torch.arange(len(x), device=x.device)
    a, z = x @ w.t(), x @ v.t()
    y = (a * z) @ p.t()
    slope = torch.zeros_like(x)
    search = torch.zeros_like(x)
    idle = torch.zeros_like(rows)  # steps in a row that gained too little
    for _ in range(steps):
        if not len(rows):
            break
        c = y @ p
        new_slope = _tangent(_apply(w, v, c, a, z), x)
        ratio = (new_slope * (new_slope - slope)).sum(1) / slope.square().sum(1)  # Polak and Ribiere's
        ratio = torch.where((idle == 0) & (ratio > 0) & ratio.isfinite(), ratio, 0)
        search = _tangent(new_slope + ratio[:, None] * search, x)
        search = torch.where(((search * new_slope).sum(1) > 0)[:, None], search, new_slope)
        slope, length = new_slope, search.norm(dim=1, keepdim=True)
        s = F.normalize(search, dim=1, eps=torch.finfo(x.dtype).tiny)
        a1, z1 = s @ w.t(), s @ v.t()
        y1, y2 = (0.5 * (a * z1 + a1 * z)) @ p.t(), (a1 * z1) @ p.t()  # B(x, s), B(s, s)
        angle, gained = _next_maximum(y, y1, y2)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        search = length * (cos * s - sin * x)  # carried along the circle
        x, a, z = cos * x + sin * s, cos * a + sin * a1, cos * z + sin * z1
        y = cos.square() * y + 2 * cos * sin * y1 + sin.square() * y2
        found[rows] = x
        idle = torch.where(gained <= tol, idle + 1, 0)
        on = idle < 2
        if not on.all():
            advance(len(rows) - int(on.sum()))
            rows, x, a, z, y, slope, search, idle = (t[on] for t in (rows, x, a, z, y, slope, search, idle))
    advance(len(rows))
    return F.normalize(found, dim=1)


def _tangent(t: Tensor, x: Tensor) -> Tensor:
    return t - (t * x).sum(1, keepdim=True) * x


def _next_maximum(y0: Tensor, y1: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
    """The angle t [m] of the first maximum of |y|, y = cos^2 y0 + 2 cos sin y1 + sin^2 y2, and the fraction gained.

    y = (y0 + y2) / 2 + (y0 - y2) / 2 cos 2t + y1 sin 2t is an ellipse, and |y|^2 a trigonometric polynomial of 2t.
    """
    centre, axis = 0.5 * (y0 + y2), 0.5 * (y0 - y2)
    products = [(2 * centre * axis), (2 * centre * y1), 0.5 * (axis.square() - y1.square()), axis * y1]
    a1, b1, a2, b2 = (t.sum(1, keepdim=True, dtype=torch.float64) for t in products)
    double = torch.arange(ANGLES, dtype=torch.float64, device=y0.device) * (2 * math.pi / ANGLES)

    def wave(t: Tensor) -> Tensor:
        return a1 * t.cos() + b1 * t.sin() + a2 * (2 * t).cos() + b2 * (2 * t).sin()

    heights = wave(double)
    t = double[(heights.roll(-1, 1) < heights).double().argmax(1, keepdim=True)]  # the first that is followed by less
    for _ in range(NEWTON):
        first = b1 * t.cos() - a1 * t.sin() + 2 * b2 * (2 * t).cos() - 2 * a2 * (2 * t).sin()
        second = -a1 * t.cos() - b1 * t.sin() - 4 * a2 * (2 * t).cos() - 4 * b2 * (2 * t).sin()
        t = t + torch.where(second < 0, -first / second, 0.5 * double[1]).clamp(-double[1], double[1])
    gain = wave(t) - wave(torch.zeros_like(t))
    t, gain = torch.where(gain > 0, t, 0), gain.clamp_min(0)
    gained = (1 + gain[:, 0] / y0.square().sum(1, dtype=torch.float64)).sqrt() - 1
    return (0.5 * t[:, 0]).to(y0.dtype), gained.nan_to_num(0)


def _strengths(x: Tensor, w: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return gated_mlp(x, w, v, p).norm(dim=1)


def _apply(w: Tensor, v: Tensor, c: Tensor, a: Tensor, z: Tensor) -> Tensor:
    """Q_k x_k [m, d] with coefficients c [m, h] of the interaction matrices, a = x W^T and z = x V^T."""
    return 0.5 * ((c * z) @ w + (c * a) @ v)


def _krylov(x: Tensor, w: Tensor, v: Tensor, c: Tensor, dimension: int) -> Tensor:
    """Ritz vectors [m, n, d] of Q_k on span{x, Q x, Q^2 x, ...}, by descending |Ritz value|; x [m, d] of unit norm.

    If that space has fewer than n dimensions, the missing vectors and their Ritz values are zero.
    """

    limit = 1e-10 if x.dtype == torch.float64 else 1e-5

    def apply(x: Tensor) -> Tensor:
        return _apply(w, v, c, x @ w.t(), x @ v.t())[:, None]

    basis, images = x[:, None], apply(x)  # [m, n, d]
    while basis.shape[1] < min(dimension, x.shape[1]):
        new = images[:, -1:]
        length = new.norm(dim=2, keepdim=True)
        for _ in range(2):
            new = new - (new @ basis.mT) @ basis
        rest = new.norm(dim=2, keepdim=True)
        new = torch.where(rest > limit * length, new / rest, 0)
        basis = torch.cat([basis, new], 1)
        images = torch.cat([images, apply(new[:, 0])], 1)
    small = basis @ images.mT
    values, mixtures = torch.linalg.eigh(0.5 * (small + small.mT))
    order = values.abs().argsort(1, descending=True)
    mixtures = mixtures.mT.gather(1, order[:, :, None].expand_as(mixtures))
    return F.normalize(mixtures @ basis, dim=2)


def _distinct(x: Tensor, strengths: Tensor, n: int, *, signed: bool = False) -> Tensor:
    """Indices of the n strongest vectors with positive strength, no two the same, up to sign unless `signed`."""
    chosen: list[int] = []
    cosines = x @ x.t() if signed else (x @ x.t()).abs()
    for i in strengths.argsort(descending=True, stable=True).tolist():
        if len(chosen) < n and strengths[i] > 0 and not (cosines[i, chosen] > SAME).any():
            chosen.append(i)
    return torch.tensor(chosen, dtype=torch.int64, device=x.device)


@_op.without_autocast
def kept_strength(
    x: Tensor, w: Tensor, v: Tensor, p: Tensor, activation: str, radii: Tensor, *, beta: float | Tensor = 1.0
) -> Tensor:
    """The share of the bilinear layer's strength along x that the gated layer has at x or -x, the larger ([A]).

    Without biases it is at least 1/2 at every length, by the theorem of `even_odd_split`. It is scale-free for relu.

    Args:
        x: `[m, d]` directions, such as those of `strongest_directions`.
        w, v, p: `[h, d]`, `[h, d]` and `[o, h]`, a layer without biases.
        activation, beta: as for `gated_mlp`.
        radii: `[r]`, lengths of the input.

    Returns:
        `[m, r]`, differentiable; float32 for half precision. NaN where the bilinear layer has no response.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices.
        TypeError: an argument that is not a floating-point tensor.
        ValueError: an unknown activation, or a beta without swish.
    """
    check(w=(w, "h d"), v=(v, "h d"), p=(p, "o h"), x=(x, "m d"), radii=(radii, "r"))
    x, w, v, p, radii = widen(x, w, v, p, radii)
    inputs = radii[:, None] * F.normalize(x, dim=1)[:, None]  # [m, r, d]
    both = [gated_mlp(t, w, v, p, activation=activation, beta=beta).norm(dim=2) for t in (inputs, -inputs)]
    return torch.maximum(*both) / gated_mlp(inputs, w, v, p).norm(dim=2)


def strength(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The strength |fn(x)| / |x|^2 of a response; for a bilinear layer it depends on the direction of x only ([A]).

    Args:
        fn: from `[..., d]` to `[..., o]`.
        x: `[..., d]`.

    Returns:
        `[...]`, differentiable; float32 for half precision. NaN at x = 0.

    Raises:
        RuntimeError: x without dimensions; fn's outputs of another shape than `[..., o]`.
        TypeError: x or fn's output that is not a floating-point tensor; fn that cannot be called.
    """
    check(x=(x, "... d"))
    y = respond(fn, x)
    wide = torch.promote_types(y.dtype, torch.float32)
    return y.to(wide).norm(dim=-1) / x.to(wide).square().sum(-1)
