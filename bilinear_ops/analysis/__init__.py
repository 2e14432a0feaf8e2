"""What the papers do with the bilinear tensor: pure functions over the package's ops."""

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
from bilinear_ops.analysis.singular import HOSVD, hosvd

__all__ = [
    "HOSVD",
    "BiasTerms",
    "CPDecomposition",
    "EvenOdd",
    "Reexpression",
    "StrongestDirections",
    "VirtualLayer",
    "augment_biases",
    "bias_terms",
    "cp_decompose",
    "even_odd_split",
    "glu_gates",
    "hosvd",
    "layer_similarity",
    "reexpress",
    "strength",
    "strongest_directions",
    "virtual_interactions",
]
