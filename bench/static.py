"""What a machine without a GPU can prove: every kernel, at every tile of its table, compiled for its real targets.

    python -m bench.static [--target sm_90 ...] [--kernel NAME]

The launchers run as they are, on meta tensors, with compilation in place of the launch: what is checked is what a
user's call would compile. Registers, shared memory, spills and matrix instructions are read from the machine code.
"""

from __future__ import annotations

import argparse
import collections
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from bilinear_ops.composite.rank1 import Masks
from bilinear_ops.kernels import config, faithfulness, gated, rank1, sparse, uniform

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Case:
    """One launch: what it is called in the table, and the launcher's call on meta tensors."""

    name: str
    call: Callable[[], object]


@dataclass
class Report:
    """What the machine code of one kernel says. Spills are counted over the whole kernel, in instructions."""

    kernel: str
    case: str
    target: str
    shared: int
    registers: int = 0
    spills: int = 0
    matrix: dict[str, int] = field(default_factory=dict)
    waits: int = 0

    def failures(self) -> list[str]:
        where = f"{self.kernel} [{self.case}] on {self.target}"
        found = []
        if self.shared > config.SHARED_MEMORY[self.target]:
            found.append(f"{where}: {self.shared} bytes of shared memory, limit {config.SHARED_MEMORY[self.target]}")
        if self.spills:
            found.append(f"{where}: {self.spills} spill instructions")
        if self.waits:
            found.append(f"{where}: {self.waits} wgmmas waited for one by one")
        return found


class _CompileOnly:
    """A driver that knows its target and has no device."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)

    def get_current_stream(self, device: object) -> int:
        return 0


@contextmanager
def compiling(arch: str) -> Iterator[list[tuple[str, Any]]]:
    """Within, launches on meta tensors compile for `arch` instead; yields the growing list of (name, kernel)."""
    compiled: list[tuple[str, Any]] = []

    def launch(kernel: JITFunction, grid: object) -> Callable[..., None]:
        def compile_(*args: object, **kwargs: object) -> None:
            compiled.append((kernel.__name__, kernel.warmup(*args, grid=grid, **kwargs)))

        return compile_

    with (
        mock.patch.object(triton.runtime.driver, "_active", _CompileOnly(TARGETS[arch])),
        mock.patch.object(JITFunction, "__getitem__", launch),
        mock.patch.object(config, "architecture", lambda device: arch),
        mock.patch.object(config, "processors", lambda device: 132),
    ):
        yield compiled


def gated_cases(arch: str) -> Iterator[Case]:
    """Every tile both ways in, with the heaviest epilogue: swish and biases, everything kept."""
    m, d, h, o = 4096, 1024, 2048, 1024
    rows = {True: arch, False: "pointers" if config.has_descriptors(arch) else arch}
    for dtype in (torch.bfloat16, torch.float16):

        def t(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        def forward(tile: config.Tile, d: int, t: Callable[..., torch.Tensor] = t) -> object:
            return gated.gate_forward(t(m, d), t(h, d), t(h, d), t(h), t(h), t(), "swish", True, (tile,))

        def backward(tile: config.Tile | None, o: int, t: Callable[..., torch.Tensor] = t) -> object:
            dy, p, tiles = (t(m, o), t(o, h), (tile,)) if tile else (t(m, h), None, None)
            return gated.gate_backward(dy, p, t(m, 2 * h), t(), "swish", True, True, tiles)

        name = str(dtype).removeprefix("torch.")
        for aligned, row in rows.items():
            way = "aligned" if aligned else "unaligned"
            for tile in config.GATED_FORWARD[row]:
                shape = f"{tile.block_m}x2x{tile.block_n}x{tile.block_k}"
                yield Case(f"{name} {shape} {way}", partial(forward, tile, d + (not aligned)))
            for tile in config.GATED_BACKWARD[row]:
                shape = f"{tile.block_m}x{tile.block_n}x{tile.block_k}"
                yield Case(f"{name} {shape} {way}", partial(backward, tile, o + (not aligned)))
        yield Case(f"{name} alone", partial(gated.gate, t(m, 2 * h), t(), "swish"))
        yield Case(f"{name} alone", partial(backward, None, o))


def rank1_cases(arch: str) -> Iterator[Case]:
    """Everything asked for at once: four samples, delta, routing and every gradient, whatever the kind of mask."""
    s, m, d, o, c, k = 4, 4096, 1024, 1024, 3072, 8
    for dtype in (torch.float32, torch.bfloat16, torch.float16):

        def t(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        name, indices = str(dtype).removeprefix("torch."), t(m, k, dtype=torch.int64)
        yield Case(name, partial(faithfulness.squared_difference, t(o, d), t(d, c), t(c, o)))
        yield Case(name, partial(sparse.sparse_dots, t(m, d), t(c, d), indices))
        yield Case(name, partial(sparse.sparse_sums, t(m, k), t(c, d), indices))
        for sampling in ("given", "source", "continuous", "binomial"):
            for rows in (m, 1):
                wide = partial(t, dtype=torch.float32)
                source = wide(s, rows, c) if sampling == "source" else None
                seed = t(dtype=torch.int64) if sampling in ("continuous", "binomial") else None
                masks = Masks(wide(rows, c), source, wide(s, m), t(m, dtype=torch.bool), seed, 0, s, sampling)
                case = f"{name} {sampling} {'broadcast' if rows == 1 else 'full'}"
                need = [True, True, True, source is not None, True]
                yield Case(case, partial(rank1.masked_apply, t(s, m, o), t(m, c), t(c, o), masks, 1.0))
                yield Case(case, partial(rank1.masked_apply_backward, t(s, m, o), t(m, c), t(c, o), masks, need))
    yield Case("alone", partial(uniform.uniform, t(dtype=torch.int64), 0, s, m, c))


FAMILIES = (gated_cases, rank1_cases)


def reports(arch: str, only: str = "") -> Iterator[Report]:
    """Compile every case of every family for `arch` and read its machine code."""
    for cases in FAMILIES:
        for case in cases(arch):
            with compiling(arch) as compiled:
                case.call()
            for name, kernel in compiled:
                if only in name:
                    yield read(name, case.name, arch, kernel)


def read(name: str, case: str, arch: str, kernel: Any) -> Report:
    report = Report(name, case, arch, kernel.metadata.shared)
    if arch.startswith("gfx"):
        text = kernel.asm["amdgcn"]
        report.registers = int(_first(r"\.vgpr_count:\s+(\d+)", text))
        report.spills = int(_first(r"\.vgpr_spill_count:\s+(\d+)", text))
        report.matrix = dict(collections.Counter(re.findall(r"\bv_mfma_\w+", text)))
        return report
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = _run("cuobjdump", "-res-usage", cubin.name)
        sass = _run("nvdisasm", "-c", cubin.name)
    report.registers = int(_first(r"REG:(\d+)", usage))
    report.spills = len(re.findall(r"\b(?:STL|LDL)\b", sass))
    matrix = re.findall(r"\b(HGMMA\.[\dx]+|HMMA\.\d+|UTCHMMA|UTCQMMA|[QI]MMA)\b", sass)
    report.matrix = dict(collections.Counter(matrix))
    report.waits = _serial_wgmmas(sass)
    return report


def _serial_wgmmas(sass: str) -> int:
    """wgmmas directly followed by a wait for all of them: the tensor core idles between such products."""
    order = re.findall(r"\bHGMMA\b|WARPGROUP\.DEPBAR\.LE gsb0, 0x0", sass)
    pairs = list(zip(order, order[1:], strict=False))
    serial = sum(a == "HGMMA" and b != "HGMMA" for a, b in pairs)
    return serial if order.count("HGMMA") > 1 and serial > order.count("HGMMA") // 2 else 0


def _first(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return match.group(1) if match else "0"


def _run(tool: str, *args: str) -> str:
    return subprocess.run([TOOLS / tool, *args], capture_output=True, text=True, check=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.static", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--target", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    arguments = parser.parse_args()
    failures = []
    print(f"{'kernel':22} {'case':44} {'target':7} {'reg':>4} {'shared':>7} {'spills':>6}  matrix instructions")
    for arch in arguments.target:
        for r in reports(arch, arguments.kernel):
            matrix = " ".join(f"{k}:{n}" for k, n in r.matrix.items())
            numbers = f"{r.registers:4} {r.shared:7} {r.spills:6}"
            print(f"{r.kernel:22} {r.case:44} {r.target:7} {numbers}  {matrix}", flush=True)
            failures += r.failures()
    for line in failures:
        print("FAIL", line)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
