"""Weights summed from gated rank-1 subcomponents."""

from __future__ import annotations

from torch import Tensor


def rank1_accumulate(gates: Tensor, read: Tensor, write: Tensor, *, base: Tensor | None = None) -> Tensor:
    """base + sum_c g_c l_c r_c^T: gates [..., C] -> [..., d_out, d_in]."""
    pieces = (gates[..., None, :] * write.mT).to(write.dtype) @ read.mT
    return pieces if base is None else base + pieces
