"""What the papers do with the bilinear tensor: pure functions over the package's ops."""

from bilinear_ops.analysis.measures import adversarial_masks, effective_rank, hoyer
from bilinear_ops.analysis.spectra import EigenPairs, interaction_eigh

__all__ = ["EigenPairs", "adversarial_masks", "effective_rank", "hoyer", "interaction_eigh"]
