"""What every rank of test_distributed.py runs: `python -m torch.distributed.run ... tests/distributed_worker.py DIR`.

Rank 0 writes the names of the cases that passed to DIR; a case that fails ends its rank, and with it the launch. After
the cases one rank ends on purpose, while the others wait for it.
"""

import datetime
import os
import sys
from pathlib import Path

import distributed_analyses
import distributed_layers  # noqa: F401
import distributed_ops  # noqa: F401
import torch
import torch.distributed as dist
from distributed_harness import CASES

from bilinear_ops.composite.limits import limits

TIMEOUT = 120  # seconds that a rank waits for another; torchrun ends it long before


def failing() -> None:
    """A rank that fails while the others wait for it."""
    if dist.get_rank() == 1:
        raise ValueError("one rank fails")
    dist.barrier()


ENDINGS = {2: distributed_analyses.killed, 4: failing}


def main() -> None:
    """In the folder of the launches, which they share."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=TIMEOUT))
    limits.small_on_cpu = -1  # the layers are small, and the ops are what is tested
    world = dist.get_world_size()
    for name, case in CASES[world].items():
        torch.manual_seed(0)
        case()
        if dist.get_rank() == 0:
            with open(f"passed-{world}", "a") as f:
                f.write(name + "\n")
    dist.barrier()
    Path(f"ending-{world}").touch()
    ENDINGS[world]()


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    main()
