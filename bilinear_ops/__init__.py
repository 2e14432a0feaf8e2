"""Gated bilinear layers, interaction tensors and rank-1 subcomponents: fast, exact, differentiable."""

from bilinear_ops import nn, reference
from bilinear_ops.entries import active_interactions, interaction_diagonal, interaction_entries
from bilinear_ops.forms import eigen_form, layer_inner, neuron_gram, quadratic_form
from bilinear_ops.gated import gated_bilinear, gated_mlp
from bilinear_ops.interaction import (
    interaction_matrices,
    iter_interaction_matrices,
    pack_symmetric,
    unpack_symmetric,
)
from bilinear_ops.ranking import interaction_moments, interaction_topk
from bilinear_ops.reference.interaction import ActiveInteractions, Directions, InteractionMoments, TopInteractions

__version__ = "0.1.0"

__all__ = [
    "ActiveInteractions",
    "Directions",
    "InteractionMoments",
    "TopInteractions",
    "active_interactions",
    "eigen_form",
    "gated_bilinear",
    "gated_mlp",
    "interaction_diagonal",
    "interaction_entries",
    "interaction_matrices",
    "interaction_moments",
    "interaction_topk",
    "iter_interaction_matrices",
    "layer_inner",
    "neuron_gram",
    "nn",
    "pack_symmetric",
    "quadratic_form",
    "reference",
    "unpack_symmetric",
]
