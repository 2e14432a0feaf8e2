"""Rank-1 subcomponents against the eager code in use today: time, peak memory, and where sparse gates stop to pay.

    python -m bench.rank1 [--tokens 512] [--rounds 5]

Correctness is checked first. Versions run interleaved, in processor time on CPU, and medians are compared. Peak memory
is the growth of a fresh process's resident set over one step (CPU), or the allocator's peak (GPU).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

import bilinear_ops as bo

Step = Callable[[], object]
D_IN, D_OUT, C, SAMPLES = 768, 3072, 3072, 4


def clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def medians(steps: Mapping[str, Step], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each, run in turns after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            start = clock(device)
            step()
            times[name].append(clock(device) - start)
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def report(title: str, seconds: dict[str, float]) -> None:
    """One line a version; ratios are against the first, the baseline."""
    base = next(iter(seconds.values()))
    print(title)
    for name, t in seconds.items():
        print(f"  {name:28} {1e3 * t:9.1f} ms  {base / t:6.2f}x", flush=True)


def stochastic_steps(tokens: int, device: str, check: bool = True) -> dict[str, Step]:
    """Forward and backward of S samples with delta, by eager code as published, with the delta shared, and by ours."""
    torch.manual_seed(0)
    x, weight = torch.randn(tokens, D_IN, device=device), torch.randn(D_OUT, D_IN, device=device) / D_IN**0.5
    read, write = torch.randn(D_IN, C, device=device) / D_IN**0.5, torch.randn(C, D_OUT, device=device) / C**0.5
    gates, dy = torch.rand(tokens, C, device=device), torch.randn(SAMPLES, tokens, D_OUT, device=device)
    leaves = [t.requires_grad_() for t in (read, write, gates)]

    def eager(share: bool) -> Tensor:
        difference = weight - (read @ write).t()
        acts, rest = x @ read, x @ difference.t() if share else None
        samples = []
        for _ in range(SAMPLES):
            mask = gates + (1 - gates) * torch.rand_like(gates)
            delta = torch.rand(tokens, 1, device=device)
            y = ((acts if share else x @ read) * mask) @ write
            samples.append(y + delta * (x @ difference.t() if rest is None else rest))
        return torch.stack(samples)

    def ours() -> Tensor:
        options = dict(samples=SAMPLES, seed=1, weight=weight, delta="uniform")
        return bo.stochastic_rank1_linear(x, read, write, gates, **options)

    def step(forward: Callable[[], Tensor]) -> Step:
        return lambda: torch.autograd.grad(forward(), leaves, dy)

    if check:
        masks = bo.stochastic_mask(gates, samples=SAMPLES, seed=1)
        deltas = bo.stochastic_delta((tokens,), samples=SAMPLES, seed=1, device=device)
        expected = bo.reference.rank1_linear(x, read, write, masks, weight=weight, delta=deltas)
        torch.testing.assert_close(ours(), expected, rtol=1e-3, atol=1e-3)
    return {
        "eager, delta shared": step(lambda: eager(True)),
        "eager, delta a sample": step(lambda: eager(False)),
        "ours": step(ours),
    }


def peak_bytes(name: str, tokens: int, device: str) -> int:
    """Of one step, in this process, which has run nothing else: freed memory would hide it."""
    step = stochastic_steps(tokens, device, check=False)[name]
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with open("/proc/self/clear_refs", "w") as f:  # the peak starts again from here
        f.write("5")
    before = _resident("VmRSS")
    step()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    with open("/proc/self/status") as f:
        return next(1024 * int(line.split()[1]) for line in f if line.startswith(field))


def bench_stochastic(tokens: int, rounds: int, device: str) -> None:
    steps = stochastic_steps(tokens, device)
    report(
        f"stochastic step, {tokens} x {D_IN} -> {D_OUT}, C = {C}, S = {SAMPLES}, delta", medians(steps, rounds, device)
    )
    command = [sys.executable, "-m", "bench.rank1", "--tokens", str(tokens), "--peak"]
    peaks = {name: int(subprocess.check_output([*command, name])) for name in steps}
    for name, peak in peaks.items():
        print(f"  {name:28} {peak / 2**20:9.0f} MB  {peak / peaks['eager, delta shared']:6.2f} of the first")


def bench_sparse(tokens: int, rounds: int, device: str) -> None:
    """Forward and backward at rising density; prints where the dense product becomes the faster one."""
    for d_in, c, d_out in ((768, 3072, 3072), (3072, 3584, 768)):
        x, dy = torch.randn(tokens, d_in, device=device), torch.randn(tokens, d_out, device=device)
        read, write = torch.randn(d_in, c, device=device) / d_in**0.5, torch.randn(c, d_out, device=device) / c**0.5
        crossover = "none measured"
        for density in (0.0025, 0.005, 0.01, 0.02, 0.05):
            k = max(round(density * c), 1)
            indices = torch.rand(tokens, c, device=device).topk(k).indices
            gates = torch.rand(tokens, k, device=device)
            mask = torch.zeros(tokens, c, device=device).scatter_(1, indices, gates)
            leaves = [t.requires_grad_() for t in (read, write)]

            def dense(mask: Tensor = mask) -> Tensor:
                return ((x @ read) * mask) @ write  # noqa: B023

            def ours(indices: Tensor = indices, gates: Tensor = gates) -> Tensor:
                return bo.rank1_sparse(x, read, write, indices, gates)  # noqa: B023

            torch.testing.assert_close(ours(), dense(), rtol=1e-3, atol=1e-3)
            with torch.no_grad():
                forward = medians({"dense": dense, "sparse": ours}, rounds, device)
            steps = {
                name: (lambda f=f: torch.autograd.grad(f(), leaves, dy))  # noqa: B023
                for name, f in (("dense", dense), ("sparse", ours))
            }
            both = medians(steps, rounds, device)
            report(f"sparse, {d_in} -> {d_out}, C = {c}, {density:.2%}: forward", forward)
            report("  forward and backward", both)
            if both["sparse"] > both["dense"]:
                crossover = f"{density:.2%}"
                break
        print(f"  dense is faster from density: {crossover}")


def bench_accumulate(rounds: int, device: str) -> None:
    samples, rows, d_out, d_in, c = 4, 2209, 94, 96, 192
    gates = torch.rand(rows, c, device=device)
    read, write = torch.randn(d_in, c, device=device), torch.randn(c, d_out, device=device)

    def einsum() -> Tensor:
        return torch.einsum("bc,ic,co->boi", gates, read, write)

    def ours() -> Tensor:
        return bo.rank1_accumulate(gates, read, write)

    torch.testing.assert_close(ours(), einsum(), rtol=1e-3, atol=1e-3)
    steps = {name: (lambda f=f: [f() for _ in range(samples)]) for name, f in (("einsum", einsum), ("ours", ours))}
    title = f"accumulate, {samples} samples of {rows} x {d_out} x {d_in}, C = {c}"
    report(title, medians(steps, rounds, device))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.rank1", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak", help="print the peak bytes of this version's step instead")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    if arguments.peak:
        print(peak_bytes(arguments.peak, arguments.tokens, device))
        return
    bench_stochastic(arguments.tokens, arguments.rounds, device)
    bench_sparse(arguments.tokens, arguments.rounds, device)
    bench_accumulate(arguments.rounds, device)


if __name__ == "__main__":
    main()
