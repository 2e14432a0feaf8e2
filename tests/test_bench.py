"""The benches run and time nothing that is wrong; the report says what the receipts say."""

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest
import torch

import bilinear_ops as bo
from bench import claims, report
from bench.__main__ import main
from bench.harness import receipts, svg
from bench.harness.measuring import measure
from bench.harness.timing import peak_memory
from bench.harness.worker import Worker
from bench.harness.workload import Workload, training_step, workloads

CPU = torch.device("cpu")
ONLY = "[silu, step]"
WORDS = ["--device", "cpu", "--size", "tiny", "--only", ONLY, "--seconds", "0.01"]


@pytest.fixture
def workload() -> Workload:
    (found,) = workloads(CPU, "tiny", only=ONLY)
    return found


def test_table_and_receipts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cpu.jsonl"
    assert main([*WORDS, "--json", str(path)]) == 0
    assert main([*WORDS, "--json", str(path), "--impl", "triton", "--check"]) == 0
    table = capsys.readouterr().out
    assert ONLY in table and "correct, not timed" in table
    measured, interpreted = receipts.load(path)
    assert (measured["kind"], interpreted["kind"]) == ("measured", "interpreted")
    assert measured["tree"] == receipts.tree_hash()
    assert measured["p20"] <= measured["p50"] <= measured["p80"]
    assert set(measured["baselines"]) == {"eager", "packed"} and measured["best_baseline"] in measured["baselines"]
    assert measured["peak_memory"] > 0 and measured["ratio"] > 0
    assert "p50" not in interpreted and not interpreted["baselines"]


def test_wrong_results_are_not_timed(workload: Workload) -> None:
    wrong = dataclasses.replace(
        workload, ours=training_step(lambda x, w, v, p: bo.gated_mlp(x, v, w, p, activation="silu"))
    )
    found = measure(wrong, CPU, seed=0, seconds=0)
    assert "result 0" in found.failed["ours"] and not found.timings


def test_unwritten_results_are_found(workload: Workload) -> None:
    torch.use_deterministic_algorithms(False)  # which alone would fill fresh memory with NaN
    lazy = dataclasses.replace(workload, ours=lambda *inputs: lambda: tuple(map(torch.empty_like, inputs)))
    assert "not finite" in measure(lazy, CPU, seed=0, seconds=0).failed["ours"]


def test_a_failing_baseline_is_reported_and_left_out(workload: Workload) -> None:
    def broken(*inputs: object) -> None:
        raise RuntimeError("no such device")

    found = measure(dataclasses.replace(workload, baselines={**workload.baselines, "peer": broken}), CPU, 0, 0)
    assert found.failed == {"peer": "RuntimeError: no such device"}
    assert {"ours", "eager", "packed"} <= set(found.timings)


def test_peak_memory_counts_what_is_held_at_once() -> None:
    def run() -> tuple[torch.Tensor, ...]:
        first = torch.ones(1000)
        second = first + first
        del first
        return (second + 1,)

    assert 2 * 4000 <= peak_memory(run, CPU) < 2 * 4000 + 100  # scalars count too


def _receipt(**changes: object) -> dict[str, object]:
    timing = {"p20": 0.9e-3, "p50": 1e-3, "p80": 1.1e-3}
    return {
        "schema": receipts.SCHEMA,
        "kind": "measured",
        "op": "op",
        "case": "case",
        "shape": {"m": 2},
        "dtype": "float32",
        "device": "Device",
        "torch": "2",
        "triton": "3",
        "tree": "now",
        "commit": "c",
        "date": "2026-01-01T00:00:00Z",
        "clock": "clock",
        **timing,
        "flops": 10,
        "bytes": 10,
        "peak_memory": 50,
        "best_baseline": "eager",
        "ratio": 1.5,
        "baselines": {"eager": {"p20": 1.4e-3, "p50": 1.5e-3, "p80": 1.6e-3, "ratio": 1.5, "peak_memory": 100}},
        "variants": {},
        "bounds": {},
        "failed": {},
        **changes,
    }


def _written(folder: Path, *found: dict[str, object]) -> Path:
    (folder / "device.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found))
    return folder


def test_report_takes_the_latest_and_marks_the_stale(tmp_path: Path) -> None:
    later = _receipt(date="2026-02-01T00:00:00Z", ratio=1.7)
    other = _receipt(case="other", tree="then")
    found = report.latest(_written(tmp_path, later, _receipt(), other))
    text = report.text(found, "now", "plots")
    assert "| `op` | case; m 2 | 1 ms | 1.5 ms (eager) | 1.70 | 0.5 |\n" in text
    assert f"other; m 2 {report.STALE} |" in text and f"case; m 2 {report.STALE}" not in text
    assert f"{report.STALE}: measured before" in text
    assert "All rows: measured before" in report.text(found, "later", "plots")
    assert "measured before" not in report.text(found[:1], "now", "plots")


def test_a_later_time_takes_the_place_of_a_failure(tmp_path: Path) -> None:
    """And not of a later failure, nor of another workload's."""
    untimed = {"clock": "not timed", "p50": None, "best_baseline": None}
    failed = _receipt(**untimed, failed={"ours": "wrong"})
    mended = _receipt(date="2026-02-01T00:00:00Z")
    other = {**failed, "case": "other"}
    assert report.latest(_written(tmp_path, failed, mended, other)) == [mended, other]
    assert report.latest(_written(tmp_path, {**failed, "date": "2026-03-01T00:00:00Z"}, mended))[1]["failed"]
    text = report.text([failed, _receipt(**untimed, case="checked")], "now", "plots")
    assert "case; m 2 | failed: wrong |" in text and "checked; m 2 | correct, not timed |" in text


def test_report_keeps_kinds_apart(tmp_path: Path) -> None:
    interpreted = _receipt(kind="interpreted", clock="not timed", p50=None)
    found = report.latest(_written(tmp_path, interpreted, _receipt(kind="modelled"), _receipt()))
    measured, checked, modelled = report.text(found, "now", "plots").split("\n\n**")
    assert measured.startswith("**Measured** on Device (float32; clock; torch 2, triton 3; 2026-01-01):")
    assert "1 ms" in measured
    assert checked.startswith("Interpreted") and "1 ms" not in checked and "never timed" in checked
    assert modelled.startswith("Modelled")
    assert len(report.plots(found)) == 2 and "![" in measured and "![" not in modelled


@pytest.mark.parametrize("change", [{"schema": 99}, {"schema": None}, {"kind": "guessed"}])
def test_report_refuses_what_it_does_not_know(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"device.jsonl:2: (schema|kind)"):
        report.latest(_written(tmp_path, _receipt(), _receipt(**change)))


NAMES = ("claims", "example", "bench")


def test_claims_quote_the_newest_receipt() -> None:
    """Ours before eager PyTorch's, and those of the fastest and of the smallest baseline if they are others."""
    baselines = {
        "eager": {"p50": 8e-3, "peak_memory": 400_000},
        "packed": {"p50": 4e-3, "peak_memory": 200_000},
        "compiled": {"p50": 9e-3, "peak_memory": 100_000},
    }
    changes = {"op": "interaction_eigh", "case": "2 strongest", "best_baseline": "packed", "peak_memory": 50_000}
    receipt = _receipt(**changes, baselines=baselines)
    older = {**receipt, "p50": 9e-3, "date": "2025-01-01T00:00:00Z"}
    modelled = {**receipt, "p50": 9e-3, "kind": "modelled", "date": "2027-01-01T00:00:00Z"}
    found = [receipt, older, modelled]
    (line,) = claims.claim_lines(found).splitlines()
    assert line.endswith(
        ": 50 kB of memory in place of 400 kB, 1 ms in place of 8 ms (eager PyTorch; m 2); compiled: 100 kB, 9 ms"
        "; packed: 200 kB, 4 ms."
    )
    assert claims.example(found).startswith("50 kB of memory in place of 400 kB, 1 ms in place of 8 ms (eager PyTorch")
    assert claims.example(found).endswith("Device: Device, clock.")
    assert claims.claim_lines([modelled]) == claims.example([modelled]) == "No receipts yet."


def test_report_is_reproducible(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(
        "before\n" + "".join(f"<!-- {name}:begin -->\nold\n<!-- {name}:end -->\n" for name in NAMES) + "after\n"
    )
    words = ["--results", str(_written(tmp_path, _receipt(), _receipt(case="other"))), "--readme", str(readme)]
    assert report.main(words) == 0
    leftover = tmp_path / "plots" / "of-no-receipt.svg"
    leftover.touch()
    assert report.main([*words, "--check"]) == 1 and leftover.exists()
    assert report.main(words) == 0 and not leftover.exists()
    first = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert report.main([*words, "--check"]) == 0 and report.main(words) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == first
    assert first["README.md"].startswith(b"before\n") and first["README.md"].endswith(b"after\n")
    shown = set(re.findall(r"!\[.*\]\(plots/(.*)\)", readme.read_text()))
    assert (
        shown
        == {name for name in first if name.endswith(".svg")}
        == {"device-clock-speed.svg", "device-clock-memory.svg"}
    )
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="claims:begin"):
        report.main(words)


def test_without_receipts_there_is_no_figure(tmp_path: Path) -> None:
    assert report.latest(tmp_path) == [] and report.plots([]) == {}
    assert report.text([], "now", "plots") == "No receipts yet."


def test_committed_receipts_are_those_that_the_readme_shows() -> None:
    found = report.latest()
    assert any(r["kind"] == "measured" and r["best_baseline"] for r in found)
    written = {path.name: path.read_text() for path in (receipts.RESULTS / "plots").iterdir()}
    assert written == report.plots(found)
    readme = (receipts.ROOT / "README.md").read_text()
    section = report.text(found, receipts.tree_hash(), "bench/results/plots")
    for line in section.splitlines():
        if line.startswith(("**", "|", "!")):
            assert line.replace(f" {report.STALE}", "") in readme.replace(f" {report.STALE}", "")


def test_tree_hash_follows_the_sources(tmp_path: Path) -> None:
    for name in ("kernels/a.py", "bilinear_ops/b.py", "tests/c.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("1")
    (tmp_path / "bilinear_ops/kernels").symlink_to("../kernels")
    first = receipts.tree_hash(tmp_path)
    (tmp_path / "tests/c.py").write_text("2")
    assert receipts.tree_hash(tmp_path) == first
    (tmp_path / "kernels/a.py").write_text("2")
    assert receipts.tree_hash(tmp_path) != first


def test_a_worker_outlives_the_death_of_its_process() -> None:
    worker = Worker()
    try:
        with pytest.raises(RuntimeError, match="died"):
            worker.ask(300, os._exit, 3)
        with pytest.raises(RuntimeError, match="ValueError: math domain"):
            worker.ask(300, __import__("math").sqrt, -1)
        assert worker.ask(300, max, 1, 2) == 2
    finally:
        worker.stop()


@pytest.mark.parametrize("better_above", (False, True))
def test_bars_start_at_one_and_show_their_side(better_above: bool) -> None:
    ratios = [("double", 2.0, ""), ("half", 0.5, ""), ("fourfold", 4.0, "")]
    chart = svg.ratio_chart("title", "axis", ratios, better_above)
    (one,) = re.findall(r'<line x1="([\d.]+)" .* stroke="#000000"', chart)
    bars = re.findall(r'<rect x="([\d.]+)" y="\d+" width="([\d.]+)" height="\d+" fill="(#\w+)"', chart)
    (x2, w2, c2), (x_half, w_half, c_half), (x4, w4, _) = bars
    assert x2 == x4 == one and float(x_half) + float(w_half) == pytest.approx(float(one), abs=0.15)
    assert float(w2) == pytest.approx(float(w_half), abs=0.15) == pytest.approx(float(w4) / 2, abs=0.15)  # logarithmic
    assert (c2, c_half) == ((svg.BETTER, svg.WORSE) if better_above else (svg.WORSE, svg.BETTER))
