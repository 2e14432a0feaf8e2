"""The machine code of one tile in two parts, main loop and what lies outside, and the work of each.

Outside the main loop, only the shortest way counts: from the start of the tile to the main loop, and from there to the
end of the tile. The start and the end are those of the enclosing loop in a persistent kernel, else the kernel's own.
Where a branch leaves a choice, the shortest way is that of a tile that needs no case of its own.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.static import machine, sass

INSTRUCTION = re.compile(r"^(?:(\.L\w+:)|\s+/\*[0-9a-f]{4,}\*/\s+(@!?\w+\s+)?([A-Z].*?)\s*;)", re.M)
LOADED = re.compile(r"LDG\S*\s+R(\d+)")
REGISTER = re.compile(r"\bR(\d+)\b")
BLOCKED = re.compile(
    r"(#\w+) = #ttg.blocked<\{sizePerThread = \[([\d, ]+)\], threadsPerWarp = \[([\d, ]+)\], .*?order = \[([\d, ]+)\]"
)
STORED = re.compile(r"tt\.store .*: tensor<[\dx]+x!tt\.ptr<\w*?(\d+)>, (#\w+)>")
PRODUCT = re.compile(
    r"^( *)ttng\.tc_gen5_mma .*? : !ttg\.memdesc<(\d+)x(\d+)x\w*?(\d+), [^>]*?(#smem|#ttng\.tensor_memory)[^>]*>, "
    r"!ttg\.memdesc<\d+x(\d+)x",
    re.M,
)


@dataclass
class Work:
    """What one block does: warp instructions of all its warps, clocks of a resource, and waits.

    `loads` and `stores` are of global memory, by bytes a thread; `lines` are their clocks, `bytes` all they move.
    """

    instructions: int = 0
    special: int = 0
    shared: float = 0.0
    tensor: float = 0.0
    loads: dict[str, int] = field(default_factory=dict)
    stores: dict[str, int] = field(default_factory=dict)
    lines: float = 0.0
    bytes: int = 0
    load_waits: int = 0
    store_waits: int = 0
    barriers: int = 0


@dataclass
class Regions:
    """The work of one iteration of the main loop, and per tile of all else; `roles`: warps of their own do the rest.

    `fills`: whether the tile's first loads are issued in it, so that its main loop starts with a wait. `sectors`: of
    a store instruction of a warp, by bytes a thread, as the layouts of the intermediate form tell.
    """

    loop: Work
    outside: Work
    fills: bool
    roles: bool
    sectors: dict[str, float]


def of_kernel(kernel: Any, text: str, arch: str) -> Regions | None:
    """The regions of a compiled kernel, of which `text` is the machine code; None for targets without a model."""
    if arch not in machine.MACHINES:
        return None
    return read(text, kernel.asm["ttgir"], arch, kernel.metadata.num_warps)


def read(text: str, ttgir: str, arch: str, warps: int) -> Regions | None:
    """The regions of disassembled code; None if it loops without a matrix instruction: its trips are not known."""
    found = [(label or body, bool(predicate)) for label, predicate, body in INSTRUCTION.findall(text)]
    lines = [line for line, _ in found]
    targets = sass.branches(lines)
    loop = sass.main_loop(lines, targets)
    back = {i: start for i, start in targets.items() if start < i}
    sectors = _sectors(ttgir)
    if not loop:
        if any(not _spins(lines, i, start) for i, start in back.items()):
            return None
        way = _way(found, targets, 0, lambda i: lines[i].startswith("EXIT"))
        return Regions(Work(), _work(lines, way, range(0), arch, warps, sectors), False, False, sectors)
    roles = "ttg.warp_specialize" in ttgir
    outer = _outer(lines, back, loop)
    if roles:
        start, end = _storing(lines, back, loop)
        way = _way(found, targets, start, lambda i: i == end)
        tail = range(start, end + 1)
    else:
        start, end = outer or (0, -1)
        way = _way(found, targets, start, lambda i: i == loop.start - 1)
        way += _way(found, targets, loop.stop, lambda i: i == end if outer else lines[i].startswith("EXIT"))
        tail = range(loop.stop, end + 1 if outer else len(lines))
    inside = _work(lines, list(loop), range(0), arch, warps, sectors)
    inside.tensor, operands = _tensor(lines, loop, ttgir, arch, warps)
    inside.shared += operands
    return Regions(inside, _work(lines, way, tail, arch, warps, sectors), not roles, roles, sectors)


def _spins(lines: Sequence[str], i: int, start: int) -> bool:
    """A wait that repeats itself, or the padding after the last instruction."""
    return i - start <= 3


def _outer(lines: Sequence[str], back: Mapping[int, int], loop: range) -> tuple[int, int] | None:
    """The first and the last line of the smallest loop around the main loop: a persistent kernel's."""
    around = [(start, i) for i, start in back.items() if start < loop.start - 1 and i >= loop.stop]
    return min(around, key=lambda a: a[1] - a[0], default=None)


def _storing(lines: Sequence[str], back: Mapping[int, int], loop: range) -> tuple[int, int]:
    """The loop of the warps that store: the largest without a matrix instruction."""
    others = [(start, i) for i, start in back.items() if not any(sass.MATRIX.match(x) for x in lines[start:i])]
    storing = [a for a in others if any(re.match(r"UTMASTG|STG", x) for x in lines[a[0] : a[1]])]
    return max(storing, key=lambda a: a[1] - a[0], default=(0, len(lines) - 1))


def _way(
    found: Sequence[tuple[str, bool]], targets: Mapping[int, int], start: int, ends: Callable[[int], bool]
) -> list[int]:
    """The instructions of the shortest way from line `start` to a line that `ends` accepts."""
    before: dict[int, int] = {start: -1}
    queue = [(0, start)]
    done: set[int] = set()
    while queue:
        cost, i = heapq.heappop(queue)
        if i in done:
            continue
        done.add(i)
        line, predicate = found[i]
        if ends(i):
            way = []
            while i >= 0:
                way.append(i)
                i = before[i]
            return [j for j in reversed(way) if not found[j][0].endswith(":")]
        always = not predicate and re.match(r"(BRA\S*\s+`|EXIT)", line)
        following = [targets[i]] if i in targets else []
        following += [] if always or i + 1 == len(found) else [i + 1]
        for j in following:
            if j not in done:
                before.setdefault(j, i)
                heapq.heappush(queue, (cost + 1, j))
    return []


def _work(
    lines: Sequence[str], way: Sequence[int], tail: range, arch: str, warps: int, sectors: Mapping[str, float]
) -> Work:
    """Count the instructions of a way; of `tail`, the lines of an epilogue, the waits for copies."""
    names = [lines[i].split()[0] for i in way]
    loads = Counter(_width(name) for name in names if name.startswith(("LDG.", "LDGSTS")))
    stores = Counter(width for name in names if (width := sass._stored(name)) and width != "tma")
    work = Work(
        instructions=len(names) * warps,
        special=sum(bool(sass.SPECIAL.match(name)) for name in names) * warps,
        shared=sum(map(_shared_clocks, names)) * warps,
        loads=dict(loads),
        stores=dict(stores),
        lines=sum(n * _lines(width, sectors) for width, n in stores.items()) * warps,
        bytes=sum(n * 32 * int(width) for kind in (loads, stores) for width, n in kind.items()) * warps,
        load_waits=_load_waits(lines, way, tail),
        store_waits=_store_waits(lines, tail),
        barriers=sum(name.startswith("BAR.") for name in names),
    )
    work.lines += sum(n * 32 * int(width) / machine.LINE for width, n in loads.items()) * warps
    return work


def _width(name: str) -> str:
    parts = name.split(".")
    return next((width for part, width in sass.NVIDIA_WIDTHS.items() if part in parts), "4")


def _shared_clocks(name: str) -> float:
    """Clocks of shared memory for one warp, without bank conflicts."""
    if name.startswith(("LDSM", "STSM")):
        return int(name[-1]) if name[-1] in "124" else 1
    if name.startswith(("LDS", "STS", "LDGSTS")):
        return 32 * int(_width(name)) / machine.SHARED_BYTES
    return 0.0


def _lines(width: str, sectors: Mapping[str, float]) -> float:
    """Clocks of one store instruction of a warp: whole lines, or a clock for every piece of one."""
    whole = 32 * int(width) / machine.LINE
    return max(whole, sectors.get(width, 0.0) / (machine.LINE / machine.SECTOR) if sectors.get(width) else whole)


def _load_waits(lines: Sequence[str], way: Sequence[int], tail: range) -> int:
    """Waits for loads that the epilogue itself issues: of a tensor copy, and of a run of loads into registers."""
    waits, copies, pending = 0, False, set[int]()
    for i in tail:
        if lines[i].startswith("UTMALDG"):
            copies = True
        elif lines[i].startswith("SYNCS.PHASECHK") and copies:
            waits, copies = waits + 1, False
    on_way = [lines[i] for i in way if not tail or i in tail]
    for line in on_way:
        used = {int(r) for r in REGISTER.findall(line)}
        if load := LOADED.match(line):
            first = int(load.group(1))
            pending |= set(range(first, first + max(1, int(_width(line.split()[0])) // 4)))
        elif pending & used:
            waits, pending = waits + 1, set()
    return waits


def _store_waits(lines: Sequence[str], tail: range) -> int:
    """Waits until a buffer in shared memory may be written again."""
    waits, stored = 0, False
    for i in tail:
        if lines[i].startswith("UTMASTG"):
            stored = True
        elif stored and lines[i].startswith("DEPBAR.LE SB0, 0x0"):
            waits, stored = waits + 1, False
    return waits


def _tensor(lines: Sequence[str], loop: range, ttgir: str, arch: str, warps: int) -> tuple[float, float]:
    """Clocks of the tensor cores and of shared memory for their operands, of one iteration of the main loop."""
    rate = machine.MACHINES[arch].tensor
    if arch == "sm_100":
        return _tensor_of_shapes(ttgir, rate)
    tensor = shared = 0.0
    for i in loop:
        if wgmma := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)\S* R\d+, (R?)", lines[i]):
            m, n, k = map(int, wgmma.group(1, 2, 3))
            tensor += 2 * m * n * k / rate * warps / 4
            rows = n + (0 if wgmma.group(4) else m)
            shared += rows * k * 2 / machine.SHARED_BYTES * warps / 4
        elif lines[i].startswith("HMMA.16816"):
            tensor += 2 * 16 * 8 * 16 / rate * warps
    return tensor, shared


def _tensor_of_shapes(ttgir: str, rate: int) -> tuple[float, float]:
    """The machine code hides the shapes of tcgen05: those of the innermost products of the intermediate form."""
    products = PRODUCT.findall(ttgir)
    depth = max((len(indent) for indent, *_ in products), default=0)
    tensor = shared = 0.0
    for indent, m, k, bits, where, n in products:
        if len(indent) == depth:
            tensor += 2 * int(m) * int(n) * int(k) / rate * int(bits) / 16
            rows = int(n) + (int(m) if where == "#smem" else 0)
            shared += rows * int(k) * int(bits) / 8 / machine.SHARED_BYTES
    return tensor, shared


def _sectors(ttgir: str) -> dict[str, float]:
    """Mean sectors that a warp's store touches, by bytes a thread; an element alone has its own sector."""
    layouts: dict[str, tuple[int, int]] = {}  # elements of a thread and threads of a warp, in a row of memory
    for name, *numbers in BLOCKED.findall(ttgir):
        size, threads, order = ([int(n) for n in text.split(",")] for text in numbers)
        layouts[name] = (size[order[0]], threads[order[0]])
    found: dict[str, list[float]] = {}
    for bits, name in STORED.findall(ttgir):
        if name in layouts:
            elements, lanes = layouts[name]
            width = min(16, elements * int(bits) // 8)
            each = 32.0 if width < 4 else 32 / lanes * max(1, lanes * width / machine.SECTOR)
            found.setdefault(str(width), []).append(each)
    return {width: sum(each) / len(each) for width, each in found.items()}
