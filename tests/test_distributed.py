"""Sharded calls equal those of one process: one launch of tests/distributed_worker.py for each number of processes.

The launches use gloo on the loopback device; what they check is in the worker, a case for each test here.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from distributed_worker import CASES, FAILING, layers
from torch.distributed import checkpoint

ROOT = Path(__file__).parents[1]
WORLDS = (2, 4)

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")


def launch(processes: int, folder: Path, *names: str) -> subprocess.CompletedProcess:
    """The worker under torchrun, on free ports of the loopback device."""
    folder.mkdir(exist_ok=True)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    command += [str(ROOT / "tests" / "distributed_worker.py"), str(folder), *names]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the launches write."""
    return tmp_path_factory.mktemp("launches")


@pytest.fixture(scope="module")
def launched(folder):
    """The cases that passed and the errors of a launch, by the number of processes."""
    results: dict[int, tuple[list[str], str]] = {}

    def result(processes: int) -> tuple[list[str], str]:
        for world in WORLDS[: WORLDS.index(processes) + 1]:  # the second reads what the first saved
            if world not in results:
                done = launch(world, folder)
                passed = folder / f"passed-{world}"
                results[world] = (passed.read_text().split() if passed.exists() else [], done.stderr)
        return results[processes]

    return result


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("processes", WORLDS)
def test_sharded_equals_whole(processes, name, launched):
    passed, errors = launched(processes)
    if name in passed:
        return
    before = list(CASES)[: list(CASES).index(name)]
    assert all(case in passed for case in before), f"not reached: see the case before {name}"
    pytest.fail(errors)


def test_a_rank_that_fails_ends_the_others(tmp_path):
    """The other rank waits in a collective, whose time-out is far longer than what torchrun needs to end it."""
    start = time.monotonic()
    done = launch(2, tmp_path, FAILING)
    assert done.returncode != 0 and "one rank fails" in done.stderr
    assert time.monotonic() - start < 110, "the other rank was left to its time-out"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_checkpoint_of_two_processes_loads_in_one(launched, folder):
    """On the CPU without a process group, into plain layers."""
    errors = launched(2)[1]
    for name in ("tensor", "data"):
        state = layers(torch.float32)[0].state_dict()
        checkpoint.load(state, checkpoint_id=folder / name)
        values = torch.load(folder / f"{name}.pt")
        assert all(torch.equal(state[key], t) for key, t in values.items()), errors
