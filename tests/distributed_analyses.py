"""Analyses of directions that are dealt to the ranks of a group."""

import os
import re
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from distributed_harness import DTYPES, Counted, R, case, line, on, randn
from torch.distributed.tensor import Shard
from torch.testing import assert_close

import bilinear_ops as bo


@case(2, 4)
def rankings():
    """Directions dealt to the ranks of a group: rankings to the bit, ties included, their gradients, and the rest."""
    group, world = dist.group.WORLD, dist.get_world_size()
    mesh = line()
    for dtype in DTYPES:
        w, v, c = (torch.randint(-2, 3, shape).to(dtype) for shape in ((9, 7), (9, 7), (6, 9)))
        u, p, basis = c[:, :3], c[:3], torch.randint(-1, 2, (7, 5)).to(dtype)
        weights = (
            None,
            randn(7, 7, dtype=dtype),
            randn(6, 7, 7, dtype=dtype),
            lambda k: torch.eye(7) * k + 1,
        )
        for scope in ("output", "global"):
            for score in ("cross", "self", "pair", "entry"):
                for weight in weights:
                    options = {"score": score, "scope": scope, "weight": weight}
                    with Counted() as counted:
                        mine = bo.interaction_topk(w, v, c, 6, **options, group=group)
                    item = 24 + c.itemsize  # a value and three indices; beside them a rank for the merge
                    padded = world * -(-6 // world)  # ranks hold as many directions, some of them void
                    expected = 6 * padded * item if scope == "output" else 6 * world * (item + c.itemsize)
                    assert counted.calls == {"all_gather_into_tensor": 4 if scope == "output" else 5}
                    assert counted.bytes.total() == expected
                    for one, other in zip(mine, bo.interaction_topk(w, v, c, 6, **options), strict=True):
                        assert torch.equal(one, other), (options, one, other)
            mine = bo.interaction_topk(w, v, bo.Directions(u, p), 4, scope=scope, basis=basis, group=group)
            alone = bo.interaction_topk(w, v, bo.Directions(u, p), 4, scope=scope, basis=basis)
            assert all(map(torch.equal, mine, alone))
            leaves = [[t.clone().requires_grad_() for t in (w, v, c)] for _ in range(2)]
            for (a, b, e), way in zip(leaves, (None, group), strict=True):
                bo.interaction_topk(a, b, e, 5, scope=scope, group=way).values.square().sum().backward()
            for one, other in zip(*leaves, strict=True):
                assert_close(one.grad, other.grad)
        sharded = bo.interaction_topk(on(mesh, w, R), on(mesh, v, R), on(mesh, c, Shard(0)), 3)
        assert sharded.k.placements == (Shard(0),)
        assert torch.equal(sharded.k.full_tensor(), bo.interaction_topk(w, v, c, 3).k)


@case(2, 4)
def results():
    """Other results of directions that are dealt to the ranks, gathered with as many bytes as docs/scale.md says."""
    group, world = dist.group.WORLD, dist.get_world_size()
    padded = world * -(-6 // world)  # ranks hold as many directions, some of them void
    for dtype in DTYPES:
        w, v, c = randn(9, 7, dtype=dtype), randn(9, 7, dtype=dtype), randn(6, 9, dtype=dtype)
        numbers = {bo.interaction_moments: 5, partial(bo.analysis.interaction_eigh, n=3): 3 * (7 + 2) + 1}
        for function, count in numbers.items():
            with Counted() as counted:
                mine = function(w, v, c, group=group)
            flags = sum(t.dtype == torch.bool for t in mine)
            assert counted.calls == {"all_gather_into_tensor": 5}
            assert counted.bytes.total() == padded * (count * c.itemsize + flags)
            tolerance = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {}
            for one, other in zip(mine, function(w, v, c), strict=True):
                assert_close(one, other, **tolerance)
        with Counted() as counted:
            seen = list(bo.iter_interaction_matrices(w, v, c, chunk_bytes=10**6, group=group))
        assert not counted.calls
        mine = [k for chunk, _ in seen for k in range(chunk.start, chunk.stop)]
        assert mine == list(range(6))[dist.get_rank() * (padded // world) :][: padded // world]
        for chunk, q in seen:
            assert_close(q, bo.interaction_matrices(w, v, c)[chunk])


@case(2, 4)
def resumable():
    """Chunks of directions dealt to the ranks: each is computed once, by one of them, and all are found in the end."""
    w, v, c = randn(9, 7), randn(9, 7), randn(7, 9)
    folder = Path(f"run-{dist.get_world_size()}")
    computed, shown = [], []

    class Bar:
        def __init__(self, total, unit, disable):
            shown.append((total, unit, disable))

        def update(self, n=0):
            pass

        close = update

    def analyse(part):
        computed.append(part)
        return bo.interaction_moments(w, v, part)

    sys.modules["tqdm.auto"] = type("module", (), {"tqdm": Bar})
    for times in (1, 0):
        with Counted() as counted:
            paths = bo.analysis.run_in_chunks(analyse, c, folder, chunk=2, group=dist.group.WORLD, progress=True)
        assert counted.calls == {"broadcast": 2, "barrier": 1}, counted.calls
        lengths = [None] * dist.get_world_size()
        dist.all_gather_object(lengths, len(computed))
        assert sum(lengths) == 4 * times and max(lengths) <= -(-4 // dist.get_world_size())
        assert shown.pop() == (len(computed), "chunk", dist.get_rank() > 0)
        computed.clear()
    for one, other in zip(bo.analysis.load_chunks(paths).values(), bo.interaction_moments(w, v, c), strict=True):
        assert_close(one, other)


def run(group, ending=None):
    """Eigenpairs of two directions at a time: every start of a chunk is logged; from the fifth direction on, it ends.

    Returns the files, and the results that they should hold.
    """
    generator = torch.Generator().manual_seed(1)
    w, v, c = (torch.randn(shape, generator=generator) for shape in ((9, 7), (9, 7), (13, 9)))

    def analyse(part):
        start = c[:, 0].tolist().index(part[0, 0].item())
        with open("begun", "a") as f:
            f.write(f"{start} ")
        if ending is not None and start >= 4:
            ending()
        return bo.analysis.interaction_eigh(w, v, part, 3)

    paths = bo.analysis.run_in_chunks(analyse, c, "killed", chunk=2, group=group)
    whole = [bo.analysis.interaction_eigh(w, v, part, 3) for part in c.split(2)]
    return paths, [torch.cat(parts) for parts in zip(*whole, strict=True)]


def killed():
    """Two ranks in their second chunk: one is killed by signal 9, the other ended by torchrun before it is done."""

    def ending():
        dist.barrier()
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)

    run(dist.group.WORLD, ending)


def begun():
    return sorted(map(int, Path("begun").read_text().split()))


@case(4)
def restarted():
    """What a killed run of two ranks has left is done by two and kept: the cut chunks alone were begun twice."""
    assert begun() == [0, 2, 4, 6]
    dist.barrier()
    two = dist.new_group([0, 1])
    if dist.get_rank() in (0, 1):
        run(two)
    dist.barrier()
    assert begun() == [0, 2, 4, 4, 6, 6, 8, 10, 12]
    dist.barrier()
    paths, expected = run(dist.group.WORLD)
    assert begun() == [0, 2, 4, 4, 6, 6, 8, 10, 12]
    for one, other in zip(bo.analysis.load_chunks(paths).values(), expected, strict=True):
        assert torch.equal(one, other)


@case(2, 4)
def example():
    """examples/sharded.py finds what one process finds, to rounding."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from sharded import main

    assert max(main().values()) < 1e-5


@case(2)
def readme():
    """The README's example for many GPUs, as it stands there."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    *_, example = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    names = {}
    exec(example, names)
    assert names["layer"].p.grad.full_tensor().isfinite().all()
    alone = bo.analysis.interaction_eigh(names["w"], names["v"], names["p"], n=4)
    assert_close(names["pairs"].values, alone.values)
