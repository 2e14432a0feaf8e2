"""Inner products of neurons and of layers: the public functions (docs/math.md 2)."""

from __future__ import annotations

from torch import Tensor

from bilinear_ops import _impl, _op, reference
from bilinear_ops._check import check
from bilinear_ops._sharding import sharded
from bilinear_ops.composite.interaction import gram as composite


@sharded("h h2", over="h2", w="h d", v="h d", w2="h2 d", v2="h2 d")
@_op.without_autocast
def neuron_gram(w: Tensor, v: Tensor, w2: Tensor | None = None, v2: Tensor | None = None) -> Tensor:
    """Frobenius inner products of the neurons' symmetric matrices sym(w_h v_h^T), from inner products of their rows.

    Args:
        w, v: `[h, d]` up-projections.
        w2, v2: `[h2, d]` those of another layer; the same one where both are None.

    Returns:
        `[h, h2]`; of one layer with itself bitwise equal to its transpose.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices.
        TypeError: an argument that is not a floating-point tensor, or only one of w2 and v2.
    """
    if (w2 is None) != (v2 is None):
        raise TypeError(f"{'w2' if w2 is None else 'v2'} must be given with {'v2' if w2 is None else 'w2'}, got None")
    check(w=(w, "h d"), v=(v, "h d"), w2=(w2, "? h2 d"), v2=(v2, "? h2 d"))
    if _impl.needs_reference():
        return reference.neuron_gram(w, v, w2, v2)
    return composite.neuron_gram(w, v, w2, v2)


@sharded("", over="h1 h2 o", w1="h1 d", v1="h1 d", p1="o h1", w2="h2 d", v2="h2 d", p2="o h2")
@_op.without_autocast
def layer_inner(w1: Tensor, v1: Tensor, p1: Tensor, w2: Tensor, v2: Tensor, p2: Tensor) -> Tensor:
    """The inner product <B1, B2> of two layers' bilinear tensors, with no [h1, h2] array in memory.

    Args:
        w1, v1, p1: `[h1, d]`, `[h1, d]` and `[o, h1]`, the first layer.
        w2, v2, p2: `[h2, d]`, `[h2, d]` and `[o, h2]`, the second.

    Returns:
        a 0-dim tensor.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices.
        TypeError: an argument that is not a floating-point tensor.
    """
    check(w1=(w1, "h1 d"), v1=(v1, "h1 d"), p1=(p1, "o h1"), w2=(w2, "h2 d"), v2=(v2, "h2 d"), p2=(p2, "o h2"))
    if _impl.needs_reference():
        return reference.layer_inner(w1, v1, p1, w2, v2, p2)
    return composite.layer_inner(w1, v1, p1, w2, v2, p2)
