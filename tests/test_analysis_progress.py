"""Progress bars: of every long computation, closed whatever happens, and needing tqdm only where shown."""

import sys

import pytest
from analysis_inputs import layer

from bilinear_ops import analysis
from bilinear_ops.analysis.progress import progress_bar

CALLS = {
    "interaction_eigh": lambda w, v, p, **o: analysis.interaction_eigh(w, v, p, 1, chunk_bytes=1, **o),
    "strongest_directions": lambda w, v, p, **o: analysis.strongest_directions(w, v, p, 2, **o),
}


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

    monkeypatch.setitem(sys.modules, "tqdm", type("module", (), {}))
    monkeypatch.setitem(sys.modules, "tqdm.auto", type("module", (), {"tqdm": Bar}))
    return found


@pytest.mark.parametrize("name", CALLS)
def test_bars_go_to_their_ends(name, bars):
    CALLS[name](*layer(5, 12, 6))
    assert not bars
    CALLS[name](*layer(5, 12, 6), progress=True)
    assert bars and all(bar.closed and bar.done == bar.total for bar in bars)
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
    with pytest.raises(ModuleNotFoundError, match=r'pip install "bilinear-ops\[progress\]"'):
        with progress_bar(3, "thing", True):
            pass
