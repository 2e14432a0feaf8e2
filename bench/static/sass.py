"""Read the machine code of a compiled kernel: registers, spills, its main loop and what lies outside."""

from __future__ import annotations

import collections
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MATRIX = re.compile(r"(HGMMA\.[\dx]+|HMMA\.\d+|UTCHMMA|UTCQMMA|[QI]MMA|v_mfma_\w+)")
BRANCH = re.compile(r"BRA\S*\s.*`\((\.L\w+)\)|s_c?branch\w*\s+(\.LBB\w+)")
NVIDIA_WIDTHS = {"U8": "1", "S8": "1", "U16": "2", "S16": "2", "64": "8", "128": "16", "256": "32"}
AMD_WIDTHS = {"byte": "1", "short": "2", "dword": "4", "dwordx2": "8", "dwordx3": "12", "dwordx4": "16"}
SPECIAL = re.compile(r"MUFU\.|v_(?:exp|log|rcp|rsq|sqrt|sin|cos)_")  # exponentials, reciprocals, roots and the like
UNIT = {"sm_80": "HMMA", "sm_89": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA", "gfx942": "v_mfma"}

# Clocks per instruction of one warp on a multiprocessor's tensor cores, from the datasheets' dense bf16 rates:
# 2048 (sm_80), 4096 (sm_90) and 512 (sm_89, sm_120) FLOP per clock. Four warps issue one HGMMA together.
HMMA_CLOCKS = {"sm_80": 2.0, "sm_89": 8.0, "sm_120": 8.0}  # 16 x 8 x 16 products
HGMMA_CLOCKS_A_COLUMN = 0.5 / 4  # 64 x n x 16 products


@dataclass
class Code:
    """What the machine code of a kernel holds; `matrix`, `waits`, `tensor` and `histogram` describe its main loop.

    Attributes:
        tensor: modelled: tensor-core clocks / max(tensor-core clocks, issue clocks), 1 if tensor cores are the limit.
        stores: stores to global memory outside the main loop, by bytes a thread; "tma" for those of whole tiles.
        special, loop_special: special-function operations outside the main loop, and in it.
        syncs: waits outside the main loop: of the block ("barrier"), for a copy into shared memory ("mbarrier"), and
            for a group of copies or products ("group").

    A kernel without matrix instructions has no main loop: all of it lies outside, and `histogram` counts all of it.
    """

    registers: int = 0
    spills: int = 0
    loop_spills: int = 0
    matrix: dict[str, int] = field(default_factory=dict)
    waits: int = 0
    tensor: float | None = None
    histogram: dict[str, int] = field(default_factory=dict)
    stores: dict[str, int] = field(default_factory=dict)
    special: int = 0
    loop_special: int = 0
    syncs: dict[str, int] = field(default_factory=dict)


def read(kernel: Any, arch: str) -> tuple[Code, str]:
    """Disassemble a compiled kernel: what its machine code holds, and its text."""
    warps = kernel.metadata.num_warps
    if arch.startswith("gfx"):
        text = kernel.asm["amdgcn"]
        code = of_lines(_amd_lines(text), arch, warps)
        code.registers = int(_first(r"\.vgpr_count:\s+(\d+)", text))
        code.spills = int(_first(r"\.vgpr_spill_count:\s+(\d+)", text))
        return code, text
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = _run("cuobjdump", "-res-usage", cubin.name)
        sass = _run("nvdisasm", "-c", cubin.name)
    code = of_lines(_sass_lines(sass), arch, warps)
    code.registers = int(_first(r"REG:(\d+)", usage))
    code.spills = len(re.findall(r"\b(?:STL|LDL)\b", sass))
    return code, sass


def of_lines(lines: Sequence[str], arch: str, warps: int) -> Code:
    """Count labels ("name:") and instructions, in their order."""
    targets = branches(lines)
    loop = main_loop(lines, targets)
    inside = [lines[i] for i in loop or range(len(lines)) if not lines[i].endswith(":")]
    outside = [i for i in range(len(lines)) if i not in loop]
    code = of_loop(inside, arch, warps)
    names = [lines[i].split()[0] for i in outside]
    widths = collections.Counter(width for name in names if (width := _stored(name)))
    code.stores = {width: widths[width] for width in sorted(widths, key=lambda w: (len(w), w))}
    code.special = sum(bool(SPECIAL.match(name)) for name in names)
    code.loop_special = sum(bool(SPECIAL.match(lines[i])) for i in loop)
    code.syncs = dict(sorted(collections.Counter(kind for i in outside if (kind := _sync(lines, i, targets))).items()))
    return code


def branches(lines: Sequence[str]) -> dict[int, int]:
    """The line of each branch's label, by the line of the branch."""
    at = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
    found = ((i, BRANCH.match(line)) for i, line in enumerate(lines))
    return {i: at[label] for i, match in found if match and (label := match.group(1) or match.group(2)) in at}


def main_loop(lines: Sequence[str], targets: Mapping[int, int]) -> range:
    """The lines of the innermost loop with the most matrix instructions; none if there is no such loop.

    A loop lies between a label and a branch back to it. Innermost: no loop inside has matrix instructions.
    """
    loops = [range(start + 1, i + 1) for i, start in targets.items() if start < i]
    count = {loop: sum(bool(MATRIX.match(lines[i])) for i in loop) for loop in loops}
    busy = [loop for loop in loops if count[loop]]
    innermost = [a for a in busy if not any(a != b and b.start in a and b.stop - 1 in a for b in busy)]
    return max(innermost, key=lambda loop: count[loop], default=range(0))


def _stored(name: str) -> str:
    """The bytes that a thread stores to global memory, "tma" for a tile's store, "" for any other instruction."""
    if name.startswith("UTMASTG"):
        return "tma"
    if found := re.match(r"STG?\.E(\S*)", name):
        parts = found.group(1).split(".")
        return next((width for part, width in NVIDIA_WIDTHS.items() if part in parts), "4")
    found = re.match(r"(?:global|buffer|flat)_store_(byte|short|dwordx?\d?)", name)
    return AMD_WIDTHS[found.group(1)] if found else ""


def _sync(lines: Sequence[str], i: int, targets: Mapping[int, int]) -> str:
    """What the instruction waits for: see Code.syncs."""
    if re.match(r"BAR\.|s_barrier", lines[i]):
        return "barrier"
    if lines[i].startswith("SYNCS.PHASECHK"):  # the compiler moves its repetition, which branches back, out of line
        return "mbarrier" if targets.get(i + 1, len(lines)) > i else ""
    return "group" if re.match(r"(?:WARPGROUP\.)?DEPBAR\.", lines[i]) else ""


def of_loop(loop: Sequence[str], arch: str, warps: int) -> Code:
    """Count a loop's instructions and model the tensor cores' share of its time."""
    code = Code()
    names = [line.split()[0] for line in loop]
    code.histogram = dict(collections.Counter(name.split(".")[0] for name in names).most_common())
    code.matrix = dict(collections.Counter(m.group(1) for name in names if (m := MATRIX.match(name))))
    code.loop_spills = code.histogram.get("STL", 0) + code.histogram.get("LDL", 0)
    code.waits = _serial_wgmmas(loop)
    tensor = sum(n * _tensor_clocks(name, arch) * warps for name, n in code.matrix.items())
    issued = len(names) * warps / 4  # four schedulers, each one instruction per clock
    code.tensor = round(tensor / max(tensor, issued), 3) if tensor else None
    return code


def _tensor_clocks(name: str, arch: str) -> float:
    if arch == "sm_90" and name.startswith("HGMMA"):
        return int(name.split("x")[1]) * HGMMA_CLOCKS_A_COLUMN
    return HMMA_CLOCKS.get(arch, 0.0) if name == "HMMA.16816" else 0.0


def _serial_wgmmas(loop: Sequence[str]) -> int:
    """The number of wgmmas followed by a wait for all, if most are: the tensor cores idle after each of them.

    One wait for a group at the loop's end is fine; a wait after each product is not.
    """
    order = [line for line in loop if line.startswith("HGMMA") or re.match(r"WARPGROUP\.DEPBAR\.LE\s+gsb0, 0x0", line)]
    serial = sum(a.startswith("HGMMA") and not b.startswith("HGMMA") for a, b in zip(order, order[1:], strict=False))
    products = sum(line.startswith("HGMMA") for line in order)
    return serial if products > 1 and serial > products // 2 else 0


def _sass_lines(sass: str) -> list[str]:
    """Labels, and instructions without address and predicate."""
    pattern = r"^(\.L\w+:)|^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z].*?)\s*;"
    return [label or instruction for label, instruction in re.findall(pattern, sass, re.M)]


def _amd_lines(text: str) -> list[str]:
    pattern = r"^(\.LBB\w+:)|^\s+([a-z]\w*_\w+.*?)\s*(?:;.*)?$"
    return [label or instruction for label, instruction in re.findall(pattern, text, re.M)]


def _first(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return match.group(1) if match else "0"


def _run(tool: str, *args: str) -> str:
    return subprocess.run([TOOLS / tool, *args], capture_output=True, text=True, check=True).stdout
