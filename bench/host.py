"""Time the host's part of a gated layer on a driver without a device, ours beside eager PyTorch.

    python -m bench.host [--json] [--seconds 10]

One row and layers too small to compute anything stand for a GPU's work, which the host does not wait for. Our kernels
pass through Triton's own launcher into the stubbed driver; PyTorch's run on the CPU. Of each of PyTorch's, the cost of
one stubbed launch is added on either side. A device's own time and the driver's are not in these figures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch.profiler import profile

import bilinear_ops as bo
from bench.__main__ import HEADER, row
from bench.harness import receipts
from bench.harness.measuring import Result
from bench.harness.stub_driver import stubbed
from bench.harness.timing import Timing, interleaved
from bench.harness.workload import Tensors, Workload, forward, training_step
from bilinear_ops import reference

CPU = torch.device("cpu")
SHAPE = {"tokens": 1, "d": 16, "h": 32}
CALLS = 10  # of one sample: a call is as short as the clock's steps
# A launch of a large batch fills a single multiprocessor with one row, and an H100 leaves one row to the library.
PROCESSORS = {"fused kernels": 1, "few tiles": 132}
CLOCK = "CPU time, 1 thread, a stubbed launch of each kernel"
# What PyTorch calls without a kernel.
NO_KERNEL = frozenset(
    f"aten::{name}"
    for name in (
        *("empty", "empty_strided", "empty_like", "new_empty", "resize_", "set_", "detach", "lift_fresh"),
        *("as_strided", "view", "_unsafe_view", "_reshape_alias", "expand", "slice", "select", "split", "chunk"),
        *("t", "transpose", "permute", "unsqueeze", "squeeze", "narrow", "alias", "result_type"),
    )
)


def workloads(case: str) -> Iterator[Workload]:
    """A call without gradients and a training step for each activation; `case` says which way ours goes."""
    d, h = SHAPE["d"], SHAPE["h"]
    for activation in ("identity", "silu"):
        for name, contender in (("call", forward), ("step", training_step)):
            eager = partial(reference.gated_mlp, activation=activation)
            dy = () if contender is forward else ((1, d),)
            shapes = ((1, d), (h, d), (h, d), (d, h), *dy)
            yield Workload(
                op="gated_mlp",
                case=f"host time of a {name}, {activation}, {case}",
                shape=SHAPE,
                dtype=torch.float32,
                inputs=partial(_ones, shapes),
                reference=contender(eager),
                ours=contender(partial(bo.gated_mlp, activation=activation, impl="triton")),
                baselines={"eager": contender(eager)},
                flops=0,
                bytes=0,
            )


def _ones(shapes: Sequence[tuple[int, ...]], seed: int) -> Tensors:
    return tuple(map(torch.ones, shapes))


def host_time(workload: Workload, seconds: float, launches: Callable[[], int], launch: float) -> Result:
    """Ours and eager interleaved, a call each, with the cost of a launch added for every kernel of PyTorch's."""
    inputs = workload.inputs(0)
    runs = {"ours": workload.ours(*inputs), "eager": workload.baselines["eager"](*inputs)}
    for run in runs.values():
        run()  # compiles
    before = launches()
    runs["ours"]()
    if launches() == before:
        raise RuntimeError(f"{workload}: launched no kernel of ours")
    result = Result(workload, clock=CLOCK)
    timings, _ = interleaved({name: partial(_repeated, run) for name, run in runs.items()}, CPU, seconds)
    for name, run in runs.items():
        added = kernels(run) * launch
        result.timings[name] = Timing(tuple(t / CALLS + added for t in timings[name].samples))
    return result


def _repeated(run: Callable[[], object]) -> Tensors:
    for _ in range(CALLS):
        run()
    return ()


def kernels(run: Callable[[], object]) -> int:
    """The kernels of PyTorch's that a run calls."""
    with profile() as found:
        run()
    leaves = (event.name for event in found.events() if not event.cpu_children)
    return sum(name.startswith("aten::") and name not in NO_KERNEL for name in leaves)


@triton.jit
def nothing_kernel(x_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(x_ptr + tl.arange(0, BLOCK), 0.0)


def launch_seconds() -> float:
    """The host's time of one stubbed launch of a compiled kernel with one argument."""
    x = torch.zeros(32)
    launched = nothing_kernel[(1,)](x, 32, enable_fp_fusion=True)[(1, 1, 1)]
    timings, _ = interleaved({"launch": partial(_repeated, partial(launched, x, 32))}, CPU, 1.0)
    return min(timings["launch"].samples) / CALLS


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.host", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="timing per workload; default: 10")
    parser.add_argument("--json", nargs="?", const="", metavar="FILE", help="append receipts (default: bench/results)")
    arguments = parser.parse_args(words)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # what a stubbed kernel leaves unwritten enters products
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # else products in float32 are the library's
    path = receipts.results_file(CPU) if arguments.json == "" else Path(arguments.json or "")
    print(f"{HEADER}")
    for case, processors in PROCESSORS.items():
        with stubbed(processors) as launches:
            launch = launch_seconds()
            for workload in workloads(case):
                result = host_time(workload, arguments.seconds, launches, launch)
                print(row(result), flush=True)
                if arguments.json is not None:
                    receipts.append(receipts.receipt(result, CPU, "host, stubbed driver"), path)
        print(f"{launch * 1e6:.2f} us a stubbed launch\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
