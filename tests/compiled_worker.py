"""What the compiler makes of the kernels, printed as JSON for test_compiled.py, in whose process they are interpreted.

python tests/compiled_worker.py precisions cases multiplications casts fusions rings more_rings
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from triton import knobs
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import CompilationError
from triton.runtime.jit import JITFunction

from bench.static import gate, sass
from bench.static.cases import FAMILIES
from bilinear_ops.kernels import config, few_rows, gated, tuning
from bilinear_ops.kernels.interaction import matrices, ranking
from bilinear_ops.kernels.rank1 import losses, masked, masks, sparse
from bilinear_ops.kernels.records import RowTile, Tile
from bilinear_ops.results import Gate, Masks

MODULES = (config, few_rows, gated, matrices, ranking, losses, masked, masks, sparse)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


# fp32 calls whose kernels multiply matrices
PRODUCTS: dict[str, Callable[[], object]] = {
    "gated forward": lambda: gated.gate_forward(
        meta(4096, 1024), meta(2048, 1024), meta(2048, 1024), None, None, Gate("silu"), True
    ),
    "gated backward": lambda: gated.gate_backward(
        meta(4096, 1024), meta(1024, 2048), meta(4096, 4096), Gate("silu"), True, False
    ),
    "interaction, few": lambda: matrices.interaction_matrices(
        meta(2048, 1024), meta(2048, 1024), meta(8, 2048), None, False
    ),
    "interaction, many": lambda: matrices.interaction_matrices(
        meta(2048, 1024), meta(2048, 1024), meta(512, 2048), None, False
    ),
    "faithfulness": lambda: losses.squared_difference(meta(1024, 1024), meta(1024, 3072), meta(3072, 1024)),
}


def precisions() -> dict[str, Any]:
    """By the switch for TF32, the call and the architecture: the `input_precision` of its launches."""
    found: dict[str, Any] = {}
    for allowed in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = allowed
        for name, call in PRODUCTS.items():
            for arch in gate.TARGETS:
                launched: list[str] = []

                def warmup(kernel: JITFunction, *args: object, launched: list[str] = launched, **kwargs: Any) -> None:
                    if "PRECISION" in kwargs:
                        launched.append(kwargs["PRECISION"])

                with gate.compiling(arch), mock.patch.object(JITFunction, "warmup", warmup):
                    call()
                found.setdefault("on" if allowed else "off", {}).setdefault(name, {})[arch] = launched
    return found


def cases() -> list[tuple[str, list[str]]]:
    """What the gate of every target compiles, as the committed baseline names it, and the pointers that are None."""
    found: list[tuple[str, list[str]]] = []
    for arch in gate.TARGETS:
        for family in FAMILIES:
            for case in family(arch):

                def warmup(
                    kernel: JITFunction, *args: object, name: str = f"{arch} {{}} [{case.name}]", **_: Any
                ) -> None:
                    absent = [key for key, value in zip(kernel.arg_names, args, strict=False) if value is None]
                    found.append((name.format(kernel.__name__), absent))

                with gate.compiling(arch), mock.patch.object(JITFunction, "warmup", warmup):
                    case.call()
    return found


class Lowered(Exception):
    """Triton's intermediate representation of a kernel, in place of its machine code."""


@contextmanager
def lowering() -> Iterator[None]:
    """Within, compilation raises `Lowered` after its first stage."""
    add_stages = CUDABackend.add_stages

    def first_stage(backend: CUDABackend, stages: dict[str, Any], *arguments: object) -> None:
        add_stages(backend, stages, *arguments)
        lower = stages["ttir"]

        def stop(source: object, metadata: object) -> None:
            raise Lowered(str(lower(source, metadata)))

        stages["ttir"] = stop

    always = knobs.compilation.always_compile
    knobs.compilation.always_compile = True
    try:
        with mock.patch.object(CUDABackend, "add_stages", first_stage):
            yield
    finally:
        knobs.compilation.always_compile = always


def strided_calls() -> Iterator[Callable[[], object]]:
    """Every kernel, on operands none of whose strides is 1: the compiler drops multiplications by 1."""

    def t(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return meta(*shape, 3, dtype=dtype)[..., 0]

    s, m, c, d, o, h = 4, 4096, 3072, 1024, 1024, 2048
    wide = partial(t, dtype=torch.float32)
    seed, routing, indices = meta(dtype=torch.int64), t(m, dtype=torch.bool), meta(m, 8, dtype=torch.int64)
    tile, swish = Tile(64, 64, 32, 4, 3), Gate("swish", meta())

    def fused(call: Callable[..., object], *arguments: object) -> None:
        with tuning.using(gated_forward_kernel=tile, gated_backward_kernel=tile):
            call(*arguments)

    yield partial(fused, gated.gate_forward, t(m, d), t(h, d), t(h, d), t(h), t(h), swish, True)
    yield partial(fused, gated.gate_backward, t(m, o), t(o, h), t(m, 2 * h), swish, True, True)
    yield partial(gated.gate, t(m, h), t(m, h), swish)
    yield partial(gated.gate_backward, t(m, h), None, t(m, 2 * h), swish, True, True)
    for directions in (8, 512):
        yield partial(matrices.interaction_matrices, t(h, d), t(h, d), t(directions, h), None, False)
        yield partial(matrices.interaction_matrices, t(h, d), t(h, d), t(directions, h), None, True)
    layer = wide(h, d), wide(h, d), wide(512, h), None, None
    yield partial(ranking.interaction_moments, *layer)
    yield partial(ranking.interaction_topk, *layer, wide(512, d, d), 10, "pair", "output")
    yield partial(masks.uniform, seed, 0, s, m, c)
    for rows in (m, 1):
        for source, drawn, sampling in ((wide(s, rows, c), None, "source"), (None, seed, "continuous")):
            masked_by = Masks(wide(rows, c), source, wide(s, m), routing, drawn, None, None, 0, s, sampling)
            need = [True, True, True, source is not None, True]
            yield partial(masked.masked_apply, meta(s, m, o), t(m, c), t(c, o), masked_by, 1.0)
            yield partial(masked.masked_apply_backward, meta(s, m, o), t(m, c), t(c, o), masked_by, need)
    yield partial(sparse.sparse_dots, t(m, d), t(c, d), indices)
    yield partial(sparse.sparse_sums, t(m, 8), t(c, d), indices)
    yield partial(losses.squared_difference, t(o, d), t(d, c), t(c, o))


def multiplications() -> dict[str, list[str]]:
    """By kernel: multiplications of two run-time numbers in 32 bits that end in an address."""
    found: dict[str, list[str]] = {}
    warmup = JITFunction.warmup

    def lower(kernel: JITFunction, *args: object, **kwargs: object) -> None:
        try:
            warmup(kernel, *args, **kwargs)
        except Lowered as done:
            found.setdefault(kernel.__name__, []).extend(narrow_offsets(str(done)))

    with gate.compiling("sm_80"), lowering(), mock.patch.object(JITFunction, "warmup", lower):
        for call in strided_calls():
            call()
    return found


PASSED = ("arith.addi", "arith.subi", "arith.extsi", "arith.extui", "tt.splat", "tt.broadcast", "tt.expand_dims",
          "tt.reshape", "arith.muli", "arith.select")  # fmt: skip
OPERATION = re.compile(r"\s*(%[\w#]+) = ([\w.]+) (.*)")


def narrow_offsets(text: str) -> list[str]:
    """The lines of a representation that multiply two run-time numbers in 32 bits on the way to an address."""
    operations = {m.group(1): m.groups()[1:] for line in text.splitlines() if (m := OPERATION.match(line))}

    def constant(name: str) -> bool:
        operation, rest = operations.get(name, ("", ""))
        if operation in ("tt.splat", "arith.extsi"):
            return constant(operands(rest)[0])
        return operation == "arith.constant"

    found: dict[str, None] = {}
    waiting = [operands(rest)[1] for operation, rest in operations.values() if operation == "tt.addptr"]
    seen = set(waiting)
    while waiting:
        name = waiting.pop()
        operation, rest = operations.get(name, ("", ""))
        if operation not in PASSED:
            continue
        if operation == "arith.muli" and "i64" not in rest and not any(map(constant, operands(rest))):
            found[f"{name} = {operation} {rest}"] = None
        for operand in operands(rest):
            if operand not in seen:
                seen.add(operand)
                waiting.append(operand)
    return list(found)


def operands(rest: str) -> list[str]:
    return re.findall(r"%[\w#]+", rest.partition(" : ")[0])


CAST = re.compile(r"\.to\(tl\.int64\)|tl\.cast\((\w+), tl\.int64\)")


def casts() -> dict[str, list[str]]:
    """By cast to 64 bits in the kernels: the kernels in which dropping it leaves a product in 32 bits, or an error."""
    before = {name: len(lines) for name, lines in multiplications().items()}
    found: dict[str, list[str]] = {}
    functions = {f.__name__: f for m in MODULES for f in vars(m).values() if isinstance(f, JITFunction)}
    for function in functions.values():
        source = function.src
        for match in CAST.finditer(source):
            line = source[: match.start()].count("\n")
            place = f"{function.__name__}: {source.splitlines()[line].strip()}"
            function._unsafe_update_src(source[: match.start()] + (match.group(1) or "") + source[match.end() :])
            try:
                after = multiplications()
                found[place] = [name for name, lines in after.items() if len(lines) > before[name]]
            except CompilationError as error:  # of numbers that do not fit 32 bits
                found[place] = [str(error)]
        function._unsafe_update_src(source)
    return found


def fusions() -> dict[str, dict[str, int]]:
    """By drawing kernel: its fused multiply-adds as it is launched, and where the launch allows them."""
    t = meta
    drawn = Masks(t(4096, 3072), None, t(4, 4096), None, t(dtype=torch.int64), None, None, 0, 4, "continuous")
    need = [True, True, True, False, True]
    calls = (
        partial(masks.uniform, t(dtype=torch.int64), 0, 4, 4096, 3072),
        partial(masked.masked_apply, t(4, 4096, 1024), t(4096, 3072), t(3072, 1024), drawn, 1.0),
        partial(masked.masked_apply_backward, t(4, 4096, 1024), t(4096, 3072), t(3072, 1024), drawn, need),
    )
    launch = RowTile.launch
    found: dict[str, dict[str, int]] = {}
    for allowed in (False, True):
        options = (lambda tile, fp_fusion=True: launch(tile, True)) if allowed else launch
        with gate.compiling("sm_90") as launches, mock.patch.object(RowTile, "launch", options):
            for call in calls:
                call()
        for made in launches:
            histogram = sass.read(made.kernel, "sm_90")[0].histogram
            found.setdefault(made.name, {})["allowed" if allowed else "launched"] = histogram.get("FFMA", 0)
    return found


def rings(*gates: str) -> dict[str, Any]:
    """Of the forward of warp roles, by gate: its machine code, and the order of its synchronisation in PTX."""
    m, d, h = 4096, 1024, 2048
    found: dict[str, Any] = {}
    for activation in gates or ("identity",):
        number = None if activation == "identity" else meta()
        t = partial(meta, dtype=torch.float16 if activation == "gelu" else torch.bfloat16)
        with gate.compiling("sm_90") as launches:
            (tile,) = config.unproven("gated_forward_kernel", "sm_90", torch.bfloat16)
            with tuning.using(gated_forward_kernel=tile):
                gate_of = Gate(activation, number if activation == "swish" else None, number, number)
                gated.gate_forward(t(m, d), t(h, d), t(h, d), t(h), t(h), gate_of, True)
        (launched,) = launches
        code, _ = sass.read(launched.kernel, "sm_90")
        found[activation] = {
            "spills": code.spills,
            "matrix": code.matrix,
            "waits": code.waits,
            "shared": launched.kernel.metadata.shared,
            "ptx": SYNCHRONISATION.findall(launched.kernel.asm["ptx"]),
        }
    return found


SYNCHRONISATION = re.compile(
    r"mbarrier\.init\.\S+ \[%r\d+\], \d+|mbarrier\.try_wait|mbarrier\.arrive\.expect_tx\.\S+ _, \[%r\d+\], \d+"
    r"|mbarrier\.arrive\.shared|cp\.async\.bulk\.tensor\.2d\.(?:shared|global)|cp\.async\.bulk\.wait_group\.read"
    r"|wgmma\.wait_group|fence\.proxy\.async|\bbar\.sync|stmatrix|setmaxnreg\.\w+\.\S+ *\t*\d+"
)


def more_rings() -> dict[str, Any]:
    """Of the heaviest epilogues, and of the other type of two bytes."""
    return rings("silu", "swish", "silu_bounded", "gelu")


if __name__ == "__main__":
    known = {f.__name__: f for f in (precisions, cases, multiplications, casts, fusions, rings, more_rings)}
    print(json.dumps({name: known[name]() for name in sys.argv[1:]}))
