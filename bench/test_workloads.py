"""Every workload under pytest-benchmark: `pytest bench --benchmark-only`. CI runs the tiny shapes.

Ratios and receipts come from `python -m bench`.
"""

from typing import Any

import pytest
import torch

from bench.harness.measuring import check
from bench.harness.workload import Workload, workloads

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [
    pytest.param(workload, name, id=f"{size}-{workload}-{name}", marks=[] if size == "tiny" else [pytest.mark.slow])
    for size in ("tiny", "quick")
    for workload in workloads(DEVICE, size)
    for name in ("ours", *workload.variants, *workload.baselines)
]


@pytest.mark.parametrize(("workload", "name"), CASES)
def test_workload(benchmark: Any, workload: Workload, name: str) -> None:
    if name == "ours":
        assert not check(workload, seed=0).failed
    contender = {"ours": workload.ours, **workload.variants, **workload.baselines}[name]
    run = contender(*workload.inputs(0))
    benchmark.group = str(workload)
    benchmark.extra_info.update(flops=workload.flops, bytes=workload.bytes)

    def synchronised() -> None:
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(synchronised, rounds=5, warmup_rounds=2)
