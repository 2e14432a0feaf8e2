"""The decomposition example: its parts, a reduced run of it, and that the page says what the receipt measured."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

import bilinear_ops as bo

ROOT = Path(__file__).parents[1]
MODULES = ("decompose", "decompose_findings", "decompose_known", "decompose_layer", "decompose_pairs", "decompose_toys")


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
def pairs(example):
    return example["decompose_pairs"]


@pytest.fixture(scope="module")
def toys(example):
    return example["decompose_toys"]


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


@pytest.mark.ci
def test_planted_terms_come_back(quick):
    """Every term with its own component, and no more of these active than there are terms."""
    (recovery,) = quick[0]["known"]
    assert recovery["cosine"] > 0.95
    assert abs(recovery["active"] / recovery["planted"] - 1) < 0.1
    assert recovery["error"] < 0.01


@pytest.mark.ci
def test_quick_run_compares_all_ways(example, layer, quick):
    receipt, out = quick
    assert [r["way"] for r in receipt["runs"]] == list(layer.WAYS)
    assert all(len(r["errors"]) == 2 for r in receipt["runs"])
    text = example["decompose_findings"].text(receipt)
    assert all(f"| {name} | {32 * factor} |" in text for name, factor in layer.WAYS.items())
    assert text.count("| planted terms | 1 |") == 1 and "| yes |" in text and "nan" not in text
    assert len(list(out.glob("decompose_text_*.pt"))) == 1
    pytest.importorskip("matplotlib")
    assert (out / "decompose.png").stat().st_size > 0


def test_the_page_says_what_the_receipt_measured(example, layer, tmp_path, monkeypatch, capsys):
    decompose, findings = example["decompose"], example["decompose_findings"]
    assert decompose.main(["--check"]) == 0
    receipt = json.loads(findings.RECEIPT.read_text())
    assert receipt["study"] == json.loads(json.dumps(layer.Study()._asdict())), "a full run's"
    assert len(receipt["runs"]) == len(layer.WAYS) * len(layer.Study().seeds), "no run is dropped"
    known = [(r["target"], r["seed"]) for r in receipt["known"]]
    assert sorted(known) == sorted((n, s) for n in example["decompose_known"].STUDIES for s in decompose.SEEDS)
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


def test_ways_start_where_they_say(layer, original):
    """Copies, mixtures and routed copies near the layer, random units far from it."""
    study, target = original
    for way in layer.WAYS:
        if way.startswith("data"):
            continue
        model = layer.start(way, target, study._replace(noise=0.0))
        assert model.weights()[0].shape == (8 * layer.WAYS[way], 6)
        distance = model.distance().item()
        assert distance > 0.5 if way.startswith("random") else distance < 1e-10


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
    for gradient in (dw, dv, dp.t()):
        assert gradient[~chosen].abs().max() < 1e-6 * gradient.abs().max()
        assert (gradient[chosen].abs().amax(1) > 0).all()


def test_routing_leaves_outputs_and_other_gradients(layer, original):
    """Where every word is routed to every unit, the routed form is the stochastic layer with its gradients."""
    study, target = original
    model = layer.start("routed x2", target, study._replace(kept=8))
    x, seed = target.train, torch.tensor(3)
    w, v, p = model.weights()
    gates = model.gates(x).lower
    found = model._routed(x, gates, seed)
    expected = bo.stochastic_gated_mlp(x, w, v, p, gates, activation="silu", seed=seed)
    torch.testing.assert_close(found, expected)
    of_found, of_expected = (
        torch.autograd.grad(y.square().sum(), (w, v, p, gates), retain_graph=True) for y in (found, expected)
    )
    torch.testing.assert_close(of_found, of_expected)


def test_active_features_are_what_is_drawn_less_nothing(toys):
    setting = toys.Setting(5, 2, 10, 0.3, 1, 1e-3, 1e-3)
    x = toys.active_features(setting, 4000)
    assert x.shape == (4000, 5) and x.any(1).all() and x.min() == 0
    assert abs((x > 0).float().mean() - 0.3 / (1 - 0.7**5)) < 0.02
    assert toys.active_features(setting, 100, low=-1.0).min() < -0.5


@pytest.fixture
def by_hand(pairs, toys):
    """A toy model of 4 features in as many dimensions, and the decomposition that gives each a component."""
    w = torch.linalg.qr(torch.randn(4, 4))[0]
    pair = pairs.Pair(w, lambda hidden: hidden, w.t(), -0.1 * torch.ones(4), lambda y, x: torch.relu(y))
    found = pairs.Decomposition(pair, 4, 2).requires_grad_(False)
    found.inward.read.copy_(torch.eye(4))
    found.inward.write.copy_(w.t())
    found.outward.read.copy_(w)
    found.outward.write.copy_(torch.eye(4))
    for gates in found.gates:  # logit 100 act - 10: open above 0.1
        gates.w1.copy_(torch.tensor([200.0, 0.0]))
        gates.b1.zero_()
        gates.w2.fill_(0.5)
        gates.b2.fill_(-10.0)
    return found


def test_recovery_of_a_decomposition_by_hand(by_hand, toys):
    """Features with a component each come back whole; without error where gates are open or the output is 0."""
    setting = toys.Setting(4, 4, 4, 0.3, 1, 1e-3, 1e-3)
    features = torch.eye(4)
    inward = toys.cosines(features, by_hand.inward.read.t()) * toys.cosines(
        by_hand.pair.first.t(), by_hand.inward.write
    )
    drawn = toys.sparse_features(setting, 500)
    drawn[drawn < 0.2] = 0
    found = toys.recovery(by_hand, features, [inward], drawn)
    assert found.cosine == pytest.approx(1) and found.active == found.planted == 1 and found.error < 1e-10
    half = [0.5 * inward, inward]
    assert toys.recovery(by_hand, features, half, drawn).cosine == pytest.approx(0.75)
    by_hand.gates[0].b2[:2] = 100.0
    assert toys.recovery(by_hand, features, [inward], drawn).active == 2.5, "two gates open for all, two for their own"
    by_hand.inward.write[0] *= 0.5
    assert toys.recovery(by_hand, features, [inward], drawn).error > 0.01


def test_reconstruction_of_a_decomposition_by_hand(by_hand, toys):
    """Nothing is lost where all gates are 1 and the components are the layers, whatever delta is drawn."""
    x = torch.rand(50, 4)
    ones, zeros = torch.ones(50, 4), torch.zeros(50, 4)
    assert by_hand.faithfulness() < 1e-12
    assert by_hand.reconstruction(x, ones, ones, 1) < 1e-10
    assert by_hand.reconstruction(x, zeros, ones, 1) > 0.01 and by_hand.reconstruction(x, ones, zeros, 1) > 0.01


def test_rising_gates_begin_open_on_positive_activations_alone(by_hand, pairs):
    found = pairs.Decomposition(by_hand.pair, 8, 4, rising=True)
    acts = torch.tensor([-2.0, -0.5, 0.5, 2.0])[:, None].expand(4, 8)
    for gates in found.gates:
        lower = gates(acts).lower
        assert (lower[:2] < 0.1).all() and (lower[2:] > 0).all()
        assert (lower[3] >= lower[2]).all()


def test_the_attempt_of_least_loss_is_kept(pairs, monkeypatch):
    attempts = iter([("a", 3.0), ("b", 1.0), ("c", 2.0)])
    monkeypatch.setattr(pairs, "_attempt", lambda *_: next(attempts))
    assert pairs.decompose("toy", None, pairs.Setting(5, 2, 4, 0.1, 1, 1e-3, 1e-3, attempts=3), None) == "b"


def test_the_best_of_several_models_is_kept(toys):
    """Models of which one starts at the answer, another far from it."""
    start = torch.tensor([[5.0], [1.0], [-3.0]])
    (found,) = toys.least([start], lambda: (start - 1).square().mean(1), 1e-3, 2)
    torch.testing.assert_close(found, torch.ones(1), atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", ["toy", "residual"])
def test_models_are_decomposed_in_a_few_steps(toys, monkeypatch, kind):
    least = toys.least
    monkeypatch.setattr(toys, "least", lambda *options: least(*options[:3], 20))
    setting = toys.Setting(6, 3, 12, 0.1, 3, 1e-2, 1e-3, batch=32)
    found = getattr(toys, f"decompose_{kind}")("a model", setting, 1)
    assert found.planted == 1 and 0 <= found.active <= 12 and 0 < found.cosine < 1 and 0 < found.error < 10


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
