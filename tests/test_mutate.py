"""The script that breaks the code finds the mistakes it promises, and draws the same ones again."""

from pathlib import Path

import mutate
import pytest
import reach

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
    drawn = mutate.draw(room, 10, 0)
    assert drawn == mutate.draw(room, 10, 0) and len(drawn) == 10


def test_equivalent_mistakes_are_in_the_code() -> None:
    """Each named one is found at a site of its file: none stands for code that is gone."""
    for path in {path for path, _ in mutate.EQUIVALENT}:
        found = {mutate.changed_line(site) for site in mutate.sites(mutate.ROOT / path)}
        assert {line for name, line in mutate.EQUIVALENT if name == path} <= found


def test_every_source_belongs_to_a_room() -> None:
    sources = {path for sources, _ in mutate.ROOMS.values() for path in mutate.files(sources)}
    everything = set(mutate.files(("bilinear_ops/**/*.py", "kernels/**/*.py", "bench/**/*.py")))
    assert {path for path in everything - sources if any(mutate.sites(path))} == set() and len(everything) > 130


NESTED = """
X = 1
def f(a):
    b = a
    def g():
        return b
    return g()
class C:
    Y = 2
    def h(self, n=3):
        return n
"""


@pytest.mark.parametrize(
    ("line", "name"), ((2, None), (3, None), (4, "f"), (6, "f.g"), (7, "f"), (9, None), (10, None), (11, "C.h"))
)
def test_the_function_of_a_line(line: int, name: str | None) -> None:
    """What stands outside of bodies runs at import: constants, signatures, class attributes."""
    assert reach.enclosing(NESTED, line) == name


def test_tests_that_can_notice(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(NESTED)
    nothing = {"functions": [], "files": [], "process": False}
    found = {
        "slow": {**nothing, "functions": ["m.py::f", "m.py::f.g"], "seconds": 3},
        "fast": {**nothing, "functions": ["m.py::f"], "seconds": 1},
        "reads": {**nothing, "files": ["m.py"], "seconds": 2},
        "starts": {**nothing, "process": True, "seconds": 4},
        "other": {**nothing, "functions": ["m.py::C.h"], "seconds": 0},
    }
    everything = ["other", "fast", "reads", "slow", "starts"]
    expected = {2: everything, 4: ["fast", "reads", "slow", "starts"], 6: ["reads", "slow", "starts"]}
    for line, names in expected.items():
        site = mutate.Site("m.py", line, "constant", 0, 0, "", "")
        assert mutate.chosen(site, found, tmp_path) == names
    assert mutate.chosen(mutate.Site("m.py", 11, "constant", 0, 0, "", ""), {"fast": found["fast"]}, tmp_path) == [
        "fast"
    ]


def test_the_likeliest_file_comes_first() -> None:
    tests = ["tests/test_contract.py", "tests/test_rank1_gates.py", "tests/test_rank1_masked.py"]
    site = mutate.Site("kernels/rank1/masked.py", 1, "constant", 0, 0, "", "")
    assert mutate.likeliest(site, tests) == [tests[2], tests[1], tests[0]]


@pytest.mark.slow
def test_a_mistake_is_noticed_without_records(tmp_path: Path) -> None:
    """By a test that passes without the mistake, by a file that it breaks; not by a file that is skipped."""
    (tmp_path / "m.py").write_text("def f(a):\n    return a < 3\n")
    (tmp_path / "test_m.py").write_text("from m import f\n\n\ndef test_f():\n    assert not f(3)\n")
    (tmp_path / "test_weak.py").write_text("from m import f\n\n\ndef test_f():\n    assert f(2)\n")
    (tmp_path / "test_import.py").write_text("from m import f\n\nassert not f(3)\n\n\ndef test_f(): pass\n")
    (tmp_path / "test_skipped.py").write_text('import pytest\n\npytest.importorskip("no_such_module")\n')
    (tmp_path / "test_fails.py").write_text("def test_f():\n    assert False\n")
    (site,) = (site for site in mutate.sites(tmp_path / "m.py", tmp_path) if site.kind == "comparison")
    assert [mutate.noticed_by_file(site, f"test_{name}.py", tmp_path) for name in ("m", "import")] == [True, True]
    assert [mutate.noticed_by_file(site, f"test_{name}.py", tmp_path) for name in ("weak", "skipped")] == [False, False]
    (tmp_path / "test_absent.py").write_text("import no_such_module\n")
    for name in ("fails", "absent"):
        with pytest.raises(RuntimeError, match="the tests fail without any mistake"):
            mutate.noticed_by_file(site, f"test_{name}.py", tmp_path)
    assert (tmp_path / "m.py").read_text() == "def f(a):\n    return a < 3\n"


@pytest.mark.slow
def test_a_mistake_is_noticed_and_undone(tmp_path: Path) -> None:
    pytest.importorskip("coverage")
    (tmp_path / "m.py").write_text("def f(a):\n    return a < 3\n")
    (tmp_path / "test_m.py").write_text("from m import f\n\n\ndef test_f():\n    assert f(2) and not f(3)\n")
    sites = {site.kind: site for site in mutate.sites(tmp_path / "m.py", tmp_path)}
    names = mutate.records(["test_m.py"], tmp_path)
    assert list(names) == ["test_m.py::test_f"]
    assert mutate.noticed(sites["comparison"], list(names), tmp_path)
    weaker = "from m import f\n\n\ndef test_f():\n    assert f(2)\n"
    (tmp_path / "test_m.py").write_text(weaker)
    assert not mutate.noticed(sites["comparison"], list(names), tmp_path)
    assert (tmp_path / "m.py").read_text() == "def f(a):\n    return a < 3\n"


@pytest.mark.slow
def test_what_runs_at_collection_belongs_to_every_test(tmp_path: Path) -> None:
    pytest.importorskip("coverage")
    room = tmp_path / "bench"
    room.mkdir()
    (room / "m.py").write_text("def f(a):\n    return a < 3\n")
    plugin = Path(reach.__file__).read_text()
    (tmp_path / "reach.py").write_text(plugin.replace("parents[1]", "parent"))  # whose rooms are those of its tree
    (tmp_path / "test_m.py").write_text("from bench.m import f\n\nFOUND = f(2)\n\n\ndef test_f():\n    assert FOUND\n")
    (record,) = mutate.records(["test_m.py"], tmp_path).values()
    assert record["functions"] == ["bench/m.py::f"]


@pytest.mark.slow
def test_a_file_that_is_skipped_has_no_records(tmp_path: Path) -> None:
    pytest.importorskip("coverage")
    skipped, fails = tmp_path / "test_skipped.py", tmp_path / "test_fails.py"
    skipped.write_text('import pytest\n\npytest.importorskip("no_such_module")\n\n\ndef test_it(): pass\n')
    fails.write_text("def test_it(): assert False\n")
    assert mutate.records([skipped.name], tmp_path) == {}
    with pytest.raises(RuntimeError, match="the tests fail without any mistake"):
        mutate.records([fails.name], tmp_path)
