"""Gate networks: one small MLP for each subcomponent, of its own activation ([SPD])."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def component_gates(acts: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """sum_j w2_cj gelu(acts_c w1_cj + b1_cj) + b2_c: acts [..., C], w1, b1, w2 [C, H], b2 [C] -> [..., C]."""
    return (w2 * F.gelu(acts[..., None] * w1 + b1)).sum(-1) + b2
