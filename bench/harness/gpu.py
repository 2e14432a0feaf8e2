"""`python -m bench --gpu`: check and measure a GPU within a time limit, most valuable results first.

The ceilings come first, then the stages below. Each stage has a share of the time left, so that every stage starts.
A stage compiles ours in parallel processes, then asks one worker process for one workload at a time.

Files in --out: environment.json, ceilings.json, checks.jsonl, tiles.jsonl, receipts.jsonl, and failures.txt if any.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.harness import receipts
from bench.harness.measuring import check, measure
from bench.harness.timing import interleaved
from bench.harness.worker import DeviceLost, Worker
from bench.harness.workload import Run, Workload, smallest, tilings, workloads

REPEATS = 20  # of each check
PATIENCE = 120.0  # seconds for one workload before its process is ended
COMPILING = 0.5  # of a stage's time at most
ATTEMPTS = 3  # at one workload, each without the contenders that ended the worker before
ROW = "{:74} {:>9} {:>26} {:>6}  {}"

LISTS: dict[str, Callable[[torch.device, str], list[Workload]]] = {
    "smallest": lambda device, size: smallest(device),
    "tilings": tilings,
    "workloads": workloads,
}
DECOMPOSITIONS = ("hosvd", "cp_decompose", "interaction_eigh", "interaction_topk")  # and rankings: long library calls


@dataclass(frozen=True)
class Stage:
    """Workloads of one list, and what to do with them."""

    title: str
    kind: str  # of LISTS
    file: str
    share: float  # of the time that is left
    selects: Callable[[Workload], bool]
    tf32: bool = False  # allowed in float32 products
    on_request: bool = False  # only with --only


def _first(w: Workload) -> bool:
    """Gated workloads with identity or silu, and rank-1 workloads."""
    return w.op.startswith(("gated", "rank1", "stochastic")) and (
        not w.op.startswith("gated") or w.case.startswith(("identity", "silu"))
    )


def _unproven(w: Workload) -> bool:
    """Whether a workload launches tiles that no GPU has run, and that could hang."""
    return w.case.startswith("unproven")


STAGES = (
    Stage("smallest shapes", "smallest", "checks.jsonl", 0.25, lambda w: True),
    Stage("smallest shapes, TF32", "smallest", "checks.jsonl", 0.05, lambda w: w.dtype == torch.float32, tf32=True),
    Stage("gated tiles", "tilings", "tiles.jsonl", 0.25, lambda w: w.op.startswith("gated") and not _unproven(w)),
    Stage("interaction tiles", "tilings", "tiles.jsonl", 0.25, lambda w: w.op.startswith("interaction")),
    Stage("gated and rank-1 workloads", "workloads", "receipts.jsonl", 0.6, _first),
    Stage("unproven tiles", "tilings", "tiles.jsonl", 0.2, _unproven),
    Stage("other tiles", "tilings", "tiles.jsonl", 0.2, lambda w: not w.op.startswith(("gated", "interaction"))),
    Stage(
        "other workloads", "workloads", "receipts.jsonl", 1.0, lambda w: not _first(w) and w.op not in DECOMPOSITIONS
    ),
    Stage(
        "decompositions and rankings",
        "workloads",
        "receipts.jsonl",
        1.0,
        lambda w: w.op in DECOMPOSITIONS,
        on_request=True,
    ),
)


class Session:
    """The device, the folder of results, the time that is left and the worker."""

    def __init__(self, device: torch.device, out: Path, minutes: float, only: str):
        self.device, self.out, self.only = device, out, only
        self.deadline = time.monotonic() + 60 * minutes
        self.worker = Worker()
        self.rows: list[str] = []
        self.measured = self.wrong = 0
        self.size = "full" if device.type == "cuda" else "tiny"
        out.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def report(self, what: str, why: str) -> None:
        print(f"FAILED {what}: {why.splitlines()[0]}", flush=True)
        with (self.out / "failures.txt").open("a") as file:
            file.write(f"{what}\n{why}\n\n")

    def names(self, stage: Stage) -> list[str]:
        if stage.on_request and not self.only:
            return []
        return [str(w) for w in LISTS[stage.kind](self.device, self.size) if stage.selects(w) and self.only in str(w)]


def run(device: torch.device, out: Path, minutes: float, only: str = "") -> int:
    """Run all stages; return 1 if any result of ours is wrong or nothing was measured, else 0."""
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # a dry run: workers interpret the kernels
    session = Session(device, out, minutes, only)
    try:
        _write(out / "environment.json", receipts.environment(device) | {"minutes": minutes})
        print(f"{receipts.device_name(device)}, {minutes:g} minutes, results in {out}", flush=True)
        try:
            ceilings = session.worker.ask(min(PATIENCE, session.left()), _ceilings, device)
            _write(out / "ceilings.json", ceilings)
            print("ceilings:", ", ".join(f"{k} {v:.4g}" for k, v in ceilings.items()), flush=True)
        except (RuntimeError, TimeoutError) as error:
            session.report("ceilings", str(error))
        for stage in STAGES:
            _run_stage(session, stage)
    finally:
        session.worker.stop()
    print(f"\n{60 * minutes - session.left():.0f} s; {session.wrong} wrong, {session.measured} measured")
    print("ratio: time of the best baseline / ours")
    print(ROW.format("workload", "ours", "best baseline", "ratio", "variants and bounds: their time / ours"))
    print("\n".join(session.rows))
    return int(session.wrong > 0 or session.measured == 0)


def _run_stage(session: Session, stage: Stage) -> None:
    names = session.names(stage)
    if not names:
        return
    names = [name for i in range(3) for name in names[i::3]]  # all sizes are seen even if time runs out
    allowed = stage.share * session.left()
    end = time.monotonic() + allowed
    print(f"\n{stage.title}: {len(names)} workloads, {allowed:.0f} s", flush=True)
    _compile(session, stage, names, COMPILING * allowed)
    seconds = min(4.0, max(0.2, (end - time.monotonic()) / (2 * len(names) + 1)))  # as long again for the check
    for i, name in enumerate(names):
        if session.left() < 2 or (i and time.monotonic() > end):
            print(f"out of time: {len(names) - i} not reached", flush=True)
            break
        # a workload may exceed the stage's time, but leaves most of the session's to later stages
        patience = min(PATIENCE, max(end - time.monotonic(), session.left() / 3))
        answer = _ask(session, stage, name, seconds, patience)
        if answer is None:
            continue
        found, wrong = answer
        session.wrong += wrong
        receipts.append(found | {"stage": stage.title}, session.out / stage.file)
        for contender, why in found["failed"].items():
            session.report(f"{name}: {contender}", why)
        if "p50" in found:
            session.measured += 1
            session.rows.append(_row(name, found))
            print(session.rows[-1], flush=True)


def _ask(
    session: Session, stage: Stage, name: str, seconds: float, patience: float
) -> tuple[dict[str, Any], bool] | None:
    """The receipt of one workload and whether anything of ours is wrong, or None without a receipt.

    A contender that costs the device is left out at the next attempt.
    """
    lost: dict[str, str] = {}
    for _ in range(ATTEMPTS):
        try:
            return session.worker.ask(
                patience, _answer, stage.kind, stage.tf32, session.device, session.size, name, seconds, lost
            )
        except DeviceLost as error:
            lost[error.contender] = error.why
            if error.contender == "ours":
                break
        except TimeoutError as error:
            session.wrong += patience == PATIENCE  # else time may have been too short
            session.report(name, str(error))
            return None
        except RuntimeError as error:
            session.wrong += 1
            session.report(name, str(error))
            return None
    session.wrong += 1
    for contender, why in lost.items():
        session.report(f"{name}: {contender}", why)
    return None


def _compile(session: Session, stage: Stage, names: list[str], seconds: float) -> None:
    """Run ours and its variants once in parallel processes, to fill the compilers' caches on disk.

    Failures are reported when the workload is measured. Baselines are left to the measurement: several at full size
    do not fit in a GPU's memory.
    """
    tasks = list(names)
    workers = [Worker() for _ in range(min(8, max(1, (os.cpu_count() or 2) // 2), len(tasks)))]
    end = time.monotonic() + seconds

    def drain(worker: Worker) -> None:
        while tasks and (left := end - time.monotonic()) > 1:
            try:
                worker.ask(left, _run_ours, stage.kind, stage.tf32, session.device, session.size, tasks.pop(0))
            except (RuntimeError, TimeoutError):
                pass
        worker.stop()

    if session.device.type == "cuda":  # there is nothing to compile for the interpreter
        with ThreadPoolExecutor(len(workers)) as pool:
            list(pool.map(drain, workers))
        print(f"compiled, {len(tasks)} left", flush=True)


def _row(name: str, found: dict[str, Any]) -> str:
    times = {**found["variants"], **found["bounds"]}
    others = ", ".join(f"{n} {times[n]['ratio']:.2f}" for n in sorted(times, key=lambda n: times[n]["ratio"])[:4])
    best = found["best_baseline"]
    return ROW.format(
        name, f"{found['p50'] * 1e3:.3f} ms", best or "-", f"{found['ratio']:.2f}" if best else "-", others
    )


def _write(path: Path, found: dict[str, Any]) -> None:
    path.write_text(json.dumps(found, indent=2) + "\n")


# Functions that workers call.


def _find(kind: str, tf32: bool, device: torch.device, size: str, name: str) -> Workload:
    torch.backends.cuda.matmul.allow_tf32 = tf32
    return next(w for w in LISTS[kind](device, size) if str(w) == name)


def _ceilings(device: torch.device) -> dict[str, float]:
    """Bytes copied per second, reads and writes both counted, and FLOPs per second of a large product."""
    n, copied = (8192, 1 << 30) if device.type == "cuda" else (256, 1 << 22)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    source = torch.randint(0, 100, (copied,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    runs: dict[str, Run] = {"copy": lambda: (target.copy_(source),), "matmul": lambda: (a @ b,)}
    times, _ = interleaved(runs, device, 2.0)
    return {
        "copy TB/s": 2 * copied / times["copy"].median / 1e12,
        f"{n}^3 {str(dtype).removeprefix('torch.')} matmul TFLOP/s": 2 * n**3 / times["matmul"].median / 1e12,
    }


def _answer(
    kind: str, tf32: bool, device: torch.device, size: str, name: str, seconds: float, lost: dict[str, str]
) -> tuple[dict[str, Any], bool]:
    """The receipt of a workload without the `lost` contenders, and whether ours or a variant is wrong."""
    torch.cuda.empty_cache()
    workload = _find(kind, tf32, device, size, name)
    rest = dataclasses.replace(
        workload,
        baselines={n: c for n, c in workload.baselines.items() if n not in lost},
        variants={n: c for n, c in workload.variants.items() if n not in lost},
        bounds={n: c for n, c in workload.bounds.items() if n not in lost},
    )
    if kind == "smallest" or (kind == "tilings" and device.type == "cpu"):  # interpreted tiles are not timed
        result = check(rest, seed=1, repeats=REPEATS if device.type == "cuda" else 2)
    else:
        result = measure(rest, device, seed=2, seconds=seconds, repeats=3)
    result.failed |= lost
    wrong = any(n == "ours" or n in workload.variants for n in result.failed)
    return receipts.receipt(result, device), wrong


def _run_ours(kind: str, tf32: bool, device: torch.device, size: str, name: str) -> None:
    workload = _find(kind, tf32, device, size, name)
    inputs = workload.inputs(0)
    for contender in (workload.ours, *workload.variants.values()):
        contender(*inputs)()
        torch.cuda.empty_cache()  # other processes use the same GPU
