"""Progress bars: of every long computation, closed whatever happens, and needing tqdm only where shown."""

import sys

import pytest
import torch
from analysis_inputs import layer

from bilinear_ops import analysis
from bilinear_ops.analysis import truncation
from bilinear_ops.analysis.progress import progress_bar
from bilinear_ops.composite.limits import limits

CALLS = {
    "interaction_eigh": lambda w, v, p, **o: analysis.interaction_eigh(w, v, p, 1, chunk_bytes=1, **o),
    "truncate": lambda w, v, p, **o: analysis.truncate(w, v, p, 1, **o),
    "truncation_curve": lambda w, v, p, **o: analysis.truncation_curve(
        *inputs(w, v, p), torch.ones(7, 6).double(), **o
    ),
    "truncation_correlation": lambda w, v, p, **o: analysis.truncation_correlation(
        *inputs(w, v, p), torch.zeros(7, 2).long(), torch.ones(7, 2).double(), **o
    ),
    "hosvd": lambda w, v, p, **o: analysis.hosvd(w, v, p, 2, **o),
    "hosvd, input": lambda w, v, p, **o: analysis.hosvd(w, v, p, 2, mode="input", **o),
    "cp_decompose": lambda w, v, p, **o: analysis.cp_decompose(w, v, p, 2, restarts=1, **o),
    "layer_similarity": lambda w, v, p, **o: analysis.layer_similarity(w, v, p, v, v, p, **o),
    "interaction_clusters": lambda w, v, p, **o: analysis.interaction_clusters(w.t() @ w, 2, **o),
    "strongest_directions": lambda w, v, p, **o: analysis.strongest_directions(w, v, p, 2, **o),
    "strongest_directions, gated": lambda w, v, p, **o: analysis.strongest_directions(
        w, v, p, 2, activation="silu", radius=2.0, **o
    ),
    "joint_diagonalise": lambda w, v, p, **o: analysis.joint_diagonalise(w, v, p, **o),
    "sparse_decompose": lambda w, v, p, **o: analysis.sparse_decompose(w, v, p, 2, steps=2, **o),
}


def inputs(w, v, p):
    return torch.ones(7, w.shape[1]).double(), analysis.interaction_eigh(w, v, p, 1)


@pytest.fixture
def bars(monkeypatch):
    found = []

    class Bar:
        def __init__(self, total, unit, disable):
            assert not disable
            self.total, self.unit, self.done, self.updates, self.closed = total, unit, 0, 0, False
            found.append(self)

        def update(self, n):
            self.done += n
            self.updates += 1

        def close(self):
            self.closed = True

    monkeypatch.setattr(limits, "gram_neurons", 5)
    monkeypatch.setattr(truncation, "blocks", lambda total, _: [(i, min(i + 3, total)) for i in range(0, total, 3)])
    monkeypatch.setitem(sys.modules, "tqdm", type("module", (), {}))
    monkeypatch.setitem(sys.modules, "tqdm.auto", type("module", (), {"tqdm": Bar}))
    return found


@pytest.mark.parametrize("name", CALLS)
def test_bars_go_to_their_ends(name, bars):
    CALLS[name](*layer(5, 12, 6))
    assert not bars
    CALLS[name](*layer(5, 12, 6), progress=True)
    assert bars and all(bar.closed and bar.done == bar.total for bar in bars)
    if name != "truncate":  # its directions are few enough for one chunk
        assert max(bar.updates for bar in bars) > 1, "a bar that is full at once shows nothing"


@pytest.mark.parametrize("name", CALLS)
def test_an_interrupt_closes_the_bar(name, bars, monkeypatch):
    def interrupt(bar, n):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["tqdm.auto"].tqdm, "update", interrupt)
    inputs = layer(5, 12, 6)
    before = [t.clone() for t in inputs]
    with pytest.raises(KeyboardInterrupt):
        CALLS[name](*inputs, progress=True)
    assert bars and all(bar.closed for bar in bars)
    assert all(t.equal(was) for t, was in zip(inputs, before, strict=True))


def test_without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with progress_bar(3, "thing", False) as advance:
        advance(1)
    with pytest.raises(ModuleNotFoundError, match=r"pip install tqdm"):
        with progress_bar(3, "thing", True):
            pass
