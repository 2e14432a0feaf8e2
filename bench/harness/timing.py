"""Time and peak memory of contenders, interleaved in rounds, on a CPU or a GPU."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.harness.workload import Run

FLUSH_BYTES = 256 << 20  # written before every timed run on a GPU: more than any L2 cache holds
LEAD, LONGEST_LEAD = 1e-3, 50e-3  # seconds that a GPU sleeps before a timed run, while the host launches it
CALIBRATION = 10_000_000  # clocks of the sleep that is timed to learn the GPU's clock rate


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender, one sample per round."""

    samples: tuple[float, ...]

    def quantile(self, q: int) -> float:
        """The q-th of the ten-quantiles: 2, 5 and 8 are p20, p50 and p80."""
        if len(self.samples) < 2:
            return self.samples[0]
        return statistics.quantiles(self.samples, n=10, method="inclusive")[q - 1]

    @property
    def median(self) -> float:
        return self.quantile(5)

    def ratio(self, other: Timing) -> float:
        """Time of self / time of other: the median of the rounds' ratios, so that a slow round affects both."""
        return statistics.median(a / b for a, b in zip(self.samples, other.samples, strict=True))

    def noise(self) -> float:
        """Relative difference between the medians of even and odd rounds."""
        even, odd = self.samples[::2], self.samples[1::2]
        return abs(statistics.median(even) / statistics.median(odd) - 1) if odd else float("nan")


def interleaved(
    runs: dict[str, Run], device: torch.device, seconds: float, rounds: tuple[int, int] = (5, 100)
) -> tuple[dict[str, Timing], str]:
    """Time all `runs` in rounds for about `seconds`; return the times and the name of the clock.

    Runs are warmed up first. Odd rounds reverse the order. The minimum of `rounds` may take up to four times
    `seconds`; two rounds are always taken.
    """
    for run in runs.values():
        for _ in range(2):
            run()
    clock, how = _cpu_clock()
    if device.type == "cuda":
        clock, how = _gpu_clock(device), "GPU events, L2 flushed"
    samples: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    done = 0
    while done < 2 or done < rounds[1] and time.perf_counter() - start < seconds * (4 if done < rounds[0] else 1):
        for name in list(runs)[:: 1 if done % 2 else -1]:
            samples[name].append(clock(runs[name]))
        done += 1
    return {name: Timing(tuple(times)) for name, times in samples.items()}, how


def _cpu_clock() -> tuple[Callable[[Run], float], str]:
    """CPU time with one thread, which other processes do not lengthen; else the wall clock."""
    threads = torch.get_num_threads()
    now, how = (time.process_time, "CPU time") if threads == 1 else (time.perf_counter, "wall clock")

    def clock(run: Run) -> float:
        run()  # the previous contender left the allocator in another state
        start = now()
        run()
        return now() - start

    return clock, f"{how}, {threads} thread{'s' * (threads > 1)}"


def _gpu_clock(device: torch.device) -> Callable[[Run], float]:
    """Time on the device, without the host's: the device sleeps until the host has launched all of the run.

    A run whose launches take longer than the sleep is repeated with a longer one. A run that waits for the device
    itself never gets there, and its waits are counted.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    leads: dict[Run, float] = {}

    def sleep(clocks: float) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        torch.cuda._sleep(int(clocks))
        after.record()
        return before, after

    for _ in range(2):  # the first warms up
        before, after = sleep(CALIBRATION)
        after.synchronize()
    rate = CALIBRATION / (before.elapsed_time(after) / 1e3)  # clocks per second

    def clock(run: Run) -> float:
        while True:
            lead = leads.get(run, LEAD)
            flush.zero_()
            begun = time.perf_counter()
            _, start = sleep(lead * rate)
            run()
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            launched = time.perf_counter() - begun
            end.synchronize()
            if launched < lead or lead == LONGEST_LEAD:
                return start.elapsed_time(end) / 1e3
            leads[run] = min(2 * launched, LONGEST_LEAD)

    return clock


def peak_memory(run: Run, device: torch.device) -> int:
    """Peak bytes of PyTorch's allocator during `run`, results included, inputs excluded.

    Workspaces of CPU libraries do not come from this allocator and are not counted.
    """
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    assert profile.profiler is not None
    held = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
