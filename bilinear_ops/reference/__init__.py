"""Eager twins of every op: same signatures less `impl`, written to be read beside the papers, not to be fast.

Sources, cited by key in docstrings throughout the package:

- [P] Pearce, Dooms, Rigg, Oramas, Sharkey, "Bilinear MLPs enable weight-based mechanistic interpretability",
  ICLR 2025, arXiv 2410.08417.
- [S] Shazeer, "GLU variants improve transformer", 2020, arXiv 2002.05202.
- [SPD] Bushnaq et al., "Stochastic Parameter Decomposition", 2025, arXiv 2506.20790.
- [B] "Brain dump on parameter decompositions, transcoders", a post, and [A] its appendix.
"""

from bilinear_ops.reference.gated import gate, gated_bilinear, gated_mlp
from bilinear_ops.reference.interaction import (
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
from bilinear_ops.reference.rank1 import (
    component_gates,
    faithfulness_loss,
    frequency_penalty,
    importance_minimality,
    lower_leaky_hard_sigmoid,
    pooled_faithfulness_loss,
    rank1_accumulate,
    rank1_linear,
    rank1_sparse,
    smooth_l0,
    stochastic_delta,
    stochastic_gated_mlp,
    stochastic_mask,
    stochastic_rank1_linear,
    subset_routing,
    upper_leaky_hard_sigmoid,
)

__all__ = [
    "active_interactions",
    "component_gates",
    "eigen_form",
    "faithfulness_loss",
    "frequency_penalty",
    "gate",
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
    "pack_symmetric",
    "pooled_faithfulness_loss",
    "quadratic_form",
    "rank1_accumulate",
    "rank1_linear",
    "rank1_sparse",
    "smooth_l0",
    "stochastic_delta",
    "stochastic_gated_mlp",
    "stochastic_mask",
    "stochastic_rank1_linear",
    "subset_routing",
    "unpack_symmetric",
    "upper_leaky_hard_sigmoid",
]
