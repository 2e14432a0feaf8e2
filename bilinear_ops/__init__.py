"""Gated bilinear layers, interaction tensors and rank-1 subcomponents: fast, exact, differentiable."""

from bilinear_ops import nn, reference
from bilinear_ops.gated import gated_bilinear, gated_mlp

__version__ = "0.1.0"

__all__ = ["gated_bilinear", "gated_mlp", "nn", "reference"]
