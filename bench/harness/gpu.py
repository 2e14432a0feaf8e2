"""`python -m bench --gpu`: all that is worth knowing about a device, in bounded time, written down as it is found.

In this order, each in a process that may fail without ending the run: the device and versions; its ceilings; all
compilations, in parallel; every op checked at small shapes, 20 times over; every workload beside its baselines; other
tiles. What takes too long is told how much was not reached; --only, in a second run, goes straight to it.
Under --out: environment.json, ceilings.json, checks.jsonl, receipts.jsonl, tiles.jsonl, and failures.txt if any.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bench.harness import receipts
from bench.harness.measuring import check, measure
from bench.harness.timing import interleaved
from bench.harness.worker import Worker
from bench.harness.workload import Run, Workload, tilings, workloads

LISTS: dict[str, Callable[[torch.device, str], list[Workload]]] = {"workloads": workloads, "tilings": tilings}
COMPILING = 0.3  # of the time, at most, goes to compilation
REPEATS = 20
PATIENCE = 120.0  # seconds for one workload before its process is ended
ROW = "{:74} {:>9} {:>26} {:>6}  {}"


class Session:
    """The time that is left, the folder of results and the device."""

    def __init__(self, device: torch.device, out: Path, minutes: float, only: str):
        self.device, self.out, self.only = device, out, only
        self.minutes = minutes
        self.deadline = time.monotonic() + 60 * minutes
        self.worker = Worker()
        self.rows: list[str] = []
        self.size = "full" if device.type == "cuda" else "tiny"
        out.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Ask the worker; a failure is written down and answered with None."""
        if self.left() < 2:
            return None
        try:
            return self.worker.ask(min(PATIENCE, self.left()), function, *arguments)
        except RuntimeError as error:
            self.report(" ".join(str(a) for a in arguments), str(error))
            return None

    def report(self, what: str, why: str) -> None:
        print(f"FAILED {what}: {why.splitlines()[0]}", flush=True)
        with (self.out / "failures.txt").open("a") as file:
            file.write(f"{what}\n{why}\n\n")

    def names(self, kind: str, size: str) -> list[str]:
        return [str(w) for w in LISTS[kind](self.device, size) if self.only in str(w)]


def run(device: torch.device, out: Path, minutes: float, only: str = "") -> int:
    session = Session(device, out, minutes, only)
    try:
        _write(out / "environment.json", receipts.environment(device) | {"minutes": minutes})
        print(f"{receipts.device_name(device)}, {minutes:g} minutes, results in {out}", flush=True)
        ceilings = session.ask(_ceilings, device)
        if ceilings:
            _write(out / "ceilings.json", ceilings)
            print("ceilings:", ", ".join(f"{k} {v:.4g}" for k, v in ceilings.items()), flush=True)
        _compile(session)
        wrong = _checks(session)
        measured = _measure(session, "workloads", "receipts.jsonl", 0.7)
        _measure(session, "tilings", "tiles.jsonl", 1.0)
    finally:
        session.worker.stop()
    print(f"\n{60 * minutes - session.left():.0f} s; {wrong} wrong, {measured} workloads measured")
    print("ratio: how many times faster ours is than the best baseline")
    print(ROW.format("workload", "ours", "best baseline", "ratio", "variants and bounds, their time over ours"))
    print("\n".join(session.rows))
    return int(wrong > 0 or measured == 0)


def _checks(session: Session) -> int:
    """Every op at its smallest shapes, against float64 and against its own bits; how many are wrong."""
    wrong = 0
    for name in session.names("workloads", "tiny"):
        found = session.ask(_check, "workloads", session.device, "tiny", name)
        if found is None or "ours" in found["failed"]:
            wrong += 1
        if found:
            receipts.append(found, session.out / "checks.jsonl")
            for contender, why in found["failed"].items():
                session.report(f"{name}: {contender}", why)
    print(f"checked: {wrong} wrong", flush=True)
    return wrong


def _compile(session: Session) -> None:
    """Run everything once in parallel processes, to warm the compilers' caches on disk; failures show later."""
    lists = dict.fromkeys([("workloads", "tiny"), *((kind, session.size) for kind in LISTS)])
    tasks = [(kind, size, name) for kind, size in lists for name in session.names(kind, size)]
    workers = [Worker() for _ in range(min(8, max(1, (os.cpu_count() or 2) // 2), len(tasks)))]
    end = time.monotonic() + COMPILING * 60 * session.minutes

    def drain(worker: Worker) -> None:
        while tasks and (left := end - time.monotonic()) > 1:
            kind, size, name = tasks.pop(0)
            try:
                worker.ask(left, _run_once, kind, session.device, size, name)
            except RuntimeError:
                pass
        worker.stop()

    with ThreadPoolExecutor(len(workers) or 1) as pool:
        list(pool.map(drain, workers))
    print(f"compiled, {len(tasks)} left to be compiled when they are measured", flush=True)


def _measure(session: Session, kind: str, file: str, share: float) -> int:
    """Measure a list, or as much of it as fits in `share` of the time that is left; how many were."""
    reserved = (1 - share) * session.left()
    names = session.names(kind, session.size)
    names = [name for i in range(3) for name in names[i::3]]  # a run cut short has still seen every size
    seconds = min(4.0, max(0.2, share * session.left() / (2 * len(names) + 1)))  # as much again for checks and memory
    measured = 0
    for i, name in enumerate(names):
        if session.left() < max(5, reserved):
            print(f"out of time: {len(names) - i} {kind} not reached", flush=True)
            break
        found = session.ask(_timed, kind, session.device, session.size, name, seconds)
        if found is None:
            continue
        receipts.append(found, session.out / file)
        for contender, why in found["failed"].items():
            session.report(f"{name}: {contender}", why)
        if "p50" in found:
            measured += 1
            session.rows.append(_row(name, found))
            print(session.rows[-1], flush=True)
    return measured


def _row(name: str, found: dict[str, Any]) -> str:
    times = {**found["variants"], **found["bounds"]}
    others = ", ".join(f"{n} {times[n]['ratio']:.2f}" for n in sorted(times, key=lambda n: times[n]["ratio"])[:4])
    best = found["best_baseline"]
    return ROW.format(
        name, f"{found['p50'] * 1e3:.3f} ms", best or "-", f"{found['ratio']:.2f}" if best else "-", others
    )


def _write(path: Path, found: dict[str, Any]) -> None:
    path.write_text(json.dumps(found, indent=2) + "\n")


# What the worker does.


def _find(kind: str, device: torch.device, size: str, name: str) -> Workload:
    return next(w for w in LISTS[kind](device, size) if str(w) == name)


def _ceilings(device: torch.device) -> dict[str, float]:
    """What the device can do: bytes copied a second, read and written both counted, and products a second."""
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


def _check(kind: str, device: torch.device, size: str, name: str) -> dict[str, Any]:
    return receipts.receipt(check(_find(kind, device, size, name), seed=1, repeats=REPEATS), device)


def _run_once(kind: str, device: torch.device, size: str, name: str) -> None:
    workload = _find(kind, device, size, name)
    inputs = workload.inputs(0)
    for contender in (workload.ours, *workload.variants.values(), *workload.baselines.values()):
        try:
            contender(*inputs)()
        except Exception as error:  # measured later, and reported then
            print(f"{name}: {error!s:.100}", flush=True)
        torch.cuda.empty_cache()  # several processes do this at once


def _timed(kind: str, device: torch.device, size: str, name: str, seconds: float) -> dict[str, Any]:
    torch.cuda.empty_cache()
    return receipts.receipt(
        measure(_find(kind, device, size, name), device, seed=2, seconds=seconds, repeats=3), device
    )
