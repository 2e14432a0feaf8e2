"""Measures of concentration at known vectors, and masks against the identity."""

import pytest
import torch

from bilinear_ops.analysis import adversarial_masks, effective_rank, hoyer
from bilinear_ops.testing import randn


def test_measures():
    torch.testing.assert_close(effective_rank(torch.eye(4)), torch.ones(4))
    torch.testing.assert_close(effective_rank(-torch.ones(2, 7)), torch.full((2,), 7.0))
    torch.testing.assert_close(effective_rank(torch.tensor([3.0, -4.0])), torch.tensor(49 / 25))
    torch.testing.assert_close(hoyer(torch.eye(4)), torch.ones(4))
    torch.testing.assert_close(hoyer(torch.ones(9)), torch.tensor(0.0))
    assert effective_rank(torch.zeros(3)).isnan() and hoyer(torch.zeros(3)).isnan()
    half = torch.full((4096,), 100.0, dtype=torch.float16)  # sums and squares beyond its range
    assert effective_rank(half) == 4096
    for size in (1e25, 1e-25):  # squares beyond float32's
        assert effective_rank(torch.full((4,), size)) == 4 and hoyer(torch.full((4,), size)) == 0
    assert effective_rank(torch.ones(3, 0)).isnan().all()
    with pytest.raises(RuntimeError, match="at least 2 entries"):
        hoyer(torch.ones(3, 1))
    with pytest.raises(TypeError, match="t must be"):
        effective_rank(torch.ones(3, dtype=torch.int64))


def test_adversarial_masks():
    vectors = randn(4, 9, dtype=torch.float64)
    masks = adversarial_masks(vectors)
    torch.testing.assert_close(masks @ vectors.t(), torch.eye(4).double())
    repeated = torch.cat([vectors, vectors])  # no identity to reach: the least masks that reproduce the span
    torch.testing.assert_close(adversarial_masks(repeated).sum(0), masks.sum(0))
    assert adversarial_masks(randn(0, 9)).shape == (0, 9)
    assert adversarial_masks(randn(4, 9).bfloat16()).dtype == torch.bfloat16


def test_masks_of_what_is_not_finite():
    """NaN for that output alone, and no error of LAPACK's."""
    vectors = randn(3, 2, 5)
    expected = adversarial_masks(vectors)
    for bad in (torch.nan, torch.inf):
        broken = vectors.clone()
        broken[1, 0, 2] = bad
        found = adversarial_masks(broken)
        assert found[1].isnan().all()
        torch.testing.assert_close(found[::2], expected[::2])
