"""Layers with biases: biases folded into the weights, and the interaction, linear and constant parts of a layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bilinear_ops import _op
from bilinear_ops._check import check
from bilinear_ops.nn import GatedMLP
from bilinear_ops.results import Layer, Result


class BiasTerms(
    Result,
    NamedTuple(
        "BiasTerms",
        [
            ("interaction", Layer),
            ("linear", Tensor),  # [o, d]
            ("constant", Tensor),  # [o]
        ],
    ),
):
    """y = gated_mlp(x, *interaction) + x linear^T + constant."""

    __slots__ = ()


def augment_biases(
    w: Tensor,
    v: Tensor,
    p: Tensor,
    b_w: Tensor | None = None,
    b_v: Tensor | None = None,
    b_p: Tensor | None = None,
) -> Layer:
    """Fold biases into the weights: the layer returned equals the biased layer when applied to [x, 1] ([P] App. J).

    b_w and b_v become a last column of w and of v, which is exact for every activation. b_p becomes the output vector
    of an additional neuron, whose hidden value is act(1): exact for identity and relu only.

    Args:
        w, v, p: `[h, d]`, `[h, d]` and `[o, h]`.
        b_w, b_v, b_p: `[h]`, `[h]` and `[o]`; None where there is no bias.

    Returns:
        (w, v, p) of shapes `[h, d + 1]`, `[h, d + 1]` and `[o, h]`; with b_p, h is one larger. Differentiable.

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


def layer_weights(module: GatedMLP) -> Layer:
    """The (w, v, p) to which the analysis of a bilinear module applies, with its biases folded in (`augment_biases`).

    With biases the layer is that of [x, 1]: w, v, eigenvectors and interaction matrices have a last entry for the
    constant input. A feature basis D `[d, F]` gets one more feature for it, `torch.block_diag(D, torch.ones(1, 1))`.
    An embedding E `[vocabulary, d]` is folded in likewise, as the basis `torch.block_diag(E.t(), torch.ones(1, 1))`,
    whose last feature is the bias, present at every token.

    Args:
        module: `nn.GatedMLP` without an activation.

    Returns:
        (w, v, p): the module's parameters themselves if it has no biases. Differentiable.

    Raises:
        TypeError: not a GatedMLP.
        ValueError: an activation: such a layer is no quadratic form, and analysis of its weights alone would ignore the
            activation. swish at beta 0 is bilinear: call `bilinearise_()` first.
    """
    if not isinstance(module, GatedMLP):
        kind = type(module).__name__
        raise TypeError(f"module must be a GatedMLP, got {kind}: for a model of transformers see gated_weights")
    if module.limit is not None or module.offset is not None:
        raise ValueError("module must have no limit and no offset to be a quadratic form")
    if module.activation != "identity":
        raise ValueError(f"module must have no activation to be a quadratic form, got {module.activation!r}")
    biases = module.b_w, module.b_v, module.b_p
    weights = module.w, module.v, module.p
    return weights if all(b is None for b in biases) else augment_biases(*weights, *biases)


@_op.without_autocast
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
        b_w, b_v, b_p: `[h]`, `[h]` and `[o]`; None where there is no bias.

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
    check(w=(w, "h d"), v=(v, "h d"), p=(p, "o h"), b_w=(b_w, "? h"), b_v=(b_v, "? h"), b_p=(b_p, "? o"))
