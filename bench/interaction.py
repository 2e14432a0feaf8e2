"""Interaction tensors against what people run today.

    python -m bench.interaction [--quick] [--only NAME]

Correctness first, then medians of interleaved repeats in processor time; nothing is said about absolute speed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import bilinear_ops as bo

Function = Callable[[], Tensor]


@dataclass(frozen=True)
class Workload:
    """Ours and the baselines on the same inputs; `tolerance` is relative to the largest element."""

    name: str
    ours: Function
    baselines: Mapping[str, Function]
    tolerance: float = 1e-5


def layer(K: int, d: int, h: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(h, d) / d**0.5, torch.randn(h, d) / d**0.5, torch.randn(K, h) / h**0.5


def einsum(w: Tensor, v: Tensor, c: Tensor) -> Tensor:
    q = torch.einsum("kh,hi,hj->kij", c, w, v)
    return 0.5 * (q + q.mT)


def flat_bmm(w: Tensor, v: Tensor, c: Tensor) -> Tensor:
    q = ((c.unsqueeze(1) * w.t()).flatten(0, 1) @ v).unflatten(0, (-1, w.shape[1]))
    return q.add_(q.mT.clone()).mul_(0.5)


def matrices(quick: bool) -> Iterator[Workload]:
    for K, d, h in [(10, 64, 64), (128, 32, 64)] if quick else [(10, 512, 512), (1024, 256, 1024), (512, 784, 2048)]:
        w, v, c = layer(K, d, h)
        baselines: dict[str, Function] = {"einsum": partial(einsum, w, v, c)}
        if K * h * d <= 1 << 29:
            baselines["flat bmm"] = partial(flat_bmm, w, v, c)
        yield Workload(f"matrices {K} {d} {h}", partial(bo.interaction_matrices, w, v, c), baselines)
        if K > d:
            directions = bo.Directions(torch.randn(K, d) / d**0.5, torch.randn(d, h) / h**0.5)
            yield Workload(
                f"matrices {K} {d} {h}, rank {d}",
                partial(bo.interaction_matrices, w, v, directions),
                {"einsum": partial(einsum, w, v, directions.u @ directions.p)},
            )


def ranked_one_by_one(w: Tensor, v: Tensor, c: Tensor, basis: Tensor, n: int) -> Tensor:
    """Every output's matrix in turn: tril, topk, and the n best of all."""
    best = []
    for row in c:
        q = (w.t() * row) @ v
        q = (basis.t() @ ((q + q.t()) @ basis)).tril(-1).flatten()  # the two triangles' sum: 2 Q_ij
        best.append(q[q.abs().topk(n).indices])
    scores = torch.cat(best)
    return scores[scores.abs().topk(n).indices]


def ranking(quick: bool) -> Iterator[Workload]:
    K, d, h, features = (8, 16, 32, 64) if quick else (64, 512, 1024, 2048)
    w, v, c = layer(K, d, h)
    basis = torch.randn(d, features) / d**0.5
    yield Workload(
        f"global top-100, {features} features, {K} outputs, d={d}",
        lambda: bo.interaction_topk(w, v, c, 100, scope="global", basis=basis).values,
        {"loop, tril, topk": lambda: ranked_one_by_one(w, v, c, basis, 100)},
    )


def eigen_pairs(quick: bool) -> Iterator[Workload]:
    tokens, K, r, d, active = (32, 64, 8, 32, 4) if quick else (511, 4096, 64, 512, 30)
    x, values, vectors = torch.randn(tokens, d), torch.randn(K, r), torch.randn(K, r, d)
    k = torch.rand(tokens, K).topk(active, 1).indices.flatten()
    t = torch.arange(tokens).repeat_interleave(active)
    mask = torch.zeros(tokens, K)
    mask[t, k] = 1

    def dense() -> Tensor:
        z = (x @ vectors.flatten(0, 1).t()).unflatten(1, (K, r)).square_()
        return ((z * values).sum(2) * mask)[t, k]

    yield Workload(
        f"eigen form, {tokens} tokens, {K} outputs, rank {r}, {active} active",
        lambda: bo.eigen_form(x, values, vectors, pairs=(t, k)),
        {"dense, square, sum, mask": dense},
    )


def inner(quick: bool) -> Iterator[Workload]:
    d, h, o = (16, 32, 8) if quick else (256, 1024, 256)
    (w1, v1, p1), (w2, v2, _) = layer(o, d, h), layer(o, d, h)
    yield Workload(
        f"layer inner product, d={d}, h={h}, o={o}",
        lambda: bo.layer_inner(w1, v1, p1, w1 + 0.1 * w2, v1 + 0.1 * v2, p1),
        {"both tensors": lambda: (einsum(w1, v1, p1) * einsum(w1 + 0.1 * w2, v1 + 0.1 * v2, p1)).sum()},
    )


WORKLOADS = (matrices, ranking, eigen_pairs, inner)


def check(workload: Workload) -> None:
    """Raise AssertionError unless ours equals every baseline."""
    ours = workload.ours()
    for name, baseline in workload.baselines.items():
        expected = baseline()
        error = ((ours - expected).abs().max() / expected.abs().max()).item()
        assert error <= workload.tolerance, f"{workload.name}: {error:.1e} from {name}"


def measure(functions: dict[str, Function], repeats: int) -> dict[str, float]:
    """Median seconds of processor time, the functions interleaved; more repeats where they cost little."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    start = time.process_time()
    while len(next(iter(times.values()))) < repeats or time.process_time() - start < 3:
        for name, function in functions.items():
            before = time.process_time()
            function()
            times[name].append(time.process_time() - before)
    return {name: statistics.median(seen) for name, seen in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.interaction")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes: whether it runs, not how fast")
    parser.add_argument("--only", default="", help="workloads whose name contains this")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    for family in WORKLOADS:
        for workload in family(arguments.quick):
            if arguments.only not in workload.name:
                continue
            check(workload)
            if arguments.quick:
                print(f"{workload.name:62} equal")
                continue
            times = measure({"ours": workload.ours, **workload.baselines}, arguments.repeats)
            ratios = "  ".join(f"{name} {t / times['ours']:.2f}x" for name, t in times.items() if name != "ours")
            print(f"{workload.name:62} {ratios}", flush=True)


if __name__ == "__main__":
    main()
