"""The quadratic function nearest to a gated layer at normally distributed inputs, and how much of the layer it is."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bilinear_ops import _op
from bilinear_ops._check import check, check_finite, check_reals
from bilinear_ops.analysis.gaussian import derivative_means, pair_means
from bilinear_ops.composite.blockwise import blocks, recompute
from bilinear_ops.composite.limits import limits
from bilinear_ops.gated import gate
from bilinear_ops.interaction.matrices import interaction_matrices
from bilinear_ops.results import Result

SMOOTH = ("silu", "swish", "sigmoid", "gelu", "gelu_tanh", "tanh", "mish")
FITTED = ("identity", *SMOOTH, "relu", "relu2", "relu6", "hardswish")
PAIRED = ("relu", "gelu")  # whose variance is a closed form if z has mean 0
SAMPLES = 1 << 13  # drawn before the standard error is looked at again


class BestQuadratic(
    Result,
    NamedTuple(
        "BestQuadratic",
        [
            ("q", Tensor),  # [K, d, d], symmetric
            ("linear", Tensor),  # [K, d]
            ("constant", Tensor),  # [K]
            ("explained", Tensor),  # [K]: the share of the variance, 1 for a layer that is quadratic
        ],
    ),
):
    """y_k is nearest to x^T q_k x + linear_k . x + constant_k."""

    __slots__ = ()


@_op.without_autocast
def best_quadratic(
    w: Tensor,
    v: Tensor,
    p: Tensor,
    activation: str,
    *,
    b_w: Tensor | None = None,
    b_v: Tensor | None = None,
    mean: Tensor | None = None,
    cov: Tensor | None = None,
    beta: float | Tensor = 1.0,
    error: float = 0.005,
) -> BestQuadratic:
    """The least-squares fit of 1, x and x x^T to a gated layer at normal inputs (docs/math.md 2).

    By Stein's lemma it needs four means for each neuron, those of act(z) and of its first three derivatives. The
    matrices are those of a bilinear layer with the same v and p, `interaction_matrices(w', v, p)` with another w': what
    a SwiGLU computes on average, where `gated_interactions` is what it computes at one input. Computed in float64.

    Args:
        w, v, p: `[h, d]`, `[h, d]` and `[K, h]`: rows of p are output directions in terms of the neurons.
        activation: identity, silu, swish, sigmoid, relu, gelu, gelu_tanh, relu2, relu6, tanh, mish or hardswish.
        b_w, b_v: `[h]`; an output bias adds to the constant.
        mean, cov: `[d]` and `[d, d]` of the inputs, by default 0 and the identity. Only cov's symmetric part counts.
        beta: slope of swish.
        error: largest standard error of `explained` where it is sampled.

    Returns:
        `BestQuadratic(q, linear, constant, explained)` in w's dtype, float32 for half precision; differentiable. The
        explained variance is a closed form for identity, and for relu and gelu without b_w, b_v and mean. Else the
        variance left is that of seeded samples, as many as `error` needs, and the same in every call. NaN for an output
        that does not vary.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices.
        TypeError: an argument that is not a floating-point tensor; error not a number.
        ValueError: another activation, a beta without swish, error not above 0, weights or inputs that are not finite,
            or cov that is not positive definite.
    """
    check(
        w=(w, "h d"), v=(v, "h d"), p=(p, "K h"), b_w=(b_w, "? h"), b_v=(b_v, "? h"), mean=(mean, "? d"),
        cov=(cov, "? d d"),
    )  # fmt: skip
    if activation not in FITTED:
        raise ValueError(f"activation must be one of {', '.join(FITTED)}, got {activation!r}")
    check_reals(beta=beta, error=error)
    check_reals(positive=True, error=float(error))
    if activation != "swish" and (isinstance(beta, Tensor) or beta != 1.0):
        raise ValueError(f"beta belongs to activation='swish', got {beta} with {activation!r}")
    given = {"w": w, "v": v, "p": p, "b_w": b_w, "b_v": b_v, "mean": mean, "cov": cov}
    check_finite(**{name: t for name, t in given.items() if t is not None})
    dtype = torch.promote_types(w.dtype, torch.float32)
    centred = b_w is None and b_v is None and mean is None
    w, v, p = w.double(), v.double(), p.double()
    b_w, b_v = (w.new_zeros(len(w)) if b is None else b.double() for b in (b_w, b_v))
    mean = w.new_zeros(w.shape[1]) if mean is None else mean.double()
    slope = beta.double() if isinstance(beta, Tensor) else w.new_ones(()) * beta
    layer = _Whitened(w, v, p, b_w + w @ mean, b_v + v @ mean, activation, slope, _root(cov))

    q = interaction_matrices(layer.best_w(w, v), v, p)
    gradient, inner = layer.gradient(w, v), layer.best_w(layer.w, layer.v)
    whitened = q if cov is None else interaction_matrices(inner, layer.v, p)
    constant = p @ layer.means - (whitened.diagonal(dim1=1, dim2=2)).sum(1)
    fitted = layer.gradient(layer.w, layer.v).square().sum(1) + 2 * whitened.square().sum((1, 2))
    if activation == "identity":
        left = torch.zeros_like(fitted)
    elif centred and activation in PAIRED:
        left = layer.variance() - fitted
    else:
        left = layer.sampled_rest(fitted, float(error))
    q_mean = q @ mean
    return BestQuadratic(
        q.to(dtype),
        (gradient - 2 * q_mean).to(dtype),
        (constant - gradient @ mean + q_mean @ mean).to(dtype),
        (fitted / (fitted + left)).to(dtype),
    )


def _root(cov: Tensor | None) -> Tensor | None:
    """L with L L^T = cov."""
    if cov is None:
        return None
    cov = cov.double()
    root, failed = torch.linalg.cholesky_ex(0.5 * (cov + cov.t()))
    if failed:
        raise ValueError("cov must be positive definite: a multiple of the identity added to it makes it so")
    return root


class _Whitened:
    """The layer as a function of u, x = mean + L u with u standard normal: a = w.u + b_w, z = v.u + b_v.

    E f, E grad f and E Hess f follow from E[a g(z)] = b_w E g(z) + (w.v) E g'(z).
    """

    def __init__(
        self,
        w: Tensor,
        v: Tensor,
        p: Tensor,
        b_w: Tensor,
        b_v: Tensor,
        activation: str,
        beta: Tensor,
        root: Tensor | None,
    ) -> None:
        self.w, self.v = (w, v) if root is None else (w @ root, v @ root)
        self.p, self.b_w, self.b_v, self.activation, self.beta = p, b_w, b_v, activation, beta
        self.shared = (self.w * self.v).sum(1)
        m0, m1, m2, m3 = derivative_means(activation, beta, b_v, self.v.norm(dim=1))
        self.means = b_w * m0 + self.shared * m1  # E[a act]
        self.of_w, self.of_v = m0, b_w * m1 + self.shared * m2  # E[act], E[a act']
        self.both, self.twice = m1, 0.5 * (b_w * m2 + self.shared * m3)  # E[act'], E[a act''] / 2

    def best_w(self, w: Tensor, v: Tensor) -> Tensor:
        """sym(w' v^T) is the mean Hessian of a neuron, halved."""
        return self.both[:, None] * w + self.twice[:, None] * v

    def gradient(self, w: Tensor, v: Tensor) -> Tensor:
        """The mean gradients of the outputs [K, d]."""
        return self.p @ (self.of_w[:, None] * w + self.of_v[:, None] * v)

    def variance(self) -> Tensor:
        """Of each output [K], if b_w and b_v are 0."""
        total = self.p.new_zeros(len(self.p))
        tiles = list(blocks(len(self.w), 1, limits.gram_neurons))
        for one in tiles:
            for two in tiles:
                total = total + recompute(self._products, self.w, self.v, self.p, slice(*one), slice(*two))
        return total - (self.p @ self.means).square()

    def _products(self, w: Tensor, v: Tensor, p: Tensor, one: slice, two: slice) -> Tensor:
        """E[f_h f_h'] of pairs of neurons, by Stein's lemma for a and a'."""
        squares = v.square().sum(1)
        ww, wv, vw, vv = w[one] @ w[two].t(), w[one] @ v[two].t(), v[one] @ w[two].t(), v[one] @ v[two].t()
        of, slopes, first, second = pair_means(self.activation, squares[one, None], squares[None, two], vv)
        r1, r2 = self.shared[one, None], self.shared[None, two]
        gram = ww * of + (r1 * r2 + wv * vw) * slopes + r1 * vw * first + wv * r2 * second
        return ((p[:, one] @ gram) * p[:, two]).sum(1)

    def sampled_rest(self, fitted: Tensor, error: float) -> Tensor:
        """The variance [K] that the fit leaves, of samples enough for that standard error of `explained`."""
        generator = torch.Generator().manual_seed(0)
        squares, fourths, count = torch.zeros_like(fitted), torch.zeros_like(fitted), 0
        while True:
            for a, b in blocks(SAMPLES, max(self.w.shape)):
                u = torch.randn(b - a, self.w.shape[1], dtype=self.w.dtype, generator=generator).to(self.w.device)
                rest = recompute(self._rest, u, self.w, self.v, self.p, self.b_w, self.b_v)
                squares = squares + rest.square().sum(0)
                fourths = fourths + rest.detach().pow(4).sum(0)
            count += SAMPLES
            left = squares / count
            with torch.no_grad():
                deviation = ((fourths / count - left.square()) / count).sqrt()
                errors = fitted * deviation / (fitted + left).square()
            if not (errors > error).any():
                return left

    def _rest(self, u: Tensor, w: Tensor, v: Tensor, p: Tensor, b_w: Tensor, b_v: Tensor) -> Tensor:
        """What the fit leaves of the outputs [N, K]."""
        a, z = u @ w.t(), u @ v.t()
        beta = self.beta if self.activation == "swish" else 1.0
        hidden = gate(a + b_w, z + b_v, activation=self.activation, beta=beta)
        fitted = self.means + self.of_w * a + self.of_v * z + self.both * (a * z - self.shared)
        fitted = fitted + self.twice * (z.square() - v.square().sum(1))
        return (hidden - fitted) @ p.t()
