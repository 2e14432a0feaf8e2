"""Gate networks: causal importances of subcomponents from a site's activations or its input."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bilinear_ops._check import check_reals, check_sizes
from bilinear_ops.rank1.gates import component_gates
from bilinear_ops.rank1.losses import lower_leaky_hard_sigmoid, upper_leaky_hard_sigmoid

KINDS = ("scalar", "vector", "shared")


class Importances(NamedTuple):
    """Causal importances: `lower` for masks, `upper` for the minimality loss, and the logits behind both."""

    lower: Tensor
    upper: Tensor
    logits: Tensor


class Gates(nn.Module):
    """Causal importances of C subcomponents, through both leaky hard sigmoids ([SPD]).

    Args:
        d_in: size of what the networks read: 0 for "scalar", which reads C activations.
        c: number of subcomponents; with "shared", of all sites together.
        hidden: hidden units of a network.
        kind: "scalar", one network for each subcomponent, of its own activation x R; "vector", one for each, of the
            site's whole input; "shared", one network for all of them, of the inputs of all sites side by side.
        alpha: slope of the leaks.
        device, dtype: of the parameters.

    Raises ValueError for another kind.
    """

    def __init__(
        self,
        d_in: int,
        c: int,
        hidden: int,
        kind: str = "scalar",
        *,
        alpha: float = 0.01,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        check_sizes(d_in=d_in, c=c, hidden=hidden)
        check_reals(alpha=alpha)
        self.kind, self.d_in, self.c, self.hidden, self.alpha = kind, d_in, c, hidden, alpha
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        units = (hidden,) if kind == "shared" else (c, hidden)
        first = {"scalar": (c, hidden), "vector": (c * hidden, d_in), "shared": (hidden, d_in)}[kind]
        self.w1 = nn.Parameter(torch.empty(first, **factory))
        self.b1 = nn.Parameter(torch.empty(units, **factory))
        self.w2 = nn.Parameter(torch.empty(c, hidden, **factory))
        self.b2 = nn.Parameter(torch.empty(c, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights normal, with the deviations of [SPD]'s code: sqrt(2 / fan in), then sqrt(1 / hidden); biases 0."""
        fan_in = 1 if self.kind == "scalar" else self.d_in
        nn.init.normal_(self.w1, std=math.sqrt(2 / max(fan_in, 1)))
        nn.init.normal_(self.w2, std=math.sqrt(1 / max(self.hidden, 1)))
        nn.init.zeros_(self.b1)
        nn.init.zeros_(self.b2)

    def forward(self, x: Tensor) -> Importances:
        """From `[..., C]` activations ("scalar") or `[..., d_in]` inputs: `Importances` of `[..., C]` each."""
        if self.kind == "scalar":
            logits = component_gates(x, self.w1, self.b1, self.w2, self.b2)
        elif self.kind == "vector":
            units = F.gelu(F.linear(x, self.w1, self.b1.flatten())).unflatten(-1, (self.c, self.hidden))
            logits = (units * self.w2).sum(-1) + self.b2
        else:
            logits = F.linear(F.gelu(F.linear(x, self.w1, self.b1)), self.w2, self.b2)
        lower, upper = lower_leaky_hard_sigmoid(logits, self.alpha), upper_leaky_hard_sigmoid(logits, self.alpha)
        return Importances(lower, upper, logits)

    def extra_repr(self) -> str:
        return f"d_in={self.d_in}, c={self.c}, hidden={self.hidden}, kind={self.kind!r}"
