"""Break the code on purpose, one mistake at a time, and see whether the tests notice.

    python tests/mutate.py [--room NAME ...] [--draw 10] [--seed 0] [--list] [--out FILE] [--reach FILE | --unrecorded]

Every room has sources and tests. The sites of a room are the places of its sources where one realistic mistake fits: a
comparison off by one, an operator exchanged, a constant off by one, two arguments swapped, a statement dropped, a
condition negated. The script draws sites with a fixed seed, applies one at a time to a copy of the tree, and runs the
room's tests and the tests that all ops share. A mutation that no test notices is printed as a survivor.

First the tests run once unchanged and record which functions each of them calls (`reach.py`); --reach keeps the records
for later runs. A mutation inside a function is then tried with the tests that call this function, that read its file or
that start a process, the fastest first; one outside functions, or in a function that no test calls, with all tests.

Records take as long as the tests under coverage. --unrecorded takes none and tries all files of tests, one after the
other, the likeliest by its name first: a few mistakes are noticed sooner, a survivor later.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import reach

ROOT = Path(__file__).resolve().parents[1]
SHARED_TESTS = (
    "tests/test_blocks.py",
    "tests/test_contract.py",
    "tests/test_errors.py",
    "tests/test_first_order.py",
    "tests/test_options.py",
    "tests/test_rooms.py",
)

# room: (sources, tests); a family's sources and tests are found by their names
ROOMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "gated": (
        ("bilinear_ops/**/gated.py",),
        ("tests/test_gated*.py", "tests/test_nn.py", "tests/test_rank1_gated.py"),
    ),
    "interaction": (("bilinear_ops/**/interaction/*.py",), ("tests/test_interaction*.py",)),
    "rank1": (("bilinear_ops/**/rank1/*.py",), ("tests/test_rank1*.py",)),
    "kernels": (
        ("kernels/**/*.py",),
        ("tests/test_gated*.py", "tests/test_*_kernels.py", "tests/test_rank1*.py", "tests/test_precision.py")
        + ("tests/test_tuning.py", "tests/test_config.py", "tests/test_launches.py", "tests/test_accumulators.py")
        + ("tests/test_compiled.py", "tests/test_direct.py", "tests/test_few_rows.py", "tests/test_plans.py"),
    ),
    "shared": (
        ("bilinear_ops/_*.py", "bilinear_ops/gates.py", "bilinear_ops/results.py", "bilinear_ops/testing.py")
        + (
            "bilinear_ops/composite/blockwise.py",
            "bilinear_ops/composite/limits.py",
            "bilinear_ops/reference/__init__.py",
        ),
        ("tests/test_gated.py", "tests/test_interaction_entries.py", "tests/test_rank1_contract.py")
        + ("tests/test_results.py", "tests/test_pickles.py", "tests/test_distributed.py", "tests/test_small_*.py"),
    ),
    "analysis": (("bilinear_ops/analysis/**/*.py",), ("tests/test_analysis*.py",)),
    "modules": (("bilinear_ops/nn/*.py", "bilinear_ops/init.py"), ("tests/test_nn*.py", "tests/test_init.py")),
    "integrations": (
        ("bilinear_ops/integrations/*.py",),
        ("tests/test_integrations*.py", "tests/test_distributed.py"),
    ),
    "plots": (("bilinear_ops/plots.py", "bilinear_ops/_figures.py"), ("tests/test_plots.py",)),
    "command": (
        ("bilinear_ops/demo.py", "bilinear_ops/environment.py", "bilinear_ops/tuning.py", "bilinear_ops/__main__.py"),
        ("tests/test_cli.py", "tests/test_tuning.py"),
    ),
    "bench": (("bench/*.py", "bench/harness/*.py"), ("tests/test_bench*.py",)),
    "static": (
        ("bench/static/*.py",),
        ("tests/test_static*.py", "tests/test_sanitize.py", "tests/test_compiled.py"),
    ),
}

# (file, the line with the mistake): why nothing is wrong with it
EQUIVALENT: dict[tuple[str, str], str] = {
    (
        "bench/report.py",
        'facts = (*dtypes[: len(dtypes) == 1], clock, *versions, " to ".join(dates[:: (max(len(dates) - 1, 1))]))',
    ): "the maximum is symmetric",
    ("bench/bench_rank1.py", "k = (max(round(density * c), 1))"): "the maximum is symmetric",
    (
        "bench/bench_interaction.py",
        "ours=ranked(lambda w, v, c: (bo.interaction_topk(v, w, c, n))),",
    ): "an interaction matrix is symmetric in w and v",
    (
        "bilinear_ops/analysis/eigen/krylov.py",
        "(torch.maximum(vector_norm(y, dim=2), scale, out=scale))",
    ): "the maximum is symmetric",
    ("bench/bench_rank1.py", '("cpu", "tiny"): [(33, 24, 41, 48)],'): "a size of a workload is as good as the next",
    ("bench/bench_interaction.py", '"tiny": [(3, 60, 70, 3)],'): "a size of a workload is as good as the next",
    ("bilinear_ops/demo.py", "BATCH = 129"): "a setting of the demo's training, as good as the next",
    (
        "bilinear_ops/composite/limits.py",
        "gradient_rows: int = 129  # for each thread, at least: fewer make the library's products slow",
    ): "results do not depend on sizes of blocks, as tests/test_blocks.py shows",
    (
        "bilinear_ops/composite/limits.py",
        "gradient_bytes: int = 9 << 20  # of [da | dz] in a block of rows: an allocator reuses such a block",
    ): "results do not depend on sizes of blocks, as tests/test_blocks.py shows",
    (
        "bilinear_ops/composite/rank1/gates.py",
        "width = max((min(count, limits.gate_columns)), 1)",
    ): "the minimum is symmetric",
    (
        "bilinear_ops/composite/rank1/masks.py",
        "height = min(items_per_block(words_a_row, budget), max(stop - start, 2))",
    ): "memory of one row too many is cut to the rows there are",
    (
        "bilinear_ops/reference/rank1/losses.py",
        "return torch.where(x > 1, 1 + alpha * (x - 1), x.clamp(0, 2))",
    ): "the clamp is read up to 1 alone",
    (
        "bilinear_ops/composite/interaction/ranking.py",
        "yield a, b, matrices(w, v, c[a:b], None, False) if u is None else (matrices(v, w, c, u[a:b], False))",
    ): "an interaction matrix is symmetric in w and v",
    (
        "bilinear_ops/interaction/ranking.py",
        "return (reference.interaction_topk(v, w, c, n, score=score, scope=scope, weight=weight, basis=basis))",
    ): "an interaction matrix is symmetric in w and v",
    (
        "bilinear_ops/nn/gated.py",
        'linear = nn.Linear(1, 2, bias=False, device="meta")',
    ): "a placeholder, whose weight is replaced",
    (
        "bilinear_ops/nn/gated.py",
        "layer = (cls(h, d, o, **options, device='meta', dtype=up.weight.dtype))",
    ): "placeholders, whose weights are replaced",
    (
        "bilinear_ops/plots.py",
        "figure = empty_figure((0.9 + n) + 3.2, 1.1 * (rows + 1))",
    ): "the size of a figure is a matter of taste",
    (
        "bilinear_ops/plots.py",
        "axes.scatter(array(x), array(y), s=6, color=LINES[1], alpha=0.5, linewidths=0)",
    ): "one colour of many is a matter of taste",
    (
        "bilinear_ops/_figures.py",
        "lines += axes.plot(range(1, len(curve) + 1), array(curve), label=name, markersize=4, linewidth=1.2, **style)",
    ): "the size of a marker is a matter of taste",
    (
        "bilinear_ops/_figures.py",
        "axes.legend(frameon=False, fontsize=9, ncols=1 + len(lines) // 8)",
    ): "the size of letters is a matter of taste",
    (
        "kernels/activation.py",
        "e = _exp((_at_most(20.0, z)))",
    ): "the minimum is symmetric but for NaN, and mish has the factor z too",
    (
        "kernels/rank1_tiles.py",
        'tiles={"any": {RowTile(8, 128, 4, 4): Compiled("sm_90 sparse_dots_kernel [float32]", "registers", 40)}},',
    ): "stages of a pipeline change no result: a benchmark must choose them",
}

CI_RUNS = "not gpu and not slow"
NO_TESTS = 5  # pytest's exit status where it collected none
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
    if not isinstance(node, ast.Compare | ast.BinOp | ast.Constant | ast.Call | ast.IfExp | ast.AugAssign | ast.Expr):
        return
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


def records(tests: list[str], tree: Path) -> dict[str, dict]:
    """What each test calls and how long it takes, on a tree without mistakes."""
    file = tree / "reach.json"
    _run_unchanged(tests, tree, REACH_RECORD=str(file))
    return json.loads(file.read_text())


def chosen(site: Site, found: dict[str, dict], root: Path = ROOT) -> list[str]:
    """The tests that can notice a mistake, the fastest first."""
    source = (root / site.path).read_text()
    name = reach.enclosing(source, site.line)
    place = f"{site.path}::{name}"
    if name is None or not any(place in record["functions"] for record in found.values()):
        names = list(found)
    else:
        names = [
            test
            for test, record in found.items()
            if place in record["functions"] or site.path in record["files"] or record["process"]
        ]
    return sorted(names, key=lambda test: found[test]["seconds"])


def equivalent(site: Site, root: Path = ROOT) -> str | None:
    """Why a mistake changes nothing that anyone promises, if that is known."""
    return EQUIVALENT.get((site.path, changed_line(site, root)))


def changed_line(site: Site, root: Path = ROOT) -> str:
    """The line of a site, with the mistake."""
    return _changed((root / site.path).read_bytes(), site).decode().splitlines()[site.line - 1].strip()


def _changed(source: bytes, site: Site) -> bytes:
    return source[: site.start] + site.after.encode() + source[site.stop :]


def noticed(site: Site, tests: list[str], tree: Path, seconds: float = 900) -> bool:
    """Whether the tests, in this order, fail on a tree with this mistake, or do not end."""
    order = tree / "order.json"
    order.write_text(json.dumps(tests))
    files = sorted({test.partition("::")[0] for test in tests})
    return _fail(site, files, tree, seconds, REACH_RUN=str(order))


def likeliest(site: Site, tests: list[str]) -> list[str]:
    """The files of tests, those first whose names share the most words with the source's."""
    words = set(re.split(r"[/_.]+", site.path))
    return sorted(tests, key=lambda test: -len(words & set(re.split(r"[/_.]+", test))))


def noticed_by_file(site: Site, test: str, tree: Path, seconds: float = 900) -> bool:
    """As `noticed`, of a file without records: RuntimeError if the test that fails does so without the mistake."""
    failed = tree / "failed.json"
    failed.unlink(missing_ok=True)
    if not _fail(site, [test], tree, seconds, REACH_FAILED=str(failed)):
        return False
    _run_unchanged([test], tree, **({"REACH_RUN": str(failed)} if failed.exists() else {}))
    return True


def _fail(site: Site, files: list[str], tree: Path, seconds: float, **options: str) -> bool:
    path = tree / site.path
    source = path.read_bytes()
    path.write_bytes(_changed(source, site))
    try:
        return _pytest(files, tree, seconds, **options).returncode not in (0, NO_TESTS)
    except subprocess.TimeoutExpired:
        return True
    finally:
        path.write_bytes(source)


def _run_unchanged(tests: list[str], tree: Path, **options: str) -> None:
    done = _pytest(tests, tree, None, **options)
    if done.returncode not in (0, NO_TESTS):  # a file is skipped where what it tests is not installed
        raise RuntimeError(f"the tests fail without any mistake:\n{done.stdout[-3000:]}")


def _pytest(tests: list[str], tree: Path, seconds: float | None, **options: str) -> subprocess.CompletedProcess:
    options_of_all = ["-q", "-x", "-m", CI_RUNS, "-p", "no:cacheprovider", "-p", "reach"]
    command = [sys.executable, "-m", "pytest", *options_of_all, *tests]
    path = os.pathsep.join((str(tree), str(tree / "tests"), str(ROOT / "tests")))
    env = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", **options}
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=seconds, check=False)


def main(words: list[str] | None = None) -> int:
    """Run the drawn mutations; the exit status says whether any survived."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--room", nargs="+", choices=ROOMS, default=list(ROOMS))
    parser.add_argument("--draw", type=int, default=10, help="mutations a room (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="print the drawn mutations and run nothing")
    parser.add_argument("--out", type=Path, help="append a JSON line for each mutation")
    recording = parser.add_mutually_exclusive_group()
    recording.add_argument("--reach", type=Path, help="keep the tests' records here, and read those kept before")
    recording.add_argument("--unrecorded", action="store_true", help="take no records, try all tests")
    arguments = parser.parse_args(words)
    kept = json.loads(arguments.reach.read_text()) if arguments.reach and arguments.reach.exists() else {}
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "*.egg-info")
        shutil.copytree(ROOT, tree, symlinks=True, ignore=ignored)
        for room in arguments.room:
            drawn = draw(room, arguments.draw, arguments.seed)
            if arguments.list:
                print(*(_place(room, site) for site in drawn), sep="\n")
                continue
            tests = [str(p.relative_to(ROOT)) for p in files((*ROOMS[room][1], *SHARED_TESTS))]
            for test in () if arguments.unrecorded else tests:
                if test not in kept:
                    kept[test] = records([test], tree)
                    if not kept[test]:
                        print("SKIPPED ", test, "(what it tests is not installed)", flush=True)
                    if arguments.reach:
                        arguments.reach.write_text(json.dumps(kept))
            found = {name: record for test in tests for name, record in kept.get(test, {}).items()}
            for site in drawn:
                if reason := equivalent(site):
                    print("EQUIVALENT", _place(room, site), f"({reason})", flush=True)
                    continue
                if arguments.unrecorded:
                    seen = any(noticed_by_file(site, test, tree) for test in likeliest(site, tests))
                else:
                    names = chosen(site, found)
                    # a run that takes far longer has noticed: the mistake does not end
                    seen = noticed(site, names, tree, 120 + 3 * sum(found[name]["seconds"] for name in names))
                survivors += not seen
                print("noticed " if seen else "SURVIVED", _place(room, site), flush=True)
                if arguments.out:
                    with arguments.out.open("a") as file:
                        file.write(json.dumps({"room": room, "noticed": seen, **asdict(site)}) + "\n")
    print(f"{survivors} survived")
    return survivors > 0


def _place(room: str, site: Site) -> str:
    return f"{room}: {site.path}:{site.line} {site.kind}: {site.before!r} -> {site.after!r}"


if __name__ == "__main__":
    sys.exit(main())
