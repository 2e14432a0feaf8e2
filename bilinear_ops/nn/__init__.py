"""`torch.nn` modules over the ops."""

from bilinear_ops.nn.adversary import AdversarialSource, FrequencyPenalty
from bilinear_ops.nn.gated import GatedBilinear, GatedMLP
from bilinear_ops.nn.gates import Gates, Importances
from bilinear_ops.nn.rank1 import Rank1Embedding, Rank1Linear

__all__ = [
    "AdversarialSource",
    "FrequencyPenalty",
    "GatedBilinear",
    "GatedMLP",
    "Gates",
    "Importances",
    "Rank1Embedding",
    "Rank1Linear",
]
