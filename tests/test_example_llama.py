"""The Llama example: a small run of all of it, its measures by hand, and the page that it writes."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
from transformers_models import build, tokens

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def llama():
    sys.path.insert(0, str(ROOT / "examples"))
    yield importlib.import_module("llama")
    sys.path.remove(str(ROOT / "examples"))


def test_quick_run(llama, tmp_path, capsys):
    assert llama.main(["--quick", "--out", str(tmp_path)]) == 0
    receipt = json.loads((tmp_path / "llama.json").read_text())
    out = capsys.readouterr().out
    assert llama.text(receipt) in out and "nan" not in out
    (model,) = receipt["models"]
    assert model["loss"]["loaded"] == model["loss"]["bilinear"]
    assert len({model["loss"][way] for way in ("swiglu", "bilinear", "abrupt")}) == 3
    assert 0 < model["similarity"][0] < 1
    for spectra in model["spectra"].values():
        assert all(0 < layer["inputs_leading"] <= 1 <= layer["inputs_rank"] <= llama.QUICK.d for layer in spectra)


def test_the_page_says_what_was_measured(llama):
    assert llama.check() == 0
    receipt = json.loads(llama.RECEIPT.read_text())
    assert receipt["sizes"] == llama.FULL._asdict()
    for loss in (model["loss"] for model in receipt["models"]):
        assert loss["swiglu"] < loss["bilinear"] == loss["loaded"] < loss["abrupt"]
    for spectra in (model["spectra"] for model in receipt["models"]):
        for n, random in enumerate(spectra["random"]):
            trained = (spectra[name][n]["inputs_leading"] for name in ("swiglu", "bilinear"))
            assert min(trained) > 1.5 * random["inputs_leading"]


def test_spectrum_by_hand(llama):
    """Of the tensor itself."""
    model = build("llama").requires_grad_(False)
    w, v, p = llama.weights(model, 1)
    q = torch.einsum("oh,hi,hj->oij", p, w, v)
    u, s, _ = torch.linalg.svd(((q + q.mT) / 2).flatten(1), full_matrices=False)
    found = llama.spectrum(model, 1)
    assert found["outputs_rank"] == pytest.approx((s.sum() / s.norm()).square().item(), rel=1e-3)
    assert found["outputs_leading"] == pytest.approx((s[:8].square().sum() / s.square().sum()).item(), rel=1e-3)
    values = torch.linalg.eigvalsh(torch.einsum("ok,oij->kij", u[:, :8], (q + q.mT) / 2))
    ranks = (values.abs().sum(-1) / values.norm(dim=-1)).square()
    assert found["inputs_rank"] == pytest.approx(ranks.mean().item(), rel=1e-3)
    share = values.square().topk(8).values.sum(-1) / values.square().sum(-1)
    assert found["inputs_leading"] == pytest.approx(share.mean().item(), rel=1e-3)


def test_mean_loss_is_that_of_all_passages(llama):
    model, words = build("llama"), tokens(64)[0]
    sizes = llama.QUICK._replace(context=10)
    with torch.no_grad():
        log_p = model(words[:60].view(6, 10)).logits[:, :-1].log_softmax(-1)
    expected = -log_p.gather(2, words[:60].view(6, 10)[:, 1:, None]).mean().item()
    assert llama.mean_loss(model, words, sizes) == pytest.approx(expected, rel=1e-4)
