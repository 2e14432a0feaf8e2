"""The GPU command without a GPU: order, exit status, lost devices, the lead of its clock."""

import dataclasses
import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.__main__ import main
from bench.harness import gpu, measuring, receipts, timing, worker
from bench.harness.worker import DeviceLost, Worker
from bench.harness.workload import Contender, Workload, tilings, workloads

CPU = torch.device("cpu")
PATIENCE = 300.0  # seconds for a process to start on a busy machine


def times(factor: float) -> Contender:
    return lambda x: lambda: (factor * x,)


def raising(error: Exception) -> Contender:
    def build(x: Tensor) -> Callable[[], tuple[Tensor]]:
        def run() -> tuple[Tensor]:
            raise error

        return run

    return build


RIGHT = Workload(
    op="gated_mlp",
    case="silu, step",
    shape={},
    dtype=torch.float32,
    inputs=lambda seed: (torch.randn(3, generator=torch.Generator().manual_seed(seed)),),
    reference=times(2),
    ours=times(2),
    baselines={"eager": times(2)},
    flops=3,
    bytes=24,
    variants={"variant": times(2)},
)


class Here(Worker):
    """A worker in this process, which counts restarts."""

    stops = 0

    def ask(self, timeout: float, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except DeviceLost:
            self.stop()
            raise
        except Exception as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error

    def stop(self) -> None:
        Here.stops += 1


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """The command over given lists, in this process."""

    def run(only: str = "", **lists: list[Workload]) -> int:
        found = {kind: lists.get(kind, []) for kind in gpu.LISTS}
        monkeypatch.setattr(gpu, "LISTS", {kind: lambda *a, w=w: w for kind, w in found.items()})
        monkeypatch.setattr(gpu, "Worker", Here)
        monkeypatch.setattr(gpu, "_ceilings", lambda device: {"copy": 1.0})
        Here.stops = 0
        return gpu.run(CPU, tmp_path, 0.2, only)

    return run


def found(folder: Path, file: str) -> list[dict[str, Any]]:
    return list(receipts.load(folder / file)) if (folder / file).exists() else []


def test_correct_results_exit_zero(command: Callable[..., int], tmp_path: Path) -> None:
    assert (
        command(smallest=[RIGHT], tilings=[dataclasses.replace(RIGHT, op="gated_forward_kernel")], workloads=[RIGHT])
        == 0
    )
    assert [r["stage"] for r in found(tmp_path, "checks.jsonl")] == ["smallest shapes", "smallest shapes, TF32"]
    assert [r["op"] for r in found(tmp_path, "tiles.jsonl")] == ["gated_forward_kernel"]
    (receipt,) = found(tmp_path, "receipts.jsonl")
    assert receipt["p50"] > 0 and not (tmp_path / "failures.txt").exists()


@pytest.mark.parametrize("kind", ("smallest", "tilings", "workloads"))
@pytest.mark.parametrize("role", ("ours", "variant", "raises"))
def test_a_wrong_result_exits_with_one(kind: str, role: str, command: Callable[..., int], tmp_path: Path) -> None:
    """In any list, whether ours or a variant, though all else is right."""
    change: dict[str, Any] = {
        "ours": {"ours": times(2.01)},
        "variant": {"variants": {"variant": times(2.01)}},
        "raises": {"ours": raising(RuntimeError("no such tile"))},
    }[role]
    lists = {k: [RIGHT] for k in gpu.LISTS}
    lists["tilings"] = [dataclasses.replace(RIGHT, op="gated_forward_kernel")]
    lists[kind] = [*lists[kind], dataclasses.replace(lists[kind][0], case="silu, wrong", **change)]
    assert command(**lists) == 1
    assert "silu, wrong" in (tmp_path / "failures.txt").read_text()


def test_a_wrong_baseline_does_not_fail_ours(command: Callable[..., int], tmp_path: Path) -> None:
    wrong = dataclasses.replace(RIGHT, baselines={"eager": times(2.01), "peer": times(2)})
    assert command(workloads=[wrong]) == 0
    (receipt,) = found(tmp_path, "receipts.jsonl")
    assert receipt["best_baseline"] == "peer" and receipt["failed"].keys() == {"eager"}


def test_nothing_measured_exits_with_one(command: Callable[..., int]) -> None:
    assert command(smallest=[RIGHT]) == 1


@pytest.mark.parametrize("culprit", ("ours", "variant", "eager"))
def test_a_lost_device_is_blamed_on_its_contender(
    culprit: str, command: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process is restarted; all other contenders and workloads are measured."""
    lost: list[str] = []

    def fault(x: Tensor) -> Callable[[], tuple[Tensor]]:
        def run() -> tuple[Tensor]:
            lost.append("illegal memory access")
            return (2 * x,)  # the error appears later, as a kernel's does

        return run

    def synchronise() -> None:
        if lost:
            raise RuntimeError(f"CUDA error: {lost[0]}")

    def stop(self: Here) -> None:
        Here.stops += 1
        lost.clear()

    monkeypatch.setattr(measuring, "synchronise", synchronise)
    monkeypatch.setattr(Here, "stop", stop)
    change = {
        "ours": {"ours": fault},
        "variant": {"variants": {"variant": fault}},
        "eager": {"baselines": {"eager": fault}},
    }
    bad = dataclasses.replace(RIGHT, case="silu, bad", **change[culprit])  # type: ignore[arg-type]
    after = dataclasses.replace(RIGHT, case="silu, after")
    assert command(workloads=[RIGHT, bad, after]) == (culprit != "eager")
    measured = {r["case"]: r for r in found(tmp_path, "receipts.jsonl")}
    assert measured.keys() == {"silu, step", "silu, after"} | ({"silu, bad"} if culprit != "ours" else set())
    assert not measured["silu, after"]["failed"]
    assert Here.stops == 2  # once for the loss, once at the end
    assert f"silu, bad]  float32: {culprit}\n" in (tmp_path / "failures.txt").read_text()


def test_a_worker_restarts_after_a_lost_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """And after any error that leaves the device unusable; an ordinary one keeps the process."""
    answers: list[tuple[Any, Exception | None, bool]] = []

    class Pipe:
        calls = [(max, (1, 2)), (_lose, ()), (int, ("x",))]

        def recv(self) -> Any:
            if not self.calls:
                raise EOFError
            return self.calls.pop(0)

        def send(self, answer: tuple[Any, Exception | None, bool]) -> None:
            answers.append(answer)

    worker._serve(Pipe())  # type: ignore[arg-type]
    assert [usable for *_, usable in answers] == [True, False, True]
    assert answers[0][0] == 2 and str(answers[1][1]) == "peer: gone"
    monkeypatch.setattr(worker, "synchronise", _lose)
    Pipe.calls = [(max, (1, 2))]
    worker._serve(Pipe())  # type: ignore[arg-type]
    assert not answers[-1][2]  # an error that appears after the call ends it all the same


def _lose() -> None:
    raise DeviceLost("peer", "gone")


def test_a_lost_device_reaches_the_asker_and_ends_the_process() -> None:
    asked = Worker()
    try:
        first = asked.ask(PATIENCE, os.getpid)
        with pytest.raises(RuntimeError, match="ValueError"):
            asked.ask(PATIENCE, int, "x")
        assert asked.ask(PATIENCE, os.getpid) == first
        with pytest.raises(DeviceLost) as lost:
            asked.ask(PATIENCE, _lose)
        assert asked.ask(PATIENCE, os.getpid) != first
        assert (lost.value.contender, lost.value.why) == ("peer", "gone")
        with pytest.raises(TimeoutError, match="no answer within 0 s"):
            asked.ask(0.1, time.sleep, 60)
        assert asked.ask(PATIENCE, max, 1, 2) == 2
    finally:
        asked.stop()


def test_stages_hold_every_workload_once() -> None:
    """The first activations and ranks before others; decompositions last, and on request."""
    listed = {str(w): w for w in workloads(CPU, "tiny")}
    stages = [stage for stage in gpu.STAGES if stage.kind == "workloads"]
    assert [stage.on_request for stage in stages] == [False, False, True]
    chosen = [[w for w in listed.values() if stage.selects(w)] for stage in stages]
    assert sorted(map(str, itertools.chain(*chosen))) == sorted(listed)
    assert {w.case.split(",")[0] for w in chosen[0] if w.op == "gated_mlp"} == {"identity", "silu"}
    assert {w.op for w in chosen[2]} == set(gpu.DECOMPOSITIONS)


def test_stages_hold_every_tiling_once() -> None:
    pytest.importorskip("triton")
    stages = {s.title: [w.op for w in tilings(CPU, "tiny") if s.selects(w)] for s in gpu.STAGES if s.kind == "tilings"}
    gated, interaction, unproven, other = stages.values()
    assert list(stages)[0].startswith("gated") and gated and all("gated" in op for op in gated)
    assert list(stages)[1].startswith("interaction") and interaction and all("interaction" in op for op in interaction)
    assert sorted([*gated, *interaction, *other]) == sorted(w.op for w in tilings(CPU, "tiny")) and not unproven


def test_unproven_tiles_have_a_workload_and_a_stage_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are any: none is a variant among proven ones, whose stages come first."""
    pytest.importorskip("triton")
    from bilinear_ops.kernels import config

    monkeypatch.setattr(config, "architecture", lambda device: "sm_90")
    listed = [w for w in tilings(CPU, "tiny") if w.op == "gated_forward_kernel"]
    (unproven,) = (w for w in listed if w.case == "unproven tiles")
    assert [name.split()[0] for name in unproven.variants] == ["RingTile"] and not unproven.baselines
    assert not any("RingTile" in name for w in listed if w is not unproven for name in w.variants)
    assert [s.title for s in gpu.STAGES if s.kind == "tilings" and s.selects(unproven)] == ["unproven tiles"]


def test_decompositions_run_on_request_only(command: Callable[..., int], tmp_path: Path) -> None:
    hosvd = dataclasses.replace(RIGHT, op="hosvd")
    assert command(workloads=[hosvd]) == 1 and not found(tmp_path, "receipts.jsonl")
    assert command("hosvd", workloads=[hosvd]) == 0 and found(tmp_path, "receipts.jsonl")


class FakeDevice:
    """A host and a device whose clocks move as work is launched and done."""

    RATE = 1e9  # clocks per second

    def __init__(self) -> None:
        self.host = self.device = 0.0

    def launch(self, host: float, device: float) -> None:
        self.host += host
        self.device = max(self.device, self.host) + device

    def event(self, enable_timing: bool) -> Any:
        fake = self

        class Event:
            def record(self) -> None:
                self.at = max(fake.device, fake.host)

            def synchronize(self) -> None:
                fake.host = max(fake.host, self.at)

            def elapsed_time(self, end: Any) -> float:
                return 1e3 * (end.at - self.at)

        return Event()


@pytest.mark.parametrize("host", (0.0, 0.3e-3, 5e-3))
def test_gpu_clock_counts_the_device_and_not_the_host(host: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten kernels of 20 us, however long the host takes to launch them."""
    fake = FakeDevice()
    monkeypatch.setattr(timing, "FLUSH_BYTES", 1)
    monkeypatch.setattr(torch.cuda, "Event", fake.event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda clocks: fake.launch(0.0, clocks / fake.RATE), raising=False)
    monkeypatch.setattr(time, "perf_counter", lambda: fake.host)

    def run() -> tuple[Tensor, ...]:
        for _ in range(10):
            fake.launch(host / 10, 20e-6)
        return ()

    clock = timing._gpu_clock(CPU)
    assert [clock(run) for _ in range(3)] == pytest.approx([200e-6] * 3)


@pytest.mark.ci
def test_gpu_command_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            main(["--gpu"])
        assert "needs a GPU" in capsys.readouterr().err
    assert gpu.run(CPU, tmp_path, 2.0, "[silu, step]") == 0
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"environment.json", "ceilings.json", "receipts.jsonl"}
    (receipt,) = receipts.load(tmp_path / "receipts.jsonl")
    assert receipt["p50"] > 0
