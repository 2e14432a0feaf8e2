"""Measure one workload: check it against float64, repeat it, time it beside its baselines, count peak memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from bench.harness.timing import Timing, interleaved, peak_memory
from bench.harness.worker import DeviceLost, synchronise
from bench.harness.workload import Contender, Run, Tensors, Workload
from bilinear_ops.testing import assert_no_worse


@dataclass
class Result:
    """Times, peak memory and errors by contender. If "ours" is in `failed`, nothing is timed."""

    workload: Workload
    timings: dict[str, Timing] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    clock: str = "not timed"

    @property
    def best(self) -> str | None:
        """The fastest baseline."""
        timed = [name for name in self.workload.baselines if name in self.timings]
        return min(timed, key=lambda name: self.timings[name].median, default=None)

    def ratio(self, name: str) -> float:
        """How many times faster ours is than `name`."""
        return self.timings[name].ratio(self.timings["ours"])


def check(workload: Workload, seed: int, repeats: int = 2) -> Result:
    """Check all contenders against the float64 reference, and ours for bitwise equal repeats."""
    result = Result(workload)
    _checked(result, workload.inputs(seed), repeats)
    return result


def measure(workload: Workload, device: torch.device, seed: int, seconds: float, repeats: int = 2) -> Result:
    """Check, then time for about `seconds` and count peak memory. Nothing is timed unless ours is correct."""
    torch.compiler.reset()  # compiled baselines share code objects, and a code object has a limit of recompilations
    result = Result(workload)
    inputs = workload.inputs(seed)
    runs = _checked(result, inputs, repeats)
    if "ours" not in runs:
        return result
    for name, contender in workload.bounds.items():
        with _reporting(result, name):
            runs[name] = contender(*inputs)
    result.timings, result.clock = interleaved(runs, device, seconds)
    for name in runs.keys() - workload.bounds.keys():
        result.memory[name] = peak_memory(runs[name], device)
    return result


def _checked(result: Result, inputs: Tensors, repeats: int) -> dict[str, Run]:
    """The runs of all correct contenders."""
    workload = result.workload
    runs: dict[str, Run] = {}
    gold: Tensors = ()
    eager: Tensors = ()
    with _reporting(result, "ours"):  # without a reference, ours counts as failed
        gold = workload.reference(*(t.double() if t.is_floating_point() else t for t in inputs))()
        eager = workload.reference(*inputs)()
    if result.failed:
        return runs
    contenders: dict[str, Contender] = {"ours": workload.ours, **workload.variants, **workload.baselines}
    for name, contender in contenders.items():
        with _reporting(result, name):
            run = contender(*inputs)
            is_ours = name not in workload.baselines
            with _poisoned_memory(is_ours):
                found = run()
            for i, (t, e, g) in enumerate(zip(found, eager, gold, strict=True)):
                assert_no_worse(t, e, g, f"result {i}")
            for _ in range(repeats - 1 if is_ours else 0):
                again = run()
                assert all(map(torch.equal, found, again)), "two runs on the same inputs differ"
            runs[name] = run
    return runs


@contextmanager
def _reporting(result: Result, name: str) -> Iterator[None]:
    """Record an exception as the contender's failure. Raises DeviceLost if the GPU does not work afterwards."""
    try:
        yield
        synchronise()
    except Exception as error:
        why = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        try:
            synchronise()
        except Exception:
            raise DeviceLost(name, why) from error
        result.failed[name] = why


@contextmanager
def _poisoned_memory(poisoned: bool) -> Iterator[None]:
    """Let PyTorch fill new allocations with NaN, so that unwritten elements fail the check."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(poisoned, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
