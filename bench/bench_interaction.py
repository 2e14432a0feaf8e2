"""Interaction tensors against what people run today (benchmarks.md, workloads 2, 4, 5 and 7)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import bilinear_ops as bo
from bench.workload import Tensors, Workload, forward

MATRICES = {
    "tiny": [(3, 8, 12), (60, 8, 12)],
    "quick": [(10, 512, 512), (1024, 256, 1024)],
    "full": [(10, 784, 512), (512, 784, 2048), (1024, 256, 1024), (512, 1024, 4096), (64, 2048, 8192)],
}
RANKING = {"tiny": (8, 16, 32, 40), "quick": (16, 512, 1024, 2048), "full": (256, 512, 1024, 2048)}  # K, d, h, F
PAIRS = {"tiny": (9, 20, 4, 16, 3), "quick": (511, 1024, 64, 512, 30), "full": (511, 4096, 64, 512, 30)}
INNER = {"tiny": (8, 16, 6), "quick": (256, 1024, 256), "full": (512, 2048, 512)}  # d, h, o


def workloads(device: torch.device, size: str, impl: str = "auto") -> Iterator[Workload]:
    for shape in MATRICES[size]:
        yield _matrices(device, impl, *shape)
    yield _ranking(device, impl, *RANKING[size])
    yield _pairs(device, *PAIRS[size])
    yield _inner(device, *INNER[size])


def _workload(
    op: str,
    case: str,
    shape: dict[str, int],
    inputs: Callable[[int], Tensors],
    reference: Callable[..., Tensor],
    ours: Callable[..., Tensor],
    baselines: dict[str, Callable[..., Tensor]],
    flops: int,
    elements: int,
) -> Workload:
    timed = {name: forward(f) for name, f in baselines.items()}
    return Workload(
        op, case, shape, torch.float32, inputs, forward(reference), forward(ours), timed, flops, 4 * elements
    )


def _draw(device: torch.device, seed: int, *shapes: tuple[int, ...]) -> Tensors:
    """Tensors whose products keep unit scale."""
    generator = torch.Generator(device).manual_seed(seed)
    return tuple(torch.randn(s, generator=generator, device=device) / s[-1] ** 0.5 for s in shapes)


def _einsum(w: Tensor, v: Tensor, c: Tensor) -> Tensor:
    q = torch.einsum("kh,hi,hj->kij", c, w, v)
    return 0.5 * (q + q.mT)


def _flat_bmm(w: Tensor, v: Tensor, c: Tensor) -> Tensor:
    q = ((c.unsqueeze(1) * w.t()).flatten(0, 1) @ v).unflatten(0, (-1, w.shape[1]))
    return q.add_(q.mT.clone()).mul_(0.5)


def _matrices(device: torch.device, impl: str, K: int, d: int, h: int) -> Workload:
    return _workload(
        "interaction_matrices",
        "full",
        {"K": K, "d": d, "h": h},
        lambda seed: _draw(device, seed, (h, d), (h, d), (K, h)),
        bo.reference.interaction_matrices,
        lambda w, v, c: bo.interaction_matrices(w, v, c, impl=impl),
        {"einsum": _einsum, "flat bmm": _flat_bmm} if K * h * d <= 1 << 29 else {"einsum": _einsum},
        K * h * d * d,
        2 * h * d + K * h + K * d * d,
    )


def _one_by_one(w: Tensor, v: Tensor, c: Tensor, basis: Tensor) -> Tensor:
    """Every output's matrix in turn: tril, topk, and the best of all."""
    best = []
    for row in c:
        q = (w.t() * row) @ v
        q = (basis.t() @ ((q + q.t()) @ basis)).tril(-1).flatten()  # the sum of both triangles: 2 Q_ij
        best.append(q[q.abs().topk(100).indices])
    scores = torch.cat(best)
    return scores[scores.abs().topk(100).indices].abs()


def _ranking(device: torch.device, impl: str, K: int, d: int, h: int, features: int) -> Workload:
    options = {"scope": "global"}
    return _workload(
        "interaction_topk",
        "global, basis",
        {"K": K, "d": d, "h": h, "F": features},
        lambda seed: _draw(device, seed, (h, d), (h, d), (K, h), (d, features)),
        _one_by_one,  # the reference would hold every matrix at once
        lambda w, v, c, basis: bo.interaction_topk(w, v, c, 100, basis=basis, impl=impl, **options).values.abs(),
        {"loop, tril, topk": _one_by_one},
        K * d * features * (2 * d + features),
        2 * h * d + K * h + d * features,
    )


def _pairs(device: torch.device, tokens: int, K: int, r: int, d: int, active: int) -> Workload:
    generator = torch.Generator(device).manual_seed(0)
    k = torch.rand(tokens, K, generator=generator, device=device).topk(active, 1).indices.flatten()
    t = torch.arange(tokens, device=device).repeat_interleave(active)
    mask = torch.zeros(tokens, K, dtype=torch.bool, device=device)
    mask[t, k] = True

    def dense(x: Tensor, values: Tensor, vectors: Tensor) -> Tensor:
        z = (x @ vectors.flatten(0, 1).t()).unflatten(1, (K, r)).square_()
        return ((z * values).sum(2) * mask)[t, k]

    return _workload(
        "eigen_form",
        "pairs",
        {"tokens": tokens, "K": K, "r": r, "d": d, "active": active},
        lambda seed: _draw(device, seed, (tokens, d), (K, r), (K, r, d)),
        dense,  # the reference would gather the eigenvectors of every pair
        lambda x, values, vectors: bo.eigen_form(x, values, vectors, pairs=(t, k)),
        {"dense, square, sum, mask": dense},
        2 * t.numel() * r * d,
        tokens * d + K * r * (d + 1),
    )


def _inner(device: torch.device, d: int, h: int, o: int) -> Workload:
    def both_tensors(w1: Tensor, v1: Tensor, p1: Tensor, w2: Tensor, v2: Tensor, p2: Tensor) -> Tensor:
        return (_einsum(w1, v1, p1) * _einsum(w2, v2, p2)).sum()

    def inputs(seed: int) -> Tensors:
        w, v, p, dw, dv = _draw(device, seed, (h, d), (h, d), (o, h), (h, d), (h, d))
        return w, v, p, w + 0.1 * dw, v + 0.1 * dv, p

    return _workload(
        "layer_inner",
        "two layers",
        {"d": d, "h": h, "o": o},
        inputs,
        bo.reference.layer_inner,
        bo.layer_inner,
        {"both tensors": both_tensors},
        h * h * (8 * d + 2 * o),
        2 * h * (2 * d + o),
    )
