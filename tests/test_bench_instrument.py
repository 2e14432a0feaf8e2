"""The instrument on workloads with known answers: contenders of known time, memory and value."""

import dataclasses
import itertools
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import bench.__main__ as command
from bench.harness import receipts
from bench.harness.measuring import Result, check, measure
from bench.harness.timing import Timing, interleaved
from bench.harness.workload import Contender, Workload

CPU = torch.device("cpu")
PROCESS_TIME = time.process_time


class Clock:
    """CPU time that passes only where a contender says so."""

    now = 0.0


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "process_time", lambda: Clock.now)


def contender(
    seconds: float, kilobytes: int = 1, error: float = 0.0, errors: Iterator[float] | None = None
) -> Contender:
    """2 x (1 + error), with so much CPU time and workspace; `errors` gives one for each run."""

    def build(x: Tensor) -> Callable[[], tuple[Tensor]]:
        def run() -> tuple[Tensor]:
            workspace = torch.empty(1000 * kilobytes, dtype=torch.uint8)
            Clock.now += seconds
            del workspace
            return (2 * x * (1 + (next(errors) if errors else error)),)

        return run

    return build


def known(ours: Contender, baselines: dict[str, Contender], **more: Any) -> Workload:
    return Workload(
        op="double",
        case="known",
        shape={"n": 3},
        dtype=torch.float32,
        inputs=lambda seed: (torch.randn(3, generator=torch.Generator().manual_seed(seed)),),
        reference=lambda x: lambda: (2 * x,),
        ours=ours,
        baselines=baselines,
        flops=3,
        bytes=24,
        **more,
    )


def measured(workload: Workload) -> Result:
    return measure(workload, CPU, seed=0, seconds=0)


@pytest.mark.parametrize("names", list(itertools.permutations(("eager", "peer", "other"))), ids=",".join)
def test_ratio_is_the_fastest_baselines_time_over_ours(names: tuple[str, ...], capsys: Any) -> None:
    of = {"eager": contender(8, 4), "peer": contender(4, 8), "other": contender(16, 2)}
    found = measured(known(contender(2, 2), {name: of[name] for name in names}))
    assert found.best == "peer"
    ratios = {name: found.ratio(name) for name in names}
    assert ratios == pytest.approx({"peer": 2, "eager": 4, "other": 8})
    receipt = receipts.receipt(found, CPU)
    assert receipt["best_baseline"] == "peer" and receipt["ratio"] == 2 and receipt["p50"] == 2
    baselines = receipt["baselines"]
    assert {name: (baselines[name]["ratio"], baselines[name]["p50"]) for name in names} == {
        name: (ratio, 2 * ratio) for name, ratio in ratios.items()
    }
    memory = {name: baselines[name]["peak_memory"] // 1000 for name in names}
    assert memory == {"peer": 8, "eager": 4, "other": 2} and receipt["peak_memory"] // 1000 == 2
    *_, ratio, eager, share, _ = command.row(found).split()
    assert (ratio, eager, share) == ("2.00", "4.00", "0.50")  # our memory over eager's


def test_a_slower_one_has_a_ratio_below_one() -> None:
    found = measured(known(contender(4), {"eager": contender(2)}))
    assert found.ratio("eager") == 0.5


WRONG = contender(0.1, error=1e-3)


def test_a_wrong_baseline_is_not_the_best_one() -> None:
    found = measured(known(contender(1), {"wrong": WRONG, "eager": contender(2)}))
    assert "result 0" in found.failed["wrong"] and "wrong" not in found.timings
    assert found.best == "eager"


def test_a_wrong_variant_is_not_timed() -> None:
    found = measured(known(contender(1), {}, variants={"wrong": WRONG, "correct": contender(1)}))
    assert found.failed.keys() == {"wrong"} and found.timings.keys() == {"ours", "correct"}


@pytest.mark.parametrize("repeat", (1, 2))
@pytest.mark.parametrize("role", ("ours", "variant"))
def test_a_result_that_changes_between_runs_is_found(role: str, repeat: int) -> None:
    """By one rounding unit, in the first or only in the last of the repeats."""
    restless = contender(1, errors=itertools.chain([0.0] * repeat, itertools.repeat(2**-23)))
    ours, variants = (restless, {}) if role == "ours" else (contender(1), {"variant": restless})
    found = check(known(ours, {}, variants=variants), seed=0, repeats=3)
    assert found.failed == {role: "AssertionError: two runs on the same inputs differ"}


def test_baselines_may_be_nondeterministic() -> None:
    """Ours runs with deterministic algorithms, which fill fresh memory with NaN; baselines run as in use."""
    seen: dict[str, bool] = {}

    def noting(name: str) -> Contender:
        def build(x: Tensor) -> Callable[[], tuple[Tensor]]:
            def run() -> tuple[Tensor]:
                seen.setdefault(name, torch.are_deterministic_algorithms_enabled())
                return (2 * x,)

            return run

        return build

    assert not check(known(noting("ours"), {"eager": noting("eager")}), seed=0).failed
    assert seen == {"ours": True, "eager": False}


def test_without_a_reference_ours_has_failed() -> None:
    def none(x: Tensor) -> Callable[[], tuple[Tensor]]:
        raise RuntimeError("no reference")

    found = measured(dataclasses.replace(known(contender(1), {}), reference=none))
    assert found.failed == {"ours": "RuntimeError: no reference"} and not found.timings


def test_ratios_are_taken_round_by_round() -> None:
    """Neither the ratio of medians (2.5), nor that of sums, nor a mean of ratios (4.7)."""
    slow, fast = Timing((3.0, 10.0, 40.0)), Timing((1.0, 10.0, 4.0))
    assert slow.ratio(fast) == 3.0
    assert fast.ratio(slow) == 1 / 3


def test_quantiles_and_noise() -> None:
    samples = Timing((10.0, 4.0, 2.0, 8.0, 0.0, 6.0, 1.0, 3.0, 5.0, 7.0, 9.0))
    assert (samples.quantile(2), samples.median, samples.quantile(8)) == (2.0, 5.0, 8.0)
    found = Result(known(contender(1), {}), {"ours": samples}, {"ours": 1})
    receipt = receipts.receipt(found, CPU)
    assert (receipt["p20"], receipt["p50"], receipt["p80"]) == (2.0, 5.0, 8.0)
    assert Timing((1.0, 4.0, 1.0, 4.0)).noise() == 0.75
    assert Timing((5.0,)).quantile(2) == 5.0


def test_rounds_are_interleaved_in_alternating_order() -> None:
    order: list[str] = []
    times, _ = interleaved({name: lambda n=name: order.append(n) for name in "abc"}, CPU, 0, rounds=(4, 9))  # type: ignore[misc]
    timed = "".join(order[6:][1::2])  # after two runs of each to warm up, an untimed run precedes each timed one
    assert "".join(order[:6]) == "aabbcc" and order[6:][::2] == order[6:][1::2]
    assert timed == "cbaabc"
    assert {name: len(t.samples) for name, t in times.items()} == {"a": 2, "b": 2, "c": 2}
    times, _ = interleaved({"a": lambda: ()}, CPU, 60, rounds=(4, 9))
    assert len(times["a"].samples) == 9


def test_clock_is_named_for_what_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU time counts no sleep, the wall clock does."""
    monkeypatch.setattr(time, "process_time", PROCESS_TIME)

    def sleep() -> tuple[Tensor, ...]:
        time.sleep(0.02)
        return ()

    one, name = interleaved({"sleep": sleep}, CPU, 0)
    assert name == "CPU time, 1 thread" and one["sleep"].median < 0.01
    torch.set_num_threads(2)
    try:
        two, name = interleaved({"sleep": sleep}, CPU, 0)
    finally:
        torch.set_num_threads(1)
    assert name == "wall clock, 2 threads" and two["sleep"].median > 0.015


def test_receipt_names_workload_device_and_code() -> None:
    workload = known(contender(1), {})
    found = receipts.receipt(measured(workload), CPU)
    assert (found["op"], found["case"], found["shape"], found["dtype"]) == ("double", "known", {"n": 3}, "float32")
    assert (found["flops"], found["bytes"]) == (3, 24)
    assert found["device"].startswith("CPU: ") and found["torch"] == torch.__version__
    assert found["clock"] == "CPU time, 1 thread" and found["tree"] == receipts.tree_hash()
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=receipts.ROOT, capture_output=True, text=True)
    if head.returncode == 0:
        assert found["commit"][:12] == head.stdout[:12]


def test_exit_status_says_whether_ours_is_correct(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    words = ["--device", "cpu", "--size", "tiny", "--seconds", "0.01"]
    for ours, baseline, status in ((contender(1), contender(1), 0), (contender(1), WRONG, 0), (WRONG, contender(1), 1)):
        workload = known(ours, {"eager": baseline})
        monkeypatch.setattr(command, "workloads", lambda *a, w=workload: [w])
        assert command.main(words) == command.main([*words, "--check"]) == status
        assert ("FAILED" in capsys.readouterr().out) == bool(status)


@pytest.mark.parametrize("status", (0, 1))
def test_exit_status_of_interpreted_kernels_counts(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "workloads", lambda *a: [known(contender(1), {})])
    done = subprocess.CompletedProcess([], status)
    monkeypatch.setattr(command.subprocess, "run", lambda *a, **k: done)
    assert command.main(["--device", "cpu", "--quick", "--seconds", "0.01"]) == status


@pytest.mark.parametrize("spills", (0, 1))
def test_exit_status_of_the_static_gate(spills: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from bench.static import gate, sass

    found = gate.Report("kernel", "case", "sm_90", 0, sass.Code(spills=spills), programs=1, tiles=1, resident=1)
    monkeypatch.setattr(gate, "all_reports", lambda *a: [found])
    monkeypatch.setattr(gate.baseline, "load", lambda file: {str(found): found.figures()})
    monkeypatch.setattr(sys, "argv", ["bench.static"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_module("bench.static", run_name="__main__")
    assert exit.value.code == bool(spills)
