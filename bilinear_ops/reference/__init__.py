"""Eager twins of every op: same signatures less `impl`, written to be read beside the papers, not to be fast.

Sources, cited by key in docstrings throughout the package:

- [P] Pearce, Dooms, Rigg, Oramas, Sharkey, "Bilinear MLPs enable weight-based mechanistic interpretability",
  ICLR 2025, arXiv 2410.08417.
- [S] Shazeer, "GLU variants improve transformer", 2020, arXiv 2002.05202.
- [SPD] Bushnaq et al., "Stochastic Parameter Decomposition", 2025, arXiv 2506.20790.
"""

from bilinear_ops.reference.gated import gated_bilinear, gated_mlp
from bilinear_ops.reference.rank1 import (
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

__all__ = [
    "faithfulness_loss",
    "gated_bilinear",
    "gated_mlp",
    "importance_minimality",
    "lower_leaky_hard_sigmoid",
    "rank1_accumulate",
    "rank1_linear",
    "rank1_sparse",
    "stochastic_delta",
    "stochastic_mask",
    "stochastic_rank1_linear",
    "upper_leaky_hard_sigmoid",
]
