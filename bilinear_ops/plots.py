"""Figures of interaction matrices and their eigenvectors: tensors in, a `matplotlib.figure.Figure` out.

A figure is independent of pyplot: `plots.spectrum(values).savefig("spectrum.png")`. A notebook shows the figure that a
cell ends with. Labels are strings or integers. Colours are safe for colour-blind readers. Signed values have a
diverging map centred at zero; blue is positive. Every function needs matplotlib, and raises ModuleNotFoundError
without it.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from bilinear_ops._check import check, check_beside, check_integers, check_shape, check_values
from bilinear_ops._figures import (
    LINES,
    MAGNITUDE,
    SIGNED,
    Figure,
    Labels,
    array,
    check_names,
    draw_lines,
    empty_figure,
    ink,
    signed_image,
)
from bilinear_ops.analysis.clusters import interaction_clusters
from bilinear_ops.analysis.eigen.spectra import EigenPairs
from bilinear_ops.analysis.explanation import explain
from bilinear_ops.interaction.forms import eigen_form

__all__ = [
    "cluster",
    "distribution",
    "eigenplane",
    "eigenvectors",
    "explanation",
    "interactions",
    "scatter",
    "similarity",
    "spectrum",
    "truncation",
]

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
    figure = empty_figure(6, 3.6)
    axes = figure.subplots()
    axes.axhline(0, color="0.6", linewidth=0.8)
    draw_lines(axes, values.sort(dim=1, descending=True).values, check_names(labels, sizes["K"]))
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
    names = check_names(labels, rows)
    figure = empty_figure(0.9 * columns + 0.5, (0.9 if values is None else 1.1) * rows + 0.1)
    grid = figure.subplots(rows, columns, squeeze=False)
    for k, i in itertools.product(range(rows), range(columns)):
        axes = grid[k, i]
        signed_image(axes, vectors[k, i].reshape(shape))
        axes.set(xticks=[], yticks=[])
        if values is not None:
            axes.set_title(f"{values[k, i].item():+.2f}", fontsize=7, pad=2)
        if i == 0 and names:
            axes.set_ylabel(names[k], rotation=0, ha="right", va="center")
    return figure


def explanation(
    x: Tensor,
    pairs: EigenPairs,
    n: int,
    shape: tuple[int, int],
    *,
    logits: Tensor | None = None,
    labels: Labels | None = None,
) -> Figure:
    """Show why an image has its outputs: each output's strongest terms at x, and bars that add up to it ([P] App. C).

    Above is the input. Below it is a row for each output: the eigenvectors of its n largest terms, with the terms, and
    bars of these terms, of the remainder and of their sum.

    Args:
        x: `[d]`, the input.
        pairs, n, logits: as for `analysis.explain`; logits `[K]`.
        shape: height and width of an image, whose product is d.
        labels: names of the K outputs.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices, or an image that does not have d pixels.
        TypeError, ValueError: as `analysis.explain`; ValueError for a wrong number of labels.
    """
    size = check(x=(x, "d"))["d"]
    check_values(x=x)
    if len(check_shape(shape)) != 2:
        raise ValueError(f"shape must be (height, width), got {shape}")
    if size != math.prod(shape):
        raise RuntimeError(
            f"x must have shape [{math.prod(shape)}] for images of {shape[0]} x {shape[1]}, got [{size}]"
        )
    contributions, remainder = explain(x, pairs, n, logits=logits)
    terms = eigen_form(x, pairs.values, pairs.vectors, reduce="none")
    order = terms.abs().argsort(dim=1, descending=True, stable=True)[:, :n]
    rows = len(contributions)
    names = check_names(labels, rows)
    figure = empty_figure(0.9 * n + 3.2, 1.1 * (rows + 1))
    grid = figure.subplots(rows + 1, n + 1, squeeze=False, width_ratios=[1] * n + [2.2])
    for axes in grid[:, :n].flat:
        axes.set(xticks=[], yticks=[])
    for axes in grid[0, 1:]:
        axes.set_axis_off()
    signed_image(grid[0, 0], x.reshape(shape))
    grid[0, 0].set_title("input", fontsize=7, pad=2)
    for k in range(rows):
        for i in range(n):
            signed_image(grid[k + 1, i], pairs.vectors[k, order[k, i]].reshape(shape))
            grid[k + 1, i].set_title(f"{contributions[k, i].item():+.2f}", fontsize=7, pad=2)
        bars = torch.cat([contributions[k], remainder[k, None], (contributions[k].sum() + remainder[k])[None]])
        colours = [LINES[0] if bar >= 0 else LINES[1] for bar in bars[:n]] + ["0.6", "black"]
        axes = grid[k + 1, n]
        axes.bar(range(n + 2), array(bars), color=colours)
        axes.axhline(0, color="0.6", linewidth=0.8)
        axes.set_xticks(range(n + 2), [*map(str, range(1, n + 1)), "rest", "sum"], fontsize=6)
        axes.spines[["top", "right"]].set_visible(False)
        if names:
            grid[k + 1, 0].set_ylabel(names[k], rotation=0, ha="right", va="center")
    return figure


def eigenplane(
    points: Tensor,
    vectors: Tensor,
    values: Tensor,
    *,
    labels: Labels | None = None,
) -> Figure:
    """Plot directions on the plane of a positive and a negative eigenvector ([P] 5.1).

    The background is value_0 a^2 + value_1 b^2 at (a, b), what a feature there contributes to the output; two features
    at one place or at opposite ones reinforce each other.

    Args:
        points: `[N, d]`, such as the features of an autoencoder.
        vectors: `[2, d]`, unit eigenvectors: horizontal, then vertical.
        values: `[2]`, their eigenvalues.
        labels: names of the N points.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices, or not two eigenvectors.
        TypeError: an argument that is not a floating-point tensor.
        ValueError: a wrong number of labels.
    """
    sizes = check(vectors=(vectors, "two d"), values=(values, "two"), points=(points, "N d"))
    check_values(points=points)
    if sizes["two"] != 2:
        raise RuntimeError(f"vectors must have shape [2, d], got {list(vectors.shape)}")
    names = check_names(labels, sizes["N"])
    places = (points @ vectors.t()).double()
    limit = 1.15 * max(places.detach().nan_to_num(0, 0, 0).abs().amax().item() if len(places) else 0.0, 1e-9)
    line = torch.linspace(-limit, limit, 101, dtype=torch.float64, device=points.device)
    heights = values[0].double() * line.square() + values[1].double() * line.square()[:, None]
    figure = empty_figure(5.4, 4.6)
    axes = figure.subplots()
    shade = heights.abs().max().item() or 1.0
    extent = (-limit, limit, -limit, limit)
    image = axes.imshow(array(heights), cmap=SIGNED, vmin=-shade, vmax=shade, extent=extent, origin="lower", alpha=0.5)
    figure.colorbar(image, label="contribution", shrink=0.8)
    axes.scatter(*array(places.t()), s=12, color="black")
    for name, (a, b) in zip(names, places.tolist(), strict=False):
        axes.annotate(name, (a, b), xytext=(3, 3), textcoords="offset points", fontsize=7)
    axes.set(
        xlabel=f"along the eigenvector of {values[0].item():+.2f}",
        ylabel=f"along the eigenvector of {values[1].item():+.2f}",
    )
    return figure


def scatter(x: Tensor, y: Tensor, *, xlabel: str = "", ylabel: str = "") -> Figure:
    """Plot pairs of values as points, with their Pearson correlation above ([P] 5.2).

    Args:
        x, y: `[N]`, such as the activations of a feature and the truncated layer's outputs.
        xlabel, ylabel: names of the axes.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices.
        TypeError: an argument that is not a floating-point tensor.
    """
    check(x=(x, "N"), y=(y, "N"))
    check_values(x=x)
    a, b = (t.detach().double() - t.detach().double().mean() for t in (x, y))
    correlation = ((a * b).sum() / (a.norm() * b.norm())).item()
    figure = empty_figure(4.4, 4)
    axes = figure.subplots()
    axes.scatter(array(x), array(y), s=6, color=LINES[0], alpha=0.5, linewidths=0)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=f"correlation {correlation:.2f}")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def distribution(values: Tensor, *, labels: Labels | None = None, bins: int = 40, xlabel: str = "value") -> Figure:
    """Plot histograms of several samples on the same bins, as shares of each sample ([P] 5.1).

    Args:
        values: `[M, N]` for M samples, or `[N]` for one. NaN, such as a correlation with a constant, is left out.
        labels: names of the M samples.
        bins: number of bins from the smallest to the largest value.
        xlabel: name of the values.

    Raises:
        RuntimeError: values of another shape.
        TypeError: values are not a floating-point tensor, or bins not an int.
        ValueError: a wrong number of labels, bins below 1, or infinite values.
    """
    if isinstance(values, Tensor) and values.dim() == 1:
        values = values[None]
    sizes = check(values=(values, "M N"))
    check_values(values=values)
    check_integers(bins=bins)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    if values.isinf().any():
        raise ValueError("values must not be infinite to be counted in bins")
    names = check_names(labels, sizes["M"])
    values = values.detach().double().cpu()
    known = values[~values.isnan()]
    low, high = (known.min().item(), known.max().item()) if len(known) else (0.0, 1.0)
    edges = torch.linspace(low, high if high > low else low + 1, bins + 1, dtype=torch.float64)
    figure = empty_figure(6, 3.6)
    axes = figure.subplots()
    for m, sample in enumerate(values):
        counted = torch.histogram(sample[~sample.isnan()], edges).hist
        shares = counted / counted.sum().clamp_min(1)
        name = names[m] if names else None
        axes.stairs(array(shares), array(edges), label=name, color=LINES[m % len(LINES)], linewidth=1.4)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel=xlabel, ylabel="share")
    if names:
        axes.legend(frameon=False, fontsize=8)
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
    names = check_names(labels, size)
    order, edges = list(range(size)), list[int]()
    if clusters is not None:
        groups = interaction_clusters(q, clusters)
        order = [i for group in groups for i in group]
        edges = list(itertools.accumulate(len(group) for group in groups[:-1]))
    figure = empty_figure(5.6, 4.8)
    axes = figure.subplots()
    figure.colorbar(signed_image(axes, q[order][:, order]), shrink=0.8)
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
    figure = empty_figure(6, 3.6)
    axes = figure.subplots()
    lines = draw_lines(axes, scores, check_names(labels, sizes["M"]))
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
    figure = empty_figure(0.5 * sizes["m"] + 2.2, 0.5 * sizes["n"] + 1)
    axes = figure.subplots()
    figure.colorbar(axes.imshow(array(cosines), cmap=MAGNITUDE, vmin=0, vmax=1), label="mean |cos|")
    for (i, j), cosine in zip(itertools.product(range(sizes["n"]), range(sizes["m"])), cosines.flatten(), strict=True):
        axes.text(j, i, f"{cosine.item():.2f}", ha="center", va="center", fontsize=7, color=ink(cosine))
    axes.set_xticks(range(sizes["m"]), range(1, sizes["m"] + 1))
    axes.set_yticks(range(sizes["n"]), range(1, sizes["n"] + 1))
    axes.set(xlabel="eigenvector of the second run", ylabel="eigenvector of the first")
    return figure
