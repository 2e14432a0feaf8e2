"""What the papers do with the bilinear tensor: pure functions over the package's ops.

[P] is Pearce et al., "Bilinear MLPs enable weight-based mechanistic interpretability" (arXiv 2410.08417); [B] and [A]
are the "Brain dump on parameter decompositions, transcoders" post and its appendix; formulas are in docs/math.md.
"""

from bilinear_ops.analysis.cp import CPDecomposition, cp_decompose
from bilinear_ops.analysis.directions import (
    EvenOdd,
    StrongestDirections,
    even_odd_split,
    glu_gates,
    strength,
    strongest_directions,
)
from bilinear_ops.analysis.layers import (
    BiasTerms,
    Reexpression,
    VirtualLayer,
    augment_biases,
    bias_terms,
    layer_similarity,
    reexpress,
    virtual_interactions,
)
from bilinear_ops.analysis.measures import adversarial_masks, effective_rank, hoyer
from bilinear_ops.analysis.singular import HOSVD, hosvd
from bilinear_ops.analysis.spectra import EigenPairs, interaction_eigh
from bilinear_ops.analysis.truncation import (
    QuadraticLayer,
    TruncationCorrelation,
    truncate,
    truncation_correlation,
    truncation_curve,
)

__all__ = [
    "HOSVD",
    "BiasTerms",
    "CPDecomposition",
    "EigenPairs",
    "EvenOdd",
    "QuadraticLayer",
    "Reexpression",
    "StrongestDirections",
    "TruncationCorrelation",
    "VirtualLayer",
    "adversarial_masks",
    "augment_biases",
    "bias_terms",
    "cp_decompose",
    "effective_rank",
    "even_odd_split",
    "glu_gates",
    "hosvd",
    "hoyer",
    "interaction_eigh",
    "layer_similarity",
    "reexpress",
    "strength",
    "strongest_directions",
    "truncate",
    "truncation_correlation",
    "truncation_curve",
    "virtual_interactions",
]
