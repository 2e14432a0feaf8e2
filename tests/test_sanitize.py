"""What compute-sanitizer is given launches every kernel there is, and its absence or verdict is said."""

import subprocess

import pytest
import torch

pytest.importorskip("triton")

from bench.static import sanitize, smallest
from bilinear_ops.kernels import gated
from bilinear_ops.kernels.interaction import matrices, ranking
from bilinear_ops.kernels.rank1 import accumulate, gates, losses, masked, masks, sparse

KERNELS = {
    (module, name)
    for module in (accumulate, gated, gates, losses, masked, masks, matrices, ranking, sparse)
    for name in vars(module)
    if name.endswith("_kernel") and name != "interaction_moments_kernel"  # the cases are steps, and moments have none
}


@pytest.mark.ci
def test_every_kernel_is_launched(monkeypatch):
    launched = set()
    for module, name in KERNELS:

        class Recorded:
            def __init__(self, key, kernel):
                self.key, self.kernel = key, kernel

            def __getitem__(self, grid):
                launched.add(self.key)
                return self.kernel[grid]

        monkeypatch.setattr(module, name, Recorded((module, name), getattr(module, name)))
    assert len(sanitize.launch_all(torch.device("cpu"), " float16")) > 15  # one of the three dtypes
    sanitize.launch_all(torch.device("cpu"), "stochastic_mask")
    assert launched == KERNELS and len(KERNELS) == 18


def test_cases_are_called_by_the_shapes_of_their_gates_or_sources():
    found = [w for w in smallest.workloads(torch.device("cpu")) if w.op == "stochastic_rank1_linear"]
    for w in found:
        _, _, _, gates, *others = w.inputs(0)
        varied = others[0] if w.case.startswith("source") else gates
        assert w.case.partition(", ")[2] == ("full" if varied.dim() > 1 else "broadcast")
    assert len({w.case for w in found}) == 6


def test_without_the_tool_or_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: None)
    assert sanitize.main([]) == 2
    assert "compute-sanitizer is not on the PATH" in capsys.readouterr().err
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sanitize.main([]) == 2
    assert "needs a GPU" in capsys.readouterr().err


@pytest.mark.parametrize(("status", "verdict"), ((0, "nothing found"), (86, "failed: racecheck")))
def test_verdict(status, verdict, monkeypatch, capsys):
    ran = []

    def run(words, **options):
        ran.append(words)
        return subprocess.CompletedProcess(words, status if "racecheck" in words else 0)

    monkeypatch.setattr(sanitize.shutil, "which", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert sanitize.main(["--tool", "memcheck", "racecheck"], run) == bool(status)
    assert verdict in capsys.readouterr().out and [words[2] for words in ran] == ["memcheck", "racecheck"]
    assert all("--child" in words and words[0] == "compute-sanitizer" for words in ran)
