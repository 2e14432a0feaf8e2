"""The text example: its parts, a small run, and at full size the findings it prints."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
corpus, model, sae, text = (importlib.import_module(f"text{part}") for part in ("_corpus", "_model", "_sae", ""))


def test_quick_run(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["text.py", "--quick"])
    text.main()
    out = capsys.readouterr().out
    assert "Kneser-Ney" in out and "random directions" in out and "feature " in out
    assert "nan" not in out.split()


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
    features = torch.nn.functional.normalize(torch.randn(8, 32), dim=1)
    data = (0.5 + torch.rand(1500, 1)) * features[torch.randint(8, (1500,))]
    assert sae.unexplained(sae.train(data, features=64, active=2, steps=300), data) < 0.05


def test_correlations_are_those_of_each_feature(monkeypatch):
    monkeypatch.setattr(text, "ENOUGH", 5)
    codes = sae.encode(torch.randn(60, 8), torch.randn(6, 8), 2)
    estimates = torch.randn(120)
    feature = codes.indices.flatten()
    estimates[feature == 2] = 3.0
    feature[:][feature == 4] = 5  # a feature that never acts
    found = text.correlations(codes, estimates, 6)
    for k in (0, 1, 3, 5):
        pair = torch.stack([codes.acts.flatten()[feature == k], estimates[feature == k]]).double()
        assert found[k].item() == pytest.approx(torch.corrcoef(pair)[0, 1].item(), abs=1e-10)
    assert found[2] == 0 and found[4].isnan()


def test_pairs_that_are_all_taken_explain_what_the_features_do():
    """And that is the MLP on the autoencoder's reading of x, seen along an output feature's encoder."""
    torch.manual_seed(1)
    mlp = text.bo.nn.GatedMLP(8, 16).requires_grad_(False)
    x = torch.randn(400, 8)
    inputs, outputs = (sae.TopKSAE(8, 6, 3).requires_grad_(False) for _ in "io")
    features = text.Features(mlp, inputs, outputs)
    everything = text.bo.interaction_topk(*features.layer, 21, score="pair", basis=features.basis)
    test = text.Activations(torch.zeros(400), x, mlp(x))
    torch.testing.assert_close(text.explained(features, test, everything), text.reconstructed(features, test))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_findings(seed):
    found = text.experiment(seed=seed)
    assert found.below_bigram >= 0.2
    assert found.above_control >= 0.15
    assert found.above_size > 0.15
