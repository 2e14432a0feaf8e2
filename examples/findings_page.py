"""What the examples' findings share: claims with verdicts, tables, receipts as JSON, and whether a page says the same.

The page, docs/findings.md unless another is given, holds the text of an example between two marks of its name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "findings.md"

Receipt = dict[str, Any]


class Finding(NamedTuple):
    """A claim of the paper beside what was measured."""

    claim: str
    where: str
    figure: str
    verdict: str


def verdict(held: Sequence[bool], of: str = "seeds") -> str:
    """Whether a claim held in all cases, in none or in some."""
    if all(held):
        return "agrees"
    return f"mixed: {sum(held)} of {len(held)} {of}" if any(held) else "differs"


def spread(found: Sequence[float], form: str = ".2f") -> str:
    """Mean and range; the mean alone where all are equal."""
    if max(found) - min(found) < 1e-9:
        return f"{mean(found):{form}}"
    return f"{mean(found):{form}} ({min(found):{form}} to {max(found):{form}})"


def differences(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """first - second, seed by seed."""
    return [a - b for a, b in zip(first, second, strict=True)]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def written(receipt: Receipt) -> str:
    """JSON with five decimals, a record a line."""
    parts = []
    for key, value in _rounded(receipt).items():
        lines = ",\n".join(map(json.dumps, value))
        parts.append(f'"{key}": ' + (f"[\n{lines}\n]" if isinstance(value, list) else json.dumps(value)))
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value]
    return round(value, 5) if isinstance(value, float) else value


def check(name: str, receipt: Path, text: Callable[[Receipt], str], page: Path = PAGE) -> int:
    """Whether the page holds the text of a receipt; returns the exit status."""
    after = page.read_text(encoding="utf-8").partition(f"<!-- {name}:begin -->\n")[2]
    held = after.partition(f"<!-- {name}:end -->\n")[0]
    if held.strip() == text(json.loads(receipt.read_text(encoding="utf-8"))).strip():
        print(f"{page.name} says what {receipt.name} measured.")
        return 0
    print(f"{page.name} differs from {receipt.name}: put the text of this receipt between its marks.")
    return 1
