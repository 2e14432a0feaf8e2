"""Similarity of two bilinear layers, from their weights ([P] 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from bilinear_ops._check import check
from bilinear_ops.analysis.bases import fold
from bilinear_ops.analysis.progress import progress_bar
from bilinear_ops.interaction.gram import layer_inner

MEASURES = ("frobenius", "gaussian")
Affine = tuple[Tensor | None, Tensor | None]


def layer_similarity(
    w1: Tensor,
    v1: Tensor,
    p1: Tensor,
    w2: Tensor,
    v2: Tensor,
    p2: Tensor,
    *,
    measure: str = "frobenius",
    affine1: Affine = (None, None),
    affine2: Affine = (None, None),
    basis: Tensor | None = None,
    progress: bool = False,
) -> Tensor:
    """The cosine similarity of two bilinear layers, 1 for equal functions; no third-order tensor is formed.

    Computed in float64.

    Args:
        w1, v1, p1: `[h1, d]`, `[h1, d]` and `[o, h1]`, the first layer.
        w2, v2, p2: `[h2, d]`, `[h2, d]` and `[o, h2]`, the second.
        measure: "frobenius" compares the tensors B1 and B2; "gaussian" compares the outputs on standard normal inputs,
            by E[y1 . y2] = sum_o 2 <Q1, Q2> + (tr Q1 + c1)(tr Q2 + c2) + <l1, l2>.
        affine1, affine2: for "gaussian", the linear part l `[o, d]` and the constant c `[o]` that each layer has beside
            its quadratic form; None where there is none. `bias_terms(...)[1:]` gives those of biases; a residual adds
            the identity to l.
        basis: D `[d, F]`: compares the layers as functions of features f, with x = D f; for "gaussian" f is standard
            normal. Layers with bases of their own: fold these into the weights, as `w1 @ D1`.
        progress: show a progress bar over the three inner products; needs tqdm.

    Returns:
        A 0-dim tensor in w1's dtype, float32 for half precision; NaN if a layer is zero.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices.
        TypeError: an argument that is not a floating-point tensor.
        ValueError: unknown measure, or an affine part for "frobenius".
        ModuleNotFoundError: progress without tqdm.
    """
    for name, pair in (("affine1", affine1), ("affine2", affine2)):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"{name} must be (linear, constant), got {type(pair).__name__}")
    (l1, c1), (l2, c2) = affine1, affine2
    check(
        w1=(w1, "h1 d"), v1=(v1, "h1 d"), p1=(p1, "o h1"), w2=(w2, "h2 d"), v2=(v2, "h2 d"), p2=(p2, "o h2"),
        **{"affine1[0]": (l1, "? o d"), "affine1[1]": (c1, "? o")},
        **{"affine2[0]": (l2, "? o d"), "affine2[1]": (c2, "? o")}, basis=(basis, "? d F"),
    )  # fmt: skip
    if measure not in MEASURES:
        raise ValueError(f"measure must be one of {', '.join(MEASURES)}, got {measure!r}")
    if measure == "frobenius" and not all(t is None for t in (l1, c1, l2, c2)):
        raise ValueError('an affine part needs measure="gaussian": "frobenius" compares the quadratic forms only')
    dtype = torch.promote_types(w1.dtype, torch.float32)
    linear = [t.double() for t in (l1, l2) if t is not None]
    wide = None if basis is None else basis.double()
    _, (w1, v1, w2, v2, *linear) = fold(wide, w1.double(), v1.double(), w2.double(), v2.double(), *linear)
    l1, l2 = (None if t is None else linear.pop(0) for t in (l1, l2))
    first, second = (w1, v1, p1.double()), (w2, v2, p2.double())
    found = []
    with progress_bar(3, "inner product", progress) as advance:
        one, two = (first, l1, c1), (second, l2, c2)
        for (a, la, ca), (b, lb, cb) in ((one, two), (one, one), (two, two)):
            inner = layer_inner(*a, *b)
            if measure == "gaussian":
                inner = 2 * inner + _mean(*a, ca) @ _mean(*b, cb)
                inner = inner if la is None or lb is None else inner + (la * lb).sum()
            found.append(inner)
            advance(1)
    between, of_first, of_second = found
    return (between / (of_first.sqrt() * of_second.sqrt())).to(dtype)


def _mean(w: Tensor, v: Tensor, p: Tensor, constant: Tensor | None) -> Tensor:
    """The mean output [o] at standard normal inputs, tr Q + c."""
    traces = p @ (w * v).sum(1)
    return traces if constant is None else traces + constant.double()
