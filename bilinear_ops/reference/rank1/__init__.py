"""Rank-1 subcomponents as the papers write them: plain, differentiable PyTorch (docs/math.md 3; [SPD])."""

from bilinear_ops.reference.rank1.accumulate import rank1_accumulate
from bilinear_ops.reference.rank1.gated import stochastic_gated_mlp
from bilinear_ops.reference.rank1.gates import component_gates
from bilinear_ops.reference.rank1.losses import (
    faithfulness_loss,
    frequency_penalty,
    importance_minimality,
    lower_leaky_hard_sigmoid,
    pooled_faithfulness_loss,
    smooth_l0,
    upper_leaky_hard_sigmoid,
)
from bilinear_ops.reference.rank1.masked import rank1_linear, stochastic_rank1_linear
from bilinear_ops.reference.rank1.masks import stochastic_delta, stochastic_mask, subset_routing
from bilinear_ops.reference.rank1.sparse import rank1_sparse

__all__ = [
    "component_gates",
    "faithfulness_loss",
    "frequency_penalty",
    "importance_minimality",
    "lower_leaky_hard_sigmoid",
    "pooled_faithfulness_loss",
    "rank1_accumulate",
    "rank1_linear",
    "rank1_sparse",
    "smooth_l0",
    "stochastic_delta",
    "stochastic_gated_mlp",
    "stochastic_mask",
    "stochastic_rank1_linear",
    "subset_routing",
    "upper_leaky_hard_sigmoid",
]
