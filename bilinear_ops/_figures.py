"""What the figures of `plots` share: an empty figure, its colours, signed images, lines, names."""

from __future__ import annotations

import functools
import io
import operator
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from bilinear_ops._check import check_values, is_integer

Figure = Any  # matplotlib.figure.Figure, imported at the first call
Labels = Sequence[str | int]

SIGNED = "RdBu"
MAGNITUDE = "cividis"
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's
MARKERS = "osD^v<>"


def empty_figure(width: float, height: float) -> Figure:
    """An empty figure of the given size in inches."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("bilinear_ops.plots needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    figure._repr_png_ = functools.partial(_png, figure)  # type: ignore[attr-defined]
    return figure


def _png(figure: Figure) -> bytes:
    """What a notebook asks for: matplotlib's figures show themselves only if pyplot has made them."""
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def signed_image(axes: Any, image: Tensor) -> Any:
    limit = image.abs().max().item() or 1.0  # matplotlib needs a non-empty range for an image of zeros
    return axes.imshow(array(image), cmap=SIGNED, vmin=-limit, vmax=limit)


def draw_lines(axes: Any, curves: Tensor, names: Sequence[str]) -> list[Any]:
    """One line for each row of `[M, n]` over 1 to n, by colour and marker, with a legend if there are names."""
    lines = []
    for m, curve in enumerate(curves):
        style = {"color": LINES[m % len(LINES)], "marker": MARKERS[m // len(LINES) % len(MARKERS)]}
        name = names[m] if names else None
        lines += axes.plot(range(1, len(curve) + 1), array(curve), label=name, markersize=3, linewidth=1.2, **style)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if names:
        axes.legend(frameon=False, fontsize=8, ncols=1 + len(lines) // 8)
    return lines


def check_names(labels: Labels | None, count: int) -> list[str]:
    if labels is None:
        return []
    if not isinstance(labels, Iterable):
        raise TypeError(f"labels must be strings or integers, got {type(labels).__name__}")
    names = labels.tolist() if isinstance(labels, Tensor) else list(labels)
    for name in names:
        if not isinstance(name, str) and not is_integer(name):
            raise TypeError(f"labels must be strings or integers, got {type(name).__name__}")
    if len(names) != count:
        raise ValueError(f"labels must be {count} names, got {len(names)}")
    return [name if isinstance(name, str) else str(operator.index(name)) for name in names]


def ink(level: Tensor) -> str:
    """The text colour on a level of the magnitude map, which is dark below one half."""
    return "white" if level < 0.5 else "black"


def array(t: Tensor) -> Any:
    """A NumPy array; matplotlib accepts neither devices, gradients nor bfloat16."""
    check_values(values=t)
    return t.detach().double().cpu().numpy()
