"""Analysis of bilinear layers from their weights: pure functions over the package's ops.

[P] is Pearce et al., "Bilinear MLPs enable weight-based mechanistic interpretability" (arXiv 2410.08417); [B] and [A]
are the "Brain dump on parameter decompositions, transcoders" post and its appendix; formulas are in docs/math.md.
"""

import sys

from bilinear_ops.analysis.biases import BiasTerms, augment_biases, bias_terms, layer_weights
from bilinear_ops.analysis.clusters import interaction_clusters
from bilinear_ops.analysis.composition import Reexpression, VirtualLayer, reexpress, virtual_interactions
from bilinear_ops.analysis.cp import CPDecomposition, cp_decompose
from bilinear_ops.analysis.distance import layer_distance
from bilinear_ops.analysis.eigen.spectra import EigenPairs, interaction_eigh
from bilinear_ops.analysis.explanation import Explanation, explain
from bilinear_ops.analysis.gates import EvenOdd, even_odd_split, gated_interactions, glu_gates
from bilinear_ops.analysis.joint import JointDiagonalisation, joint_diagonalise
from bilinear_ops.analysis.measures import adversarial_masks, effective_rank, hoyer, loss_added
from bilinear_ops.analysis.quadratic import BestQuadratic, best_quadratic
from bilinear_ops.analysis.resumable import load_chunks, run_in_chunks
from bilinear_ops.analysis.similarity import layer_similarity
from bilinear_ops.analysis.singular import HOSVD, hosvd
from bilinear_ops.analysis.sparse import SparseDecomposition, sparse_decompose
from bilinear_ops.analysis.strongest import StrongestDirections, kept_strength, strength, strongest_directions
from bilinear_ops.analysis.truncation import (
    QuadraticLayer,
    TruncationCorrelation,
    truncate,
    truncation_correlation,
    truncation_curve,
)

__all__ = [
    "HOSVD",
    "BestQuadratic",
    "BiasTerms",
    "CPDecomposition",
    "EigenPairs",
    "EvenOdd",
    "Explanation",
    "JointDiagonalisation",
    "QuadraticLayer",
    "Reexpression",
    "SparseDecomposition",
    "StrongestDirections",
    "TruncationCorrelation",
    "VirtualLayer",
    "adversarial_masks",
    "augment_biases",
    "best_quadratic",
    "bias_terms",
    "cp_decompose",
    "effective_rank",
    "even_odd_split",
    "explain",
    "gated_interactions",
    "glu_gates",
    "hosvd",
    "hoyer",
    "interaction_clusters",
    "interaction_eigh",
    "joint_diagonalise",
    "kept_strength",
    "layer_distance",
    "layer_similarity",
    "layer_weights",
    "load_chunks",
    "loss_added",
    "reexpress",
    "run_in_chunks",
    "sparse_decompose",
    "strength",
    "strongest_directions",
    "truncate",
    "truncation_correlation",
    "truncation_curve",
    "virtual_interactions",
]

# Pickles of earlier versions name these former modules; the types are found in this one.
sys.modules.update({f"{__name__}.{former}": sys.modules[__name__] for former in ("directions", "layers", "spectra")})
