"""Interaction matrices, rankings, eigenpairs and inner products, against einsum, bmm and eigh."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import bilinear_ops as bo
from bench.harness.workload import Contender, Tensors, Workload, compiled, draw, forward, has_compiler, tiling

MATRICES = {  # (outputs, d, h)
    ("cpu", "tiny"): [(5, 24, 40), (40, 16, 33)],
    ("cpu", "quick"): [(10, 96, 128), (256, 48, 128)],
    ("cpu", "full"): [(10, 784, 512), (1024, 256, 1024), (64, 784, 2048)],
    ("cuda", "tiny"): [(10, 128, 128), (256, 64, 128)],
    ("cuda", "quick"): [(64, 512, 1024), (1024, 256, 1024)],
    ("cuda", "full"): [(10, 784, 512), (512, 784, 2048), (1024, 256, 1024), (512, 1024, 4096), (64, 2048, 8192)],
}
RANKINGS = {  # (outputs, d, h, features)
    ("cpu", "tiny"): (4, 16, 33, 40),
    ("cpu", "quick"): (16, 128, 256, 256),
    ("cpu", "full"): (64, 512, 1024, 2048),
    ("cuda", "tiny"): (8, 64, 128, 128),
    ("cuda", "quick"): (64, 512, 1024, 2048),
    ("cuda", "full"): (2048, 512, 1024, 2048),
}
STRONGEST = 100
SMALL = ((4, 32, 64), (32, 32, 128))  # (outputs, d, h) where calls cost more than arithmetic
SMALL_STRONGEST = 10
EIGENPAIRS = {  # (tokens, outputs, rank, d, active outputs of a token)
    "tiny": [(33, 40, 5, 24, 3)],
    "quick": [(128, 512, 16, 128, 8)],
    "full": [(511, 4096, 64, 512, 30), (511, 16384, 64, 512, 30)],
}
SPECTRA = {  # (directions, d, h, eigenpairs of each)
    "tiny": [(3, 60, 70, 2)],
    "quick": [(10, 256, 256, 2)],
    "full": [(10, 512, 512, 2), (512, 256, 1024, 2), (64, 256, 1024, 8), (10, 1024, 128, 2)],
}
LAYERS = {"tiny": (12, 33, 10), "quick": (64, 256, 64), "full": (256, 1024, 256)}  # (d, h, outputs)
OTHERS = 4  # layers that one layer is compared with
CHUNK = 1 << 26  # workspace of a reference, in bytes


def workloads(device: torch.device, size: str, impl: str = "auto") -> Iterator[Workload]:
    for outputs, d, h in MATRICES[device.type, size]:
        for dtype in (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,):
            yield _matrices(device, size, impl, outputs, d, h, dtype)
            if outputs > d:
                yield _low_rank(device, size, impl, outputs, d, h, dtype)
    yield _ranking(device, impl, *RANKINGS[device.type, size])
    if impl == "triton":
        return  # the rest are library calls
    if device.type == "cpu":
        for small in SMALL:
            yield _small_ranking(device, *small)
    for tokens, outputs, rank, d, active in EIGENPAIRS[size][: None if device.type == "cuda" else 1]:
        yield _eigenpairs(device, tokens, outputs, rank, d, active)
    for outputs, d, h, n in SPECTRA[size]:
        yield _spectrum(device, outputs, d, h, n)
    yield _inner(device, *LAYERS[size])


def _einsum(w: Tensor, v: Tensor, c: Tensor) -> Tensor:
    q = torch.einsum("kh,hi,hj->kij", c, w, v)
    return 0.5 * (q + q.mT)


def _einsum_of_factors(w: Tensor, v: Tensor, u: Tensor, p: Tensor) -> Tensor:
    q = torch.einsum("ko,oh,hi,hj->kij", u, p, w, v)
    return 0.5 * (q + q.mT)


def _scaled(w: Tensor, v: Tensor, c: Tensor) -> Tensors:
    """The operands of one large product: [K d, h] and [h, d]."""
    return (c.unsqueeze(1) * w.t()).flatten(0, 1), v


def _flat(w: Tensor, v: Tensor, c: Tensor) -> Tensor:
    q = torch.mm(*_scaled(w, v, c)).unflatten(0, (-1, w.shape[1]))
    return 0.5 * (q + q.mT)


def _in_chunks(w: Tensor, v: Tensor, c: Tensor) -> Tensor:
    """The reference in chunks: its float64 workspace [K, d, h] does not fit in memory at once."""
    return torch.cat([q for _, q in bo.reference.iter_interaction_matrices(w, v, c, chunk_bytes=CHUNK)])


def _matrices(device: torch.device, size: str, impl: str, outputs: int, d: int, h: int, dtype: torch.dtype) -> Workload:
    baselines = {"eager": forward(_einsum), "flat bmm": forward(_flat)}
    if has_compiler(device) and size == "full":
        baselines["flat bmm, compiled"] = forward(compiled(_flat))
    return Workload(
        op="interaction_matrices",
        case="coefficients",
        shape={"K": outputs, "d": d, "h": h},
        dtype=dtype,
        inputs=draw(device, dtype, ((h, d), d**-0.5), ((h, d), d**-0.5), ((outputs, h), h**-0.5)),
        reference=forward(_in_chunks),
        ours=forward(lambda w, v, c: bo.interaction_matrices(w, v, c, impl=impl)),
        baselines=baselines,
        flops=2 * outputs * d * d * h,
        bytes=(2 * h * d + outputs * h + outputs * d * d) * dtype.itemsize,
        bounds={"matmul": forward(torch.mm, _scaled)},
    )


def _low_rank(device: torch.device, size: str, impl: str, outputs: int, d: int, h: int, dtype: torch.dtype) -> Workload:
    """More outputs than dimensions: coefficients u p [K, h] of rank d."""

    def of_product(fn: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
        return lambda w, v, u, p: fn(w, v, u @ p)

    baselines = {"eager": forward(_einsum_of_factors), "flat bmm": forward(of_product(_flat))}
    if has_compiler(device) and size == "full":
        baselines["flat bmm, compiled"] = forward(compiled(of_product(_flat)))
    up = ((h, d), d**-0.5)
    return Workload(
        op="interaction_matrices",
        case="directions",
        shape={"K": outputs, "d": d, "h": h},
        dtype=dtype,
        inputs=draw(device, dtype, up, up, ((outputs, d), d**-0.5), ((d, h), h**-0.5)),
        reference=forward(of_product(_in_chunks)),
        ours=forward(lambda w, v, u, p: bo.interaction_matrices(w, v, bo.Directions(u, p), impl=impl)),
        baselines=baselines,
        flops=2 * d * d * d * h + outputs * d * d * (d + 1),  # d matrices, then combinations of their upper triangles
        bytes=(3 * h * d + outputs * d + outputs * d * d) * dtype.itemsize,
    )


def _strongest(scores: list[Tensor]) -> Tensor:
    """Magnitudes in descending order: near-ties may swap indices between precisions, but not values."""
    return torch.cat(scores).abs().topk(STRONGEST).values


def _ranked_one_by_one(w: Tensor, v: Tensor, c: Tensor, basis: Tensor) -> Tensor:
    """Form each output's matrix in a loop; tril and topk of each, then of all."""
    best = []
    for row in c:
        q = (w.t() * row) @ v
        q = (basis.t() @ ((q + q.t()) @ basis)).tril(-1).flatten()  # the two triangles' sum: 2 Q_ij
        best.append(q[q.abs().topk(STRONGEST).indices])
    return _strongest(best)


def _ranking(device: torch.device, impl: str, outputs: int, d: int, h: int, features: int) -> Workload:
    def reference(w: Tensor, v: Tensor, c: Tensor, basis: Tensor) -> Tensor:
        """One output at a time: the global reference sorts an array of K F (F - 1) / 2 elements."""
        found = (bo.reference.interaction_topk(w, v, row[None], STRONGEST, basis=basis).values[0] for row in c)
        return _strongest(list(found))

    def ours(w: Tensor, v: Tensor, c: Tensor, basis: Tensor) -> Tensor:
        return bo.interaction_topk(w, v, c, STRONGEST, scope="global", basis=basis, impl=impl).values.abs()

    up, down, into = ((h, d), d**-0.5), ((outputs, h), h**-0.5), ((d, features), d**-0.5)
    return Workload(
        op="interaction_topk",
        case=f"global, {STRONGEST}",
        shape={"K": outputs, "d": d, "h": h, "F": features},
        dtype=torch.float32,
        inputs=draw(device, torch.float32, up, up, down, into),
        reference=forward(reference),
        ours=forward(ours),
        baselines={"eager": forward(_ranked_one_by_one)},
        # per output the matrix, then its feature pairs, in the cheapest order of products
        flops=2 * outputs * min(d * d * h + d * d * features + d * features * features // 2, features * features * h),
        bytes=4 * (2 * h * d + outputs * h + d * features) + (4 + 3 * 8) * STRONGEST,  # values, and indices i, j, k
    )


def _small_ranking(device: torch.device, outputs: int, d: int, h: int) -> Workload:
    n = SMALL_STRONGEST

    def formula(w: Tensor, v: Tensor, c: Tensor) -> bo.TopInteractions:
        q = torch.einsum("kh,hi,hj->kij", c, w, v)
        q = (q + q.mT).triu(1).flatten(1)
        place = q.abs().topk(n).indices
        k = torch.arange(outputs, device=device)[:, None].expand(outputs, n)
        return bo.TopInteractions(q.gather(1, place), k, place // d, place % d)

    def ranked(topk: Callable[..., bo.TopInteractions]) -> Contender:
        """Magnitudes: near-ties may swap indices between precisions."""
        return forward(lambda w, v, c: topk(w, v, c).values.abs())

    return Workload(
        op="interaction_topk",
        case=f"small, {n} of each",
        shape={"K": outputs, "d": d, "h": h},
        dtype=torch.float32,
        inputs=draw(device, torch.float32, ((h, d), d**-0.5), ((h, d), d**-0.5), ((outputs, h), h**-0.5)),
        reference=ranked(lambda w, v, c: bo.reference.interaction_topk(w, v, c, n)),
        ours=ranked(lambda w, v, c: bo.interaction_topk(w, v, c, n)),
        baselines={"eager": ranked(formula)},
        flops=2 * outputs * d * d * h,
        bytes=4 * (2 * h * d + outputs * h) + (4 + 3 * 8) * outputs * n,  # values, and indices i, j, k
    )


def _eigenpairs(device: torch.device, tokens: int, outputs: int, rank: int, d: int, active: int) -> Workload:
    def inputs(seed: int) -> Tensors:
        tensors = ((tokens, d), d**-0.5), ((outputs, rank), 1.0), ((outputs, rank, d), 1.0), ((tokens, outputs), 1.0)
        x, values, vectors, strength = draw(device, torch.float32, *tensors)(seed)
        k = strength.topk(active, 1).indices.flatten()
        return x, values, vectors, torch.arange(tokens, device=device).repeat_interleave(active), k

    def reference(x: Tensor, values: Tensor, vectors: Tensor, t: Tensor, k: Tensor) -> Tensor:
        """In chunks of pairs: the reference copies the vectors of every pair."""
        step = max(1, CHUNK // (8 * rank * d))
        pairs = zip(t.split(step), k.split(step), strict=True)
        return torch.cat([bo.reference.eigen_form(x, values, vectors, pairs=pair) for pair in pairs])

    def masked(x: Tensor, values: Tensor, vectors: Tensor, t: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        z = (x @ vectors.flatten(0, 1).t()).unflatten(1, (outputs, rank)).square_()
        return ((z * values).cumsum(2)[..., -1] * mask)[t, k]

    def with_mask(x: Tensor, values: Tensor, vectors: Tensor, t: Tensor, k: Tensor) -> Tensors:
        mask = x.new_zeros(tokens, outputs).index_put_((t, k), x.new_ones(()))
        return x, values, vectors, t, k, mask

    def gathered(x: Tensor, values: Tensor, vectors: Tensor, t: Tensor, k: Tensor) -> Tensor:
        z = torch.bmm(vectors[k], x[t].unsqueeze(2)).squeeze(2)
        return (values[k] * z.square()).sum(1)

    pairs = tokens * active
    return Workload(
        op="eigen_form",
        case=f"pairs, {active} active",
        shape={"m": tokens, "K": outputs, "r": rank, "d": d},
        dtype=torch.float32,
        inputs=inputs,
        reference=forward(reference),
        ours=forward(lambda x, values, vectors, t, k: bo.eigen_form(x, values, vectors, pairs=(t, k))),
        baselines={"eager": forward(masked, with_mask), "gathered bmm": forward(gathered)},
        flops=2 * pairs * rank * d,
        bytes=4 * (tokens * d + min(outputs, pairs) * rank * (d + 1) + pairs) + 16 * pairs,
    )


def _spectrum(device: torch.device, outputs: int, d: int, h: int, n: int) -> Workload:
    """Weights of descending scale, for spectra that decay like those of trained layers."""

    def inputs(seed: int) -> Tensors:
        up, down = ((h, d), d**-0.5), ((outputs, h), h**-0.5)
        w, v, c, rotation = draw(device, torch.float32, up, up, down, ((d, d), 1.0))(seed)
        scaled = torch.linalg.qr(rotation)[0] * torch.arange(1, d + 1, device=device).rsqrt()
        return w @ scaled, (w + v) @ scaled, c

    def strongest(values: Tensor) -> Tensor:
        """Magnitudes: the order of nearly equal eigenvalues of opposite sign depends on rounding."""
        return values.abs().topk(n, 1).values

    def decomposed(matrices: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Contender:
        return forward(lambda w, v, c: strongest(torch.linalg.eigh(matrices(w, v, c))[0]))

    return Workload(
        op="interaction_eigh",
        case=f"{n} strongest",
        shape={"K": outputs, "d": d, "h": h},
        dtype=torch.float32,
        inputs=inputs,
        reference=decomposed(_in_chunks),
        ours=forward(lambda w, v, c: strongest(bo.analysis.interaction_eigh(w, v, c, n).values)),
        baselines={"eager": decomposed(_einsum), "flat bmm": decomposed(_flat)},
        flops=8 * outputs * n * h * d,  # one product with each eigenvector
        bytes=4 * (2 * h * d + outputs * (h + n + n * d)),
    )


def _inner(device: torch.device, d: int, h: int, outputs: int) -> Workload:
    """One layer against several similar ones: the rounding error of a single number says little."""

    def inputs(seed: int) -> Tensors:
        up, down = ((h, d), d**-0.5), ((outputs, h), h**-0.5)
        others = [((OTHERS, *shape), 0.1 * scale) for shape, scale in (up, up, down)]
        w, v, p, *changes = draw(device, torch.float32, up, up, down, *others)(seed)
        return w, v, p, w + changes[0], v + changes[1], p + changes[2]

    def against_each(inner: Callable[..., Tensor]) -> Contender:
        return forward(
            lambda w, v, p, *others: torch.stack([inner(w, v, p, *other) for other in zip(*others, strict=True)])
        )

    def formed(w: Tensor, v: Tensor, p: Tensor, *others: Tensor) -> Tensor:
        b = _flat(w, v, p)
        return torch.stack([(b * _flat(*other)).sum() for other in zip(*others, strict=True)])

    return Workload(
        op="layer_inner",
        case=f"{OTHERS} others",
        shape={"d": d, "h": h, "o": outputs},
        dtype=torch.float32,
        inputs=inputs,
        reference=against_each(bo.reference.layer_inner),
        ours=against_each(bo.layer_inner),
        baselines={"eager": forward(formed)},
        flops=2 * OTHERS * h * h * (4 * d + outputs),
        bytes=4 * ((1 + OTHERS) * h * (2 * d + outputs) + OTHERS),
    )


def tilings(device: torch.device, size: str) -> Iterator[Workload]:
    """The kernels of both orders of contraction, and where gradients go by pairs, theirs."""
    from bilinear_ops.composite.interaction.matrices import interaction_matrices_backward as composite
    from bilinear_ops.kernels import config
    from bilinear_ops.kernels.interaction import matrices, matrices_backward

    def gradients(fn: Callable[..., Any], *need: bool) -> Callable[..., Any]:
        return lambda dq, w, v, c: tuple(itertools.compress(fn(dq, w, v, c, None, list(need)), need))

    dtype = torch.bfloat16
    for outputs, d, h in MATRICES[device.type, size]:
        tensors = (((h, d), d**-0.5), ((h, d), d**-0.5), ((outputs, h), h**-0.5))
        shape, matrix = {"K": outputs, "d": d, "h": h}, ((outputs, d, d), d**-0.5)
        products, moved = 2 * outputs * d * d * h, (2 * h * d + outputs * h + outputs * d * d) * dtype.itemsize
        yield tiling(
            "interaction_matrices", shape, dtype, draw(device, dtype, *tensors), _in_chunks,
            lambda w, v, c: matrices.interaction_matrices(w, v, c, None, False), device, products, moved,
        )  # fmt: skip
        if not config.interaction_pairs(config.architecture(device), dtype, outputs):
            continue
        for kernel, need in (
            ("interaction_weights_kernel", (True, True, False, False)),
            ("interaction_coefficients_kernel", (False, False, True, False)),
        ):
            yield tiling(
                kernel, shape, dtype, draw(device, dtype, matrix, *tensors), gradients(composite, *need),
                gradients(matrices_backward.interaction_matrices_backward, *need), device, products, moved,
            )  # fmt: skip
