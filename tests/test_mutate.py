"""The script that breaks the code finds the mistakes it promises, and draws the same ones again."""

from pathlib import Path

import mutate
import pytest

SOURCE = """
def f(a, b):
    if a < 3:
        a += 1
    g(a, b)
    return a - b if a == b else h(b, *a)
"""
EXPECTED = {
    ("comparison", "a < 3", "(a <= 3)"),
    ("comparison", "a == b", "(a != b)"),
    ("constant", "3", "4"),
    ("constant", "1", "2"),
    ("statement", "a += 1", "pass"),
    ("statement", "g(a, b)", "pass"),
    ("arguments", "g(a, b)", "(g(b, a))"),
    ("operator", "a - b", "(a + b)"),
    ("condition", "a - b if a == b else h(b, *a)", "(h(b, *a) if a == b else a - b)"),
}


def test_sites(tmp_path: Path) -> None:
    path = tmp_path / "m.py"
    path.write_text(SOURCE)
    found = list(mutate.sites(path, tmp_path))
    assert {(s.kind, s.before, s.after) for s in found} == EXPECTED and len(found) == len(EXPECTED)
    for site in found:
        changed = SOURCE[: site.start] + site.after + SOURCE[site.stop :]
        compile(changed, "m.py", "exec")


@pytest.mark.parametrize("room", mutate.ROOMS)
def test_rooms_have_sources_and_tests(room: str) -> None:
    sources, tests = mutate.ROOMS[room]
    assert mutate.files(sources) and mutate.files(tests)
    assert mutate.draw(room, 10, 0) == mutate.draw(room, 10, 0) and len(mutate.draw(room, 10, 0)) == 10


@pytest.mark.slow
def test_a_mistake_is_noticed_and_undone(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text("def f(a):\n    return a < 3\n")
    (tmp_path / "test_m.py").write_text("from m import f\n\n\ndef test_f():\n    assert f(2) and not f(3)\n")
    sites = {site.kind: site for site in mutate.sites(tmp_path / "m.py", tmp_path)}
    assert mutate.noticed(sites["comparison"], ["test_m.py"], tmp_path)
    weaker = "from m import f\n\n\ndef test_f():\n    assert f(2)\n"
    (tmp_path / "test_m.py").write_text(weaker)
    assert not mutate.noticed(sites["comparison"], ["test_m.py"], tmp_path)
    assert (tmp_path / "m.py").read_text() == "def f(a):\n    return a < 3\n"
