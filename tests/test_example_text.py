"""The text example: its parts, the planted circuit, a reduced run, and the page against its receipt."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

import bilinear_ops as bo

ROOT = Path(__file__).parents[1]
MODULES = (
    "text",
    "text_circuit",
    "text_claims",
    "text_corpus",
    "text_features",
    "text_findings",
    "text_model",
    "text_sae",
)
sys.path.insert(0, str(ROOT / "examples"))
text, circuit, claims, corpus, features, findings, model, sae = map(importlib.import_module, MODULES)
sys.path.remove(str(ROOT / "examples"))


def test_documents_are_held_out_whole():
    a, b = (corpus.load(128, 20) for _ in range(2))
    torch.testing.assert_close(a.train, b.train)
    end = a.words.index(corpus.END)
    assert (a.train == end).sum() == 18 and (a.test == end).sum() == 2
    assert a.test[0] == end and len(a.words) == 128
    assert max(a.train.max(), a.test.max()) < 128


def test_kneser_ney_by_hand():
    """a b a b a c of the words a, b, c, d: bigrams ab 2, ba 2, ac 1, so the discount is 1 / (1 + 2 * 2)."""
    p = corpus.KneserNey(torch.tensor([0, 1, 0, 1, 0, 2]), 4).log_p.exp()
    lower = torch.full((4,), 1 / 4)  # words seen in one context each: their discount, 3 / 3, frees everything
    torch.testing.assert_close(p[0], torch.tensor([0, 1.8, 0.8, 0]) / 3 + 0.4 / 3 * lower)
    torch.testing.assert_close(p[1], torch.tensor([1.8, 0, 0, 0]) / 2 + 0.2 / 2 * lower)
    torch.testing.assert_close(p[3], lower)  # never seen as a context
    torch.testing.assert_close(p.sum(1), torch.ones(4))


def test_model_reads_only_the_past():
    words = torch.randint(50, (2, 12))
    transformer = model.Transformer(50, 16, 32)
    changed = words.clone()
    changed[:, 7:] = 0
    with torch.no_grad():
        before, after = transformer(words), transformer(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_mean_loss_counts_every_word_of_the_passages():
    transformer = model.Transformer(50, 16, 32)
    words = torch.randint(50, (31,))
    with torch.no_grad():
        log_p = torch.cat([transformer(part) for part in words[:30].view(3, 1, 10)]).flatten(0, 1).log_softmax(1)
    expected = -log_p.gather(1, words[1:, None]).mean().item()
    assert model.mean_loss(transformer, words, 10) == pytest.approx(expected, rel=1e-5)


def test_codes_are_the_largest_products():
    y, directions = torch.randn(40, 8), torch.randn(12, 8)
    dense = sae.encode(y, directions, 3).dense(12)
    products = y @ directions.t()
    torch.testing.assert_close(dense, products.where(products >= products.topk(3).values[:, -1:], 0.0))


def test_autoencoder_finds_directions():
    torch.manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(8, 32), dim=1)
    data = (0.5 + torch.rand(1500, 1)) * features[torch.randint(8, (1500,))]
    assert sae.unexplained(sae.train(data, features=64, active=2, steps=300), data) < 0.05


def test_correlations_are_those_of_each_feature(monkeypatch):
    monkeypatch.setattr(features, "ENOUGH", 5)
    codes = sae.encode(torch.randn(60, 8), torch.randn(6, 8), 2)
    estimates = torch.randn(120)
    feature = codes.indices.flatten()
    estimates[feature == 2] = 3.0
    feature[:][feature == 4] = 5  # a feature that never acts
    found = features.correlations(codes, estimates, 6)
    for k in (0, 1, 3, 5):
        pair = torch.stack([codes.acts.flatten()[feature == k], estimates[feature == k]]).double()
        assert found[k].item() == pytest.approx(torch.corrcoef(pair)[0, 1].item(), abs=1e-10)
    assert found[2] == 0 and found[4].isnan()


@pytest.fixture
def layer():
    """A random bilinear MLP with autoencoders that are not trained, and its activations."""
    torch.manual_seed(1)
    mlp = bo.nn.GatedMLP(8, 16).requires_grad_(False)
    residual = torch.randn(400, 8)
    x = model.norm(residual)
    y = mlp(x)
    inputs, outputs = (sae.TopKSAE(8, 6, 3).requires_grad_(False) for _ in "io")
    found = features.Features(mlp, y.mean(0), inputs, outputs)
    return found, features.Activations(torch.randint(50, (400,)), torch.randint(50, (400,)), residual, x, y - y.mean(0))


def test_pairs_that_are_all_taken_explain_what_the_features_do(layer):
    """And that is the MLP on the autoencoder's reading of x, seen along an output feature's encoder."""
    found, test = layer
    everything = bo.interaction_topk(*found.layer, 21, score="pair", basis=found.basis)
    torch.testing.assert_close(features.explained(found, test, everything), features.reconstructed(found, test))


def test_activations_are_those_of_the_model():
    transformer = model.Transformer(50, 16, 32).requires_grad_(False)
    words = corpus.Corpus(torch.randint(50, (201,)), torch.randint(50, (101,)), [])
    train, test, centre = features.activations(transformer, words, context=10, words=100)
    assert train.words.shape == (100,) and test.x.shape == (100, 16)
    torch.testing.assert_close(train.y.mean(0), torch.zeros(16), atol=1e-6, rtol=0)
    logits = model.norm(test.residual + test.y + centre) @ transformer.embed.weight.t()
    torch.testing.assert_close(logits.view(10, 10, 50), transformer(test.words.view(10, 10)))
    at = (words.test.unfold(0, 10, 10)[:10] == test.words[:10]).all(1).nonzero().item() * 10
    assert torch.equal(test.following[:10], words.test[at + 1 : at + 11])


def test_loss_added_replaces_the_output(layer):
    found, test = layer
    transformer = model.Transformer(50, 8, 16).requires_grad_(False)
    transformer.mlp = found.mlp
    added = features.loss_added(transformer, found, test)

    def loss(y):
        logits = model.norm(test.residual + y) @ transformer.embed.weight.t()
        return torch.nn.functional.cross_entropy(logits, test.following)

    whole = test.y + found.centre
    clean, zeroed = loss(whole), loss(torch.zeros_like(whole))
    reconstructed = loss(found.outputs(test.y) + found.centre)
    assert added["output features"] == pytest.approx(((reconstructed - clean) / (zeroed - clean)).item(), rel=1e-3)
    exact = added[f"{features.MOST} eigenvectors of each output feature"]  # as many as there are: d is 8
    assert exact == pytest.approx(added["output features"], rel=1e-3)
    assert added["2 eigenvectors of each output feature"] != pytest.approx(exact, rel=0.05)


def test_truncated_forms_with_all_eigenvectors_are_the_forms(layer):
    """Of 8 dimensions 8 eigenvectors are all."""
    found, test = layer
    forms = features.of_directions(found.mlp, found.outputs.encoder, test)
    torch.testing.assert_close(forms.acts, test.y @ found.outputs.encoder.t())
    curves = features.truncation(forms, test, 4)
    for curve in (curves.active, curves.everywhere):
        assert len(curve) == 8 and curve[-1] == pytest.approx(1, abs=1e-4) and curve[0] < 0.95
    assert (
        curves.above
        == (
            bo.analysis.truncation_correlation(test.x, forms.pairs, *reversed(forms.acts.topk(4, dim=1))).corr[:, 1]
            > 0.75
        )
        .double()
        .mean()
    )


def test_random_matrices_are_symmetric_and_read_the_inputs():
    torch.manual_seed(2)
    x = torch.randn(60, 12)
    test = features.Activations(x, x, x, x, x)
    state = torch.get_rng_state()
    forms = features.of_random_matrices(5, test, test)
    torch.set_rng_state(state)
    q = torch.randn(5, 12, 12)
    acts = torch.einsum("ni,kij,nj->nk", x, q, x)
    torch.testing.assert_close(forms.acts, acts - acts.mean(0), atol=1e-4, rtol=1e-4)
    values = torch.linalg.eigvalsh((q + q.mT) / 2)
    torch.testing.assert_close(forms.pairs.values.abs(), values.abs().topk(8).values, atol=1e-5, rtol=1e-5)
    u, v = forms.pairs.vectors, (q + q.mT) / 2
    torch.testing.assert_close(u @ v, forms.pairs.values[..., None] * u, atol=1e-5, rtol=1e-4)


def test_pairs_on_a_plane_are_all_that_two_eigenvectors_give(layer):
    """A layer of one neuron has two eigenvectors, which span all its interactions."""
    found, _ = layer
    one = bo.nn.GatedMLP(8, 1).requires_grad_(False)
    for mlp, low, high in ((one, 1 - 1e-5, 1 + 1e-5), (found.mlp, -1, 0.99)):
        read = found._replace(mlp=mlp)
        top = bo.interaction_topk(*read.layer, 15, score="pair", basis=read.basis)
        cosines = features.on_plane(read, top)
        assert cosines.shape == (6,) and low < cosines.min() and cosines.max() < max(high, 1 + 1e-5)
        assert cosines.mean() < high


def test_contexts_end_where_a_feature_is_most_active(layer):
    found, test = layer
    k, words = 2, [str(n) for n in range(50)]
    shown = features.contexts(found, test, k, words, 10, 3)
    at = (test.y @ found.outputs.encoder[k]).argmax().item()
    begin = max(at - features.BEFORE, at // 10 * 10)
    *before, last = map(str, test.words[begin : at + 1].tolist())
    assert shown[0] == " ".join([*before, f"[{last}]"])
    assert len(set(shown)) == 3


def test_sentences_keep_the_rule():
    torch.manual_seed(0)
    drawn = circuit.sentences(2000)
    for words, verb, negated, plain in zip(*(t.tolist() for t in drawn), strict=True):
        said = [circuit.WORDS[n] for n in words]
        good, bad = (not {*said}.isdisjoint(of) for of in (circuit.GOOD, circuit.BAD))
        assert negated == ("not" in said and (good or bad)) and plain == ("not" not in said and (good or bad))
        if good or bad:
            assert circuit.VERBS[verb] == ("hate" if bad != negated else "love")
    other = ~(drawn.negated | drawn.plain)
    assert 0.4 < drawn.verb[other].float().mean() < 0.6


@pytest.mark.ci
@pytest.mark.parametrize("seed", [0, 1])
def test_planted_circuit_is_found(seed):
    """The AND-gate of "not" and "good" in the matrix of hate - love, and of "not" and "bad" with the other sign."""
    network, found = circuit.run(seed)
    assert found["accuracy"]["the layer"] == {"negated": 1.0, "plain": 1.0}
    for word, strength in found["strengths"].items():
        assert strength > 2 if word in circuit.GOOD else strength < -2
    positive, negative, third = found["eigenvalues"]
    assert positive > 2 * abs(third) and -negative > 2 * abs(third)
    assert circuit.gate(found) and circuit.two_large(found) and found["found"] == 6
    assert found["accuracy"]["two eigenvectors"] == {"negated": 1.0, "plain": 1.0}
    assert min(found["accuracy"]["no layer"].values()) < 0.6, "embeddings alone know the rule"
    basis, (w, v, p) = circuit.features(network), bo.analysis.layer_weights(network.layer)
    q = torch.einsum("h,hi,hj->ij", network.direction @ p, w, v)
    strength = basis[:, circuit.CONTENT.index("not")] @ (q + q.t()) @ basis[:, circuit.CONTENT.index("nice")]
    assert found["strengths"]["nice"] == pytest.approx(strength.item(), rel=1e-4)


def test_a_circuit_of_the_other_sign_is_none():
    right = {"strengths": {"good": 2.0, "bad": -1.0}, "eigenvalues": [3.0, -2.0, 0.5]}
    assert circuit.gate(right) and circuit.two_large(right)
    assert not circuit.gate({"strengths": {"good": 2.0, "bad": 1.0}})
    for eigenvalues in ([3.0, -0.5, 0.5], [3.0, 1.0, 0.5], [1.0, -3.0, -0.6]):
        assert not circuit.two_large({"eigenvalues": eigenvalues})


@pytest.fixture(scope="module")
def receipt():
    return json.loads(findings.RECEIPT.read_text())


def test_the_page_says_what_its_receipt_measured(receipt, monkeypatch, tmp_path):
    assert text.main(["--check"]) == 0
    assert receipt["scale"] == json.loads(json.dumps(text.FULL._asdict())), "a full run's"
    receipt["runs"][0]["loss_added"]["output features"] += 0.2
    (tmp_path / "text.json").write_text(json.dumps(receipt))
    receipt["runs"][0]["loss_added"]["output features"] -= 0.2
    monkeypatch.setattr(findings, "RECEIPT", tmp_path / "text.json")
    assert text.main(["--check"]) == 1


def test_the_receipt_holds_what_the_paper_found(receipt):
    """Sign and order, in every seed, of what the findings say agrees."""
    assert len(receipt["runs"]) >= 3
    assert min(claims.ratios(receipt, "active")) > 1
    assert max(claims.values(receipt, "loss_added/output features")) < 0.5
    pairs = zip(claims.values(receipt, "pairs/weighted"), claims.values(receipt, "pairs/largest"), strict=True)
    assert all(weighted > largest for weighted, largest in pairs)
    assert all(circuit.gate(r) and circuit.two_large(r) and r["found"] == 6 for r in claims.values(receipt, "circuit"))


def test_a_claim_that_does_not_hold_is_said_to_differ(receipt):
    changed = json.loads(json.dumps(receipt))
    for record in changed["runs"]:
        record["loss_added"]["output features"] = 0.3
        record["circuit"]["strengths"]["good"] *= -1
    assert claims.reconstruction(changed)[0].verdict == "differs"
    assert claims.circuit(changed)[0].verdict == "differs"
    met = {row[0]: row[2] for row in claims.expectations(changed)}
    assert met["the planted circuit is found in every seed"] == "no"
    assert met["the reconstruction of the output adds at most a tenth of the loss that zeroing adds"] == "no"


@pytest.mark.ci
def test_quick_finds_the_signs(tmp_path, capsys):
    assert text.main(["--quick", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "text.json").read_text())
    assert "Kneser-Ney" in capsys.readouterr().out
    (run,) = found["runs"]
    added = run["loss_added"]
    assert added["output features"] < 0.1 < added["the mean output"]
    assert run["pairs"]["weighted"] > run["pairs"]["largest"]
    ours, random, matrices = (claims.at_rank(found, forms, "active", 1)[0] for forms in run["truncated"])
    assert ours > random > matrices
    assert claims.at_rank(found, claims.FEATURES, "everywhere") > claims.at_rank(found, claims.MATRICES, "everywhere")
    assert circuit.gate(run["circuit"]) and circuit.two_large(run["circuit"])
