"""`torch.nn` modules over the ops."""

from bilinear_ops.nn.adversary import AdversarialSource, FrequencyPenalty
from bilinear_ops.nn.annealing import anneal_beta, bilinearise_, swish_
from bilinear_ops.nn.gated import GatedBilinear, GatedMLP
from bilinear_ops.nn.gates import Gates, Importances
from bilinear_ops.nn.mixed import MixedWeights
from bilinear_ops.nn.rank1 import Rank1Embedding, Rank1Linear
from bilinear_ops.nn.routed import route, routed_gated_mlp
from bilinear_ops.nn.transcoder import Transcoder
from bilinear_ops.results import Activations

__all__ = [
    "Activations",
    "AdversarialSource",
    "FrequencyPenalty",
    "GatedBilinear",
    "GatedMLP",
    "Gates",
    "Importances",
    "MixedWeights",
    "Rank1Embedding",
    "Rank1Linear",
    "Transcoder",
    "anneal_beta",
    "bilinearise_",
    "route",
    "routed_gated_mlp",
    "swish_",
]
