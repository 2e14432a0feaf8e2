"""Sparse stand-ins for a layer, from its input to its output."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bilinear_ops._check import check_reals, check_sizes
from bilinear_ops.rank1.sparse import rank1_sparse

KINDS = ("topk", "jumprelu")


class Transcoder(nn.Module):
    """f(x read + b_read) write + b_write, of which few of the C features are active for a token.

    Args:
        d_in, d_out: sizes of inputs and outputs.
        c: number of features.
        kind: "topk", the k largest features after a ReLU, gathered; "jumprelu", those above a learned threshold.
        k: number of features that "topk" keeps.
        bandwidth: of the straight-through estimate by which "jumprelu" learns its thresholds.
        device, dtype: of the parameters.

    Raises ValueError for another kind.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        c: int,
        *,
        kind: str = "topk",
        k: int = 32,
        bandwidth: float = 1e-3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        check_sizes(d_in=d_in, d_out=d_out, c=c, k=k)
        check_reals(bandwidth=bandwidth)
        self.kind, self.k, self.bandwidth = kind, min(k, c), bandwidth
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.read = nn.Parameter(torch.empty(d_in, c, **factory))
        self.write = nn.Parameter(torch.empty(c, d_out, **factory))
        self.b_read = nn.Parameter(torch.zeros(c, **factory))
        self.b_write = nn.Parameter(torch.zeros(d_out, **factory))
        self.log_threshold = nn.Parameter(torch.full((c,), math.log(1e-3), **factory)) if kind == "jumprelu" else None
        for t in (self.read, self.write):
            nn.init.normal_(t, std=1 / math.sqrt(max(t.shape[0], 1)))

    def features(self, x: Tensor) -> Tensor:
        """`[..., C]` features after ReLU or JumpReLU, before the k largest are chosen."""
        acts = F.relu(x @ self.read + self.b_read)
        if self.log_threshold is None:
            return acts
        threshold = self.log_threshold.exp()
        return _JumpReLU.apply(acts, threshold, self.bandwidth)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., d_in]` -> `[..., d_out]`."""
        acts = self.features(x)
        if self.kind == "jumprelu":
            return acts @ self.write + self.b_write
        top = acts.topk(self.k, sorted=False)
        ones = torch.ones_like(top.values)
        return rank1_sparse(x, self.read, self.write, top.indices, ones, self.b_write, acts=top.values)

    def extra_repr(self) -> str:
        (d_in, c), d_out = self.read.shape, self.write.shape[1]
        return f"d_in={d_in}, d_out={d_out}, c={c}, kind={self.kind!r}"


class _JumpReLU(torch.autograd.Function):
    """acts where above the threshold, else 0; in the threshold the gradient of a step smoothed over the bandwidth."""

    @staticmethod
    def forward(ctx: Any, acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(acts, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(acts > threshold, acts, 0)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        acts, threshold = ctx.saved_tensors
        near = (acts - threshold).abs() < ctx.bandwidth / 2
        dthreshold = torch.where(near, dy * (-threshold / ctx.bandwidth), 0).flatten(0, -2).sum(0)
        return torch.where(acts > threshold, dy, 0), dthreshold, None
