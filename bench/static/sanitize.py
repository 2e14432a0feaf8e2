"""Every kernel at its smallest sizes under NVIDIA's compute-sanitizer: out-of-bounds access, races, unwritten memory.

    python -m bench.static.sanitize [--tool memcheck racecheck initcheck synccheck] [--only TEXT]

Needs a GPU, and `compute-sanitizer` on the PATH (it comes with the CUDA toolkit).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable

import torch

from bench.harness import receipts
from bench.static import smallest

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
ERROR = 86  # exit status of the child if the sanitizer finds an error


def launch_all(device: torch.device, only: str = "") -> list[str]:
    """Run every workload once, forward and backward; return their names."""
    names = []
    for workload in smallest.workloads(device):
        if only in str(workload):
            workload.ours(*workload.inputs(0))()
            names.append(str(workload))
    if device.type == "cuda":
        torch.cuda.synchronize()
    return names


def command(tool: str, only: str) -> list[str]:
    """The command that runs this file's --child under the sanitizer."""
    options = ["--tool", tool, "--error-exitcode", str(ERROR), "--target-processes", "all"]
    return ["compute-sanitizer", *options, sys.executable, "-m", "bench.static.sanitize", "--child", "--only", only]


def main(words: list[str] | None = None, run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.static.sanitize", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tool", nargs="+", default=list(TOOLS), choices=TOOLS)
    parser.add_argument("--only", default="", metavar="TEXT", help="only workloads whose name contains this")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.child:
        launched = launch_all(torch.device("cuda"), arguments.only)
        print(f"{len(launched)} workloads launched")
        return int(not launched)
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("compute-sanitizer needs a GPU visible to PyTorch", file=sys.stderr)
        return 2
    # separate allocations, so that an access past the end is detected
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    failed = []
    for tool in arguments.tool:
        print(f"== {tool}", flush=True)
        if run(command(tool, arguments.only), cwd=receipts.ROOT, env=environment).returncode:
            failed.append(tool)
    print(f"failed: {', '.join(failed)}" if failed else "nothing found")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
