"""Quantities of the bilinear tensor B_oij = sum_h P_oh 1/2 (W_hi V_hj + W_hj V_hi) (docs/math.md 2; [P] 3.1).

Everything is formed in full, so these are for small sizes. With a `basis` [d, F], indices and results refer to its
features. The result types are named here too, because pickles of earlier versions look for them here.
"""

from bilinear_ops.reference.interaction.entries import active_interactions, interaction_diagonal, interaction_entries
from bilinear_ops.reference.interaction.forms import eigen_form, quadratic_form
from bilinear_ops.reference.interaction.gram import layer_inner, neuron_gram
from bilinear_ops.reference.interaction.matrices import (
    interaction_matrices,
    iter_interaction_matrices,
    pack_symmetric,
    unpack_symmetric,
)
from bilinear_ops.reference.interaction.ranking import interaction_moments, interaction_topk
from bilinear_ops.results import ActiveInteractions, Directions, InteractionMoments, TopInteractions

__all__ = [
    "ActiveInteractions",
    "Directions",
    "InteractionMoments",
    "TopInteractions",
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
