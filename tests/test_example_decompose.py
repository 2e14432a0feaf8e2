"""The decomposition example runs from its command line, and planted terms come back."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def decompose():
    sys.path.insert(0, str(ROOT / "examples"))
    yield importlib.import_module("decompose")
    sys.path.remove(str(ROOT / "examples"))


def test_planted_terms_come_back(decompose):
    """What --quick runs: every term with its own component, and no more of these active than there are terms."""
    ((recovery,),) = decompose.main(["--quick"]).values()
    assert recovery.cosine > 0.95
    assert abs(recovery.active / recovery.planted - 1) < 0.1
    assert recovery.error < 0.01


def test_cosines_of_terms(decompose):
    """Against the terms' tensors, for products as for squares; neither scale nor order of the factors counts."""
    a = decompose.Terms(torch.randn(3, 4), torch.randn(3, 4), torch.randn(2, 3))
    b = decompose.Terms(torch.randn(5, 4), torch.randn(5, 4), torch.randn(2, 5))

    def tensors(t):
        q = torch.einsum("oh,hi,hj->hoij", t.p, t.w, t.v)
        return (q + q.mT).flatten(1)

    expected = torch.cosine_similarity(tensors(a)[:, None], tensors(b)[None], dim=-1)
    torch.testing.assert_close(decompose.term_cosines(a, b), expected)
    torch.testing.assert_close(
        decompose.term_cosines(a, decompose.Terms(2 * a.v, a.w, -a.p)).diagonal(), -torch.ones(3)
    )
