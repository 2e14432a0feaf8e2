"""A pytest plugin for mutate.py: which functions each test runs, and how long it takes.

With REACH_RECORD=FILE the tests run as ever under coverage, and FILE receives each test's record as JSON. With
REACH_RUN=FILE only the tests that FILE names run, in its order. With REACH_FAILED=FILE, FILE receives the name of the
last test that failed, as a list that REACH_RUN reads.
"""

from __future__ import annotations

import ast
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("bilinear_ops", "kernels", "bench")


def functions(source: str) -> Iterator[tuple[str, int, int]]:
    """Name, first and last line of every function's body; nested functions come before those that hold them."""

    def search(node: ast.AST, prefix: str) -> Iterator[tuple[str, int, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield from search(child, f"{prefix}{child.name}.")
                if not isinstance(child, ast.ClassDef):
                    yield prefix + child.name, child.body[0].lineno, child.end_lineno or child.lineno
            else:
                yield from search(child, prefix)

    return search(ast.parse(source), "")


def enclosing(source: str, line: int) -> str | None:
    """The innermost function whose body holds a line; None: the line runs at import."""
    return next((name for name, first, last in functions(source) if first <= line <= last), None)


def pytest_configure(config: pytest.Config) -> None:
    if "REACH_RECORD" in os.environ:
        config.pluginmanager.register(_Recorder())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "REACH_RUN" in os.environ:
        order = {name: number for number, name in enumerate(json.loads(Path(os.environ["REACH_RUN"]).read_text()))}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in order])
        items[:] = sorted((item for item in items if item.nodeid in order), key=lambda item: order[item.nodeid])


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed and "REACH_FAILED" in os.environ:
        Path(os.environ["REACH_FAILED"]).write_text(json.dumps([report.nodeid]))


class _Recorder:
    """A test's context is its name. A fixture that several tests share has its own, which each of these tests gets.

    What runs while tests are collected, such as the workloads that parametrise them, belongs to all of them.
    """

    def __init__(self) -> None:
        import coverage

        self.coverage = coverage.Coverage(data_file=None, include=[str(ROOT / room / "*") for room in ROOMS])
        self.coverage.start()
        self.tests: dict[str, dict] = {}
        self.fixtures: dict[str, list[str]] = {}
        self.opened: set[str] = set()
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple) -> None:
        if event == "subprocess.Popen":
            words = [os.fspath(word) for word in arguments[1]] if isinstance(arguments[1], list | tuple) else []
            if sys.executable in words and not any("_inductor" in str(word) for word in words):
                self.opened.add("a process")
        elif event == "open" and isinstance(arguments[0], str | os.PathLike):
            self.opened.add(os.fspath(arguments[0]))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: object) -> Generator[None, object, object]:
        self.context = item.nodeid
        self.coverage.switch_context(item.nodeid)
        self.opened.clear()
        start = time.perf_counter()
        result = yield
        self.tests[item.nodeid] = {
            "seconds": round(time.perf_counter() - start, 3),
            "files": sorted(os.path.realpath(f).removeprefix(f"{ROOT}/") for f in self.opened if f.endswith(".py")),
            "process": "a process" in self.opened,
        }
        self.fixtures[item.nodeid] = [f"fixture {name}" for name in getattr(item, "fixturenames", ())]
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef, request) -> Generator[None, object, object]:
        if fixturedef.scope == "function":
            return (yield)
        self.coverage.switch_context(f"fixture {fixturedef.argname}")
        try:
            return (yield)
        finally:
            self.coverage.switch_context(self.context)

    def pytest_sessionfinish(self) -> None:
        self.coverage.stop()
        data = self.coverage.get_data()
        ran: dict[str, set[str]] = defaultdict(set)  # context -> functions
        for file in data.measured_files():
            lines = data.contexts_by_lineno(file)
            for name, first, last in functions(Path(file).read_text()):
                for line in range(first, last + 1):
                    for context in lines.get(line, ()):
                        ran[context].add(f"{os.path.realpath(file).removeprefix(f'{ROOT}/')}::{name}")
        for name, record in self.tests.items():
            record["functions"] = sorted(set().union(*(ran[context] for context in ("", name, *self.fixtures[name]))))
        Path(os.environ["REACH_RECORD"]).write_text(json.dumps(self.tests))
