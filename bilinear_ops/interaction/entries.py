"""Elements of interaction matrices at chosen places, without the matrices: the public functions (docs/math.md 2)."""

from __future__ import annotations

from torch import Tensor

from bilinear_ops import _impl, _op, reference
from bilinear_ops._check import check, check_index, check_layer
from bilinear_ops._sharding import refuse_sharded, sharded
from bilinear_ops.composite.interaction import entries as composite
from bilinear_ops.results import ActiveInteractions, Directions


@sharded("K", over="K h o", w="h d", v="h d", c="K h", basis="d F")
@_op.without_autocast
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
    if _impl.needs_reference():
        return reference.interaction_diagonal(w, v, c, basis=basis)
    return composite.interaction_diagonal(w, v, c, basis)


@sharded("N", over="N h o", w="h d", v="h d", c="K h", k="N", i="N", j="N", basis="d F")
@_op.without_autocast
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
    if _impl.needs_reference():
        return reference.interaction_entries(w, v, c, k, i, j, basis=basis)
    return composite.interaction_entries(w, v, c, k, i, j, basis)


@_op.without_autocast
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
    refuse_sharded(
        "active_interactions", (w, v, c, basis, in_indices, in_acts), "there is no sharding rule; pass plain tensors"
    )
    sizes = check_layer(w, v, c, basis)
    check(w=(w, "h d"), in_acts=(in_acts, "T a"))
    check_index("in_indices", in_indices, sizes["F"], tuple(in_acts.shape), w)
    check_index("out_indices", out_indices, sizes["K"], (in_acts.shape[0], None), w)
    if _impl.needs_reference():
        return reference.active_interactions(w, v, c, basis, in_indices, in_acts, out_indices)
    return composite.active_interactions(w, v, c, basis, in_indices, in_acts, out_indices)
