"""Quadratic and eigenvector forms: the public functions and the op of chosen pairs (docs/math.md 2)."""

from __future__ import annotations

from torch import Tensor

from bilinear_ops import _impl, _op, reference
from bilinear_ops._check import check, check_index
from bilinear_ops._sharding import sharded
from bilinear_ops.composite.interaction import forms as composite
from bilinear_ops.results import REDUCTIONS


@sharded("... K", over="... K", x="... d", q="K")
@_op.without_autocast
def quadratic_form(x: Tensor, q: Tensor) -> Tensor:
    """x^T Q_k x for every matrix: the response of direction k of a bilinear layer to x ([P] eq. 2).

    Args:
        x: `[..., d]`.
        q: `[K, d, d]`, or packed `[K, d(d+1)/2]`.

    Returns:
        `[..., K]`.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices; a packed length that is not d(d+1)/2.
        TypeError: an argument that is not a floating-point tensor.
    """
    packed = isinstance(q, Tensor) and q.dim() == 2
    sizes = check(x=(x, "... d"), q=(q, "K n" if packed else "K d d"))
    length = sizes["d"] * (sizes["d"] + 1) // 2
    if packed and sizes["n"] != length:
        raise RuntimeError(f"q must have shape [K, {length}] for d={sizes['d']}, got {list(q.shape)}")
    if _impl.needs_reference():
        return reference.quadratic_form(x, q)
    rows = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_empty(x.shape[:-1].numel(), 0)
    return composite.quadratic_form(rows, q).view(*x.shape[:-1], q.shape[0])


@_op.without_autocast
def eigen_form(
    x: Tensor,
    values: Tensor,
    vectors: Tensor,
    *,
    pairs: tuple[Tensor, Tensor] | None = None,
    reduce: str = "sum",
) -> Tensor:
    """sum_i values[k, i] (vectors[k, i] . x)^2, the quadratic form of eigenpairs ([P] eq. 3).

    Args:
        x: `[..., d]`; `[M, d]` with `pairs`.
        values, vectors: `[K, r]` and `[K, r, d]`; eigenvectors are rows: of `torch.linalg.eigh` pass `vectors.mT`.
        pairs: `(t, k)`, int64 `[N]` each: only these rows of x with these outputs.
        reduce: "sum" over i; "cumsum" for all truncations at once; "none" for each eigenvector's term.

    Returns:
        `[..., K]`, or `[N]` with `pairs`; for "cumsum" and "none" with a last dimension r.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices.
        TypeError: an argument that is not a floating-point tensor, or indices that are not int64.
        IndexError: an index out of range.
        ValueError: unknown reduce.
    """
    if pairs is None:
        return _eigen_form(x, values, vectors, reduce)
    if not isinstance(pairs, tuple | list) or len(pairs) != 2:
        raise TypeError(f"pairs must be two int64 tensors (t, k), got {type(pairs).__name__}")
    return _eigen_pairs(x, values, vectors, *pairs, reduce)


@sharded("... K", over="... K", x="... d", values="K r", vectors="K r d")
def _eigen_form(x: Tensor, values: Tensor, vectors: Tensor, reduce: str) -> Tensor:
    check(x=(x, "... d"), values=(values, "K r"), vectors=(vectors, "K r d"))
    _check_reduce(reduce)
    if _impl.needs_reference():
        return reference.eigen_form(x, values, vectors, reduce=reduce)
    rows = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_empty(x.shape[:-1].numel(), 0)
    return (
        composite.eigen_form(rows, values, vectors, reduce)
        .unflatten(0, x.shape[:-1] or (1,))
        .view(*x.shape[:-1], *values.shape[: 1 if reduce == "sum" else 2])
    )


@sharded("N", over="N", x="M d", values="K r", vectors="K r d", t="N", k="N")
def _eigen_pairs(x: Tensor, values: Tensor, vectors: Tensor, t: Tensor, k: Tensor, reduce: str) -> Tensor:
    sizes = check(x=(x, "M d"), values=(values, "K r"), vectors=(vectors, "K r d"))
    _check_reduce(reduce)
    check_index("k", k, sizes["K"], (None,), x)
    check_index("t", t, sizes["M"], tuple(k.shape), x)
    if _impl.needs_reference():
        return reference.eigen_form(x, values, vectors, pairs=(t, k), reduce=reduce)
    return eigen_pairs_op(x, values, vectors, t, k, reduce)


def _check_reduce(reduce: str) -> None:
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce must be one of {', '.join(REDUCTIONS)}, got {reduce!r}")


def _pairs_fake(x, values, vectors, t, k, reduce):
    return x.new_empty(k.shape[0], *([] if reduce == "sum" else [values.shape[1]]))


def _pairs_formula(x: Tensor, values: Tensor, vectors: Tensor, *, t: Tensor, k: Tensor, reduce: str) -> Tensor:
    return reference.eigen_form(x, values, vectors, pairs=(t, k), reduce=reduce)


eigen_pairs_op, eigen_pairs_backward_op = _op.differentiable(
    "eigen_pairs(Tensor x, Tensor values, Tensor vectors, Tensor t, Tensor k, str reduce) -> Tensor",
    composite.eigen_pairs,
    _pairs_fake,
    composite.eigen_pairs_backward,
    _pairs_formula,
)
