"""Bilinear layers as wholes: how alike two are, composed, in other output directions, and what their biases do."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bilinear_ops import _dispatch
from bilinear_ops.composite.blocks import widen
from bilinear_ops.forms import layer_inner

MEASURES = ("frobenius", "gaussian")
OUTSIDE = 1e-6  # of |B|: what directions may miss by rounding alone

Layer = tuple[Tensor, Tensor, Tensor]  # w [h, d], v [h, d], p [o, h]


class VirtualLayer(NamedTuple):
    """The second of two layers as a function of the first one's hidden units, to be used as any bilinear layer."""

    w: Tensor  # [h2, h1], or [h2, d + h1] with the residual stream
    v: Tensor  # as w
    p: Tensor  # [o, h2]
    scale: Tensor  # [h1] or [d + h1]: the norms of what its inputs compute; Q_ij scale_i scale_j can be compared


class Reexpression(NamedTuple):
    """B = sum_k outputs_k (x) Q_k with the interaction matrices Q_k of the directions."""

    c: Tensor  # [K, h], coefficients: Q = interaction_matrices(w, v, c)
    outputs: Tensor  # [K, o], the rows that multiply them; outputs^T c = p


class BiasTerms(NamedTuple):
    """y = gated_mlp(x, *interaction) + x linear^T + constant."""

    interaction: Layer
    linear: Tensor  # [o, d]
    constant: Tensor  # [o]


def layer_similarity(
    w1: Tensor, v1: Tensor, p1: Tensor, w2: Tensor, v2: Tensor, p2: Tensor, *, measure: str = "frobenius"
) -> Tensor:
    """The cosine between two bilinear layers, computed in float64 without their tensors: 1 for equal functions.

    Args:
        w1, v1, p1: `[h1, d]`, `[h1, d]` and `[o, h1]`, the first layer.
        w2, v2, p2: `[h2, d]`, `[h2, d]` and `[o, h2]`, the second.
        measure: "frobenius" for the angle between B1 and B2; "gaussian" for that between the outputs on normal inputs,
            E[y1 . y2] = sum_o 2 <Q1, Q2> + tr Q1 tr Q2.

    Returns:
        a 0-dim tensor in w1's dtype, float32 for half precision; NaN where a layer is zero.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices.
        TypeError: an argument that is not a floating-point tensor.
        ValueError: unknown measure.
    """
    _dispatch.check(
        w1=(w1, "h1 d"), v1=(v1, "h1 d"), p1=(p1, "o h1"), w2=(w2, "h2 d"), v2=(v2, "h2 d"), p2=(p2, "o h2")
    )
    if measure not in MEASURES:
        raise ValueError(f"measure must be one of {', '.join(MEASURES)}, got {measure!r}")
    inner = layer_inner if measure == "frobenius" else _gaussian_inner
    first, second = [t.double() for t in (w1, v1, p1)], [t.double() for t in (w2, v2, p2)]
    norms = inner(*first, *first).sqrt() * inner(*second, *second).sqrt()
    return (inner(*first, *second) / norms).to(torch.promote_types(w1.dtype, torch.float32))


def _gaussian_inner(w1: Tensor, v1: Tensor, p1: Tensor, w2: Tensor, v2: Tensor, p2: Tensor) -> Tensor:
    traces1, traces2 = p1 @ (w1 * v1).sum(1), p2 @ (w2 * v2).sum(1)  # tr Q of every output
    return 2 * layer_inner(w1, v1, p1, w2, v2, p2) + traces1 @ traces2


def virtual_interactions(first: Layer, second: Layer, *, residual: bool = False) -> VirtualLayer:
    """How the second layer multiplies the first one's hidden units: its interaction matrices are P1^T Q2 P1.

    They come as a layer, so that nothing `[h1, h1]` is formed unless asked for: `interaction_topk(l.w * l.scale,
    l.v * l.scale, l.p, n)` ranks them. On the hidden units of the first layer, with any activation,
    `gated_mlp(hidden, l.w, l.v, l.p)` is `second(first(x))`; with `residual`, on `[x, hidden]`, it is
    `second(x + first(x))`. What biases do is not in it.

    Args:
        first: a tuple (w, v, p), `[h1, d]`, `[h1, d]` and `[m, h1]`.
        second: (w, v, p), `[h2, m]`, `[h2, m]` and `[o, h2]`.
        residual: whether the second layer reads the first one's input too, so that m = d.

    Returns:
        `VirtualLayer(w, v, p, scale)`, differentiable. `scale` is |sym(w_h v_h^T)| of the first layer's neurons, by
        which their arbitrary scale is undone, and 1 for inputs.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices.
        TypeError: an argument that is not a floating-point tensor.
    """
    for name, layer in (("first", first), ("second", second)):
        if not isinstance(layer, tuple | list) or len(layer) != 3:
            raise TypeError(f"{name} must be (w, v, p), got {type(layer).__name__}")
    (w1, v1, p1), (w2, v2, p2) = first, second
    m = "d" if residual else "m"
    _dispatch.check(
        **{"first.w": (w1, "h1 d"), "first.v": (v1, "h1 d"), "first.p": (p1, f"{m} h1")},
        **{"second.w": (w2, f"h2 {m}"), "second.v": (v2, f"h2 {m}"), "second.p": (p2, "o h2")},
    )
    w, v, scale = _through(w2, p1), _through(v2, p1), _neuron_norms(w1, v1)
    if residual:
        w, v, scale = torch.cat([w2, w], 1), torch.cat([v2, v], 1), torch.cat([scale.new_ones(w1.shape[1]), scale])
    return VirtualLayer(w, v, p2, scale)


@_dispatch.without_autocast
def _through(w: Tensor, p: Tensor) -> Tensor:
    return w @ p


def _neuron_norms(w: Tensor, v: Tensor) -> Tensor:
    """|sym(w_h v_h^T)| [h]; fourth powers would leave the range of float16."""
    dtype = w.dtype
    w, v = widen(w, v)
    return (0.5 * (w.square().sum(1) * v.square().sum(1) + (w * v).sum(1).square())).sqrt().to(dtype)


def reexpress(w: Tensor, v: Tensor, p: Tensor, directions: Tensor) -> Reexpression:
    """The layer through its interaction matrices along given output directions, with nothing lost ([P] App. I).

    `interaction_matrices(w, v, c)` are the directions' matrices, and B = sum_k outputs_k (x) Q_k: the rows `outputs`
    are those of the directions' pseudo-inverse. They are dual to the directions only where these are independent;
    the sum is B for more directions than outputs too.

    Args:
        w, v, p: `[h, d]`, `[h, d]` and `[o, h]`.
        directions: `[K, o]` of full rank, which must span the layer's outputs.

    Returns:
        `Reexpression(c, outputs)` in w's dtype, float32 for half precision; differentiable.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices.
        TypeError: an argument that is not a floating-point tensor.
        ValueError: directions that are not of full rank, or that some of B's outputs lie outside of.
    """
    sizes = _dispatch.check(w=(w, "h d"), v=(v, "h d"), p=(p, "o h"), directions=(directions, "K o"))
    dtype = torch.promote_types(w.dtype, torch.float32)
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


def augment_biases(
    w: Tensor,
    v: Tensor,
    p: Tensor,
    b_w: Tensor | None = None,
    b_v: Tensor | None = None,
    b_p: Tensor | None = None,
) -> Layer:
    """The layer without biases that equals the biased one on [x, 1]; its tensor holds all of it ([P] App. J).

    b_w and b_v become a last column of w and v. b_p goes through one more neuron, 1 * act(1): this neuron is right
    for the bilinear layer only, the columns for every activation.

    Args:
        w, v, p: `[h, d]`, `[h, d]` and `[o, h]`.
        b_w, b_v, b_p: `[h]`, `[h]` and `[o]`; None for none.

    Returns:
        (w, v, p), `[h, d + 1]` twice and `[o, h]`; with b_p `[h + 1, d + 1]` twice and `[o, h + 1]`. Differentiable.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices.
        TypeError: an argument that is not a floating-point tensor.
    """
    _check_biased(w, v, p, b_w, b_v, b_p)
    w, v = (torch.cat([t, (t.new_zeros(len(t)) if b is None else b)[:, None]], 1) for t, b in ((w, b_w), (v, b_v)))
    if b_p is not None:
        one = w.new_zeros(1, w.shape[1])
        one[:, -1] = 1
        w, v, p = torch.cat([w, one]), torch.cat([v, one]), torch.cat([p, b_p[:, None]], 1)
    return w, v, p


@_dispatch.without_autocast
def bias_terms(
    w: Tensor,
    v: Tensor,
    p: Tensor,
    b_w: Tensor | None = None,
    b_v: Tensor | None = None,
    b_p: Tensor | None = None,
) -> BiasTerms:
    """A biased bilinear layer as the sum of its interaction, linear and constant parts ([P] App. J).

    Args:
        w, v, p: `[h, d]`, `[h, d]` and `[o, h]`.
        b_w, b_v, b_p: `[h]`, `[h]` and `[o]`; None for none.

    Returns:
        `BiasTerms(interaction, linear, constant)`: the layer (w, v, p), P (b_v * W + b_w * V) `[o, d]`, and
        P (b_w * b_v) + b_p `[o]`. Differentiable.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices.
        TypeError: an argument that is not a floating-point tensor.
    """
    _check_biased(w, v, p, b_w, b_v, b_p)
    b_w, b_v = (p.new_zeros(p.shape[1]) if b is None else b for b in (b_w, b_v))
    linear = p @ (b_v[:, None] * w + b_w[:, None] * v)
    constant = p @ (b_w * b_v)
    return BiasTerms((w, v, p), linear, constant if b_p is None else constant + b_p)


def _check_biased(w: Tensor, v: Tensor, p: Tensor, b_w: Tensor | None, b_v: Tensor | None, b_p: Tensor | None) -> None:
    _dispatch.check(w=(w, "h d"), v=(v, "h d"), p=(p, "o h"), b_w=(b_w, "? h"), b_v=(b_v, "? h"), b_p=(b_p, "? o"))
