"""The committed figures of the machine code, one file for each pair of torch and Triton versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeAlias

import torch
import triton

Figures: TypeAlias = dict[str, Any]
FOLDER = Path(__file__).parent


def path(torch_version: str = torch.__version__, triton_version: str = triton.__version__) -> Path:
    """The file of a pair of versions, whatever device the build of torch is for."""
    return FOLDER / f"baseline-torch{torch_version.partition('+')[0]}-triton{triton_version}.json"


def load(file: Path) -> dict[str, Figures]:
    """Figures by kernel, case and target; none if there is no such file."""
    return json.loads(file.read_text()) if file.exists() else {}


def save(figures: dict[str, Figures], file: Path) -> None:
    """A line a kernel, so that a commit shows what it changed."""
    lines = (f"{json.dumps(name)}: {json.dumps(figures[name], sort_keys=True)}" for name in sorted(figures))
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def changes(name: str, before: Figures | None, now: Figures) -> str:
    """A line that says what became of a kernel, or nothing where it is as it was."""
    if before is None:
        return f"NEW {name}"
    differ = [f"{k} {before.get(k)} -> {now[k]}" for k in sorted(now) if before.get(k) != now[k]]
    return f"CHANGED {name}: {', '.join(differ)}" if differ else ""
