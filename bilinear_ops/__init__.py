"""Gated bilinear layers, interaction tensors and rank-1 subcomponents: fast, exact, differentiable."""

from bilinear_ops import reference
from bilinear_ops.gated import gated_bilinear, gated_mlp
from bilinear_ops.masks import stochastic_delta, stochastic_mask
from bilinear_ops.rank1 import rank1_linear, stochastic_rank1_linear

__version__ = "0.1.0"

__all__ = [
    "gated_bilinear",
    "gated_mlp",
    "rank1_linear",
    "reference",
    "stochastic_delta",
    "stochastic_mask",
    "stochastic_rank1_linear",
]
