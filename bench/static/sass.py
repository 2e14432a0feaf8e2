"""Read the machine code of a compiled kernel: registers, spills, and the instructions of its main loop."""

from __future__ import annotations

import collections
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MATRIX = re.compile(r"(HGMMA\.[\dx]+|HMMA\.\d+|UTCHMMA|UTCQMMA|[QI]MMA|v_mfma_\w+)")
UNIT = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA", "gfx942": "v_mfma"}

# Clocks per instruction of one warp on a multiprocessor's tensor cores, from the datasheets' dense bf16 rates:
# 2048 (sm_80), 4096 (sm_90) and 512 (sm_120) FLOP per clock. Four warps issue one HGMMA together.
HMMA_CLOCKS = {"sm_80": 2.0, "sm_120": 8.0}  # 16 x 8 x 16 products
HGMMA_CLOCKS_A_COLUMN = 0.5 / 4  # 64 x n x 16 products


@dataclass
class Code:
    """Registers and spill instructions of the whole kernel; the other fields describe its main loop.

    `tensor` is modelled: tensor-core clocks / max(tensor-core clocks, issue clocks), 1 if tensor cores are the limit.
    """

    registers: int = 0
    spills: int = 0
    loop_spills: int = 0
    matrix: dict[str, int] = field(default_factory=dict)
    waits: int = 0
    tensor: float | None = None
    histogram: dict[str, int] = field(default_factory=dict)


def read(kernel: Any, arch: str) -> Code:
    """Disassemble a compiled kernel."""
    if arch.startswith("gfx"):
        text = kernel.asm["amdgcn"]
        code = of_loop(main_loop(_amd_lines(text), r"s_c?branch\w*\s+(\.LBB\w+)"), arch, kernel.metadata.num_warps)
        code.registers = int(_first(r"\.vgpr_count:\s+(\d+)", text))
        code.spills = int(_first(r"\.vgpr_spill_count:\s+(\d+)", text))
        return code
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = _run("cuobjdump", "-res-usage", cubin.name)
        sass = _run("nvdisasm", "-c", cubin.name)
    code = of_loop(main_loop(_sass_lines(sass), r"BRA\S*\s.*`\((\.L\w+)\)"), arch, kernel.metadata.num_warps)
    code.registers = int(_first(r"REG:(\d+)", usage))
    code.spills = len(re.findall(r"\b(?:STL|LDL)\b", sass))
    return code


def main_loop(lines: Sequence[str], branch: str) -> list[str]:
    """The instructions of the innermost loop with the most matrix instructions; all instructions if there is none.

    A loop lies between a label ("name:") and a branch back to it. Innermost: no loop inside has matrix instructions.
    """
    at: dict[str, int] = {}
    loops = []
    for i, line in enumerate(lines):
        if line.endswith(":"):
            at[line[:-1]] = i
        elif (target := re.search(branch, line)) and target.group(1) in at:
            loops.append(range(at[target.group(1)] + 1, i + 1))
    count = {loop: sum(bool(MATRIX.match(lines[i])) for i in loop) for loop in loops}
    busy = [loop for loop in loops if count[loop]]
    innermost = [a for a in busy if not any(a != b and b.start in a and b.stop - 1 in a for b in busy)]
    chosen = max(innermost, key=lambda loop: count[loop], default=range(len(lines)))
    return [lines[i] for i in chosen if not lines[i].endswith(":")]


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
