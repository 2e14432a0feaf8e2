"""Time and peak memory of contenders, interleaved in rounds, on a CPU or a GPU."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from bench.harness.workload import Run, Tensors

FLUSH_BYTES = 256 << 20  # written before every timed run on a GPU: more than any L2 cache holds
GRAPH_BELOW = 50e-6  # seconds; shorter work is replayed from a CUDA graph, so that launches are not what is timed


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
        if min(clock(run) for run in runs.values()) < GRAPH_BELOW and (graphs := _graphs(runs)):
            runs, how = graphs, "GPU events around graph replays, L2 flushed"
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
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def clock(run: Run) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()  # meanwhile the host gets ahead, so that its share of the work is hidden as in a training loop
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return clock


def _graphs(runs: dict[str, Run]) -> dict[str, Run] | None:
    """The runs as graph replays, or None where one of them cannot be captured: all are timed the same way."""
    graphs: dict[str, Run] = {}
    try:
        for name, run in runs.items():
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            graphs[name] = partial(_replay, graph)
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graphs


def _replay(graph: torch.cuda.CUDAGraph) -> Tensors:
    graph.replay()
    return ()


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
