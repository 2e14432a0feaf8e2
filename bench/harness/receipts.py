"""Receipts: one JSON line per measured workload, with device, versions, commit and a hash of the code."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench.harness.measuring import Result
from bench.harness.timing import Timing

SCHEMA = 1
KINDS = ("measured", "interpreted", "modelled", "host, stubbed driver")
ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"


def receipt(result: Result, device: torch.device, kind: str = "measured") -> dict[str, Any]:
    """The receipt of `result`: times in seconds, memory in bytes."""
    assert kind in KINDS
    workload = result.workload
    ours = result.timings.get("ours")
    return {
        "schema": SCHEMA,
        "kind": kind,
        "op": workload.op,
        "case": workload.case,
        "shape": workload.shape,
        "dtype": str(workload.dtype).removeprefix("torch."),
        **environment(device),
        "clock": result.clock,
        **(_quantiles(ours) if ours else {}),
        "noise": round(ours.noise(), 4) if ours else None,
        "flops": workload.flops,
        "bytes": workload.bytes,
        "peak_memory": result.memory.get("ours"),
        "best_baseline": result.best,
        "ratio": round(result.ratio(result.best), 4) if result.best else None,
        "baselines": _others(result, workload.baselines),
        "variants": _others(result, workload.variants),
        "bounds": _others(result, workload.bounds),
        "failed": result.failed,
    }


def _others(result: Result, names: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {
            **_quantiles(result.timings[name]),
            "ratio": round(result.ratio(name), 4),
            "peak_memory": result.memory.get(name),
        }
        for name in names
        if name in result.timings
    }


def _quantiles(timing: Timing) -> dict[str, float]:
    return {f"p{10 * q}": float(f"{timing.quantile(q):.4g}") for q in (2, 5, 8)}


def environment(device: torch.device) -> dict[str, Any]:
    """Device, versions, code and date."""
    try:
        import triton
    except ImportError:
        triton = None
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": triton and triton.__version__,
        "python": platform.python_version(),
        "tree": tree_hash(),
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"CPU: {found.group(1) if found else platform.processor() or platform.machine()}"


def tree_hash(root: Path = ROOT) -> str:
    """A hash of the sources in kernels/ and bilinear_ops/; a receipt with another hash is stale."""
    digest = hashlib.sha256()
    for folder in ("kernels", "bilinear_ops"):
        for path in sorted((root / folder).rglob("*.py")):
            name = path.relative_to(root).as_posix()
            if not name.startswith("bilinear_ops/kernels/"):  # a symlink to kernels/
                digest.update(f"{name}\0{path.read_text()}\0".encode())
    return digest.hexdigest()[:16]


def commit() -> str | None:
    """The checked-out commit, with "-dirty" if files have changed; None outside a repository."""
    try:
        described = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(described, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def results_file(device: torch.device, folder: Path = RESULTS) -> Path:
    """<folder>/<device>.jsonl"""
    return folder / f"{re.sub(r'[^a-z0-9]+', '-', device_name(device).lower()).strip('-')}.jsonl"


def append(found: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(found) + "\n")


def load(path: Path) -> Iterator[dict[str, Any]]:
    """The receipts in a file, oldest first. Raises ValueError on an unknown schema or kind."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        found = json.loads(line)
        if found.get("schema") != SCHEMA:
            raise ValueError(f"{path.name}:{number}: schema {found.get('schema')!r}, this report reads {SCHEMA}")
        if found.get("kind") not in KINDS:
            raise ValueError(f"{path.name}:{number}: kind {found.get('kind')!r}, expected one of {', '.join(KINDS)}")
        yield found
