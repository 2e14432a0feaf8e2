"""The sentences of the README's first page that carry figures, made of receipts: `bench.report` writes them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Receipt = dict[str, Any]

# (op, case): what it does for a user
CLAIMS = {
    ("interaction_eigh", "2 strongest"): "**Read** a layer: the 2 strongest eigenvectors of each output",
    ("hosvd", "output"): "**Decompose** its tensor into singular output directions (HOSVD)",
    ("rank1_accumulate", "gates"): "**Sum** gated rank-1 subcomponents into weights",
    ("gated_mlp", "silu, step"): "**Train** a SwiGLU MLP, forward and backward",
}
EXAMPLE = ("interaction_eigh", "2 strongest")


def claim_lines(receipts: Iterable[Receipt]) -> str:
    """One line for each claim that has a measured receipt."""
    found = [(text, _of(receipts, *key)) for key, text in CLAIMS.items()]
    return "\n".join(f"- {text}: {_figures(r)}." for text, r in found if r is not None) or "No receipts yet."


def example(receipts: Iterable[Receipt]) -> str:
    """What the example of the first page takes, before and after."""
    r = _of(receipts, *EXAMPLE)
    if r is None:
        return "No receipts yet."
    return f"{_figures(r)}. Device: {r['device'].removeprefix('CPU: ')}, {r['clock']}."


def _of(receipts: Iterable[Receipt], op: str, case: str) -> Receipt | None:
    """The newest measured receipt of a workload."""
    found = [r for r in receipts if (r["kind"], r["op"], r["case"]) == ("measured", op, case) and r.get("p50")]
    return max(found, key=lambda r: r["date"], default=None)


def _figures(r: Receipt) -> str:
    """Our peak memory and time in place of eager PyTorch's, and those of the fastest and smallest others."""
    eager, best = r["baselines"]["eager"], r["best_baseline"]
    peaks = f"{_size(r['peak_memory'])} of memory in place of {_size(eager['peak_memory'])}"
    text = f"{peaks}, {duration(r['p50'])} in place of {duration(eager['p50'])} (eager PyTorch; {_sizes(r)})"
    smallest = min(r["baselines"], key=lambda name: r["baselines"][name]["peak_memory"])
    for name in sorted({best, smallest} - {"eager"}):
        other = r["baselines"][name]
        text += f"; {name}: {_size(other['peak_memory'])}, {duration(other['p50'])}"
    return text


def _size(count: float) -> str:
    """Bytes, with two digits and a unit."""
    unit, scale = ("GB", 1e9) if count >= 1e9 else ("MB", 1e6) if count >= 1e6 else ("kB", 1e3)
    return f"{count / scale:.2g} {unit}" if count / scale < 100 else f"{count / scale:.0f} {unit}"


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    unit, scale = ("s", 1.0) if seconds >= 1 else ("ms", 1e-3) if seconds >= 1e-3 else ("µs", 1e-6)
    return f"{seconds / scale:.3g} {unit}"


def _sizes(r: Receipt) -> str:
    return ", ".join(f"{name} {n}" for name, n in r["shape"].items())
