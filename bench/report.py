"""The README's tables and the plots, from committed receipts and nothing else.

    python -m bench.report            rewrite them
    python -m bench.report --check    fail where they are not what the receipts say

The latest receipt of a workload on a device counts. Measured, interpreted and modelled figures never share a table. A
receipt taken with other code than the tree's is marked stale.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.harness.receipts import RESULTS, ROOT, load, tree_hash
from bench.harness.svg import Bars, bar_chart

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
STALE = "†"
Receipt = dict[str, Any]


def latest(folder: Path = RESULTS) -> list[Receipt]:
    """The last receipt of every (kind, device, clock, op, case, shape, dtype), in a fixed order."""
    found: dict[tuple[str, ...], Receipt] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for receipt in load(path):
            key = (receipt["kind"], receipt["device"], receipt["clock"], receipt["op"], *_sortable(receipt))
            if key not in found or found[key]["date"] <= receipt["date"]:
                found[key] = receipt
    return [found[key] for key in sorted(found)]


def _sortable(receipt: Receipt) -> tuple[str, ...]:
    sizes = (f"{n:012}" for n in receipt["shape"].values())
    return receipt["case"], receipt["dtype"], *sizes


def tables(receipts: Iterable[Receipt], tree: str) -> str:
    """A Markdown section for each device and kind."""
    sections: dict[tuple[str, str, str], list[Receipt]] = {}
    for receipt in receipts:
        sections.setdefault((receipt["kind"], receipt["device"], receipt["clock"]), []).append(receipt)
    parts = []
    for (kind, device, clock), group in sorted(sections.items(), key=lambda item: _kind_order(item[0])):
        parts.append(_table(kind, device, clock, group, tree) if kind != "interpreted" else _interpreted(group, tree))
    if any(r["tree"] != tree for group in sections.values() for r in group):
        parts.append(f"{STALE} taken with an earlier state of the code than this one.")
    return "\n\n".join(parts) or "No receipts yet."


def _kind_order(section: tuple[str, str, str]) -> tuple[int, tuple[str, str, str]]:
    return ("measured", "interpreted", "modelled").index(section[0]), section


def _table(kind: str, device: str, clock: str, group: list[Receipt], tree: str) -> str:
    versions = sorted({f"torch {r['torch']}, triton {r['triton']}" for r in group})
    dates = sorted(r["date"][:10] for r in group)
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    lines = [
        f"**{kind.capitalize()}** on {device} ({clock}; {'; '.join(versions)}; {when}):",
        "",
        "| op | case | shape | ours, median | best baseline | times faster | than eager | peak memory, of eager's |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in group:
        if r.get("p50") is None:
            lines.append(f"| {_name(r, tree)} | failed: {r['failed'].get('ours', 'not timed')} | | | | |")
            continue
        eager = r["baselines"].get("eager", {})
        best = r["best_baseline"]
        cells = (
            _name(r, tree),
            _duration(r["p50"]),
            best or "-",
            f"{r['ratio']:.2f}" if best else "-",
            f"{eager['ratio']:.2f}" if eager else "-",
            f"{r['peak_memory'] / eager['peak_memory']:.2f}" if eager.get("peak_memory") else "-",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _interpreted(group: list[Receipt], tree: str) -> str:
    wrong = [r for r in group if r["failed"]]
    stale = f" {STALE}" if any(r["tree"] != tree for r in group) else ""
    ops = ", ".join(sorted({f"`{r['op']}`" for r in group}))
    return (
        f"**Interpreted** (kernels in Triton's interpreter on a CPU, checked against float64, never timed): "
        f"{len(group) - len(wrong)} of {len(group)} workloads right, of {ops}.{stale}"
    )


def _name(receipt: Receipt, tree: str) -> str:
    shape = ", ".join(f"{k} {n}" for k, n in receipt["shape"].items())
    stale = "" if receipt["tree"] == tree else f" {STALE}"
    return f"`{receipt['op']}` | {receipt['case']}{stale} | {shape}, {receipt['dtype']}"


def _duration(seconds: float) -> str:
    unit, scale = ("s", 1.0) if seconds >= 1 else ("ms", 1e-3) if seconds >= 1e-3 else ("µs", 1e-6)
    return f"{seconds / scale:.3g} {unit}"


def plots(receipts: Iterable[Receipt]) -> dict[str, str]:
    """File name -> SVG, from measured receipts: speed and memory against every baseline, and rates for each device."""
    groups: dict[tuple[str, str, str], list[Receipt]] = {}
    for r in receipts:
        if r["kind"] == "measured" and r.get("p50") is not None:
            groups.setdefault((r["device"], r["clock"], r["op"]), []).append(r)
    found = {}
    for (device, clock, op), group in groups.items():
        stem = re.sub(r"[^a-z0-9]+", "-", f"{device} {op} {clock}".lower()).strip("-")
        labels = [f"{r['case']}, {' '.join(f'{k}={n}' for k, n in r['shape'].items())}" for r in group]
        names = sorted({name for r in group for name in r["baselines"]})
        faster = [Bars(a, [_of(r, n, "ratio") for n in names]) for a, r in zip(labels, group, strict=True)]
        found[f"{stem}-speed.svg"] = bar_chart(f"{op} on {device}", f"times faster than; {clock}", names, faster, 1.0)
        held = ["ours", *names]
        memory = [Bars(a, [_mebibytes(r, n) for n in held]) for a, r in zip(labels, group, strict=True)]
        found[f"{stem}-memory.svg"] = bar_chart(f"{op} on {device}: peak memory", "MiB beyond the inputs", held, memory)
        rates = [Bars(a, [r["flops"] / r["p50"] / 1e12, _bound(r)]) for a, r in zip(labels, group, strict=True)]
        found[f"{stem}-rate.svg"] = bar_chart(
            f"{op} on {device}: arithmetic", "TFLOP/s", ["ours", "its matmuls"], rates
        )
    return found


def _of(receipt: Receipt, name: str, figure: str) -> float | None:
    return receipt["baselines"].get(name, {}).get(figure)


def _mebibytes(receipt: Receipt, name: str) -> float | None:
    held = receipt["peak_memory"] if name == "ours" else _of(receipt, name, "peak_memory")
    return None if held is None else held / 2**20


def _bound(receipt: Receipt) -> float | None:
    """The rate at which the library's products alone would give the result: the roofline that was measured."""
    matmuls = receipt["bounds"].get("matmuls")
    return receipt["flops"] / matmuls["p50"] / 1e12 if matmuls else None


def rewritten(text: str, section: str) -> str:
    """`text` with what stands between the markers replaced. Raises ValueError where it lacks them."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no {BEGIN} ... {END} to write between")
    return f"{head}{BEGIN}\n{section}\n{END}{tail}"


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where something would change")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    arguments = parser.parse_args(words)
    receipts = latest(arguments.results)
    files = {arguments.results / "plots" / name: svg for name, svg in plots(receipts).items()}
    files[arguments.readme] = rewritten(arguments.readme.read_text(), tables(receipts, tree_hash()))
    changed = [path for path, text in files.items() if not path.exists() or path.read_text() != text]
    for path in changed:
        print(path.name, "differs" if arguments.check else "written")
        if not arguments.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(files[path])
    return int(arguments.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
