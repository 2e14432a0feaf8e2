"""The decomposition example: its parts, a reduced run of it, and that the page says what the receipt measured."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

import bilinear_ops as bo

ROOT = Path(__file__).parents[1]
MODULES = ("decompose", "decompose_findings", "decompose_known", "decompose_layer")


@pytest.fixture(scope="module")
def example():
    """The example's modules, by name."""
    sys.path.insert(0, str(ROOT / "examples"))
    yield {name: importlib.import_module(name) for name in MODULES}
    sys.path.remove(str(ROOT / "examples"))


@pytest.fixture(scope="module")
def known(example):
    return example["decompose_known"]


@pytest.fixture(scope="module")
def layer(example):
    return example["decompose_layer"]


@pytest.fixture
def original(layer):
    """A layer of random weights, its study and inputs."""
    study = layer.Study(d=6, h=8, kept=3, steps=4, every=2, batch=32)
    weights = bo.nn.GatedMLP(6, 8, activation="silu").requires_grad_(False)
    return study, layer.Target(weights, torch.randn(100, 6), torch.randn(40, 6), 1.0, 1.0)


@pytest.fixture(scope="module")
def quick(example, tmp_path_factory):
    """What --quick measures, and where it leaves it."""
    out = tmp_path_factory.mktemp("figures")
    assert example["decompose"].main(["--quick", "--out", str(out)]) == 0
    return json.loads((out / "decompose.json").read_text()), out


def test_planted_terms_come_back(quick):
    """Every term with its own component, and no more of these active than there are terms."""
    (recovery,) = quick[0]["known"]
    assert recovery["cosine"] > 0.95
    assert abs(recovery["active"] / recovery["planted"] - 1) < 0.1
    assert recovery["error"] < 0.01


def test_quick_run_compares_all_ways(example, layer, quick):
    receipt, out = quick
    assert [r["arm"] for r in receipt["runs"]] == list(layer.ARMS)
    assert all(len(r["errors"]) == 2 for r in receipt["runs"])
    text = example["decompose_findings"].text(receipt)
    assert all(f"| {name} | {32 * factor} |" in text for name, factor in layer.ARMS.items())
    assert text.count("| planted terms | 1 |") == 1 and "| yes |" in text and "nan" not in text
    assert len(list(out.glob("decompose_text_*.pt"))) == 1
    pytest.importorskip("matplotlib")
    assert (out / "decompose.png").stat().st_size > 0


def test_the_page_says_what_the_receipt_measured(example, layer, tmp_path, monkeypatch, capsys):
    decompose, findings = example["decompose"], example["decompose_findings"]
    assert decompose.main(["--check"]) == 0
    receipt = json.loads(findings.RECEIPT.read_text())
    assert receipt["study"] == json.loads(json.dumps(layer.Study()._asdict())), "a full run's"
    assert len(receipt["runs"]) == len(layer.ARMS) * len(layer.Study().seeds), "no run is dropped"
    receipt["runs"][0]["errors"][-1] += 0.05
    (tmp_path / "decompose.json").write_text(json.dumps(receipt))
    monkeypatch.setattr(findings, "RECEIPT", tmp_path / "decompose.json")
    assert decompose.main(["--check"]) == 1
    assert "differs from decompose.json" in capsys.readouterr().out


def test_runs_that_miss_the_error_are_beyond_the_budget(example):
    censored = example["decompose_findings"].censored
    runs = [{"step": step} for step in (None, 20, 50)]
    assert censored(runs, "step", 100, ".0f") == "50 (20 to > 100)"
    assert censored(runs[:1], "step", 100, ".0f") == "> 100"
    assert censored([*runs, {"step": None}, {"step": None}], "step", 100, ".0f") == "> 100 (20 to > 100)"


def test_target_is_trained_once(layer, tmp_path, monkeypatch):
    study = layer.Study(vocabulary=64, documents=20, d=16, h=8, model_steps=2, words=1024)
    first = layer.target(study, tmp_path)
    monkeypatch.delattr(layer, "_trained")
    again = layer.target(study, tmp_path)
    assert torch.equal(again.train, first.train) and torch.equal(again.layer.p, first.layer.p)
    assert len(first.train) == 1024 and len(first.test) == 64
    torch.testing.assert_close(first.layer(first.train).square().mean(), torch.tensor(1.0))


def test_arms_start_where_they_say(layer, original):
    """Copies, mixtures and routed copies near the layer, random units far from it."""
    study, target = original
    for arm in layer.ARMS:
        if arm.startswith("data"):
            continue
        model = layer.start(arm, target, study._replace(noise=0.0))
        assert model.weights()[0].shape == (8 * layer.ARMS[arm], 6)
        distance = model.distance().item()
        assert distance > 0.5 if arm.startswith("random") else distance < 1e-10


def test_gates_keep_the_largest(layer, original):
    study, target = original
    model = layer.start("own x1", target, study)
    x = target.test
    importances = model.gates(x)
    kept = importances.logits >= importances.logits.topk(3).values[:, -1:]
    expected = bo.gated_mlp(x, *model.weights(), activation="silu", mask=importances.lower * kept)
    torch.testing.assert_close(model(x), expected)
    whole = layer.start("own x1", target, study._replace(kept=8, noise=0.0))
    torch.nn.init.constant_(whole.gates.b2, 10.0)
    torch.testing.assert_close(whole(x), target.layer(x))
    assert layer.strongest(target, 8) < 1e-10 < layer.strongest(target, 3)


def test_routed_units_learn_from_words_of_their_originals(layer, original):
    study, target = original
    x = target.train[:1]
    model = layer.start("routed x2", target, study)
    w, v, _ = target.layer.w, target.layer.v, target.layer.p
    strength = bo.gated_bilinear(x, w, v, activation="silu").abs() * target.layer.p.norm(dim=0)
    chosen = torch.zeros(8).scatter(0, strength[0].topk(3).indices, 1.0).bool().repeat(2)
    found = model.loss(x, torch.randn(1, 6), 1) - model.distance()
    dw, dv, dp = torch.autograd.grad(found, model.weights())
    assert dw[~chosen].abs().max() < 1e-6 * dw.abs().max() and dv[~chosen].abs().max() < 1e-6 * dv.abs().max()
    assert (dw[chosen].abs().amax(1) > 0).all() and (dp.abs().amax(0) > 0).all()


def test_active_features_are_what_is_drawn_less_nothing(known):
    setting = known.Setting(5, 2, 10, 0.3, 1, 1e-3, 1e-3, batch=4000)
    x = known.active_features(setting)
    assert x.shape == (4000, 5) and x.any(1).all()
    assert abs((x > 0).float().mean() - 0.3 / (1 - 0.7**5)) < 0.02


def test_cosines_of_terms(known):
    """Against the terms' tensors, for products as for squares; neither scale nor order of the factors counts."""
    a = known.Terms(torch.randn(3, 4), torch.randn(3, 4), torch.randn(2, 3))
    b = known.Terms(torch.randn(5, 4), torch.randn(5, 4), torch.randn(2, 5))

    def tensors(t):
        q = torch.einsum("oh,hi,hj->hoij", t.p, t.w, t.v)
        return (q + q.mT).flatten(1)

    expected = torch.cosine_similarity(tensors(a)[:, None], tensors(b)[None], dim=-1)
    torch.testing.assert_close(known.term_cosines(a, b), expected)
    torch.testing.assert_close(known.term_cosines(a, known.Terms(2 * a.v, a.w, -a.p)).diagonal(), -torch.ones(3))
