"""Small layers and their interaction matrices formed in full, for the tests of entries and rankings."""

import torch

import bilinear_ops as bo
from bilinear_ops.testing import randn

SIZES = [(1, 1, 1, None), (1, 1, 1, 3), (3, 5, 7, None), (3, 5, 7, 4), (2, 3, 17, 12), (60, 4, 3, 6), (7, 17, 2, 65)]


def layer(K, d, h, F=None, dtype=torch.float64, factors=False):
    """w, v, coefficients and a basis."""
    c = bo.Directions(randn(K, 2, dtype=dtype), randn(2, h, dtype=dtype)) if factors else randn(K, h, dtype=dtype)
    basis = None if F is None else randn(d, F, dtype=dtype)
    return randn(h, d, dtype=dtype), randn(h, d, dtype=dtype), c, basis


def in_full(w, v, c, basis):
    """Q in the feature basis, from the third-order tensor [h, F, F]."""
    if basis is not None:
        w, v = w @ basis, v @ basis
    b = torch.einsum("hi,hj->hij", w, v)
    return torch.einsum("kh,hij->kij", c.u @ c.p if isinstance(c, bo.Directions) else c, (b + b.mT) / 2)


def close(got, expected, rtol=1e-11):
    torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol)
