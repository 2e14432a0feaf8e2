"""The committed figures of the machine code and the model, one file of each for a pair of torch and Triton versions."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

import torch
import triton

from bench.harness import receipts

Figures: TypeAlias = dict[str, Any]
FOLDER = Path(__file__).parent
MODELLED = receipts.RESULTS / "modelled"  # apart from what was measured


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


def modelled_path(torch_version: str = torch.__version__, triton_version: str = triton.__version__) -> Path:
    """The modelled receipts of a pair of versions."""
    return MODELLED / f"torch{torch_version.partition('+')[0]}-triton{triton_version}.jsonl"


def save_modelled(found: Iterable[Figures], targets: Iterable[str], kernel: str) -> None:
    """Replace the receipts of these targets and of the kernels whose name contains `kernel`."""
    file = modelled_path()
    chosen = tuple(targets)
    kept = list(receipts.load(file)) if file.exists() else []
    kept = [r for r in kept if r["op"].split()[0] not in chosen or kernel not in r["op"]]
    versions = {"schema": receipts.SCHEMA, "torch": torch.__version__, "triton": triton.__version__}
    kept += ({**versions, "tree": receipts.tree_hash(), **r} for r in found)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{json.dumps(r)}\n" for r in sorted(kept, key=lambda r: (r["op"], r["case"]))))


def changes(name: str, before: Figures | None, now: Figures) -> str:
    """A line that says what became of a kernel, or nothing where it is as it was."""
    if before is None:
        return f"NEW {name}"
    differ = [f"{k} {before.get(k)} -> {now[k]}" for k in sorted(now) if before.get(k) != now[k]]
    return f"CHANGED {name}: {', '.join(differ)}" if differ else ""
