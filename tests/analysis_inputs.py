"""Small float64 layers, their tensors formed in full, and comparison, for the tests of `analysis`."""

import torch
from interaction_inputs import close

from bilinear_ops.testing import randn

__all__ = ["close", "doubles", "layer", "tensor"]


def doubles(*shapes, grad=False):
    return tuple(randn(*shape, dtype=torch.float64, requires_grad=grad) for shape in shapes)


def layer(d, h, o, **options):
    """w, v and p."""
    return doubles((h, d), (h, d), (o, h), **options)


def tensor(w, v, p):
    """B [o, d, d]."""
    b = torch.einsum("oh,hi,hj->oij", p, w, v)
    return (b + b.mT) / 2
