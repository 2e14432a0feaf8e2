"""The gated MLP, forward and training step, against eager, packed, compiled and other libraries' versions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bilinear_ops as bo
from bench.harness.workload import (
    Contender,
    Run,
    Tensors,
    Workload,
    compiled,
    draw,
    forward,
    has,
    has_compiler,
    tiling,
    training_step,
)
from bilinear_ops.composite import gated as composite
from bilinear_ops.reference.gated import activate
from bilinear_ops.results import Gate

SHAPES = {  # (tokens, d, h)
    ("cpu", "tiny"): [(32, 48, 64)],
    ("cpu", "quick"): [(512, 256, 1024)],
    ("cpu", "full"): [(2048, 512, 2048), (2048, 768, 3072)],
    ("cuda", "tiny"): [(256, 128, 256)],
    ("cuda", "quick"): [(4096, 512, 2048)],
    ("cuda", "full"): [(16384, d, h) for d, h in ((512, 2048), (768, 3072), (1024, 4096), (2048, 5632), (4096, 11008))],
}
SMALL = (8, 16, 24)  # where a call costs more than its arithmetic
CASES = (("identity", 1.0), ("silu", 1.0), ("swish", 0.5))
ALL_CASES = (*CASES, ("relu", 1.0), ("gelu", 1.0), ("sigmoid", 1.0), ("gelu_tanh", 1.0))


def workloads(device: torch.device, size: str, impl: str = "auto") -> Iterator[Workload]:
    shapes = SHAPES[device.type, size]
    for shape in shapes:
        for activation, beta in ALL_CASES if size == "full" and shape == shapes[0] else CASES:
            for backward in (False, True):
                yield _mlp(device, size, impl, shape, activation, beta, backward, _dtype(device))
    if device.type == "cpu" and impl != "triton":
        yield _mlp(device, "quick", impl, SMALL, "silu", 1.0, False, torch.float32)
        yield _module(device, *SMALL)
    if device.type == "cuda":
        for dtype in (torch.float16, torch.float32):
            for shape in shapes[:2]:
                for backward in (False, True):
                    yield _mlp(device, size, impl, shape, "silu", 1.0, backward, dtype)


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _mlp(
    device: torch.device,
    size: str,
    impl: str,
    shape: tuple[int, int, int],
    activation: str,
    beta: float,
    backward: bool,
    dtype: torch.dtype,
) -> Workload:
    m, d, h = shape
    options: dict[str, Any] = {"activation": activation, "beta": beta}
    timed = training_step if backward else forward

    def ours(**more: Any) -> Contender:
        return timed(partial(bo.gated_mlp, **options, **more, impl=impl))

    def eager(x: Tensor, w: Tensor, v: Tensor, p: Tensor) -> Tensor:
        return F.linear(F.linear(x, w) * activate(F.linear(x, v), activation, beta), p)

    def packed(x: Tensor, vw: Tensor, p: Tensor) -> Tensor:
        z, a = F.linear(x, vw).chunk(2, -1)
        return F.linear(a * activate(z, activation, beta), p)

    def timed_packed(fn: Callable[..., Tensor], pack: Callable[..., Tensors] = _pack) -> Contender:
        return training_step(fn, pack, _unpack if pack is _pack else _unpack_rows) if backward else forward(fn, pack)

    baselines = {"eager": timed(eager), "packed": timed_packed(packed)}
    if has_compiler(device) and size == "full":
        baselines["eager, compiled"] = timed(compiled(eager))
        baselines["packed, compiled"] = timed_packed(compiled(packed))
    if device.type == "cuda" and activation == "silu" and dtype == torch.bfloat16:
        if has("liger_kernel"):
            baselines["liger"] = timed(_liger)
        if has("quack"):
            baselines["quack"] = timed_packed(_quack, _pack_rows)

    tensors = [((m, d), 1.0), ((h, d), d**-0.5), ((h, d), d**-0.5), ((d, h), h**-0.5)]  # x, w, v, p
    moved = 2 * m * d + 3 * h * d
    if backward:
        tensors.append(((m, d), 1.0))  # dy
        moved *= 2
    return Workload(
        op="gated_mlp",
        case=f"{activation if beta == 1.0 else f'{activation}({beta})'}, {'step' if backward else 'forward'}",
        shape={"m": m, "d": d, "h": h},
        dtype=dtype,
        inputs=draw(device, dtype, *tensors),
        reference=timed(lambda x, w, v, p: bo.reference.gated_mlp(x, w, v, p, **options)),
        ours=ours(),
        baselines=baselines,
        flops=(18 if backward else 6) * m * d * h,  # backward has two products for each of the forward's three
        bytes=moved * dtype.itemsize,
        variants={"recompute": ours(recompute=True)} if backward else {},
        bounds={"matmuls": _matmuls},
    )


def _module(device: torch.device, m: int, d: int, h: int) -> Workload:
    """Inference of the module against a module of three Linears, calls and attributes included."""

    def of(build: Callable[..., torch.nn.Module]) -> Contender:
        def contender(x: Tensor, *weights: Tensor) -> Run:
            module = build(*(torch.nn.Parameter(t) for t in weights))

            def run() -> Tensors:
                with torch.inference_mode():
                    return (module(x),)

            return run

        return contender

    def fused(w: torch.nn.Parameter, v: torch.nn.Parameter, p: torch.nn.Parameter) -> torch.nn.Module:
        layer = bo.nn.GatedMLP(w.shape[1], w.shape[0], activation="silu", dtype=w.dtype)
        layer.w, layer.v, layer.p = w, v, p
        return layer

    return Workload(
        op="GatedMLP",
        case="small, inference",
        shape={"m": m, "d": d, "h": h},
        dtype=torch.float32,
        inputs=draw(device, torch.float32, ((m, d), 1.0), ((h, d), d**-0.5), ((h, d), d**-0.5), ((d, h), h**-0.5)),
        reference=forward(lambda x, w, v, p: bo.reference.gated_mlp(x, w, v, p, activation="silu")),
        ours=of(fused),
        baselines={"eager": of(_ThreeLinears)},
        flops=6 * m * d * h,
        bytes=4 * (2 * m * d + 3 * h * d),
    )


class _ThreeLinears(torch.nn.Module):
    def __init__(self, *weights: torch.nn.Parameter):
        super().__init__()
        self.up, self.gate, self.down = (
            torch.nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta") for w in weights
        )
        self.up.weight, self.gate.weight, self.down.weight = weights

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x) * F.silu(self.gate(x)))


def _pack(x: Tensor, w: Tensor, v: Tensor, *rest: Tensor) -> Tensors:
    return x, torch.cat([v, w]), *rest


def _unpack(dx: Tensor, dvw: Tensor, *rest: Tensor) -> Tensors:
    dv, dw = dvw.chunk(2)
    return dx, dw, dv, *rest


def _liger(x: Tensor, w: Tensor, v: Tensor, p: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return F.linear(LigerSiLUMulFunction.apply(F.linear(x, v), F.linear(x, w)), p)


def _pack_rows(x: Tensor, w: Tensor, v: Tensor, *rest: Tensor) -> Tensors:
    return x, torch.stack([v, w], 1).flatten(0, 1), *rest


def _unpack_rows(dx: Tensor, dvw: Tensor, *rest: Tensor) -> Tensors:
    return dx, dvw[1::2], dvw[::2], *rest


def _quack(x: Tensor, vw: Tensor, p: Tensor) -> Tensor:
    from quack.mlp import mlp_func

    return mlp_func(x, vw, p, "swiglu")


def _matmuls(x: Tensor, w: Tensor, v: Tensor, p: Tensor, *dy: Tensor) -> Run:
    """The layer's matrix products alone, as few and as large as possible."""
    weights = torch.cat([w, v])  # [2h, d]
    az = torch.randn_like(x @ weights.t())  # [m, 2h], stands for [a | z] and for [da | dz]
    hid = az[:, : w.shape[0]].contiguous()  # [m, h]

    def run() -> Tensors:
        with torch.no_grad():
            torch.mm(x, weights.t())
            torch.mm(hid, p.t())
            for g in dy:
                torch.mm(g, p)
                torch.mm(g.t(), hid)
                torch.mm(az.t(), x)
                torch.mm(az, weights)
        return ()

    return run


def tilings(device: torch.device, size: str) -> Iterator[Workload]:
    """The two fused kernels, and the forward's unproven tiles apart: one that never ends costs no other tile."""
    from bilinear_ops.kernels import config, gated

    def forward_of(backend: ModuleType) -> Callable[..., Tensors]:
        return lambda x, w, v: backend.gate_forward(x, w, v, None, None, Gate("silu"), True)

    def backward_of(backend: ModuleType) -> Callable[..., Tensors]:
        return lambda dy, p, az: backend.gate_backward(dy, p, az, Gate("silu"), True, False)[:2]

    dtype = torch.bfloat16
    for m, d, h in SHAPES[device.type, size]:
        x, weight, az, p = ((m, d), 1.0), ((h, d), d**-0.5), ((m, 2 * h), 1.0), ((d, h), h**-0.5)
        for kernel, of, tensors, flops, moved in (
            ("gated_forward_kernel", forward_of, (x, weight, weight), 4, m * d + 2 * h * d + 3 * m * h),
            ("gated_backward_kernel", backward_of, (x, p, az), 2, m * d + h * d + 5 * m * h),
        ):
            tiles = partial(
                tiling, kernel, {"m": m, "d": d, "h": h}, dtype, draw(device, dtype, *tensors), of(composite),
                of(gated), device, flops * m * d * h, 2 * moved,
            )  # fmt: skip
            yield tiles()
            if config.unproven(kernel, config.architecture(device), dtype):
                yield tiles(unproven=True)
