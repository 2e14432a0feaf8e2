"""Rank-1 subcomponents of which few are active for each token: public function, op and backward (docs/math.md 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from bilinear_ops import _impl, _op, reference
from bilinear_ops._check import check, check_beside
from bilinear_ops._sharding import sharded
from bilinear_ops.composite.rank1 import sparse as composite


@sharded("... o", over="... o", x="... i", read="i c", write="c o", indices="... k", gates="... k", bias="o")
def rank1_sparse(
    x: Tensor,
    read: Tensor,
    write: Tensor,
    indices: Tensor,
    gates: Tensor,
    bias: Tensor | None = None,
    *,
    acts: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """sum_j g_j (x . r_i(j)) l_i(j) + bias over the k active subcomponents of each token ([SPD]).

    Args:
        x: `[..., d_in]` inputs.
        read, write: `[d_in, C]` and `[C, d_out]` subcomponents. A read stored by columns, as the transpose of a
            contiguous `[C, d_in]` tensor, saves a copy.
        indices: int64 or int32 `[..., k]`, the active subcomponents; one named twice counts twice.
        gates: `[..., k]` in any floating dtype, used in float32 or better.
        bias: `[d_out]`.
        acts: `[..., k]`, x . r_i(j) where the caller has it already; gradients then go through it.
        impl: "auto", "triton" or "torch".

    Returns:
        `[..., d_out]`, contiguous, in x's dtype.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices, or impl="triton" where it cannot run.
        TypeError: an argument that is not a floating-point tensor, indices that are not an integer tensor.
        IndexError: indices outside [0, C); on other devices than the CPU an asynchronous assertion.
        ValueError: unknown impl.
    """
    x, read, write, bias, acts = _op.autocast(x, read, write, bias, acts)
    check(x=(x, "... i"), read=(read, "i c"), write=(write, "c o"), bias=(bias, "? o"), acts=(acts, "? ... k"))
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int64, torch.int32):
        got = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"indices must be an int64 or int32 tensor, got {got}")
    k = indices.shape[-1] if indices.dim() else 0
    for name, t in (("indices", indices), ("gates", gates), ("acts", acts)):
        if isinstance(t, Tensor) and t.shape != (*x.shape[:-1], k):
            raise RuntimeError(f"{name} must have shape {[*x.shape[:-1], k]}, got {list(t.shape)}")
    if gates is None:
        raise TypeError("gates must be a torch.Tensor, got NoneType")
    check_beside(x, gates=(gates, tuple(indices.shape)))
    if indices.device != x.device:
        raise RuntimeError(f"indices must be on the device of x, {x.device}, got {indices.device}")
    impl = _impl.resolve(impl, x)
    if _impl.needs_reference():
        return reference.rank1_sparse(x, read, write, indices, gates, bias, acts=acts)
    tokens = x.shape[:-1].numel()
    if acts is not None:  # what the result does not depend on gets no gradient
        x, read, acts = x.detach(), read.detach(), acts.reshape(tokens, k)
    y, _ = sparse_op(
        x.reshape(tokens, x.shape[-1]), read, write, gates.reshape(tokens, k), bias, acts,
        indices.reshape(tokens, k).long().contiguous(), impl,
    )  # fmt: skip
    return y.view(*x.shape[:-1], write.shape[1])


def launchers():
    """The kernels of this family, imported at the first launch."""
    from bilinear_ops.kernels.rank1 import sparse

    return sparse


def _forward(
    x: Tensor,
    read: Tensor,
    write: Tensor,
    gates: Tensor,
    bias: Tensor | None,
    acts: Tensor | None,
    indices: Tensor,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """y [M, d_out] and the activations [M, k] of the active subcomponents, empty where the caller gave them."""
    _check_range(indices, read.shape[1])
    path = composite if impl == "torch" else launchers()
    dots = path.sparse_dots(x, read.t(), indices) if acts is None else acts
    y = path.sparse_sums((dots * gates).to(x.dtype), write, indices)
    return y if bias is None else y.add_(bias), _op.or_empty(dots if acts is None else None, x)


def _check_range(indices: Tensor, count: int) -> None:
    if indices.numel() == 0:
        return
    low, high = indices.aminmax()
    if indices.device.type == "cpu":
        if low < 0 or high >= count:
            raise IndexError(f"indices must lie in [0, {count}), got {int(low)} to {int(high)}")
    else:
        torch._assert_async((low >= 0) & (high < count))


def _forward_fake(x, read, write, gates, bias, acts, indices, impl):
    return x.new_empty(x.shape[0], write.shape[1]), x.new_empty(indices.shape if acts is None else 0)


def _backward(
    dy: Tensor,
    kept: Tensor,
    x: Tensor,
    read: Tensor,
    write: Tensor,
    gates: Tensor,
    bias: Tensor | None,
    acts: Tensor | None,
    indices: Tensor,
    need: list[bool],
    impl: str,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, read (a transposed [C, d_in]), write, gates, bias and acts, each None unless needed."""
    need_x, need_read, need_write, need_gates, need_bias, need_acts = need
    path = composite if impl == "torch" else launchers()
    acts = kept if acts is None else acts
    dx = dread = dwrite = dgates = dacts = None
    dy = dy.contiguous()
    if need_x or need_read or need_gates or need_acts:
        dots = path.sparse_dots(dy, write, indices)  # [M, k]
        wide = torch.promote_types(gates.dtype, torch.float32)
        if need_gates:
            dgates = (dots.to(wide) * acts).to(gates.dtype)
        dacts = (dots * gates).to(x.dtype)
        if need_x:
            dx = path.sparse_sums(dacts, read.t().contiguous(), indices)
        if need_read:
            dread = composite.sparse_outer(dacts, x, indices, read.shape[1]).t()
    if need_write:
        dwrite = composite.sparse_outer((acts * gates).to(x.dtype), dy, indices, read.shape[1])
    return dx, dread, dwrite, dgates, dy.sum(0) if need_bias else None, dacts if need_acts else None


def _backward_fake(dy, kept, x, read, write, gates, bias, acts, indices, need, impl):
    need_x, need_read, need_write, need_gates, need_bias, need_acts = need
    return (
        x.new_empty(x.shape if need_x else 0),
        x.new_empty(read.shape[::-1]).t() if need_read else x.new_empty(0),
        x.new_empty(write.shape if need_write else 0),
        gates.new_empty(gates.shape) if need_gates else x.new_empty(0),
        x.new_empty(dy.shape[1] if need_bias else 0),
        x.new_empty(indices.shape if need_acts else 0),
    )


def _formula(
    x: Tensor, read: Tensor, write: Tensor, gates: Tensor, bias: Tensor | None, acts: Tensor | None, *, indices: Tensor
) -> Tensor:
    return reference.rank1_sparse(x, read, write, indices, gates, bias, acts=acts)


sparse_op, sparse_backward_op = _op.differentiable(
    "rank1_sparse(Tensor x, Tensor read, Tensor write, Tensor gates, Tensor? bias, Tensor? acts, Tensor indices, "
    "str impl) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    _backward,
    _formula,
    backward_fake=_backward_fake,
)
