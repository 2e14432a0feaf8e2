"""Gates that turn a bilinear layer into a gated one, and the even and odd parts of a layer ([A], [B])."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bilinear_ops import _op
from bilinear_ops._check import check, check_layer, check_reals
from bilinear_ops.interaction.matrices import interaction_matrices
from bilinear_ops.results import Directions, Result, coefficients

GATES = ("identity", "silu", "swish", "relu", "gelu", "gelu_tanh")


class EvenOdd(
    Result,
    NamedTuple(
        "EvenOdd",
        [
            ("even", Tensor),
            ("odd", Tensor),
        ],
    ),
):
    """fn(x) = even + odd; at -x the even part is the same and the odd part is negated."""

    __slots__ = ()


def glu_gates(
    x: Tensor, v: Tensor, activation: str, *, b_v: Tensor | None = None, beta: float | Tensor = 1.0
) -> Tensor:
    """The gates s(z) of act(z) = z s(z) at z = x v^T + b_v: one factor for each term p_i (x) w_i (x) v_i ([B]).

    A gated layer is the bilinear layer with the same weights and these gates on its hidden units:
    `gated_mlp(x, w, v, p, activation=act) = (glu_gates(x, v, act) * gated_bilinear(x, w, v)) p^T`.

    Args:
        x: `[..., d]`.
        v: `[h, d]`.
        activation: silu, swish, relu, gelu (erf), gelu_tanh, or identity, whose gates are 1.
        b_v: `[h]`.
        beta: slope of swish.

    Returns:
        `[..., h]`, in [0, 1], differentiable. For relu, s(0) is 1/2, so that s(z) + s(-z) = 1 holds there too.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices.
        TypeError: an argument that is not a floating-point tensor.
        ValueError: an activation without such gates (sigmoid), or an unknown one; a beta without swish.
    """
    x, v, b_v = _op.autocast(x, v, b_v)
    check(x=(x, "... d"), v=(v, "h d"), b_v=(b_v, "? h"))
    if activation not in GATES:
        raise ValueError(f"activation must be one of {', '.join(GATES)}, got {activation!r}")
    check_reals(beta=beta)
    if activation != "swish" and (isinstance(beta, Tensor) or beta != 1.0):
        raise ValueError(f"beta belongs to activation='swish', got {beta} with {activation!r}")
    z = F.linear(x, v, b_v)
    if activation == "identity":
        return torch.ones_like(z)
    if activation == "relu":
        return 0.5 * (1 + z.sign())
    if activation == "gelu":
        return torch.special.ndtr(z)
    if activation == "gelu_tanh":
        return torch.sigmoid(math.sqrt(8 / math.pi) * (z + 0.044715 * z**3))
    return torch.sigmoid(beta * z)


@_op.without_autocast
def gated_interactions(
    x: Tensor, w: Tensor, v: Tensor, c: Tensor | Directions, activation: str, *, beta: float | Tensor = 1.0
) -> Tensor:
    """The interaction matrices of a gated layer at each input: those of the bilinear layer with gated c ([B]).

    x^T Q_k(x) x is output k of the gated layer at x: exact for one input, where `best_quadratic` is nearest to all of
    them. Biases: fold them into the weights first (`augment_biases`), and append 1 to x.

    Args:
        x: `[..., d]`.
        w, v, c: `[h, d]`, `[h, d]` and `[K, h]`, or `Directions`, as for `interaction_matrices`.
        activation, beta: as for `glu_gates`.

    Returns:
        `[..., K, d, d]`, differentiable. Choose a few directions: a matrix is formed for each, at every input.

    Raises:
        RuntimeError, TypeError, ValueError: as `glu_gates`.
    """
    sizes = check_layer(w, v, c)
    check(w=(w, "h d"), x=(x, "... d"))
    gates = glu_gates(x, v, activation, beta=beta)
    terms = (gates[..., None, :] * coefficients(c)).flatten(0, -2)
    return interaction_matrices(w, v, terms).view(*x.shape[:-1], sizes["K"], sizes["d"], sizes["d"])


def respond(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """fn(x) `[..., o]` for x `[..., d]`, checked."""
    if not callable(fn):
        raise TypeError(f"fn must be callable, got {type(fn).__name__}")
    y = fn(x)
    check(**{"fn(x)": (y, "... o")})
    if y.shape[:-1] != x.shape[:-1]:
        raise RuntimeError(f"fn(x) must have shape {[*x.shape[:-1], 'o']}, got {list(y.shape)}")
    return y


def even_odd_split(fn: Callable[[Tensor], Tensor], x: Tensor) -> EvenOdd:
    """fn(x) as [fn(x) + fn(-x)] / 2 plus [fn(x) - fn(-x)] / 2.

    Theorem. Let S be a gated layer without biases whose activation is z s(z) with s(z) + s(-z) = 1: silu, swish with
    any beta, gelu in both forms, relu. Let S_bil be the bilinear layer with the same weights. Then for every x

        S(x) + S(-x) = S_bil(x),

    so the even part of S is S_bil / 2. By the triangle inequality max(|S(x)|, |S(-x)|) >= |S_bil(x)| / 2: the gated
    layer keeps at least half of the bilinear layer's response at x or at -x. [A] states this for large x.

    Proof. Neuron h adds (w.x)(v.x) s(v.x) p_h to S(x) and (w.x)(v.x) s(-v.x) p_h to S(-x).

    Args:
        fn: from `[..., d]` to `[..., o]`.
        x: `[..., d]`.

    Returns:
        `EvenOdd(even, odd)`, `[..., o]` each; differentiable.

    Raises:
        RuntimeError: x without dimensions; fn's outputs of another shape than `[..., o]`.
        TypeError: x or fn's output that is not a floating-point tensor; fn that cannot be called.
    """
    check(x=(x, "... d"))
    there, back = respond(fn, x), respond(fn, -x)
    return EvenOdd(0.5 * (there + back), 0.5 * (there - back))
