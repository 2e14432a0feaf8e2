"""Sharded calls equal those of one process: one launch of tests/distributed_worker.py for each number of processes.

The launches use gloo on the loopback device. The cases, one for each test here, are in tests/distributed_*.py.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from distributed_harness import CASES, layers
from distributed_worker import TIMEOUT
from torch.distributed import checkpoint

ROOT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.ci,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed"),
]


class Launch(NamedTuple):
    """The cases that passed, what was written to stderr, and the seconds from the end of the cases to that of all."""

    passed: list[str]
    errors: str
    ending: float


def launch(processes: int, folder: Path) -> Launch:
    """The worker under torchrun, on free ports of the loopback device."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    command += [str(ROOT / "tests" / "distributed_worker.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, check=False)
    assert done.returncode != 0, "one rank ends on purpose"
    passed, ending = folder / f"passed-{processes}", folder / f"ending-{processes}"
    seconds = time.time() - ending.stat().st_mtime if ending.exists() else float("inf")
    return Launch(passed.read_text().split() if passed.exists() else [], done.stderr, seconds)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the launches write."""
    return tmp_path_factory.mktemp("launches")


@pytest.fixture(scope="module")
def launches(folder):
    """By the number of processes, in order: the second goes on with what the first left."""
    return {processes: launch(processes, folder) for processes in CASES}


@pytest.mark.parametrize(("processes", "name"), [(n, name) for n, cases in CASES.items() for name in cases])
def test_sharded_equals_whole(processes, name, launches):
    passed, errors, _ = launches[processes]
    if name in passed:
        return
    names = list(CASES[processes])
    assert all(case in passed for case in names[: names.index(name)]), f"not reached: see the case before {name}"
    pytest.fail(errors)


@pytest.mark.parametrize(("processes", "error"), [(2, "Signal 9 (SIGKILL)"), (4, "one rank fails")])
def test_a_rank_that_ends_ends_the_others(processes, error, launches):
    """They wait in a collective, whose time-out is far longer than what torchrun needs to end them."""
    _, errors, ending = launches[processes]
    assert error in errors
    assert ending < TIMEOUT / 2, "the other ranks were left to their time-out"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_checkpoint_of_two_processes_loads_in_one(launches, folder):
    """On the CPU without a process group, into plain layers."""
    for name in ("tensor", "data"):
        state = layers(torch.float32)[0].state_dict()
        checkpoint.load(state, checkpoint_id=folder / name)
        values = torch.load(folder / f"{name}.pt")
        assert all(torch.equal(state[key], t) for key, t in values.items()), launches[2].errors
