"""Bar charts of ratios as SVG text: equal values give equal bytes, and no plotting library is needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, LEFT, RIGHT, ROW, BAR, TOP, BOTTOM = 980, 450, 180, 19, 13, 54, 40
BETTER, WORSE, GREY = "#1b6ca8", "#e07a2f", "#666666"


def ratio_chart(title: str, axis: str, ratios: Sequence[tuple[str, float, str]], better_above: bool) -> str:
    """Bars from 1 to each ratio, given as (label, ratio, note), on a logarithmic axis; orange if worse than 1."""
    low = min([0.5, *(r for _, r, _ in ratios)])
    high = max([2.0, *(r for _, r, _ in ratios)])
    span = math.log(high / low)
    bottom = TOP + ROW * len(ratios)
    height = bottom + BOTTOM

    def x(ratio: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log(ratio / low) / span

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
        ' font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="12" y="24" font-size="15" font-weight="bold">{escape(title)}</text>',
    ]
    for tick in _ticks(low, high):
        at = f"{x(tick):.1f}"
        stroke = "#000000" if tick == 1 else "#dddddd"
        out.append(f'<line x1="{at}" x2="{at}" y1="{TOP - 6}" y2="{bottom}" stroke="{stroke}"/>')
        out.append(f'<text x="{at}" y="{bottom + 14}" text-anchor="middle" fill="{GREY}">{tick:g}</text>')
    for i, (label, ratio, note) in enumerate(ratios):
        y = TOP + ROW * i
        left, right = sorted((x(1), x(ratio)))
        colour = BETTER if ratio == 1 or (ratio > 1) == better_above else WORSE
        out.append(f'<text x="12" y="{y + BAR - 2}">{escape(label)}</text>')
        out.append(f'<rect x="{left:.1f}" y="{y}" width="{right - left:.1f}" height="{BAR}" fill="{colour}"/>')
        out.append(f'<text x="{right + 5:.1f}" y="{y + BAR - 2}" fill="{GREY}">{escape(f"{ratio:.3g} {note}")}</text>')
    out.append(f'<text x="12" y="{height - 8}" fill="{GREY}">{escape(axis)}</text>')
    return "\n".join([*out, "</svg>", ""])


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within the axis, or powers of ten alone if those are many."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(exponents) < 5 else (1,)
    return [tick for e in exponents for f in factors if low <= (tick := f * 10.0**e) <= high]
