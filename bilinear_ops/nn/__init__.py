"""`torch.nn` modules over the ops."""

from bilinear_ops.nn.gated import GatedBilinear, GatedMLP
from bilinear_ops.nn.rank1 import Rank1Embedding, Rank1Linear

__all__ = ["GatedBilinear", "GatedMLP", "Rank1Embedding", "Rank1Linear"]
