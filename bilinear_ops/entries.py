"""Elements of interaction matrices at chosen places, without the matrices: the public functions (docs/math.md 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from bilinear_ops import _dispatch, reference
from bilinear_ops.composite import entries as composite
from bilinear_ops.interaction import check_layer
from bilinear_ops.reference.interaction import ActiveInteractions, Directions, active_indices


@_dispatch.without_autocast
def interaction_diagonal(w: Tensor, v: Tensor, c: Tensor | Directions, *, basis: Tensor | None = None) -> Tensor:
    """The self-interactions Q_k[i, i], diag(Q_k) = C (W * V), with no Q formed.

    Args:
        w, v, c: as for `interaction_matrices`.
        basis: `[d, F]` directions of features; the diagonal is then that of D^T Q_k D.

    Returns:
        `[K, d]`, or `[K, F]` in a basis.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices.
        TypeError: an argument that is not a floating-point tensor.
    """
    check_layer(w, v, c, basis)
    if _dispatch.needs_reference():
        return reference.interaction_diagonal(w, v, c, basis=basis)
    return composite.interaction_diagonal(w, v, c, basis)


@_dispatch.without_autocast
def interaction_entries(
    w: Tensor, v: Tensor, c: Tensor | Directions, k: Tensor, i: Tensor, j: Tensor, *, basis: Tensor | None = None
) -> Tensor:
    """Q_k[i, j] at index vectors, with no Q formed.

    Args:
        w, v, c, basis: as for `interaction_diagonal`.
        k, i, j: `[N]` int64 indices of outputs and of inputs (of features in a basis).

    Returns:
        `[N]`.

    Raises:
        RuntimeError, TypeError: as `interaction_diagonal`; TypeError for an index vector that is not int64.
        IndexError: an index out of range, negative ones included.
    """
    sizes = check_layer(w, v, c, basis)
    features = sizes["d"] if basis is None else sizes["F"]
    check_index("k", k, sizes["K"], (None,), w)
    check_index("i", i, features, tuple(k.shape), w)
    check_index("j", j, features, tuple(k.shape), w)
    if _dispatch.needs_reference():
        return reference.interaction_entries(w, v, c, k, i, j, basis=basis)
    return composite.interaction_entries(w, v, c, k, i, j, basis)


@_dispatch.without_autocast
def active_interactions(
    w: Tensor,
    v: Tensor,
    c: Tensor | Directions,
    basis: Tensor,
    in_indices: Tensor,
    in_acts: Tensor,
    out_indices: Tensor,
) -> ActiveInteractions:
    """What each pair of a token's active input features contributes to each of its active outputs ([P] 3.1, 5).

    The contribution of a pair is act_i act_j times 2 Q_k[i, j], or Q_k[i, i] for i = j, with Q_k in the feature basis.
    Over the pairs of one output they add up to x^T Q_k x at x = sum_i act_i basis_i.

    Args:
        w, v, c: as for `interaction_matrices`.
        basis: `[d, F]` decoder directions of the input features.
        in_indices, in_acts: `[T, a]` active features of each token, int64, and their activations.
        out_indices: `[T, b]` active outputs of each token, int64.

    Returns:
        `ActiveInteractions(values, token, k, i, j)`, each `[T, b, a(a+1)/2]`, i <= j. The indices are broadcast views.

    Raises:
        RuntimeError, TypeError: as `interaction_diagonal`; TypeError for indices that are not int64.
        IndexError: an index out of range.
    """
    sizes = check_layer(w, v, c, basis)
    _dispatch.check(w=(w, "h d"), in_acts=(in_acts, "T a"))
    check_index("in_indices", in_indices, sizes["F"], tuple(in_acts.shape), w)
    check_index("out_indices", out_indices, sizes["K"], (in_acts.shape[0], None), w)
    if _dispatch.needs_reference():
        return reference.active_interactions(w, v, c, basis, in_indices, in_acts, out_indices)
    values = composite.active_interactions(w, v, c, basis, in_indices, in_acts, out_indices)
    return ActiveInteractions(values, *active_indices(in_indices, out_indices))


def check_index(name: str, index: Tensor, limit: int, shape: tuple[int | None, ...], like: Tensor) -> None:
    """Check an index tensor's dtype, device, shape (None is any size) and, where its values can be read, its range."""
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        got = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"{name} must be an int64 tensor, got {got}")
    if index.device != like.device:
        raise RuntimeError(f"{name} must be on the device of w, {like.device}, got {index.device}")
    if index.dim() != len(shape) or any(n not in (None, got) for n, got in zip(shape, index.shape, strict=True)):
        sizes = ", ".join("any" if n is None else str(n) for n in shape)
        raise RuntimeError(f"{name} must have shape [{sizes}], got {list(index.shape)}")
    if torch.compiler.is_compiling() or _dispatch.needs_reference() or index.device.type == "meta":
        return
    if index.numel() and (index.min() < 0 or index.max() >= limit):
        raise IndexError(f"{name} must be at least 0 and below {limit}, got {index.min()} to {index.max()}")
