"""The digits example runs from its command line, and finds what the paper found."""

import importlib
import sys
from itertools import combinations, pairwise
from pathlib import Path
from statistics import mean

import pytest
import torch

ROOT = Path(__file__).parents[1]

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def digits():
    sys.path.insert(0, str(ROOT / "examples"))
    yield importlib.import_module("digits")
    sys.path.remove(str(ROOT / "examples"))


@pytest.fixture(scope="module")
def quick(digits, tmp_path_factory):
    """What `examples/digits.py --quick` measures, and where it saves."""
    out = tmp_path_factory.mktemp("figures")
    return digits.main(["--quick", "--out", str(out)]), out


def agreements(digits, networks, which):
    return [digits.agreement(a, b, which) for a, b in combinations(networks, 2)]


def of_both(digits, run):
    """The spectrum with both regularisers, that without decay, and that without noise."""
    return run.spectra[digits.NOISE, digits.DECAY], run.spectra[digits.NOISE, 0], run.spectra[0, digits.DECAY]


def test_quick_finds_the_same(digits, quick):
    """After 200 steps the regularisers have done part of their work: looser bounds for them."""
    found, _ = quick
    (runs,) = found.runs.values()
    for run in runs:
        both, no_decay, no_noise = of_both(digits, run)
        assert both.accuracy > 0.93
        assert both.share > 0.93
        assert both.rank < 0.85 * no_decay.rank
        assert both.size < 0.97 * no_noise.size
        kept = run.truncated[digits.TOP - 1].item()
        assert kept > both.accuracy - 0.01
        assert kept > run.projected[digits.TOP - 1] + 0.04
        within, across = run.fooled
        assert within.either > within.permuted + 0.08
        assert across.either > across.permuted + 0.2
    networks = [run.network for run in runs]
    positive, by_magnitude = (mean(agreements(digits, networks, which)) for which in ("positive", "abs"))
    assert positive > 0.9 and by_magnitude < positive - 0.1
    for target in found.targets:
        assert target.correlation > 0.95 and target.ratio > 3


def test_figures_are_saved(quick):
    pytest.importorskip("matplotlib")
    _, out = quick
    names = {"eigenvectors", "masks", "similarity", "spectrum", "target", "truncation"}
    assert {path.name for path in out.iterdir()} == {f"digits_{name}.png" for name in names}


def test_without_matplotlib(digits, quick, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(digits, "study", lambda *_: quick[0])
    digits.main(["--out", str(tmp_path)])
    assert capsys.readouterr().out.endswith('needs matplotlib: pip install "bilinear-ops[plots]"\n')
    assert not list(tmp_path.iterdir())


def test_truncation_to_all_eigenvectors_is_the_network(digits, quick):
    found, _ = quick
    data, run = digits.load_digits(), found.runs[64][0]
    everything = digits.truncated(run.network, data, 64)[-1].item()
    assert everything == pytest.approx(run.spectra[digits.NOISE, digits.DECAY].accuracy, abs=1e-6)
    assert digits.projected(run.network, data, 64)[-1].item() == pytest.approx(everything, abs=1e-6)


def test_masks_move_their_eigenvector_alone(digits, quick):
    found, _ = quick
    data, network = digits.load_digits(), found.runs[64][0].network
    vectors = digits.eigenpairs(network, digits.MASKS, "positive").vectors
    within, across = digits.masks(network, data)
    length = within.norm(dim=1)
    torch.testing.assert_close(within / length[:, None], vectors.flatten(0, 1), rtol=0, atol=1e-4)
    moved = across @ vectors[:, 0].t()
    assert moved.diag().min() > 0.1
    assert (moved - moved.diag().diag()).abs().max() < 1e-4


@pytest.mark.slow
def test_six_seeds_find_what_the_paper_found(digits):
    """The bounds are the claims; `pytest -s` prints how far from them the figures are."""
    found = digits.study(digits.load_digits(), digits.HIDDEN, 6, digits.STEPS)
    digits.tell(found)
    for runs in found.runs.values():
        gains = []
        for run in runs:
            both, no_decay, no_noise = of_both(digits, run)
            assert both.share > 0.93
            assert both.rank < 0.6 * no_decay.rank
            assert both.size < 0.93 * no_noise.size
            assert both.rank > 1.1 * no_noise.rank
            kept = run.truncated[digits.TOP - 1].item()
            assert kept > both.accuracy - 0.01
            gains.append(kept - run.projected[digits.TOP - 1].item())
            within, across = run.fooled
            assert within.either > within.permuted + 0.1
            assert across.either > across.permuted + 0.25
            assert across.once > across.permuted_once + 0.1
        assert mean(gains) > 0.05
        networks = [run.network for run in runs]
        positive, by_magnitude = (mean(agreements(digits, networks, which)) for which in ("positive", "abs"))
        assert positive > 0.78 and by_magnitude < positive - 0.1
    for first, second in pairwise(found.runs.values()):
        pairs = list(zip(first, second, strict=True))
        assert mean(digits.agreement(a.network, b.network, "positive") for a, b in pairs) > 0.78
    for target, clean in zip(found.targets, found.clean_targets, strict=True):
        assert target.correlation > 0.95 and target.ratio > 3
        assert clean.correlation < target.correlation
