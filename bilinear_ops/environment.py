"""What this machine has and what each op will run on it: the report of `python -m bilinear_ops`."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import bilinear_ops
from bilinear_ops import _impl, tuning
from bilinear_ops.interaction import matrices, ranking
from bilinear_ops.rank1 import masked

VARIABLES = (
    "BILINEAR_OPS_CACHE_DIR",
    "BILINEAR_OPS_TUNE",
    "BILINEAR_OPS_TUNE_UNPROVEN",
    "BILINEAR_OPS_WARP_SPECIALIZE",
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "TRITON_CACHE_DIR",
    "TRITON_DEFAULT_FP_FUSION",
    "TRITON_INTERPRET",
)
# What impl="auto" leaves to PyTorch where the kernels run, and impl="triton" therefore refuses.
BRANCHES = {
    "interaction_matrices": (matrices.LEFT_TO_PYTORCH,),
    "iter_interaction_matrices": (matrices.LEFT_TO_PYTORCH,),
    "interaction_topk": (ranking.CALLED, ranking.ONLY_DIAGONALS, ranking.MANY_FEATURES, matrices.LEFT_TO_PYTORCH),
    "interaction_moments": (matrices.LEFT_TO_PYTORCH,),
    "rank1_linear": (masked.NO_MASK,),
    "every op": (_impl.TRANSFORMS,),
}
PREFIX = "BILINEAR_OPS_"  # other variables with our prefix are reported too: a name may be misspelt


def report() -> dict[str, Any]:
    """Versions, devices, the implementation of each op on each device, environment variables, caches.

    "branches" names what each op leaves to PyTorch even where the kernels run. Only types that JSON has; a package or
    variable that is absent is None.
    """
    ours = sorted(name for name in os.environ if name.startswith(PREFIX))
    return {
        "versions": {
            "bilinear_ops": bilinear_ops.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "triton", "numpy")},
        },
        "devices": devices(),
        "implementations": {
            name: {device: _choice_of(op, device) for device in devices()} for name, op in public_ops().items()
        },
        "branches": {op: list(reasons) for op, reasons in BRANCHES.items()},
        "environment": {name: os.environ.get(name) for name in (*VARIABLES, *ours)},
        "caches": {"triton": str(_triton_cache()), "tiles": tuning.cache_folder()},
    }


def public_ops() -> dict[str, Callable[..., Any]]:
    """The public functions of the package but `warmup`: an op is reported from the day it is exported."""
    members = ((name, getattr(bilinear_ops, name)) for name in bilinear_ops.__all__)
    return {name: member for name, member in members if inspect.isfunction(member) and name != "warmup"}


def devices() -> dict[str, str]:
    """The devices PyTorch sees, by name, each with a description."""
    found = {"cpu": f"{platform.machine()}, PyTorch threads: {torch.get_num_threads()}"}
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            capability = f"compute capability {properties.major}.{properties.minor}"
            arch = getattr(properties, "gcnArchName", None) or capability
            found[f"cuda:{i}"] = f"{properties.name}, {arch}, {properties.total_memory / 2**30:.0f} GiB"
    return found


def choice(device: torch.device | str, dtype: torch.dtype = torch.float32) -> tuple[str, str]:
    """The implementation that impl="auto" takes there, "triton" or "torch", and why."""
    t = torch.empty(0, device=device, dtype=dtype)
    if _impl.resolve("auto", t) != "torch":
        return "triton", "the kernels run on this device"
    return "torch", _impl.why_not_triton(t) or 'impl="triton" would interpret the kernels, slowly'


def text(found: dict[str, Any]) -> str:
    """The report for people."""
    reasons: dict[str, int] = {}
    rows = [["", *found["devices"]]]
    for op, per_device in found["implementations"].items():
        cells = (f"{c['impl']} [{reasons.setdefault(c['why'], len(reasons) + 1)}]" for c in per_device.values())
        rows.append([op, *cells])
    sections = {
        "versions": [[k, v or "not installed"] for k, v in found["versions"].items()],
        "devices": [[k, v] for k, v in found["devices"].items()],
        'ops: what impl="auto" runs on float32, bfloat16 and float16 (float64 is always torch)': rows,
        "because": [[f"[{n}]", why] for why, n in reasons.items()],
        'branches that impl="auto" leaves to PyTorch everywhere, and impl="triton" refuses': [
            [op, why] for op, branches in found["branches"].items() for why in branches
        ],
        "environment": [[k, "not set" if v is None else v] for k, v in found["environment"].items()],
        "caches": [[k, v or "not used"] for k, v in found["caches"].items()],
    }
    return "\n\n".join("\n".join([title, *_columns(rows)]) for title, rows in sections.items())


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def has_impl(op: Callable[..., Any]) -> bool:
    """Whether an op claims kernels: whether it takes `impl`."""
    return "impl" in inspect.signature(op).parameters


def _choice_of(op: Callable[..., Any], device: str) -> dict[str, str]:
    if not has_impl(op):
        return {"impl": "torch", "why": "the op has no kernel of its own"}
    impl, why = choice(device)
    return {"impl": impl, "why": why}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _triton_cache() -> Path:
    home = Path(os.environ.get("TRITON_HOME", Path.home()))
    return Path(os.environ.get("TRITON_CACHE_DIR", home / ".triton" / "cache"))
