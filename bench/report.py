"""The README's tables and the plots they show, from committed receipts only.

    python -m bench.report            rewrite the tables and plots
    python -m bench.report --check    fail if they differ from the receipts

The latest receipt of each workload and device counts. Measured, interpreted and modelled figures are kept apart.
Receipts taken with other code than the current are marked stale.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from bench.claims import claim_lines, duration, example
from bench.harness.receipts import KINDS, RESULTS, ROOT, load, tree_hash
from bench.harness.svg import ratio_chart

STALE = "†"
UNTIMED = "not timed"  # the clock of what failed or was checked alone
Receipt = dict[str, Any]
Section = tuple[str, str, str]  # kind, device, clock


def latest(folder: Path = RESULTS) -> list[Receipt]:
    """The last receipt of every (kind, device, clock, op, case, shape, dtype), in a fixed order.

    What was not timed has no clock of its own: a later receipt of the same workload, of any clock, takes its place.
    """
    found: dict[tuple[str, ...], Receipt] = {}
    dates: dict[tuple[str, ...], str] = {}  # the last one's of a workload, whatever its clock
    for path in sorted(folder.glob("*.jsonl")):
        for receipt in load(path):
            key = (*_section(receipt), *_workload(receipt))
            if key not in found or found[key]["date"] <= receipt["date"]:
                found[key] = receipt
            dates[key[:2] + key[3:]] = max(receipt["date"], dates.get(key[:2] + key[3:], ""))
    return [
        receipt
        for key, receipt in sorted(found.items())
        if receipt["clock"] != UNTIMED or receipt["date"] == dates[key[:2] + key[3:]]
    ]


def _workload(receipt: Receipt) -> tuple[str, ...]:
    sizes = (f"{n:012}" for n in receipt["shape"].values())
    return receipt["op"], receipt["case"], receipt["dtype"], *sizes


def _section(receipt: Receipt) -> Section:
    return receipt["kind"], receipt["device"], receipt["clock"]


def sections(receipts: Iterable[Receipt]) -> dict[Section, list[Receipt]]:
    """Receipts by kind, device and clock: measured first, then interpreted, then modelled."""
    found: dict[Section, list[Receipt]] = {}
    for receipt in receipts:
        found.setdefault(_section(receipt), []).append(receipt)
    return dict(sorted(found.items(), key=lambda item: (KINDS.index(item[0][0]), item[0])))


def text(receipts: Iterable[Receipt], tree: str, folder: str) -> str:
    """A Markdown section per kind, device and clock; `folder` is the plots' path as seen from the README."""
    groups = sections(receipts)
    parts = []
    for section, group in groups.items():
        parts.append(_interpreted(group, tree) if section[0] == "interpreted" else _table(section, group, tree))
        parts += [f"![{title}]({folder}/{name})" for name, title, _ in _plots(section, group)]
    return "\n\n".join(parts) or "No receipts yet."


def _table(section: Section, group: list[Receipt], tree: str) -> str:
    kind, device, clock = section
    versions = sorted({f"torch {r['torch']}, triton {r['triton']}" for r in group})
    dates = sorted({r["date"][:10] for r in group})
    dtypes = sorted({r["dtype"] for r in group})
    all_stale = all(r["tree"] != tree for r in group)
    facts = (*dtypes[: len(dtypes) == 1], clock, *versions, " to ".join(dates[:: max(1, len(dates) - 1)]))
    lines = [
        f"**{kind.capitalize()}** on {device} ({'; '.join(facts)}):",
        "",
        "| op | case | ours | best baseline | times faster | memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in group:
        stale = f" {STALE}" if r["tree"] != tree and not all_stale else ""
        case = f"`{r['op']}` | {_case(r, len(dtypes) > 1)}{stale}"
        best = r["best_baseline"]
        if r.get("p50") is None:
            why = f"failed: {r['failed']['ours']}" if "ours" in r["failed"] else "correct, not timed"
            lines.append(f"| {case} | {why} | | | |")
        elif best is None:
            lines.append(f"| {case} | {duration(r['p50'])} | none | | |")
        else:
            memory = _memory(r)
            figures = f"{r['ratio']:.2f} | {'' if memory is None else f'{memory:.2g}'}"
            them = f"{duration(r['baselines'][best]['p50'])} ({best})"
            lines.append(f"| {case} | {duration(r['p50'])} | {them} | {figures} |")
    notes = [
        "Times are medians. Times faster is the median of the rounds' ratios, so it may differ from the quotient of "
        "the two times; below 1 ours is slower. Memory is our peak / the fastest baseline's. A row is its newest run."
    ]
    if any(r["tree"] != tree for r in group):
        notes.append(f"{'All rows' if all_stale else STALE}: measured before the latest change of the code.")
    return "\n".join([*lines, "", " ".join(notes)])


def _interpreted(group: list[Receipt], tree: str) -> str:
    correct = sum(not r["failed"] for r in group)
    stale = " Checked before the latest change of the code." if any(r["tree"] != tree for r in group) else ""
    ops = ", ".join(sorted({f"`{r['op']}`" for r in group}))
    return (
        f"**Interpreted** (kernels in Triton's interpreter, checked against float64, never timed): "
        f"{correct} of {len(group)} workloads correct, of {ops}.{stale}"
    )


def _case(receipt: Receipt, with_dtype: bool) -> str:
    sizes = ", ".join(f"{k} {n}" for k, n in receipt["shape"].items())
    return f"{receipt['case']}; {sizes}" + (f"; {receipt['dtype']}" if with_dtype else "")


def _memory(receipt: Receipt) -> float | None:
    """Our peak memory / the best baseline's."""
    theirs = receipt["baselines"][receipt["best_baseline"]]["peak_memory"]
    return receipt["peak_memory"] / theirs if theirs else None


def plots(receipts: Iterable[Receipt]) -> dict[str, str]:
    """File name -> SVG: speed and memory against the best baseline, per device and clock, of measured receipts."""
    return {name: svg for section, group in sections(receipts).items() for name, _, svg in _plots(section, group)}


def _plots(section: Section, group: list[Receipt]) -> Iterator[tuple[str, str, str]]:
    """(file name, title, SVG)"""
    kind, device, clock = section
    group = [r for r in group if r.get("p50") is not None and r["best_baseline"]]
    if kind != "measured" or not group:
        return
    stem = re.sub(r"[^a-z0-9]+", "-", f"{device} {clock}".lower()).strip("-")
    dtypes = len({r["dtype"] for r in group}) > 1

    def bars(figure: Callable[[Receipt], float | None]) -> list[tuple[str, float, str]]:
        found = ((f"{r['op']}: {_case(r, dtypes)}", figure(r), f"({r['best_baseline']})") for r in group)
        return [(label, ratio, note) for label, ratio, note in found if ratio]

    for name, title, axis, figure, better_above in (
        ("speed", "Times faster than the best baseline", "time of the best baseline / ours", _ratio, True),
        ("memory", "Peak memory beside the best baseline's", "our peak / the best baseline's", _memory, False),
    ):
        yield (
            f"{stem}-{name}.svg",
            f"{title}, {device}",
            ratio_chart(title, f"{axis}; {device}, {clock}", bars(figure), better_above),
        )


def _ratio(receipt: Receipt) -> float:
    """Time of the best baseline / ours."""
    return receipt["ratio"]


def rewritten(readme: str, sections: dict[str, str]) -> str:
    """`readme` with each section between the markers of its name. Raises ValueError if a marker is missing."""
    for name, section in sections.items():
        first, last = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        head, begin, rest = readme.partition(first)
        _, end, tail = rest.partition(last)
        if not begin or not end:
            raise ValueError(f"no {first} ... {last} to write between")
        readme = f"{head}{first}\n{section}\n{last}{tail}"
    return readme


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if something would change")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    arguments = parser.parse_args(words)
    receipts = latest(arguments.results)
    folder = arguments.results / "plots"
    table = text(receipts, tree_hash(), folder.relative_to(arguments.readme.parent).as_posix())
    written = {"claims": claim_lines(receipts), "example": example(receipts), "bench": table}
    files: dict[Path, str | None] = dict.fromkeys(sorted(folder.glob("*.svg")))  # None: no plot of these receipts
    files |= {folder / name: svg for name, svg in plots(receipts).items()}
    files[arguments.readme] = rewritten(arguments.readme.read_text(), written)
    changed = [path for path, content in files.items() if content != (path.read_text() if path.exists() else None)]
    for path in changed:
        content = files[path]
        print(path.name, "differs" if arguments.check else "removed" if content is None else "written")
        if arguments.check:
            continue
        if content is None:
            path.unlink()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
    return int(arguments.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
