"""Accumulated weights against the sum written out."""

import pytest
import torch

import bilinear_ops as bo
from bilinear_ops import testing
from bilinear_ops.testing import randn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MANY_SIZES = (*DTYPES[:2], pytest.param(DTYPES[2], marks=pytest.mark.slow))  # bfloat16 stands for both that round
IMPLS = ("torch", "triton")


def decomposition(d_out, d_in, c, dtype=torch.float32):
    return [randn(d_out, d_in, dtype=dtype), randn(d_in, c, dtype=dtype), randn(c, d_out, dtype=dtype)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("base", (False, True))
@pytest.mark.parametrize("lead", ((), (1,), (3,), (2, 3), (40,), (5, 8), (0,)))
def test_accumulate(lead, base, dtype):
    """Both orders of contraction: few rows of gates, and more rows than d_in."""
    gates, read, write = torch.rand(*lead, 17).to(dtype), randn(30, 17, dtype=dtype), randn(17, 23, dtype=dtype)
    tensors = [gates, read, write] + ([randn(23, 30, dtype=dtype)] if base else [])
    dy = randn(*lead, 23, 30, dtype=dtype)

    def accumulate(module):
        return lambda g, r, w, b=None: module.rank1_accumulate(g, r, w, base=b)

    def definition(g, r, w, b=None):
        pieces = torch.einsum("...c,coi->...oi", g, w[:, :, None] * r.t()[:, None, :])
        return pieces if b is None else pieces + b

    ours = testing.gradients(accumulate(bo), tensors, dy)
    # the two orders round their gradients differently, so each is held to eager code in its own
    eager = testing.gradients(definition if gates[..., 0].numel() > 30 else accumulate(bo.reference), tensors, dy)
    gold = testing.gradients(accumulate(bo.reference), [t.double() for t in tensors], dy.double())
    assert ours[0].is_contiguous()
    for what, *results in zip(("weights", "dgates", "dread", "dwrite", "dbase"), ours, eager, gold, strict=False):
        testing.assert_no_worse(*results, what=what)


def test_accumulate_by_hand():
    gates, read, write = torch.rand(2, 3).double(), randn(5, 3).double(), randn(3, 4).double()
    expected = torch.einsum("bc,ic,co->boi", gates, read, write)
    torch.testing.assert_close(bo.rank1_accumulate(gates, read, write), expected)
    torch.testing.assert_close(bo.reference.rank1_accumulate(gates, read, write), expected)
