"""The SwiGLU example: its figures against their definitions, a quick run, and the page against its receipt."""

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
def swiglu():
    sys.path.insert(0, str(ROOT / "examples"))
    yield importlib.import_module("swiglu")
    sys.path.remove(str(ROOT / "examples"))


@pytest.fixture(scope="module")
def data(swiglu):
    return swiglu.load_digits()


@pytest.fixture(scope="module")
def network(swiglu, data):
    return swiglu.train(data, swiglu.QUICK, 0)


@pytest.mark.ci
def test_a_trained_swiglu_is_read(swiglu, data, network):
    found = swiglu.measure(network, data)
    kept = torch.tensor(found["kept"])
    assert 0 < len(kept) <= swiglu.DIRECTIONS and kept.shape[1] == len(swiglu.RADII)
    assert (kept >= 0.5 - 1e-5).all()
    assert found["accuracy"] > 0.8 and 0.1 < found["accuracy of the quadratic"] <= found["accuracy"] + 0.05
    assert 0.3 < found["explained"] < 1 and found["explained on images"] < 1
    w, v, p = network.layer.w, network.layer.v, network.layer.p
    x = torch.nn.functional.normalize(torch.randn(5000, w.shape[1]), dim=1) * found["length"]
    drawn = bo.gated_mlp(x, w, v, p, activation="silu").norm(dim=1).max() / found["length"] ** 2
    bilinear = bo.analysis.strongest_directions(w, v, p, 1).strengths[0]
    assert found["gated over bilinear"] * bilinear >= drawn


def test_the_page_says_what_its_receipt_measured(swiglu, monkeypatch, tmp_path):
    assert swiglu.main(["--check"]) == 0
    receipt = json.loads(swiglu.RECEIPT.read_text())
    assert receipt["scale"] == {**swiglu.FULL._asdict(), "seeds": list(swiglu.FULL.seeds)}
    assert all(k >= 0.5 - 1e-5 for run in receipt["runs"] for row in run["kept"] for k in row)
    receipt["runs"][0]["accuracy"] -= 0.1
    changed = tmp_path / "swiglu.json"
    changed.write_text(json.dumps(receipt))
    monkeypatch.setattr(swiglu, "RECEIPT", changed)
    assert swiglu.main(["--check"]) == 1


def test_a_quick_run_writes_a_receipt(swiglu, tmp_path, capsys):
    assert swiglu.main(["--quick", "--out", str(tmp_path)]) == 0
    receipt = json.loads((tmp_path / "swiglu.json").read_text())
    assert swiglu.text(receipt).splitlines()[0] in capsys.readouterr().out
