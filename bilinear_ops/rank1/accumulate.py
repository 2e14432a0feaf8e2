"""Weights summed from gated rank-1 subcomponents: public function, op and backward (docs/math.md 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from bilinear_ops import _impl, _op, reference
from bilinear_ops._check import check, check_beside
from bilinear_ops._sharding import sharded
from bilinear_ops.composite.rank1 import accumulate as composite


@sharded("... o i", over="... c o i", once=("base",), gates="... c", read="i c", write="c o", base="... o i")
@_op.without_autocast
def rank1_accumulate(
    gates: Tensor, read: Tensor, write: Tensor, *, base: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """base + sum_c g_c l_c r_c^T, one weight for every row of gates ([SPD]).

    Backward keeps the arguments alone. On a GPU, "auto" takes the kernels, which hold nothing of `[..., C, d]`, where
    by a model the library's workspace would cost more time than its faster product saves; nothing was measured.

    Args:
        gates: `[..., C]` in any floating dtype.
        read, write: `[d_in, C]` and `[C, d_out]` subcomponents.
        base: broadcasts to `[..., d_out, d_in]`.
        impl: "auto", "triton" or "torch".

    Returns:
        `[..., d_out, d_in]`, contiguous, in read's dtype; half precision is summed in float32.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices, or impl="triton" where it cannot run.
        TypeError: an argument that is not a floating-point tensor.
        ValueError: unknown impl.
    """
    sizes = check(read=(read, "i c"), write=(write, "c o"))
    d_in, d_out, c = sizes["i"], sizes["o"], sizes["c"]
    if not isinstance(gates, Tensor):
        raise TypeError(f"gates must be a torch.Tensor, got {type(gates).__name__}")
    lead = gates.shape[:-1]
    if gates.dim() == 0 or gates.shape[-1] != c:
        raise RuntimeError(f"gates must have shape [..., {c}], got {list(gates.shape)}")
    check_beside(read, gates=(gates, (*lead, c)), base=(base, (*lead, d_out, d_in)))
    if base is not None and base.dtype != read.dtype:
        raise RuntimeError(f"base must have the dtype of read, {read.dtype}, got {base.dtype}")
    impl = _impl.resolve(impl, read)
    if _impl.needs_reference():
        return reference.rank1_accumulate(gates, read, write, base=base)
    rows = gates.reshape(lead.numel(), c)
    return accumulate_op(rows, read, write, _flat_base(base, lead), impl).view(*lead, d_out, d_in)


def _flat_base(base: Tensor | None, lead: torch.Size) -> Tensor | None:
    """The base with its leading dimensions flattened: [rows or 1, d_out or 1, d_in or 1]."""
    if base is None:
        return None
    base = base.reshape((1,) * (len(lead) + 2 - base.dim()) + tuple(base.shape))
    if any(n != 1 for n in base.shape[:-2]):
        base = base.expand(*lead, -1, -1)
    return base.reshape(base.shape[:-2].numel(), *base.shape[-2:])


def launchers():
    """The kernels of this family, imported at the first launch."""
    from bilinear_ops.kernels.rank1 import accumulate

    return accumulate


def _forward(gates: Tensor, read: Tensor, write: Tensor, base: Tensor | None, impl: str) -> Tensor:
    if impl == "torch":
        return composite.rank1_accumulate(gates, read, write, base)
    return launchers().rank1_accumulate(gates, read, write, base, library=impl == "auto")


def _forward_fake(gates, read, write, base, impl):
    return read.new_empty(gates.shape[0], write.shape[1], read.shape[0])


def _backward(
    dweights: Tensor, gates: Tensor, read: Tensor, write: Tensor, base: Tensor | None, need: list[bool], impl: str
) -> tuple[Tensor | None, ...]:
    """Gradients of gates, read, write and base, each None unless needed."""
    *need_factors, need_base = need
    if impl == "torch":
        found = composite.rank1_accumulate_backward(dweights, gates, read, write, need_factors)
    else:
        backward = launchers().rank1_accumulate_backward
        found = backward(dweights, gates, read, write, need_factors, library=impl == "auto")
    return *found, _sum_to(dweights, base) if need_base and base is not None else None


def _sum_to(dweights: Tensor, base: Tensor) -> Tensor:
    """The sum over what the base was repeated along, in memory of its own."""
    repeated = [dim for dim, n in enumerate(base.shape) if n == 1]
    summed = dweights.sum(repeated, keepdim=True) if repeated else dweights.clone()
    return summed.contiguous()


def _formula(gates: Tensor, read: Tensor, write: Tensor, base: Tensor | None) -> Tensor:
    return reference.rank1_accumulate(gates, read, write, base=base)


accumulate_op, accumulate_backward_op = _op.differentiable(
    "rank1_accumulate(Tensor gates, Tensor read, Tensor write, Tensor? base, str impl) -> Tensor",
    _forward,
    _forward_fake,
    _backward,
    _formula,
)
