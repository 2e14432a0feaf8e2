"""Check every workload against float64, then time it beside its baselines.

python -m bench [--only TEXT] [--quick] [--json]    on the GPU if there is one, else on the CPU
python -m bench --gpu --minutes 9 --out DIR         a GPU's checks, times and tiles within a time limit
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

from bench.harness import gpu, receipts
from bench.harness.measuring import Result, check, measure
from bench.harness.workload import SIZES, workloads

HEADER = f"{'workload':74} {'ours':>10} {'best baseline':>26} {'ratio':>6} {'eager':>6} {'memory':>6} {'noise':>6}"


def row(result: Result) -> str:
    """One line of the table: time, speed-ups, and peak memory as a fraction of eager's."""
    name = f"{result.workload!s:74}"
    if "ours" not in result.timings:
        return f"{name} {'FAILED: ' + result.failed['ours'] if 'ours' in result.failed else 'correct, not timed'}"
    ours = result.timings["ours"]
    best = result.best
    against = f"{best} {_duration(result.timings[best].median)}" if best else "none"
    ratio = f"{result.ratio(best):.2f}" if best else "-"
    eager = f"{result.ratio('eager'):.2f}" if "eager" in result.timings else "-"
    memory = f"{result.memory['ours'] / result.memory['eager']:.2f}" if result.memory.get("eager") else "-"
    noise = f"{ours.noise():.1%}"
    return f"{name} {_duration(ours.median):>10} {against:>26} {ratio:>6} {eager:>6} {memory:>6} {noise:>6}"


def _duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale or unit == "us":
            return f"{seconds / scale:.3g} {unit}"
    raise AssertionError


def run(arguments: argparse.Namespace) -> int:
    """Measure on one device, print the table, append receipts on --json; return the number of failed workloads."""
    device = torch.device(arguments.device)
    path = receipts.results_file(device) if arguments.json == "" else Path(arguments.json or "")
    print(f"{receipts.device_name(device)}, torch {torch.__version__}, {torch.get_num_threads()} CPU thread(s)")
    print("ratio: time of the best baseline / ours; eager: time of eager / ours; memory: peak of ours / peak of eager")
    print("noise: difference between the medians of even and odd rounds\n")
    print(HEADER)
    failures = 0
    for workload in workloads(device, arguments.size, arguments.impl, arguments.only):
        result = (
            check(workload, seed=0) if arguments.check else measure(workload, device, seed=0, seconds=arguments.seconds)
        )
        print(row(result), flush=True)
        for name, reason in result.failed.items():
            print(f"    {name}: {reason}")
        failures += "ours" in result.failed
        if arguments.json is not None:
            receipts.append(receipts.receipt(result, device, "interpreted" if arguments.check else "measured"), path)
    return failures


def interpreted(arguments: argparse.Namespace) -> int:
    """Check the kernels in Triton's interpreter, in a new process; return its exit status."""
    print("\nKernels in Triton's interpreter (checked, not timed)", flush=True)
    command = [sys.executable, "-m", "bench", "--device", "cpu", "--size", "tiny", "--impl", "triton", "--check"]
    command += ["--only", arguments.only, "--threads", "1"]
    command += [] if arguments.json is None else ["--json", arguments.json]
    return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=receipts.ROOT).returncode


def parse(words: list[str] | None = None) -> argparse.Namespace:
    text = __doc__ or ""
    parser = argparse.ArgumentParser("python -m bench", description=text, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="only workloads whose name contains this")
    parser.add_argument("--size", choices=SIZES, help="shapes; default: full, or quick with --quick")
    parser.add_argument("--quick", action="store_true", help="small shapes; on a CPU also checks interpreted kernels")
    parser.add_argument("--device", help="default: cuda if available, else cpu")
    parser.add_argument("--impl", default="auto", choices=("auto", "triton", "torch"), help="as in every op")
    parser.add_argument("--threads", type=int, help="CPU threads; 1 measures CPU time")
    parser.add_argument("--seconds", type=float, help="timing per workload; default: 10, or 1 with --quick")
    parser.add_argument("--check", action="store_true", help="check only")
    parser.add_argument("--json", nargs="?", const="", metavar="FILE", help="append receipts (default: bench/results)")
    parser.add_argument("--gpu", action="store_true", help="measure a GPU within --minutes; dry run: --device cpu")
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit of --gpu")
    parser.add_argument("--out", type=Path, default=Path("bench-out"), metavar="DIR", help="results of --gpu")
    arguments = parser.parse_args(words)
    if arguments.gpu and not arguments.device and not torch.cuda.is_available():
        parser.error("--gpu needs a GPU visible to PyTorch; --device cpu makes a dry run with tiny shapes")
    arguments.size = arguments.size or ("quick" if arguments.quick else "full")
    arguments.seconds = arguments.seconds or (1.0 if arguments.quick else 10.0)
    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return arguments


def main(words: list[str] | None = None) -> int:
    arguments = parse(words)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # for child processes
    if arguments.gpu:
        return gpu.run(torch.device(arguments.device), arguments.out, arguments.minutes, arguments.only)
    failures = run(arguments)
    if arguments.quick and arguments.device == "cpu":
        failures += interpreted(arguments)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
