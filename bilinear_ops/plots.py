"""Figures of interaction matrices and their eigenvectors: tensors in, a `matplotlib.figure.Figure` out.

A figure is independent of pyplot: `plots.spectrum(values).savefig("spectrum.png")`. A notebook shows the figure that a
cell ends with. Labels are strings or integers. Colours are safe for colour-blind readers. Signed values have a
diverging map centred at zero; blue is positive. Every function needs matplotlib, and raises ModuleNotFoundError
without it.
"""

from __future__ import annotations

import functools
import io
import itertools
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import normalize

from bilinear_ops._check import check, check_beside, check_shape, check_values, is_integer
from bilinear_ops.analysis.clusters import interaction_clusters

__all__ = ["cluster", "eigenvectors", "interactions", "similarity", "spectrum", "truncation"]

Figure = Any  # matplotlib.figure.Figure, imported at the first call
Labels = Sequence[str | int]

SIGNED = "RdBu"
MAGNITUDE = "cividis"
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's
MARKERS = "osD^v<>"
LABELLED = 40  # the most rows of a heat map whose names can be read

cluster = interaction_clusters  # former name


def spectrum(values: Tensor, *, labels: Labels | None = None) -> Figure:
    """Plot eigenvalues in descending order, one line for each output ([P] 4.1).

    Args:
        values: `[K, n]`, in any order.
        labels: names of the K outputs.

    Raises:
        RuntimeError: values are not two-dimensional.
        TypeError: values are not a floating-point tensor.
        ValueError: a wrong number of labels.
    """
    sizes = check(values=(values, "K n"))
    figure = _figure(6, 3.6)
    axes = figure.subplots()
    axes.axhline(0, color="0.6", linewidth=0.8)
    _lines(axes, values.sort(dim=1, descending=True).values, _names(labels, sizes["K"]))
    axes.set(xlabel="eigenvector, from the most positive to the most negative", ylabel="eigenvalue")
    return figure


def eigenvectors(
    vectors: Tensor,
    shape: tuple[int, int],
    *,
    values: Tensor | None = None,
    labels: Labels | None = None,
) -> Figure:
    """Show eigenvectors as images, one row for each output ([P] 4.1). Each image has its own scale, white at zero.

    Args:
        vectors: `[K, n, d]`.
        shape: height and width of an image, whose product is d.
        values: `[K, n]`, written above the images.
        labels: names of the K outputs.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices, or images that do not have d pixels.
        TypeError: an argument that is not a floating-point tensor.
        ValueError: a wrong number of labels.
    """
    sizes = check(vectors=(vectors, "K n d"), values=(values, "? K n"))
    if len(check_shape(shape)) != 2:
        raise ValueError(f"shape must be (height, width), got {shape}")
    rows, columns = sizes["K"], sizes["n"]
    if sizes["d"] != math.prod(shape):
        expected = f"[K, n, {math.prod(shape)}] for images of {shape[0]} x {shape[1]}"
        raise RuntimeError(f"vectors must have shape {expected}, got {list(vectors.shape)}")
    names = _names(labels, rows)
    figure = _figure(0.9 * columns + 0.5, (0.9 if values is None else 1.1) * rows + 0.1)
    grid = figure.subplots(rows, columns, squeeze=False)
    for k, i in itertools.product(range(rows), range(columns)):
        axes = grid[k, i]
        _signed_image(axes, vectors[k, i].reshape(shape))
        axes.set(xticks=[], yticks=[])
        if values is not None:
            axes.set_title(f"{values[k, i].item():+.2f}", fontsize=7, pad=2)
        if i == 0 and names:
            axes.set_ylabel(names[k], rotation=0, ha="right", va="center")
    return figure


def interactions(q: Tensor, *, labels: Labels | None = None, clusters: int | None = None) -> Figure:
    """Draw a heat map of one interaction matrix, white at zero ([P] section 5).

    Args:
        q: `[F, F]`, symmetric.
        labels: names of the F rows, shown for at most 40 rows.
        clusters: number of clusters of similar rows (`analysis.interaction_clusters`). Rows and columns are reordered
            by cluster, with lines between clusters; None keeps the order.

    Raises:
        RuntimeError: q is not square.
        TypeError: q is not a floating-point tensor.
        ValueError: a wrong number of labels, or clusters not from 1 to F.
    """
    size = check(q=(q, "F F"))["F"]
    names = _names(labels, size)
    order, edges = list(range(size)), list[int]()
    if clusters is not None:
        groups = interaction_clusters(q, clusters)
        order = [i for group in groups for i in group]
        edges = list(itertools.accumulate(len(group) for group in groups[:-1]))
    figure = _figure(5.6, 4.8)
    axes = figure.subplots()
    figure.colorbar(_signed_image(axes, q[order][:, order]), shrink=0.8)
    for edge in edges:
        axes.axhline(edge - 0.5, color="black", linewidth=0.8)
        axes.axvline(edge - 0.5, color="black", linewidth=0.8)
    if names and size <= LABELLED:
        shown = [names[i] for i in order]
        axes.set_xticks(range(size), shown, rotation=90, fontsize=7)
        axes.set_yticks(range(size), shown, fontsize=7)
    return figure


def truncation(
    scores: Tensor,
    *,
    labels: Labels | None = None,
    full: Tensor | None = None,
    ylabel: str = "accuracy",
) -> Figure:
    """Plot scores of truncated layers against the number of eigenvectors kept ([P] 4.2).

    Args:
        scores: `[M, n]`, for M layers with 1 to n eigenvectors kept; or `[n]` for one, as `truncation_curve` returns.
        labels: names of the M lines.
        full: `[M]` or `[]`, any float dtype: the scores of the layers without truncation, drawn as dashed lines.
        ylabel: name of the score.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices.
        TypeError: an argument that is not a floating-point tensor.
        ValueError: a wrong number of labels.
    """
    if isinstance(scores, Tensor) and scores.dim() == 1:
        scores = scores[None]
    sizes = check(scores=(scores, "M n"))
    check_beside(scores, full=(full, (sizes["M"],)))
    figure = _figure(6, 3.6)
    axes = figure.subplots()
    lines = _lines(axes, scores, _names(labels, sizes["M"]))
    if full is not None:
        for line, level in zip(lines, full.expand(sizes["M"]).tolist(), strict=True):
            axes.axhline(level, color=line.get_color(), linewidth=0.8, linestyle="--")
    axes.set(xlabel="eigenvectors kept for each output", ylabel=ylabel)
    return figure


def similarity(first: Tensor, second: Tensor) -> Figure:
    """Show |cos| between the eigenvectors of two runs, averaged over the outputs ([P] 4.2).

    Args:
        first, second: `[K, n, d]` and `[K, m, d]`. To average over several pairs of runs, concatenate them along K.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices.
        TypeError: an argument that is not a floating-point tensor.
    """
    sizes = check(first=(first, "K n d"), second=(second, "K m d"))
    cosines = (normalize(first, dim=2) @ normalize(second, dim=2).mT).abs().mean(0)
    figure = _figure(0.5 * sizes["m"] + 2.2, 0.5 * sizes["n"] + 1)
    axes = figure.subplots()
    figure.colorbar(axes.imshow(_array(cosines), cmap=MAGNITUDE, vmin=0, vmax=1), label="mean |cos|")
    for (i, j), cosine in zip(itertools.product(range(sizes["n"]), range(sizes["m"])), cosines.flatten(), strict=True):
        axes.text(j, i, f"{cosine.item():.2f}", ha="center", va="center", fontsize=7, color=_ink(cosine))
    axes.set_xticks(range(sizes["m"]), range(1, sizes["m"] + 1))
    axes.set_yticks(range(sizes["n"]), range(1, sizes["n"] + 1))
    axes.set(xlabel="eigenvector of the second run", ylabel="eigenvector of the first")
    return figure


def _figure(width: float, height: float) -> Figure:
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


def _signed_image(axes: Any, image: Tensor) -> Any:
    limit = image.abs().max().item() or 1.0  # matplotlib needs a non-empty range for an image of zeros
    return axes.imshow(_array(image), cmap=SIGNED, vmin=-limit, vmax=limit)


def _lines(axes: Any, curves: Tensor, names: Sequence[str]) -> list[Any]:
    """One line for each row of `[M, n]` over 1 to n, by colour and marker, with a legend if there are names."""
    lines = []
    for m, curve in enumerate(curves):
        style = {"color": LINES[m % len(LINES)], "marker": MARKERS[m // len(LINES) % len(MARKERS)]}
        name = names[m] if names else None
        lines += axes.plot(range(1, len(curve) + 1), _array(curve), label=name, markersize=3, linewidth=1.2, **style)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if names:
        axes.legend(frameon=False, fontsize=8, ncols=1 + len(lines) // 8)
    return lines


def _names(labels: Labels | None, count: int) -> list[str]:
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


def _ink(level: Tensor) -> str:
    """The text colour on a level of the magnitude map, which is dark below one half."""
    return "white" if level < 0.5 else "black"


def _array(t: Tensor) -> Any:
    """A NumPy array; matplotlib accepts neither devices, gradients nor bfloat16."""
    check_values(values=t)
    return t.detach().double().cpu().numpy()
