"""Interaction tensors of bilinear layers: the second family of ops."""

from bilinear_ops.interaction.entries import active_interactions, interaction_diagonal, interaction_entries
from bilinear_ops.interaction.forms import eigen_form, quadratic_form
from bilinear_ops.interaction.gram import layer_inner, neuron_gram
from bilinear_ops.interaction.matrices import (
    interaction_matrices,
    iter_interaction_matrices,
    pack_symmetric,
    unpack_symmetric,
)
from bilinear_ops.interaction.ranking import interaction_moments, interaction_topk

__all__ = [
    "active_interactions",
    "eigen_form",
    "interaction_diagonal",
    "interaction_entries",
    "interaction_matrices",
    "interaction_moments",
    "interaction_topk",
    "iter_interaction_matrices",
    "layer_inner",
    "neuron_gram",
    "pack_symmetric",
    "quadratic_form",
    "unpack_symmetric",
]
