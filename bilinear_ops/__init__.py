"""Gated bilinear layers, interaction tensors and rank-1 subcomponents: fast, exact, differentiable."""

from bilinear_ops import analysis, nn, plots, reference
from bilinear_ops.gated import gated_bilinear, gated_mlp
from bilinear_ops.interaction import (
    active_interactions,
    eigen_form,
    interaction_diagonal,
    interaction_entries,
    interaction_matrices,
    interaction_moments,
    interaction_topk,
    iter_interaction_matrices,
    layer_inner,
    neuron_gram,
    pack_symmetric,
    quadratic_form,
    unpack_symmetric,
)
from bilinear_ops.rank1 import (
    component_gates,
    faithfulness_loss,
    importance_minimality,
    lower_leaky_hard_sigmoid,
    rank1_accumulate,
    rank1_linear,
    rank1_sparse,
    stochastic_delta,
    stochastic_mask,
    stochastic_rank1_linear,
    upper_leaky_hard_sigmoid,
)
from bilinear_ops.results import ActiveInteractions, Directions, InteractionMoments, TopInteractions
from bilinear_ops.tuning import warmup

__version__ = "0.1.0"

__all__ = [
    "ActiveInteractions",
    "Directions",
    "InteractionMoments",
    "TopInteractions",
    "active_interactions",
    "analysis",
    "component_gates",
    "eigen_form",
    "faithfulness_loss",
    "gated_bilinear",
    "gated_mlp",
    "importance_minimality",
    "interaction_diagonal",
    "interaction_entries",
    "interaction_matrices",
    "interaction_moments",
    "interaction_topk",
    "iter_interaction_matrices",
    "layer_inner",
    "lower_leaky_hard_sigmoid",
    "neuron_gram",
    "nn",
    "pack_symmetric",
    "plots",
    "quadratic_form",
    "rank1_accumulate",
    "rank1_linear",
    "rank1_sparse",
    "reference",
    "stochastic_delta",
    "stochastic_mask",
    "stochastic_rank1_linear",
    "unpack_symmetric",
    "upper_leaky_hard_sigmoid",
    "warmup",
]
