"""What the papers do with the bilinear tensor: pure functions over the package's ops."""

from bilinear_ops.analysis.measures import adversarial_masks, effective_rank, hoyer
from bilinear_ops.analysis.spectra import EigenPairs, interaction_eigh
from bilinear_ops.analysis.truncation import (
    QuadraticLayer,
    TruncationCorrelation,
    truncate,
    truncation_correlation,
    truncation_curve,
)

__all__ = [
    "EigenPairs",
    "QuadraticLayer",
    "TruncationCorrelation",
    "adversarial_masks",
    "effective_rank",
    "hoyer",
    "interaction_eigh",
    "truncate",
    "truncation_correlation",
    "truncation_curve",
]
