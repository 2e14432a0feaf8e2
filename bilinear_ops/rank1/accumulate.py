"""Weights summed from gated rank-1 subcomponents: the public function (docs/math.md 3)."""

from __future__ import annotations

from torch import Tensor

from bilinear_ops import _op
from bilinear_ops._check import check, check_beside
from bilinear_ops._sharding import sharded


@sharded("... o i", over="... c o i", once=("base",), gates="... c", read="i c", write="c o", base="... o i")
@_op.without_autocast
def rank1_accumulate(gates: Tensor, read: Tensor, write: Tensor, *, base: Tensor | None = None) -> Tensor:
    """base + sum_c g_c l_c r_c^T, one weight for every row of gates.

    Library calls alone, so it takes no `impl`: of the two orders of contraction, both one large GEMM, the one with the
    smaller workspace.

    Args:
        gates: `[..., C]` in any floating dtype.
        read, write: `[d_in, C]` and `[C, d_out]` subcomponents.
        base: broadcasts to `[..., d_out, d_in]`.

    Returns:
        `[..., d_out, d_in]`, contiguous, in read's dtype.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices.
        TypeError: an argument that is not a floating-point tensor.
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
    if lead.numel() > d_in:
        pieces = (write[:, :, None] * read.t()[:, None, :]).flatten(1)  # [C, d_out d_in]
        weights = gates.reshape(lead.numel(), c).to(read.dtype) @ pieces
    else:
        weights = (gates[..., None, :] * write.t()).to(read.dtype) @ read.t()
    weights = weights.view(*lead, d_out, d_in)
    return weights if base is None else weights + base
