"""Every kernel on every way in (but TF32), at the smallest sizes with a tail: for GPU tests and compute-sanitizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import bilinear_ops as bo
from bench.harness.workload import Contender, Run, Workload, draw, training_step
from bilinear_ops.kernels import config, tuning

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ALIGNED, UNALIGNED = (33, 24, 40, 16), (33, 23, 41, 17)  # tokens, d, h, o: with rows of 16 bytes' multiples, and not
SEED = 3
FUSED = ("gated_forward_kernel", "gated_backward_kernel")
Op = Callable[..., Tensor]
Shapes = tuple[tuple[int, ...], ...]


def workloads(device: torch.device) -> list[Workload]:
    """Training steps, ours through the kernels; the names are the same for all devices."""
    families = (_gated, _interaction, _ranked, _masked, _sparse, _accumulated, _networks, _faithfulness, _uniform)
    return [w for family in families for w in family(device)]


def _workload(
    device: torch.device,
    op: str,
    case: str,
    dtype: torch.dtype,
    shapes: Shapes,
    fn: Callable[[Any], Op],
    **tiles: Callable[[], config.Choice],
) -> Workload:
    """`fn(module)` is the op in bilinear_ops or in its reference; the last of the shapes is its result's."""
    return Workload(
        op=op,
        case=case,
        shape={},
        dtype=dtype,
        inputs=draw(device, dtype, *((shape, 1.0) for shape in shapes)),
        reference=training_step(fn(bo.reference)),
        ours=_with(training_step(fn(bo)), tiles),
        baselines={},
        flops=0,
        bytes=0,
    )


def _with(contender: Contender, tiles: dict[str, Callable[[], config.Choice]]) -> Contender:
    def build(*inputs: Tensor) -> Run:
        run = contender(*inputs)

        def with_tiles() -> tuple[Tensor, ...]:
            with tuning.using(**{kernel: tile() for kernel, tile in tiles.items()}):
                return run()

        return with_tiles

    return build


def _ours(module: Any) -> dict[str, str]:
    return {"impl": "triton"} if module is bo else {}


def _gated(device: torch.device) -> Iterator[Workload]:
    def mlp(module: Any) -> Op:
        return lambda x, w, v, p, b_w, b_v, b_p, beta: module.gated_mlp(
            x, w, v, p, b_w, b_v, b_p, activation="swish", beta=beta, **_ours(module)
        )

    def up(module: Any) -> Op:
        return lambda x, w, v: module.gated_bilinear(x, w, v, activation="silu", **_ours(module))

    for dtype in DTYPES:
        for (m, d, h, o), aligned in ((ALIGNED, True), (UNALIGNED, False)):
            shapes: Shapes = ((m, d), (h, d), (h, d), (o, h), (h,), (h,), (o,), (), (m, o))
            case = "aligned" if aligned else "unaligned"
            if dtype != torch.float32:  # whose products are the library's

                def tile(kernel: str, dtype: torch.dtype = dtype, aligned: bool = aligned) -> config.Choice:
                    return config.tiles(kernel, config.architecture(device), dtype, aligned)[0]

                fused = {kernel: partial(tile, kernel) for kernel in FUSED}
                yield _workload(device, "gated_mlp", f"fused, {case}", dtype, shapes, mlp, **fused)
            library: dict[str, Callable[[], config.Choice]] = dict.fromkeys(FUSED, _library)
            yield _workload(device, "gated_mlp", f"library, {case}", dtype, shapes, mlp, **library)
            shapes = ((m, d), (h, d), (h, d), (m, h))
            yield _workload(device, "gated_bilinear", case, dtype, shapes, up)


def _library() -> config.Choice:
    return config.LIBRARY


def _interaction(device: torch.device) -> Iterator[Workload]:
    d, h = 18, 21
    for dtype in DTYPES:
        for layout, q in (("full", (d, d)), ("packed", (d * (d + 1) // 2,))):
            # so many directions K that the gradients take the same order
            for order, directions, K in (("direction", 8, 5), ("pairs", 512, 85)):

                def tile(dtype: torch.dtype = dtype, directions: int = directions) -> config.Choice:
                    return config.interaction_matrices(config.architecture(device), dtype, directions)[0]

                def matrices(module: Any, layout: str = layout) -> Op:
                    return lambda w, v, c: module.interaction_matrices(w, v, c, layout=layout, **_ours(module))

                shapes = ((h, d), (h, d), (K, h), (K, *q))
                yield _workload(
                    device, "interaction_matrices", f"{order}, {layout}", dtype, shapes, matrices,
                    interaction_matrices=tile,
                )  # fmt: skip


def _ranked(device: torch.device) -> Iterator[Workload]:
    """More outputs than matrices are formed for, by their strongest pairs' values."""

    def strongest(module: Any) -> Op:
        return lambda w, v, c: module.interaction_topk(w, v, c, 2, scope="global", **_ours(module)).values

    for dtype in DTYPES:
        yield _workload(device, "interaction_topk", "", dtype, ((21, 18), (21, 18), (49, 21), (2,)), strongest)


def _masked(device: torch.device) -> Iterator[Workload]:
    m, d, o, c, s = 33, 24, 17, 40, 2
    routing = torch.arange(m, device=device) % 3 > 0

    def given(module: Any) -> Op:
        return lambda x, read, write, mask, weight, delta: module.rank1_linear(
            x, read, write, mask, weight=weight, delta=delta, routing=routing, **_ours(module)
        )

    def drawn(sampling: str, **more: Any) -> Callable[[Any], Op]:
        def of(module: Any) -> Op:
            return lambda x, read, write, gates, weight: module.stochastic_rank1_linear(
                x, read, write, gates, samples=s, seed=SEED, sampling=sampling, weight=weight, delta="uniform",
                routing=routing, **more, **_ours(module),
            )  # fmt: skip

        return of

    def adversarial(module: Any) -> Op:
        return lambda x, read, write, gates, source: module.stochastic_rank1_linear(
            x, read, write, gates, samples=s, source=source, **_ours(module)
        )

    for dtype in DTYPES:
        layer = ((m, d), (d, c), (c, o))
        shapes: Shapes = (*layer, (m, c), (o, d), (m,), (m, o))
        yield _workload(device, "rank1_linear", "given", dtype, shapes, given)
        for sampling in ("continuous", "binomial"):
            for gates in ((m, c), (c,)):
                case = f"{sampling}, {'full' if len(gates) == 2 else 'broadcast'}"
                shapes = (*layer, gates, (o, d), (s, m, o))
                yield _workload(device, "stochastic_rank1_linear", case, dtype, shapes, drawn(sampling))
        for source in ((s, m, c), (c,)):
            case = f"source, {'full' if len(source) == 3 else 'broadcast'}"
            shapes = (*layer, (m, c), source, (s, m, o))
            yield _workload(device, "stochastic_rank1_linear", case, dtype, shapes, adversarial)


def _sparse(device: torch.device) -> Iterator[Workload]:
    m, d, o, c, k = 9, 24, 17, 400, 2
    indices = torch.arange(m * k, device=device).view(m, k) * 7 % c

    def sparse(module: Any) -> Op:
        return lambda x, read, write, gates: module.rank1_sparse(x, read, write, indices, gates, **_ours(module))

    for dtype in DTYPES:
        yield _workload(device, "rank1_sparse", "gathered", dtype, ((m, d), (d, c), (c, o), (m, k), (m, o)), sparse)


def _accumulated(device: torch.device) -> Iterator[Workload]:
    def weights(module: Any) -> Op:
        return lambda gates, read, write, base: module.rank1_accumulate(gates, read, write, base=base, **_ours(module))

    for dtype in DTYPES:
        shapes = ((5, 40), (70, 40), (40, 33), (33, 70), (5, 33, 70))
        yield _workload(device, "rank1_accumulate", "", dtype, shapes, weights)


def _networks(device: torch.device) -> Iterator[Workload]:
    def logits(module: Any) -> Op:
        return lambda *tensors: module.component_gates(*tensors, **_ours(module))

    for dtype in DTYPES:
        shapes = ((33, 70), (70, 3), (70, 3), (70, 3), (70,), (33, 70))
        yield _workload(device, "component_gates", "", dtype, shapes, logits)


def _faithfulness(device: torch.device) -> Iterator[Workload]:
    def loss(module: Any) -> Op:
        return lambda weight, read, write: module.faithfulness_loss(weight, read, write, **_ours(module)).to(weight)

    for dtype in DTYPES:
        yield _workload(device, "faithfulness_loss", "", dtype, ((33, 70), (70, 40), (40, 33), ()), loss)


def _uniform(device: torch.device) -> Iterator[Workload]:
    def mask(module: Any) -> Op:
        return lambda gates: module.stochastic_mask(gates, samples=2, seed=SEED, **_ours(module))

    yield _workload(device, "stochastic_mask", "", torch.float32, ((33, 70), (2, 33, 70)), mask)
