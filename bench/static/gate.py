"""What a machine without a GPU can prove: every kernel, at every tile of its table, compiled for its real targets.

    python -m bench.static [--target sm_90 ...] [--kernel NAME] [--jobs N] [--histogram] [--update]

The launchers run as they are, on meta tensors, with compilation in place of the launch: what is checked is what a
user's call would compile. Registers, shared memory, spills, the main loop and what lies outside are read from the
machine code, and compared with the committed figures of the same versions of torch and Triton, so that a change shows
what it did to them. A performance model (model.py) makes a range of times of them. Triton keeps what it has compiled: a
second run is quick.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from bench.static import baseline, machine, model, regions, sass
from bench.static.baseline import Figures
from bench.static.cases import FAMILIES, Family
from bench.static.known import KNOWN, Known
from bench.static.model import Estimate, Sizes
from bench.static.regions import Regions
from bench.static.residency import resident_blocks
from bilinear_ops.kernels import config, launching
from bilinear_ops.kernels.records import Tile

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
PROCESSORS = 132  # of every target: what a launch asks for is compared with what one of them holds


@dataclass
class Report:
    """What the machine code of one kernel says, and the programs that its launch asks for.

    `tiles`: what the programs share, more than them only if the kernel is persistent. `resident`: blocks that one
    multiprocessor holds at once. `regions` and `sizes`, the launch's integers by name, are what the model reads.
    """

    kernel: str
    case: str
    target: str
    shared: int
    code: sass.Code
    programs: int
    tiles: int
    resident: int
    rejected: bool = False
    ragged: bool = False
    regions: Regions | None = None
    sizes: Sizes = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.target} {self.kernel} [{self.case}]"

    def estimate(self, workload: Sizes) -> Estimate | None:
        """The model of this code at other sizes; None where there is no model."""
        if self.regions is None or not self.code.spills == 0:
            return None
        per_sm = self.programs // PROCESSORS if self.programs < self.tiles else None
        sizes = {**self.sizes, **workload}
        return model.estimate(self.kernel, self.regions, self.target, self.resident, sizes, self.programs, per_sm)

    def modelled(self) -> Iterator[tuple[str, Estimate]]:
        """Estimates by workload: of bfloat16 alone, for float16 takes as long."""
        if self.rejected or not self.case.startswith("bfloat16"):
            return
        for workload in model.WORKLOADS.get(self.kernel, ({},)):
            if found := self.estimate(workload):
                yield model.named(workload) or "as launched", found

    def faults(self, committed: Figures | None) -> dict[str, str]:
        """What is wrong, by its kind; of a rejected tile, that it would compile well."""
        found = self._compiled_badly()
        if self.rejected:
            return {} if found else {"rejected": "nothing is wrong with this rejected tile"}
        return found | self._wasteful(committed)

    def _compiled_badly(self) -> dict[str, str]:
        found = {}
        limit = config.SHARED_MEMORY[self.target]
        if self.shared > limit:
            found["shared"] = f"{self.shared} bytes of shared memory, limit {limit}"
        if self.code.spills:
            inside = f"{self.code.loop_spills} of them in the main loop"
            found["spills"] = f"{self.code.spills} spill instructions, {inside}"
        if not self.case.startswith("float32"):  # fp32-accurate products are made otherwise, and wait
            unit = sass.UNIT[self.target]
            if self.code.matrix and not any(name.startswith(unit) for name in self.code.matrix):
                found["unit"] = f"the main loop multiplies with {', '.join(self.code.matrix)}, not {unit}"
            if self.code.waits:
                found["waits"] = f"{self.code.waits} wgmmas of the main loop waited for one by one"
        return found

    def _wasteful(self, committed: Figures | None) -> dict[str, str]:
        found = {}
        narrow = {width: n for width, n in self.code.stores.items() if width in ("1", "2")}
        if narrow and not self.ragged:
            found["stores"] = f"stores narrower than 4 bytes to an aligned output: {_counts(narrow)}"
        if committed is None:
            found["committed"] = "no committed figures; --update writes them"
        else:
            before, now = (f["special"] + f["loop_special"] for f in (committed, self.figures()))
            if now > before:
                found["special"] = f"{now} special-function operations, {before} committed"
            if (share := self.share()) and share < committed.get("share", 0) - 0.005:
                found["share"] = f"a modelled tensor share of {share}, {committed['share']} committed"
        if self.programs < min(self.tiles, PROCESSORS * self.resident):
            launched = f"{self.programs} programs on {PROCESSORS} multiprocessors for {self.tiles} tiles"
            found["blocks"] = f"{launched}, where each holds {self.resident}"
        return found

    def share(self) -> float | None:
        """The lower end of the modelled tensor share at the launch's own sizes; None without tensor cores.

        None for fp32 too: the model counts two bytes an element.
        """
        found = None if self.case.startswith("float32") else self.estimate({})
        return round(found.share[0], 3) if found and found.share[0] else None

    def figures(self) -> Figures:
        """What the baseline keeps."""
        found = asdict(self.code) | {"shared": self.shared, "loop": sum(self.code.histogram.values())}
        del found["histogram"]
        blocks = {"programs": self.programs, "tiles": self.tiles, "resident": self.resident}
        return found | blocks | ({"share": share} if (share := self.share()) else {})

    def model_rows(self) -> Iterator[str]:
        """The lines of the model's table: the widths are bytes a thread, with the sectors of a warp's instruction."""
        for workload, found in self.modelled():
            assert self.regions
            widths = [
                f"{width}:{n}" + (f"x{self.regions.sectors[width]:.0f}" if width in self.regions.sectors else "")
                for width, n in self.regions.outside.stores.items()
            ]
            tma = [f"tma:{self.code.stores['tma']}"] if "tma" in self.code.stores else []
            name = f"{self.target:7} {self.kernel:28} {self.case.removeprefix('bfloat16 '):32} {workload:30}"
            yield f"{name} {model.row(found):58} {','.join(tma + widths)}"

    def row(self) -> str:
        """The line of the printed table."""
        code = self.code
        tensor = "-" if code.tensor is None else f"{code.tensor:.2f}"
        main = f"{code.registers:4} {self.shared:7} {code.spills:6} {sum(code.histogram.values()):5} {tensor:>6}"
        special = f"{code.loop_special}+{code.special}"
        blocks = f"{min(self.programs, self.tiles) / PROCESSORS:.3g}/{self.resident}"
        outside = f"{special:>8} {blocks:>8} {_counts(code.syncs, ','):32} {_counts(code.stores, ','):16}"
        return f"{self.kernel:28} {self.case:52} {self.target:7} {main} {outside} {_counts(code.matrix)}".rstrip()


COLUMNS = (
    f"{'kernel':28} {'case':52} {'target':7} {'reg':>4} {'shared':>7} {'spills':>6} {'loop':>5} {'tensor':>6} "
    f"{'special':>8} {'blocks':>8} {'waits outside the main loop':32} {'bytes a store':16} matrix instructions"
)
NOTES = """
loop: instructions of the main loop, of which the last column counts those of the matrix unit
tensor: a model, of the clocks that the main loop's instructions take; nothing here was timed
special: exponentials, reciprocals and the like, in the main loop + outside
blocks: launched for each of 132 multiprocessors / that one holds at once"""
MODEL_COLUMNS = f"{'target':7} {'kernel':28} {'case':32} {'workload':30} {model.COLUMNS:58} bytes a store, sectors"
MODEL_NOTES = """
tensor: share of a tile's time in which the tensor cores work; outside: clocks per tile that the main loop leaves bare
res: blocks at once on a multiprocessor; limit: the largest term beside the tensor cores' own
ranges: all constants of bench/static/machine.py better and worse by a quarter; nothing here was timed"""


def _counts(found: dict[str, int], separator: str = " ") -> str:
    return separator.join(f"{name}:{n}" for name, n in found.items())


@dataclass(frozen=True)
class Launch:
    """A compiled kernel in place of a launch of `programs` programs over `tiles` tiles."""

    name: str
    kernel: Any
    programs: int
    tiles: int
    sizes: Sizes


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
def compiling(arch: str, only: str = "") -> Iterator[list[Launch]]:
    """Within, launches on meta tensors compile for `arch` instead, where the kernel's name contains `only`."""
    launches: list[Launch] = []
    shared_out: list[int] = []  # the tiles of the persistent kernel that is launched next
    programs = launching.programs

    def counted(tile: Tile, m: int, n: int, device: torch.device) -> int:
        shared_out.append(triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n))
        return programs(tile, m, n, device)

    def launch(kernel: JITFunction, grid: tuple[int, ...]) -> Callable[..., None]:
        def compile_(*args: object, **kwargs: object) -> None:
            tiles = shared_out.pop() if shared_out else math.prod(grid)
            if only in kernel.__name__:
                compiled = kernel.warmup(*args, grid=grid, **kwargs)
                given = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
                given |= {f"GRID_{axis}": n for axis, n in enumerate(grid)}
                sizes = {name: value for name, value in given.items() if type(value) is int}
                launches.append(Launch(kernel.__name__, compiled, math.prod(grid), tiles, sizes))

        return compile_

    with (
        mock.patch.object(triton.runtime.driver, "_active", _CompileOnly(TARGETS[arch])),
        mock.patch.object(JITFunction, "__getitem__", launch),
        mock.patch.object(launching, "programs", counted),
        mock.patch.object(config, "architecture", lambda device: arch),
        mock.patch.object(config, "processors", lambda device: PROCESSORS),
    ):
        yield launches


def reports(arch: str, only: str = "", families: Iterable[Family] = FAMILIES) -> Iterator[Report]:
    """Compile every case of the families for `arch` and read its machine code."""
    for cases in families:
        for case in cases(arch):
            with compiling(arch, only) as launches:
                case.call()
            for found in launches:
                (code, text), metadata = sass.read(found.kernel, arch), found.kernel.metadata
                columns = getattr(metadata, "tmem_size", 0)
                resident = resident_blocks(arch, code.registers, metadata.shared, metadata.num_warps, columns)
                yield Report(
                    found.name, case.name, arch, metadata.shared, code, found.programs, found.tiles, resident,
                    case.rejected, case.ragged, regions.of_kernel(found.kernel, text, arch), found.sizes,
                )  # fmt: skip


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


def judged(report: Report, committed: Figures | None, known: Iterable[Known] = KNOWN) -> tuple[list[str], list[str]]:
    """The failures of a report, and the faults that are known; an exception for a fault that it lacks is a failure."""
    faults = report.faults(committed)
    failures, excused = [], []
    for kind, what in faults.items():
        reasons = [k.reason for k in known if k.covers(kind, str(report))]
        if reasons:
            excused.append(f"{report}: {what} ({reasons[0]})")
        else:
            failures.append(f"{report}: {what}")
    mended = {k.kind for k in known if k.kind not in faults and k.covers(k.kind, str(report))}
    failures += [f"{report}: no fault of its {kind} any more: take it off the known ones" for kind in sorted(mended)]
    return failures, excused


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.static", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--target", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; default: one for each core")
    parser.add_argument("--histogram", action="store_true", help="print the instructions of every main loop")
    parser.add_argument("--update", action="store_true", help="write what was found to the baseline of these versions")
    arguments = parser.parse_args()
    file = baseline.path()
    committed = baseline.load(file)
    figures = {k: v for k, v in committed.items() if k.split()[0] not in arguments.target or arguments.kernel not in k}
    failures, known, changed = [], [], []
    modelled: list[str] = []
    receipts: list[dict[str, object]] = []
    print(COLUMNS)
    for r in all_reports(arguments.target, arguments.kernel, arguments.jobs):
        found = figures[str(r)] = r.figures()
        print(r.row(), flush=True)
        if arguments.histogram:
            print("   ", _counts(r.code.histogram))
        before = committed.get(str(r))
        wrong, excused = judged(r, found if arguments.update else before)
        failures += wrong
        known += excused
        changed.append(baseline.changes(str(r), before, found))
        modelled += r.model_rows()
        receipts += (model.receipt(r.target, r.kernel, r.case, workload, e) for workload, e in r.modelled())
    print(NOTES)
    print(f"\nModel, {machine.CALIBRATION}\n{MODEL_COLUMNS}", *modelled, MODEL_NOTES, sep="\n")
    print("\n".join(filter(None, changed)))
    if arguments.update:
        baseline.save(figures, file)
        baseline.save_modelled(receipts, arguments.target, arguments.kernel)
    elif not committed:
        failures = [f"no {file.name}: nothing to compare with; --update writes it"]
    for line in known:
        print("KNOWN", line)
    for line in failures:
        print("FAIL", line)
    return bool(failures)
