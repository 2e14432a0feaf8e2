"""Break the code on purpose, one mistake at a time, and see whether the tests notice.

    python tests/mutate.py [--room NAME ...] [--draw 10] [--seed 0] [--list] [--out FILE]

Every room has sources and tests. The sites of a room are the places of its sources where one realistic mistake fits: a
comparison off by one, an operator exchanged, a constant off by one, two arguments swapped, a statement dropped, a
condition negated. The script draws sites with a fixed seed, applies one at a time to a copy of the tree, and runs the
room's tests and the tests that all ops share. A mutation that no test notices is printed as a survivor.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED_TESTS = ("tests/test_contract.py", "tests/test_errors.py")
SECONDS = 900  # a test run that takes longer has noticed: the mutation does not end

# room: (sources, tests); a family's sources and tests are found by their names
ROOMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "gated": (("bilinear_ops/**/gated.py",), ("tests/test_gated*.py",)),
    "interaction": (("bilinear_ops/**/interaction/*.py",), ("tests/test_interaction*.py",)),
    "rank1": (("bilinear_ops/**/rank1/*.py",), ("tests/test_rank1*.py",)),
    "kernels": (("kernels/**/*.py",), ("tests/test_*_kernels.py", "tests/test_rank1*.py", "tests/test_tuning.py")),
    "shared": (
        ("bilinear_ops/_*.py", "bilinear_ops/composite/blockwise.py", "bilinear_ops/testing.py"),
        ("tests/test_gated.py", "tests/test_interaction_entries.py", "tests/test_rank1_contract.py"),
    ),
    "analysis": (("bilinear_ops/analysis/**/*.py",), ("tests/test_analysis*.py",)),
    "modules": (("bilinear_ops/nn.py", "bilinear_ops/nn/*.py"), ("tests/test_nn*.py",)),
    "plots": (("bilinear_ops/plots.py",), ("tests/test_plots.py",)),
    "command": (
        ("bilinear_ops/demo.py", "bilinear_ops/environment.py", "bilinear_ops/tuning.py", "bilinear_ops/__main__.py"),
        ("tests/test_cli.py", "tests/test_tuning.py"),
    ),
    "bench": (("bench/*.py", "bench/harness/*.py"), ("tests/test_bench*.py",)),
    "static": (("bench/static/*.py",), ("tests/test_static*.py", "tests/test_sanitize.py")),
}

COMPARISONS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult}


@dataclass(frozen=True)
class Site:
    """A mistake: the text of a file from `start` to `stop`, in bytes, becomes `after`."""

    path: str
    line: int
    kind: str
    start: int
    stop: int
    before: str
    after: str


def files(patterns: tuple[str, ...], root: Path = ROOT) -> list[Path]:
    """The files of some patterns; a link to another room is not followed."""
    found = {path for pattern in patterns for path in root.glob(pattern) if path.suffix == ".py"}
    return sorted(path for path in found if not any(part.is_symlink() for part in path.parents))


def sites(path: Path, root: Path = ROOT) -> Iterator[Site]:
    """Every mistake that fits into a file, in the order of the text."""
    source = path.read_text()
    starts = [0]
    for text_line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(text_line))
    for node in ast.walk(ast.parse(source)):
        for kind, changed in _mistakes(node):
            start = starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]
            stop = starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]
            before = source.encode()[start:stop].decode()
            # brackets keep a changed operator inside a larger expression
            after = (
                ast.unparse(changed) if isinstance(changed, ast.stmt | ast.Constant) else f"({ast.unparse(changed)})"
            )
            yield Site(str(path.relative_to(root)), node.lineno, kind, start, stop, before, after)  # type: ignore[attr-defined]


def _mistakes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    changed = copy.deepcopy(node)
    if isinstance(changed, ast.Compare) and type(changed.ops[0]) in COMPARISONS:
        changed.ops[0] = COMPARISONS[type(changed.ops[0])]()
        yield "comparison", changed
    elif isinstance(changed, ast.BinOp) and type(changed.op) in OPERATORS and not _is_type(changed):
        changed.op = OPERATORS[type(changed.op)]()
        yield "operator", changed
    elif isinstance(changed, ast.Constant) and type(changed.value) is int:
        changed.value += 1
        yield "constant", changed
    elif isinstance(changed, ast.Call) and len(changed.args) > 1 and not any(map(_is_starred, changed.args[:2])):
        changed.args[:2] = changed.args[1::-1]
        if ast.dump(changed) != ast.dump(node):
            yield "arguments", changed
    elif isinstance(changed, ast.IfExp):
        changed.body, changed.orelse = changed.orelse, changed.body
        yield "condition", changed
    elif isinstance(changed, ast.AugAssign) or isinstance(changed, ast.Expr) and isinstance(changed.value, ast.Call):
        yield "statement", ast.Pass()


def _is_starred(node: ast.AST) -> bool:
    return isinstance(node, ast.Starred)


def _is_type(node: ast.BinOp) -> bool:
    """Whether a sum could be one of texts: those are messages, and no test should pin every word."""
    return any(isinstance(side, ast.JoinedStr) or isinstance(side, ast.Constant) and isinstance(side.value, str)
               for side in (node.left, node.right))  # fmt: skip


def draw(room: str, count: int, seed: int) -> list[Site]:
    """Sites of a room, the same ones for the same tree and seed."""
    found = [site for path in files(ROOMS[room][0]) for site in sites(path)]
    return random.Random(f"{seed} {room}").sample(found, min(count, len(found)))


def noticed(site: Site, tests: list[str], tree: Path) -> bool:
    """Whether the tests fail on a tree with this mistake."""
    path = tree / site.path
    source = path.read_bytes()
    path.write_bytes(source[: site.start] + site.after.encode() + source[site.stop :])
    try:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
        done = subprocess.run(command, cwd=tree, env=_environment(tree), capture_output=True, timeout=SECONDS)
        return done.returncode != 0
    except subprocess.TimeoutExpired:
        return True
    finally:
        path.write_bytes(source)


def _environment(tree: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}


def main(words: list[str] | None = None) -> int:
    """Run the drawn mutations; the exit status says whether any survived."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--room", nargs="+", choices=ROOMS, default=list(ROOMS))
    parser.add_argument("--draw", type=int, default=10, help="mutations a room (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="print the drawn mutations and run nothing")
    parser.add_argument("--out", type=Path, help="append a JSON line for each mutation")
    arguments = parser.parse_args(words)
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "*.egg-info")
        shutil.copytree(ROOT, tree, symlinks=True, ignore=ignored)
        for room in arguments.room:
            tests = [str(p.relative_to(ROOT)) for p in files((*ROOMS[room][1], *SHARED_TESTS))]
            for site in draw(room, arguments.draw, arguments.seed):
                place = f"{room}: {site.path}:{site.line} {site.kind}: {site.before!r} -> {site.after!r}"
                if arguments.list:
                    print(place)
                    continue
                found = noticed(site, tests, tree)
                survivors += not found
                print("noticed " if found else "SURVIVED", place, flush=True)
                if arguments.out:
                    with arguments.out.open("a") as file:
                        file.write(json.dumps({"room": room, "noticed": found, **asdict(site)}) + "\n")
    print(f"{survivors} survived")
    return survivors > 0


if __name__ == "__main__":
    sys.exit(main())
