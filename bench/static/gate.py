"""What a machine without a GPU can prove: every kernel, at every tile of its table, compiled for its real targets.

    python -m bench.static [--target sm_90 ...] [--kernel NAME] [--jobs N] [--histogram] [--update]

The launchers run as they are, on meta tensors, with compilation in place of the launch: what is checked is what a
user's call would compile. Registers, shared memory, spills and the main loop are read from the machine code, and
compared with bench/static/baseline.json, so that a change shows what it did to them. Triton keeps what it has compiled:
a second run is quick.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from bench.static import sass
from bilinear_ops.kernels import config, gated, tuning
from bilinear_ops.kernels.interaction import matrices
from bilinear_ops.kernels.rank1 import losses, masked, masks, sparse
from bilinear_ops.kernels.records import Choice, PairTile, Rejected, Tile
from bilinear_ops.results import Gate, Masks

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
Family: TypeAlias = Callable[[str], Iterator["Case"]]
BASELINE = Path(__file__).parent / "baseline.json"


@dataclass(frozen=True)
class Case:
    """One launch: its name, the launcher's call on meta tensors, and whether it is evidence against its tile."""

    name: str
    call: Callable[[], object]
    rejected: bool = False


@dataclass
class Report:
    """What the machine code of one kernel says."""

    kernel: str
    case: str
    target: str
    shared: int
    code: sass.Code
    rejected: bool = False

    def __str__(self) -> str:
        return f"{self.target} {self.kernel} [{self.case}]"

    def failures(self) -> list[str]:
        """What is wrong; of a rejected tile, that nothing is."""
        found = self._wrong()
        if self.rejected:
            found = [] if found else ["nothing is wrong with this rejected tile"]
        return [f"{self}: {what}" for what in found]

    def _wrong(self) -> list[str]:
        found = []
        limit = config.SHARED_MEMORY[self.target]
        if self.shared > limit:
            found.append(f"{self.shared} bytes of shared memory, limit {limit}")
        if self.code.spills:
            found.append(f"{self.code.spills} spill instructions, {self.code.loop_spills} of them in the main loop")
        if not self.case.startswith("float32"):  # fp32-accurate products are made otherwise, and wait
            unit = sass.UNIT[self.target]
            if self.code.matrix and not any(name.startswith(unit) for name in self.code.matrix):
                found.append(f"the main loop multiplies with {', '.join(self.code.matrix)}, not {unit}")
            if self.code.waits:
                found.append(f"{self.code.waits} wgmmas of the main loop waited for one by one")
        return found

    def figures(self) -> dict[str, Any]:
        """What the baseline keeps."""
        found = asdict(self.code) | {"shared": self.shared, "loop": sum(self.code.histogram.values())}
        del found["histogram"]
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
def compiling(arch: str, only: str = "") -> Iterator[list[tuple[str, Any]]]:
    """Within, launches on meta tensors compile for `arch` instead, where the kernel's name contains `only`; yields the
    growing list of (name, kernel)."""
    compiled: list[tuple[str, Any]] = []

    def launch(kernel: JITFunction, grid: object) -> Callable[..., None]:
        def compile_(*args: object, **kwargs: object) -> None:
            if only in kernel.__name__:
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
    """Every tile both ways in, with the heaviest epilogue: swish and biases, everything kept; fp32 as TF32, for only
    with that opted in to are its products ours."""
    m, d, h, o = 4096, 1024, 2048, 1024
    for dtype in (torch.bfloat16, torch.float16, torch.float32):

        def t(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        def forward(tile: Choice, aligned: bool, t: Callable[..., torch.Tensor] = t) -> object:
            k = d + (not aligned)
            with tuning.using(gated_forward_kernel=tile), _tf32():
                return gated.gate_forward(t(m, k), t(h, k), t(h, k), t(h), t(h), Gate("swish", t()), True)

        def backward(tile: Choice, aligned: bool, t: Callable[..., torch.Tensor] = t) -> object:
            k = o + (not aligned)
            with tuning.using(gated_backward_kernel=tile), _tf32():
                return gated.gate_backward(t(m, k), t(k, h), t(m, 2 * h), Gate("swish", t()), True, True)

        name = str(dtype).removeprefix("torch.")
        for kernel, by, call in (("gated_forward_kernel", "x2x", forward), ("gated_backward_kernel", "x", backward)):
            for aligned in (True, False):
                way = "aligned" if aligned else "unaligned"
                for tile in config.tiles(kernel, arch, dtype, aligned):
                    if isinstance(tile, Tile):  # not the library
                        yield Case(f"{name} {_shape(tile, by)} {way}", partial(call, tile, aligned))
            for r in _rejected(kernel, arch, dtype):
                way = "aligned" if r.aligned else "unaligned"
                case = f"{name} {_shape(r.tile, by)} {way}, {r.tile.warps} warps: rejected"
                yield Case(case, partial(call, r.tile, r.aligned), rejected=True)
        alone = partial(gated.gate_backward, t(m, h), None, t(m, 2 * h), Gate("swish", t()), True, True)
        yield Case(f"{name} alone", partial(gated.gate, t(m, h), t(m, h), Gate("swish", t())))
        yield Case(f"{name} alone", alone)


def _shape(tile: Tile | PairTile, by: str = "x") -> str:
    """The blocks of a tile; `by` stands between those of the output."""
    if isinstance(tile, PairTile):
        return f"{tile.block_i}x{tile.block_j}x{tile.block_k}x{tile.block_h}"
    return f"{tile.block_m}{by}{tile.block_n}x{tile.block_k}"


def _rejected(kernel: str, arch: str, dtype: torch.dtype) -> Iterator[Rejected]:
    return (r for r in config.KERNELS[kernel].rejected if r.arch == arch and r.dtype == dtype)


def _tf32() -> AbstractContextManager[object]:
    return mock.patch.object(config, "tf32_allowed", lambda: True)


def interaction_cases(arch: str) -> Iterator[Case]:
    """Both orders of contraction, with the heavier epilogue: both triangles."""
    d, h = 1024, 2048
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        w = torch.empty(h, d, dtype=dtype, device="meta")
        for kernel, directions in (("interaction_direction_kernel", 8), ("interaction_pairs_kernel", 512)):
            c = torch.empty(directions, h, dtype=dtype, device="meta")
            name = f"{str(dtype).removeprefix('torch.')} K={directions}"
            for packed in (False, True) if dtype == torch.bfloat16 else (False,):
                layout = "packed" if packed else "full"
                yield Case(f"{name} {layout}", partial(matrices.interaction_matrices, w, w, c, None, packed))
            for r in _rejected(kernel, arch, dtype):

                def call(tile: Choice, w: torch.Tensor = w, c: torch.Tensor = c) -> object:
                    with tuning.using(interaction_matrices=tile):
                        return matrices.interaction_matrices(w, w, c, None, False)

                case = f"{name}, {_shape(r.tile)}, {r.tile.warps} warps: rejected"
                yield Case(case, partial(call, r.tile), rejected=True)


def rank1_cases(arch: str) -> Iterator[Case]:
    """Everything asked for at once: four samples, delta, routing and every gradient, whatever the kind of mask."""
    s, m, d, o, c, k = 4, 4096, 1024, 1024, 3072, 8
    for dtype in (torch.float32, torch.bfloat16, torch.float16):

        def t(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        name, indices = str(dtype).removeprefix("torch."), t(m, k, dtype=torch.int64)
        yield Case(name, partial(losses.squared_difference, t(o, d), t(d, c), t(c, o)))
        yield Case(name, partial(sparse.sparse_dots, t(m, d), t(c, d), indices))
        yield Case(name, partial(sparse.sparse_sums, t(m, k), t(c, d), indices))
        whole = dtype == torch.bfloat16  # the others differ in loads and stores alone
        for sampling in ("given", "source", "continuous", "binomial") if whole else ("continuous",):
            for rows in (m, 1) if whole else (m,):
                wide = partial(t, dtype=torch.float32)
                source = wide(s, rows, c) if sampling == "source" else None
                seed = t(dtype=torch.int64) if sampling in ("continuous", "binomial") else None
                drawn = Masks(
                    wide(rows, c), source, wide(s, m), t(m, dtype=torch.bool), seed, None, None, 0, s, sampling
                )
                case = f"{name} {sampling} {'broadcast' if rows == 1 else 'full'}"
                need = [True, True, True, source is not None, True]
                yield Case(case, partial(masked.masked_apply, t(s, m, o), t(m, c), t(c, o), drawn, 1.0))
                yield Case(case, partial(masked.masked_apply_backward, t(s, m, o), t(m, c), t(c, o), drawn, need))
    yield Case("alone", partial(masks.uniform, t(dtype=torch.int64), 0, s, m, c))


FAMILIES = (gated_cases, interaction_cases, rank1_cases)


def reports(arch: str, only: str = "", families: Iterable[Family] = FAMILIES) -> Iterator[Report]:
    """Compile every case of the families for `arch` and read its machine code."""
    for cases in families:
        for case in cases(arch):
            with compiling(arch, only) as compiled:
                case.call()
            for name, kernel in compiled:
                code = sass.read(kernel, arch)
                yield Report(name, case.name, arch, kernel.metadata.shared, code, case.rejected)


def _family(arch: str, cases: Family, only: str) -> list[Report]:
    return list(reports(arch, only, (cases,)))


def all_reports(targets: list[str], only: str, jobs: int) -> Iterator[Report]:
    """The reports of all targets, in order; families compile beside each other, in `jobs` processes."""
    tasks = zip(*itertools.product(targets, FAMILIES, (only,)), strict=True)
    if jobs == 1:
        yield from itertools.chain.from_iterable(map(_family, *tasks))
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from itertools.chain.from_iterable(pool.map(_family, *tasks))


def load_baseline(path: Path = BASELINE) -> dict[str, dict[str, Any]]:
    """Figures by kernel, case and target, as this version of Triton compiled them; none where it was another one."""
    found = json.loads(path.read_text()) if path.exists() else {}
    return found.get("kernels", {}) if found.get("triton") == triton.__version__ else {}


def save_baseline(figures: dict[str, dict[str, Any]], path: Path = BASELINE) -> None:
    """A line a kernel, so that a commit shows what it changed."""
    lines = (f"{json.dumps(name)}: {json.dumps(figures[name], sort_keys=True)}" for name in sorted(figures))
    path.write_text(f'{{"triton": "{triton.__version__}", "kernels": {{\n' + ",\n".join(lines) + "\n}}\n")


def changes(name: str, before: dict[str, Any] | None, now: dict[str, Any]) -> str:
    """A line that says what became of a kernel, or nothing where it is as it was."""
    if before is None:
        return f"NEW {name}"
    differ = [f"{k} {before.get(k)} -> {now[k]}" for k in sorted(now) if before.get(k) != now[k]]
    return f"CHANGED {name}: {', '.join(differ)}" if differ else ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.static", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--target", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; default: one for each core")
    parser.add_argument("--histogram", action="store_true", help="print the instructions of every main loop")
    parser.add_argument("--update", action="store_true", help="write what was found to the baseline")
    arguments = parser.parse_args()
    baseline = load_baseline()
    figures = {k: v for k, v in baseline.items() if k.split()[0] not in arguments.target or arguments.kernel not in k}
    failures, changed = [], []
    columns = f"{'reg':>4} {'shared':>7} {'spills':>6} {'loop':>5} {'tensor':>6}"
    print(f"{'kernel':28} {'case':52} {'target':7} {columns}  matrix instructions of the main loop")
    for r in all_reports(arguments.target, arguments.kernel, arguments.jobs):
        found = figures[str(r)] = r.figures()
        tensor = "-" if r.code.tensor is None else f"{r.code.tensor:.2f}"
        matrix = " ".join(f"{k}:{n}" for k, n in r.code.matrix.items())
        numbers = f"{r.code.registers:4} {r.shared:7} {r.code.spills:6} {found['loop']:5} {tensor:>6}"
        print(f"{r.kernel:28} {r.case:52} {r.target:7} {numbers}  {matrix}", flush=True)
        if arguments.histogram:
            print("   ", " ".join(f"{k}:{n}" for k, n in r.code.histogram.items()))
        failures += r.failures()
        changed.append(changes(str(r), baseline.get(str(r)), found))
    print("\ntensor: a model, of the clocks that the main loop's instructions take; nothing here was timed")
    print("\n".join(filter(None, changed)) if baseline else "no baseline of this version of Triton to compare with")
    if arguments.update:
        save_baseline(figures)
    for line in failures:
        print("FAIL", line)
    return bool(failures)
