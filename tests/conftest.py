"""The suite runs on any machine: kernels are interpreted unless the GPU tests are asked for."""

import os
import sys

if "gpu" not in sys.argv:  # as in `pytest -m gpu`
    os.environ["TRITON_INTERPRET"] = "1"
# a backward traced before a change of our ops' schemas would be replayed
os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"

import pytest
import torch

import bilinear_ops.gated

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _ops_even_where_eager_is_faster(monkeypatch):
    """The tests' layers are small: without this most would compare eager PyTorch with itself."""
    monkeypatch.setattr(bilinear_ops.gated, "SMALL_ON_CPU", -1)


@pytest.fixture(autouse=True)
def _deterministic():
    """Fixed numbers, and NaN in every fresh `torch.empty`, so that what is not written shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
