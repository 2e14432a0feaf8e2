"""Measures of concentration at known vectors, and masks against the identity."""

import pytest
import torch

from bilinear_ops import analysis
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


def test_loss_added():
    """Of a softmax over two classes whose losses are known: log 2 for equal logits, log(1 + e^-x) at distance x."""
    right = torch.tensor([[2.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    targets = torch.tensor([0, 1])
    clean, zeroed, wrong = (torch.log1p(torch.tensor(-x).double().exp()) for x in (2.0, 0.0, -1.0))
    close = torch.testing.assert_close
    close(analysis.loss_added(right, right, 0 * right, targets), torch.tensor(0.0).double())
    close(analysis.loss_added(right, 0 * right, 0 * right, targets), torch.tensor(1.0).double())
    close(analysis.loss_added(right, -right / 2, 0 * right, targets), (wrong - clean) / (zeroed - clean))
    assert analysis.loss_added(right, 2 * right, 0 * right, targets) < 0
    many = [t.expand(3, 2, 2) for t in (right, -right / 2, 0 * right)]
    close(analysis.loss_added(*many, targets.expand(3, 2)), (wrong - clean) / (zeroed - clean))
    half = analysis.loss_added(*(t.half() for t in many), targets.expand(3, 2))
    assert half.dtype == torch.float32
    close(half.double(), (wrong - clean) / (zeroed - clean), rtol=1e-6, atol=0)
    assert torch.autograd.gradcheck(
        lambda *t: analysis.loss_added(*t, targets),
        [t.clone().requires_grad_() for t in (right, -right / 2, 0 * right)],
    )
    assert analysis.loss_added(right[:0], right[:0], right[:0], targets[:0]).isnan()


def test_loss_added_is_checked():
    logits, targets = torch.zeros(5, 3), torch.zeros(5, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"zeroed must have shape \[5, 3\], that of logits, got \[4, 3\]"):
        analysis.loss_added(logits, logits, logits[:4], targets)
    with pytest.raises(RuntimeError, match="reconstructed must have the dtype of logits"):
        analysis.loss_added(logits, logits.double(), logits, targets)
    with pytest.raises(TypeError, match="targets must be an int64 tensor, got torch.int32"):
        analysis.loss_added(logits, logits, logits, targets.int())
    with pytest.raises(RuntimeError, match=r"targets must have shape \[5\], got \[4\]"):
        analysis.loss_added(logits, logits, logits, targets[:4])
    with pytest.raises(IndexError, match="targets must be at least 0 and below 3"):
        analysis.loss_added(logits, logits, logits, targets + 3)
    with pytest.raises(TypeError, match="logits must be a torch.Tensor"):
        analysis.loss_added([0.0], logits, logits, targets)
