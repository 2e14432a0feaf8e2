"""Gated bilinear layers, interaction tensors and rank-1 subcomponents: fast, exact, differentiable."""

from bilinear_ops import nn, reference
from bilinear_ops.accumulate import rank1_accumulate
from bilinear_ops.gated import gated_bilinear, gated_mlp
from bilinear_ops.losses import (
    faithfulness_loss,
    importance_minimality,
    lower_leaky_hard_sigmoid,
    upper_leaky_hard_sigmoid,
)
from bilinear_ops.masks import stochastic_delta, stochastic_mask
from bilinear_ops.rank1 import rank1_linear, stochastic_rank1_linear
from bilinear_ops.sparse import rank1_sparse

__version__ = "0.1.0"

__all__ = [
    "faithfulness_loss",
    "gated_bilinear",
    "gated_mlp",
    "importance_minimality",
    "lower_leaky_hard_sigmoid",
    "nn",
    "rank1_accumulate",
    "rank1_linear",
    "rank1_sparse",
    "reference",
    "stochastic_delta",
    "stochastic_mask",
    "stochastic_rank1_linear",
    "upper_leaky_hard_sigmoid",
]
