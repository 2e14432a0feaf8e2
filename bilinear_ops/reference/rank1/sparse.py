"""Rank-1 subcomponents of which few are active for each token ([SPD])."""

from __future__ import annotations

from torch import Tensor


def rank1_sparse(
    x: Tensor,
    read: Tensor,
    write: Tensor,
    indices: Tensor,
    gates: Tensor,
    bias: Tensor | None = None,
    *,
    acts: Tensor | None = None,
) -> Tensor:
    """sum_j g_j (x . r_i(j)) l_i(j) + bias over each token's k active subcomponents: -> [..., d_out]."""
    if acts is None:
        acts = (x[..., None, :] @ read.mT[indices].mT).squeeze(-2)  # [..., k]
    acts = (acts * gates).to(x.dtype)
    y = (acts[..., None, :] @ write[indices]).squeeze(-2)
    return y if bias is None else y + bias
