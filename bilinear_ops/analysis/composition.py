"""Composition of two bilinear layers, and a layer expressed in other output directions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bilinear_ops import _op
from bilinear_ops._check import check, check_finite
from bilinear_ops.composite.blockwise import widen
from bilinear_ops.interaction.gram import layer_inner
from bilinear_ops.results import Layer, Result

OUTSIDE = 1e-6  # share of |B| outside of the directions' span that rounding can explain


class VirtualLayer(
    Result,
    NamedTuple(
        "VirtualLayer",
        [
            ("w", Tensor),  # [h2, h1], or [h2, d + h1] with the residual stream
            ("v", Tensor),  # as w
            ("p", Tensor),  # [o, h2]
            ("scale", Tensor),  # [h1] or [d + h1]: norms of the first layer's neurons, 1 for residual inputs
        ],
    ),
):
    """The second of two layers as a bilinear layer over the hidden units of the first."""

    __slots__ = ()


class Reexpression(
    Result,
    NamedTuple(
        "Reexpression",
        [
            ("c", Tensor),  # [K, h], coefficients: Q = interaction_matrices(w, v, c)
            ("outputs", Tensor),  # [K, o], the output vector of each Q_k; outputs^T c = p
        ],
    ),
):
    """B = sum_k outputs_k (x) Q_k, where Q_k is the interaction matrix of direction k."""

    __slots__ = ()


def virtual_interactions(first: Layer, second: Layer, *, residual: bool = False) -> VirtualLayer:
    """The second layer as a bilinear layer over the hidden units of the first: interaction matrices P1^T Q2 P1.

    The result is a layer `l` in factors, and no `[h1, h1]` matrix is formed. For any activation of the first layer,
    `gated_mlp(hidden, l.w, l.v, l.p)` equals `second(first(x))`; with `residual=True`, `gated_mlp` of `[x, hidden]`
    equals `second(x + first(x))`. Biases are not included.

    The scale of a neuron is arbitrary (w can be scaled by s and p by 1 / s), so rank interactions with
    `interaction_topk(l.w * l.scale, l.v * l.scale, l.p, n)`, which does not depend on it.

    Args:
        first: a tuple (w, v, p), `[h1, d]`, `[h1, d]` and `[m, h1]`.
        second: (w, v, p), `[h2, m]`, `[h2, m]` and `[o, h2]`.
        residual: whether the second layer reads the input of the first layer as well (then m = d).

    Returns:
        `VirtualLayer(w, v, p, scale)`, differentiable. `scale` is |sym(w_h v_h^T)| for each neuron of the first
        layer, and 1 for residual inputs.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices.
        TypeError: an argument that is not a floating-point tensor.
    """
    for name, layer in (("first", first), ("second", second)):
        if not isinstance(layer, tuple | list) or len(layer) != 3:
            raise TypeError(f"{name} must be (w, v, p), got {type(layer).__name__}")
    (w1, v1, p1), (w2, v2, p2) = first, second
    m = "d" if residual else "m"
    check(
        **{"first.w": (w1, "h1 d"), "first.v": (v1, "h1 d"), "first.p": (p1, f"{m} h1")},
        **{"second.w": (w2, f"h2 {m}"), "second.v": (v2, f"h2 {m}"), "second.p": (p2, "o h2")},
    )
    w, v, scale = _through(w2, p1), _through(v2, p1), _neuron_norms(w1, v1)
    if residual:
        w, v, scale = torch.cat([w2, w], 1), torch.cat([v2, v], 1), torch.cat([scale.new_ones(w1.shape[1]), scale])
    return VirtualLayer(w, v, p2, scale)


@_op.without_autocast
def _through(w: Tensor, p: Tensor) -> Tensor:
    return w @ p


def _neuron_norms(w: Tensor, v: Tensor) -> Tensor:
    """|sym(w_h v_h^T)| [h]; fourth powers would leave the range of float16."""
    dtype = w.dtype
    w, v = widen(w, v)
    return (0.5 * (w.square().sum(1) * v.square().sum(1) + (w * v).sum(1).square())).sqrt().to(dtype)


def reexpress(w: Tensor, v: Tensor, p: Tensor, directions: Tensor) -> Reexpression:
    """Express a layer exactly by its interaction matrices along given output directions ([P] App. I).

    B = sum_k outputs_k (x) Q_k, where the Q_k are `interaction_matrices(w, v, c)` and the rows of `outputs` are the
    columns of the directions' pseudo-inverse. The sum is exact for overcomplete directions (K > o) too. The outputs are
    dual to the directions only if these are independent.

    Args:
        w, v, p: `[h, d]`, `[h, d]` and `[o, h]`.
        directions: `[K, o]` of full rank, whose span must contain the layer's outputs.

    Returns:
        `Reexpression(c, outputs)` in w's dtype, float32 for half precision; differentiable.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices.
        TypeError: an argument that is not a floating-point tensor.
        ValueError: directions that are not finite, do not have full rank, or do not span the layer's outputs.
    """
    sizes = check(w=(w, "h d"), v=(v, "h d"), p=(p, "o h"), directions=(directions, "K o"))
    dtype = torch.promote_types(w.dtype, torch.float32)
    check_finite(directions=directions)
    most = max(sizes["K"], sizes["o"])
    w, v, p, u = w.double(), v.double(), p.double(), directions.double()
    q, r = torch.linalg.qr(u if sizes["K"] >= sizes["o"] else u.t())
    needed, rank = r.shape[0], int(torch.linalg.matrix_rank(r.detach(), rtol=most * torch.finfo(dtype).eps))
    if rank < needed:
        raise ValueError(f"directions must have rank {needed} to span the outputs or be independent, got {rank}")
    inverse = torch.linalg.solve_triangular(r, q.t(), upper=True)  # of u, or of its transpose
    outputs = inverse.t() if sizes["K"] >= sizes["o"] else inverse
    c = u @ p
    rest = (p - outputs.t() @ c).detach()
    whole, missed = (layer_inner(w.detach(), v.detach(), t, w.detach(), v.detach(), t) for t in (p.detach(), rest))
    if missed > OUTSIDE**2 * whole:
        share = (missed / whole).sqrt().item()
        raise ValueError(f"directions must span the layer's outputs, but {share:.1%} of |B| lies outside of them")
    return Reexpression(c.to(dtype), outputs.to(dtype))
