"""Weights as sparse mixtures of a layer's original weights, or the original as mixtures of them ([A])."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bilinear_ops._check import check, check_sizes

DIRECTIONS = ("forward", "reverse")


class MixedWeights(nn.Module):
    """Replacement weights `[rows, d]` tied to original ones `[h, d]` by a mixing matrix E, sparse by its L1 norm ([A]).

    Args:
        original: `[h, d]`, kept frozen.
        rows: number of replacement units.
        direction: "forward", replacement = E original with E `[rows, h]`; "reverse", a free replacement, which
            original = E replacement with E `[h, rows]` is to hold for (`residual`). E starts as identities, stacked.
        slack: add a learned `[rows, d]`, 0 at first, to a "forward" mixture.
        pattern: bool of E's shape, where E may be other than 0: only these entries are stored.

    Raises ValueError for another direction or slack with "reverse", RuntimeError for a pattern of another shape.
    """

    original: Tensor
    positions: Tensor | None
    slack: Tensor | None

    def __init__(
        self,
        original: Tensor,
        rows: int,
        direction: str = "forward",
        slack: bool = False,
        *,
        pattern: Tensor | None = None,
    ):
        super().__init__()
        if direction not in DIRECTIONS:
            raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
        if slack and direction == "reverse":
            raise ValueError("slack belongs to direction='forward': a reverse replacement is free already")
        h = check(original=(original, "h d"))["h"]
        check_sizes(rows=rows)
        if h == 0:
            raise RuntimeError("original must have rows, got [0, d]")
        if pattern is not None and (not isinstance(pattern, Tensor) or pattern.dtype != torch.bool):
            raise TypeError(f"pattern must be a bool tensor, got {getattr(pattern, 'dtype', type(pattern).__name__)}")
        self.direction, self.rows = direction, rows
        self.register_buffer("original", original.detach().clone())
        copies = torch.arange(rows, device=original.device) % h
        identities = F.one_hot(copies, h).to(original.dtype)  # [rows, h]
        if direction == "reverse":
            identities = identities.t() / torch.bincount(copies, minlength=h)[:, None].clamp(min=1)
            self.replacement = nn.Parameter(self.original[copies])
        if pattern is not None and pattern.shape != identities.shape:
            raise RuntimeError(f"pattern must have shape {list(identities.shape)}, got {list(pattern.shape)}")
        self.shape = tuple(identities.shape)
        self.register_buffer("positions", None if pattern is None else pattern.nonzero().t().contiguous())
        self.entries = nn.Parameter(identities.contiguous() if pattern is None else identities[pattern])
        self.slack = nn.Parameter(torch.zeros(rows, original.shape[1]).to(original)) if slack else None

    @property
    def mixing(self) -> Tensor:
        """E, sparse where it has a pattern."""
        if self.positions is None:
            return self.entries
        return torch.sparse_coo_tensor(self.positions, self.entries, self.shape, check_invariants=False)

    @property
    def weight(self) -> Tensor:
        """The replacement weights `[rows, d]`."""
        if self.direction == "reverse":
            return self.replacement
        mixed = self._mix(self.original)
        return mixed if self.slack is None else mixed + self.slack

    def forward(self, x: Tensor) -> Tensor:
        """x replacement^T: `[..., d]` -> `[..., rows]`, mixed after the original where that is less work."""
        h, d = self.original.shape
        tokens = x.shape[:-1].numel()
        mixing = self.entries.numel()  # multiply-adds of a mixture, per column
        if self.direction == "reverse" or mixing * d + tokens * self.rows * d <= tokens * (h * d + mixing):
            return F.linear(x, self.weight)
        y = self._mix(F.linear(x, self.original).flatten(0, -2).t()).t().unflatten(0, x.shape[:-1])
        return y if self.slack is None else y + F.linear(x, self.slack)

    def residual(self) -> Tensor:
        """original - E replacement `[h, d]`, which "reverse" is to make small."""
        if self.direction != "reverse":
            raise ValueError("residual belongs to direction='reverse'")
        return self.original - self._mix(self.replacement)

    def penalty(self) -> Tensor:
        """The L1 norm of E."""
        return self.entries.abs().sum()

    def _mix(self, t: Tensor) -> Tensor:
        return self.entries @ t if self.positions is None else torch.sparse.mm(self.mixing, t)

    def extra_repr(self) -> str:
        return f"shape={list(self.shape)}, direction={self.direction!r}, slack={self.slack is not None}"
