"""Means of an activation and of its derivatives at normally distributed inputs, and of products of two of them.

With z normal of mean m and deviation s, E act(z), E act'(z), E act''(z) and E act'''(z) say all that the best quadratic
fit of a gated layer needs. Where the activation is made of pieces of parabolas, or is the erf GELU, the means are
closed forms. The others are sigmoids of something, alone or times z, whose derivatives decay on both sides: the
trapezoidal rule converges faster than any power of its step.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# act(z) = sum of first * (z - knot)_+ + second * (z - knot)_+^2: no quadrature is accurate across a kink.
PIECES = {
    "relu": ((0.0, 1.0, 0.0),),
    "relu2": ((0.0, 0.0, 1.0),),
    "relu6": ((0.0, 1.0, 0.0), (6.0, -1.0, 0.0)),
    "hardswish": ((-3.0, -1 / 2, 1 / 6), (3.0, -1 / 2, -1 / 6)),
}
NODES = 257
INPUTS, DEVIATIONS = 40.0, 9.0  # beyond which the derivatives of sigmoids, and the density, are below 1e-17


def derivative_means(activation: str, beta: Tensor, mean: Tensor, deviation: Tensor) -> list[Tensor]:
    """E act(z) and the means of act's first three derivatives: four tensors of the shape of `mean`."""
    if activation == "identity":
        return [mean, torch.ones_like(mean), torch.zeros_like(mean), torch.zeros_like(mean)]
    if activation in PIECES:
        parts = [_parabola(mean - knot, deviation, first, second) for knot, first, second in PIECES[activation]]
        return [torch.stack(part).sum(0) for part in zip(*parts, strict=True)]
    if activation == "tanh":
        middle, *slopes = _sigmoid_means(_plain, 2 * mean, 2 * deviation)
        return [2 * middle - 1, *(2 ** (k + 1) * slope for k, slope in enumerate(slopes[:3], 1))]
    if activation == "sigmoid":
        return _sigmoid_means(_plain, mean, deviation)[:4]
    if activation == "gelu":
        gates = _normal_means(mean, deviation)
    elif activation == "swish":
        gates = [beta**k * g for k, g in enumerate(_sigmoid_means(_plain, beta * mean, beta.abs() * deviation))]
    else:
        inner = {"silu": _plain, "gelu_tanh": _cubic, "mish": _softplus}[activation]
        gates = _sigmoid_means(inner, mean, deviation)
    # act = z G: E[z G^(k)] is mean E[G^(k)] + deviation^2 E[G^(k + 1)]
    return [(k * gates[k - 1] if k else 0) + mean * gates[k] + deviation.square() * gates[k + 1] for k in range(4)]


def _parabola(mean: Tensor, deviation: Tensor, first: float, second: float) -> list[Tensor]:
    """The means of first * z_+ + second * z_+^2 and its derivatives."""
    there = deviation > 0
    s = deviation.where(there, 1)
    r = (mean / s).where(there, math.inf * mean.sign()).nan_to_num(0).clamp(-50, 50)
    share = torch.special.ndtr(r)
    density = (_density(r) / s).where(there, 0)
    ramp = mean * share + deviation.square() * density  # E z_+
    return [
        first * ramp + second * (mean * ramp + deviation.square() * share),
        first * share + 2 * second * ramp,
        first * density + 2 * second * share,
        -first * r * density / s + 2 * second * density,
    ]


def _normal_means(mean: Tensor, deviation: Tensor) -> list[Tensor]:
    """The means of the normal distribution function and its first four derivatives."""
    s = (1 + deviation.square()).sqrt()
    r = mean / s
    density = _density(r)
    hermite = (torch.ones_like(r), -r, r.square() - 1, r * (3 - r.square()))
    return [torch.special.ndtr(r), *(h * density / s**k for k, h in enumerate(hermite, 1))]


def _density(r: Tensor) -> Tensor:
    return (-0.5 * r.square()).exp() / math.sqrt(2 * math.pi)


def _plain(z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return z, torch.ones_like(z), torch.zeros_like(z), torch.zeros_like(z), torch.zeros_like(z)


def _cubic(z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of the tanh GELU."""
    scale, cube = math.sqrt(8 / math.pi), 0.044715
    slope, bend = scale * (1 + 3 * cube * z.square()), 6 * scale * cube * z
    return scale * z * (1 + cube * z.square()), slope, bend, torch.full_like(z, 6 * scale * cube), torch.zeros_like(z)


def _softplus(z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of mish: tanh(log(1 + e^z)) is the sigmoid of z + log(1 + e^z / 2)."""
    q = torch.sigmoid(z - math.log(2))
    first = q * torch.sigmoid(math.log(2) - z)
    return z + torch.nn.functional.softplus(z - math.log(2)), 1 + q, first, first * (1 - 2 * q), first * (1 - 6 * first)


def _sigmoid_means(
    inner: Callable[[Tensor], tuple[Tensor, Tensor, Tensor, Tensor, Tensor]], mean: Tensor, deviation: Tensor
) -> list[Tensor]:
    """The means of G(z) = sigmoid(u(z)) and its first four derivatives; `inner` gives u and its own.

    Nodes are where neither the density nor the integrand vanishes: at most 80 / 256 apart in z, and 18 / 256 in
    deviations. Of G, which does not decay, the difference to the normal distribution function does.
    """
    with torch.no_grad():
        s = deviation.clamp_min(torch.finfo(deviation.dtype).tiny)
        low, high = (((end - mean) / s).clamp(-DEVIATIONS, DEVIATIONS) for end in (-INPUTS, INPUTS))
        t = torch.lerp(low[..., None], high[..., None], torch.linspace(0, 1, NODES, dtype=s.dtype, device=s.device))
        weight = _density(t) * ((high - low) / (NODES - 1))[..., None]
        weight[..., 0] /= 2
        weight[..., -1] /= 2
    z = mean[..., None] + deviation[..., None] * t
    u, u1, u2, u3, u4 = inner(z)
    g = torch.sigmoid(u)
    g1 = g * torch.sigmoid(-u)
    g2, g3 = g1 * (1 - 2 * g), g1 * (1 - 6 * g1)
    g4 = g2 * (1 - 12 * g1)
    curves = (
        g - torch.special.ndtr(z),
        g1 * u1,
        g2 * u1**2 + g1 * u2,
        g3 * u1**3 + 3 * g2 * u1 * u2 + g1 * u3,
        g4 * u1**4 + 6 * g3 * u1**2 * u2 + g2 * (3 * u2**2 + 4 * u1 * u3) + g1 * u4,
    )
    found = [(weight * curve).sum(-1) for curve in curves]
    return [found[0] + _normal_means(mean, deviation)[0], *found[1:]]


def pair_means(activation: str, first: Tensor, second: Tensor, cov: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """E[f f], E[f' f'], E[f'' f] and E[f f''] of f(z1) and f(z2), relu or erf GELU, in closed form.

    z1 and z2 are normal of mean 0, variances `first` and `second`, and covariance `cov`.
    """
    return (_relu_pairs if activation == "relu" else _gelu_pairs)(first, second, cov)


def _relu_pairs(first: Tensor, second: Tensor, cov: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cho and Saul's arc-cosine kernels."""
    area = first * second - cov.square()
    there = area > 1e-15 * first * second  # elsewhere z1 and z2 are one, and the root has no derivative
    root = area.where(there, 1).sqrt().where(there, 0)
    angle = torch.atan2(root, cov.where(there | (cov != 0), 1))
    share = (math.pi - angle) / (2 * math.pi)
    of_first, of_second = ((root / t.where(t > 0, 1)).where(t > 0, 0) / (2 * math.pi) for t in (first, second))
    return root / (2 * math.pi) + cov * share, share, of_first, of_second


def _gelu_pairs(first: Tensor, second: Tensor, cov: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """E[f f] = c E[Phi Phi] + (first second - c^2 k) / (2 pi root), and by Price's theorem its derivatives."""
    one, two = 1 + first, 1 + second
    area = one * two - cov.square()
    root = area.sqrt()
    share = 0.25 + torch.atan2(cov, root) / (2 * math.pi)  # E[Phi Phi]
    k = 1 - 1 / one - 1 / two
    rest = first * second - cov.square() * k
    scale = 1 / (2 * math.pi * root)

    def bend(a: Tensor, b: Tensor, other: Tensor) -> Tensor:
        """Twice the derivative of E[f f] by the variance a - 1."""
        return scale * (2 * other - cov.square() * (1 / a + 2 / a.square()) - rest * b / area)

    product = cov * share + scale * rest
    slopes = share + scale * cov * (1 - 2 * k + rest / area)
    return product, slopes, bend(one, two, second), bend(two, one, first)
