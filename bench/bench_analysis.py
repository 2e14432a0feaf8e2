"""HOSVD and CP of a bilinear layer, against the same decompositions of its materialised tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import bilinear_ops as bo
from bench.harness.workload import Tensors, Workload, draw, forward

LAYERS = {"tiny": (12, 33, 10), "quick": (64, 256, 64), "full": (256, 1024, 256)}  # (d, h, outputs)
RANK, STEPS = 8, 5  # of the CP fit
CONVERGED = 300  # iterations of conjugate gradients; the baseline solves the equations directly
PROBES = 64


def workloads(device: torch.device, size: str, impl: str = "auto") -> Iterator[Workload]:
    if impl == "triton":
        return  # library calls only
    for mode in ("output", "input"):
        yield _hosvd(device, mode, *LAYERS[size])
    yield _cp(device, *LAYERS[size])


def _tensor(w: Tensor, v: Tensor, p: Tensor) -> Tensor:
    """B [o, d, d] by one large product."""
    b = ((p.unsqueeze(1) * w.t()).flatten(0, 1) @ v).unflatten(0, (-1, w.shape[1]))
    return 0.5 * (b + b.mT)


def _hosvd(device: torch.device, mode: str, d: int, h: int, outputs: int) -> Workload:
    rank = outputs if mode == "output" else d
    # the neurons' Gram matrices and their products with p, w, v; symmetry not used
    output_flops = 2 * h * h * (4 * d + outputs) + 2 * outputs * outputs * h
    input_flops = h * h * (16 * d + 2 * outputs) + 4 * h * d * d

    def formed(w: Tensor, v: Tensor, p: Tensor) -> Tensor:
        b = _tensor(w, v, p)
        flat = b.flatten(1) if mode == "output" else b.transpose(0, 1).flatten(1)
        return torch.linalg.svd(flat, full_matrices=False).S

    return Workload(
        op="hosvd",
        case=mode,
        shape={"d": d, "h": h, "o": outputs},
        dtype=torch.float32,
        inputs=_layer(device, d, h, outputs),
        reference=forward(formed),
        ours=forward(lambda w, v, p: bo.analysis.hosvd(w, v, p, rank, mode=mode).S),
        baselines={"eager": forward(formed)},
        flops=output_flops if mode == "output" else input_flops,
        bytes=4 * (h * (2 * d + outputs) + rank * (rank + 1) + 1),
    )


def _cp(device: torch.device, d: int, h: int, outputs: int) -> Workload:
    """Fits from the same start, compared by the outputs of the fitted layers on the same inputs."""

    def ours(w: Tensor, v: Tensor, p: Tensor, x: Tensor) -> Tensor:
        start = w[:RANK], v[:RANK]
        fit = bo.analysis.cp_decompose(w, v, p, RANK, init=start, steps=STEPS, inner_steps=CONVERGED, tol=0)
        return bo.reference.gated_mlp(x, fit.w, fit.v, fit.p)

    def formed(w: Tensor, v: Tensor, p: Tensor, x: Tensor) -> Tensor:
        b = _tensor(w, v, p)
        a, c = w[:RANK], v[:RANK]
        for _ in range(STEPS):
            a = _unit(_formed_up(b, a, c))
            c = _unit(_formed_up(b, c, a))
        return bo.reference.gated_mlp(x, a, c, _formed_down(b, a, c))

    layer = _layer(device, d, h, outputs)

    def inputs(seed: int) -> Tensors:
        return *layer(seed), *draw(device, torch.float32, ((PROBES, d), d**-0.5))(seed + 1)

    return Workload(
        op="cp_decompose",
        case=f"rank {RANK}, {STEPS} steps",
        shape={"d": d, "h": h, "o": outputs},
        dtype=torch.float32,
        inputs=inputs,
        reference=forward(formed),
        ours=forward(ours),
        baselines={"eager": forward(formed)},
        # without the conjugate gradients, whose number depends on the data and whose size not on h
        flops=2 * h * (h + (4 * STEPS + 1) * RANK) * (4 * d + outputs),
        bytes=4 * (h + RANK) * (2 * d + outputs),
    )


def _layer(device: torch.device, d: int, h: int, outputs: int) -> Callable[[int], Tensors]:
    return draw(device, torch.float32, ((h, d), d**-0.5), ((h, d), d**-0.5), ((outputs, h), h**-0.5))


def _unit(t: Tensor) -> Tensor:
    return torch.nn.functional.normalize(t, dim=1)


def _formed_down(b: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """The least-squares p [o, r] with B [o, d, d] = sum_r p_r sym(w_r v_r^T)."""
    terms = w.unsqueeze(2) * v.unsqueeze(1)
    terms = (0.5 * (terms + terms.mT)).flatten(1)
    return torch.linalg.solve(terms @ terms.t(), terms @ b.flatten(1).t()).t()


def _formed_up(b: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """The least-squares w [r, d] for given v, with the best p of the current w."""
    p = _formed_down(b, w, v)
    (r, d), n = v.shape, p.t() @ p
    equations = torch.einsum("rs,rs,ij->risj", n, v @ v.t(), torch.eye(d, dtype=v.dtype, device=v.device))
    equations = equations + torch.einsum("rs,si,rj->risj", n, v, v)
    right = (torch.einsum("oij,rj->ori", b, v) * p.unsqueeze(2)).sum(0)
    return torch.linalg.solve(0.5 * equations.reshape(r * d, r * d), right.flatten()).view(r, d)
