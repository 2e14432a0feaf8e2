"""Bar charts as SVG text: the same receipts give the same bytes, and nothing needs installing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#1b6ca8", "#e07a2f", "#6a994e", "#9467bd", "#8c8c8c", "#c44e52")
WIDTH, LEFT, RIGHT, BAR, GAP, TOP, BOTTOM = 860, 300, 70, 13, 10, 64, 34


@dataclass(frozen=True)
class Bars:
    """One group of bars, a value for each series; None where there is none."""

    label: str
    values: Sequence[float | None]


def bar_chart(title: str, unit: str, series: Sequence[str], groups: Sequence[Bars], mark: float | None = None) -> str:
    """Horizontal bars from zero, one group below the other; `mark` draws a line across, such as at a ratio of one."""
    rows = sum(1 for g in groups for v in g.values if v is not None)
    height = TOP + rows * BAR + len(groups) * GAP + BOTTOM
    longest = max([v for g in groups for v in g.values if v is not None] + [mark or 0.0], default=1.0) or 1.0
    scale = (WIDTH - LEFT - RIGHT) / longest
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
        ' font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="12" y="22" font-size="15" font-weight="bold">{escape(title)}</text>',
    ]
    x = 12
    for name, colour in zip(series, _colours(series), strict=True):
        out.append(f'<rect x="{x}" y="36" width="11" height="11" fill="{colour}"/>')
        out.append(f'<text x="{x + 16}" y="46">{escape(name)}</text>')
        x += 34 + 6 * len(name)
    y = TOP
    for group in groups:
        bars = [(v, c) for v, c in zip(group.values, _colours(series), strict=True) if v is not None]
        middle = y + len(bars) * BAR / 2 + 4
        out.append(f'<text x="{LEFT - 8}" y="{middle:.1f}" text-anchor="end">{escape(group.label)}</text>')
        for value, colour in bars:
            out.append(f'<rect x="{LEFT}" y="{y}" width="{value * scale:.1f}" height="{BAR - 2}" fill="{colour}"/>')
            out.append(f'<text x="{LEFT + value * scale + 4:.1f}" y="{y + BAR - 3}" fill="#444">{value:.3g}</text>')
            y += BAR
        y += GAP
    if mark is not None:
        at = f"{LEFT + mark * scale:.1f}"
        out.append(f'<line x1="{at}" x2="{at}" y1="{TOP - 6}" y2="{y}" stroke="#000" stroke-dasharray="3 3"/>')
    out.append(f'<text x="{LEFT}" y="{height - 12}" fill="#444">{escape(unit)}</text>')
    return "\n".join([*out, "</svg>", ""])


def _colours(series: Sequence[str]) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(series))]
