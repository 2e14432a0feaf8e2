"""Figures show what they are given: their data, scales and marks, read back from the drawing."""

import itertools
import pickle
import sys

import numpy as np
import pytest
import torch

from bilinear_ops import gated_mlp, plots
from bilinear_ops.analysis import explain, interaction_clusters, interaction_eigh
from bilinear_ops.testing import randn

matplotlib = pytest.importorskip("matplotlib")


def curves(axes):
    """The lines of an axes that are not drawn across it, `[M, n]`."""
    return torch.stack([torch.as_tensor(line.get_ydata()) for line in axes.get_lines() if line.get_marker() != "None"])


def levels(axes):
    """The heights of the lines drawn across."""
    return [line.get_ydata()[0] for line in axes.get_lines() if line.get_marker() == "None"]


def names(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_spectrum():
    values = randn(9, 5)
    (axes,) = plots.spectrum(values, labels="abcdefghi").axes
    torch.testing.assert_close(curves(axes), values.sort(dim=1, descending=True).values.double())
    assert axes.get_lines()[1].get_xdata().tolist() == [1, 2, 3, 4, 5]
    assert levels(axes) == [0], "zero is marked"
    assert names(axes) == list("abcdefghi")
    styles = {(line.get_color(), line.get_marker()) for line in axes.get_lines()[1:]}
    assert len(styles) == 9, "every line can be told apart"


def test_eigenvectors():
    vectors, values = randn(3, 2, 12), randn(3, 2)
    grid = plots.eigenvectors(vectors, (3, 4), values=values, labels=["p", "q", "r"]).axes
    assert len(grid) == 6
    for (k, i), axes in zip(itertools.product(range(3), range(2)), grid, strict=True):
        (image,) = axes.get_images()
        torch.testing.assert_close(torch.as_tensor(image.get_array().data), vectors[k, i].view(3, 4).double())
        limit = vectors[k, i].abs().max().item()
        assert image.get_clim() == (-limit, limit), "white is zero, the strongest pixel at an end"
        assert axes.get_title() == f"{values[k, i]:+.2f}"
    assert [axes.get_ylabel() for axes in grid] == ["p", "", "q", "", "r", ""]
    assert grid[0].yaxis.label.get_rotation() == 0, "names of rows lie level"
    red, blue = (image.to_rgba(torch.tensor([[level]]).numpy())[0, 0] for level in image.get_clim())
    assert red[0] > red[2] and blue[2] > blue[0], "positive is blue"
    assert image.to_rgba(torch.zeros(1, 1).numpy())[0, 0].min() > 0.95, "zero is white"


def test_an_eigenvector_of_zeros_has_a_scale():
    (axes,) = plots.eigenvectors(torch.zeros(1, 1, 4), (2, 2)).axes
    assert axes.get_images()[0].get_clim() == (-1, 1)


def test_interactions_show_clusters():
    q = randn(12, 12)
    q = q + q.mT
    groups = interaction_clusters(q, 4)
    order = [i for group in groups for i in group]
    figure = plots.interactions(q, labels=[str(i) for i in range(len(q))], clusters=4)
    axes, _bar = figure.axes
    (image,) = axes.get_images()
    torch.testing.assert_close(torch.as_tensor(image.get_array().data), q[order][:, order].double())
    assert image.get_clim() == (-q.abs().max().item(), q.abs().max().item())
    assert [int(tick.get_text()) for tick in axes.get_yticklabels()] == order
    edges = list(itertools.accumulate(map(len, groups)))[:-1]
    assert [line.get_ydata()[0] for line in axes.get_lines()[::2]] == [edge - 0.5 for edge in edges]
    assert [line.get_xdata()[0] for line in axes.get_lines()[1::2]] == [edge - 0.5 for edge in edges]


def test_interactions_keep_their_order():
    q = randn(50, 50)
    axes, _bar = plots.interactions(q + q.mT, labels=["?"] * 50).axes
    torch.testing.assert_close(torch.as_tensor(axes.get_images()[0].get_array().data), (q + q.mT).double())
    assert not axes.get_lines()
    assert "?" not in [tick.get_text() for tick in axes.get_yticklabels()], "fifty names could not be read"


def test_the_former_name_of_clusters():
    assert plots.cluster is interaction_clusters


def test_truncation():
    scores, full = torch.rand(2, 6), torch.rand(2)
    (axes,) = plots.truncation(scores, labels=["a", "b"], full=full, ylabel="correlation").axes
    torch.testing.assert_close(curves(axes), scores.double())
    assert levels(axes) == full.tolist()
    assert (axes.get_ylabel(), names(axes)) == ("correlation", ["a", "b"])
    colours = [line.get_color() for line in axes.get_lines()]
    assert colours[:2] == colours[2:], "a layer's level has its line's colour"


def test_similarity():
    first, second = randn(4, 3, 7), randn(4, 2, 7)
    axes, _bar = plots.similarity(first, 5 * second).axes
    expected = torch.nn.functional.cosine_similarity(first[:, :, None], second[:, None], dim=3).abs().mean(0)
    (image,) = axes.get_images()
    torch.testing.assert_close(torch.as_tensor(image.get_array().data), expected.double())
    assert image.get_clim() == (0, 1)
    assert [text.get_text() for text in axes.texts] == [f"{c:.2f}" for c in expected.flatten()]
    itself, _bar = plots.similarity(first, -first).axes
    torch.testing.assert_close(torch.as_tensor(itself.get_images()[0].get_array().data).diag(), torch.ones(3).double())


def explained(k=2, d=12):
    w, v, p = randn(9, d), randn(9, d), randn(k, 9)
    return randn(d), interaction_eigh(w, v, p), gated_mlp, (w, v, p)


def test_explanation():
    x, pairs, forward, layer = explained()
    figure = plots.explanation(x, pairs, 3, (3, 4), labels=["p", "q"])
    grid = [figure.axes[i : i + 4] for i in range(0, 12, 4)]
    shown = torch.as_tensor(grid[0][0].get_images()[0].get_array().data)
    torch.testing.assert_close(shown, x.view(3, 4).double())
    assert grid[0][0].get_title() == "input" and not any(axes.axison for axes in grid[0][1:])
    contributions, remainder = explain(x, pairs, 3)
    terms = pairs.values * (pairs.vectors @ x).square()
    logits = forward(x, *layer)
    for k, row in enumerate(grid[1:]):
        assert [axes.get_title() for axes in row[:3]] == [f"{c:+.2f}" for c in contributions[k]]
        for i, axes in enumerate(row[:3]):
            vector = pairs.vectors[k, (terms[k] - contributions[k, i]).abs().argmin()]
            image = torch.as_tensor(axes.get_images()[0].get_array().data)
            torch.testing.assert_close(image, vector.view(3, 4).double())
        heights = torch.tensor([bar.get_height() for bar in row[3].patches])
        expected = torch.cat([contributions[k], remainder[k, None], logits[k, None]])
        torch.testing.assert_close(heights, expected.double(), rtol=1e-4, atol=1e-4)
        assert [tick.get_text() for tick in row[3].get_xticklabels()] == ["1", "2", "3", "rest", "sum"]
        assert row[0].get_ylabel() == "pq"[k]
        colours = [bar.get_facecolor() for bar in row[3].patches[:3]]
        assert [c == colours[0] for c in colours] == [(c > 0) == (contributions[k, 0] > 0) for c in contributions[k]]


def test_an_explanation_of_given_logits():
    x, pairs, *_ = explained()
    logits = randn(2)
    few = pairs._replace(values=pairs.values[:, :4], vectors=pairs.vectors[:, :4])
    axes = plots.explanation(x, few, 2, (3, 4), logits=logits).axes
    sums = torch.tensor([axes[i].patches[-1].get_height() for i in (5, 8)])
    torch.testing.assert_close(sums, logits.double(), rtol=1e-5, atol=1e-5)


def test_eigenplane():
    points, values = randn(5, 7), torch.tensor([2.0, -3.0])
    vectors = torch.linalg.qr(randn(7, 2)).Q.t()
    axes, bar = plots.eigenplane(points, vectors, values, labels=list("abcde")).axes
    places = torch.as_tensor(axes.collections[0].get_offsets().data)
    torch.testing.assert_close(places, (points @ vectors.t()).double())
    assert [text.get_text() for text in axes.texts] == list("abcde")
    assert [text.xy for text in axes.texts] == [tuple(place) for place in places.tolist()]
    (image,) = axes.get_images()
    heights, (left, right, bottom, top) = torch.as_tensor(image.get_array().data), image.get_extent()
    assert image.origin == "lower" and left == bottom == -right == -top and places.abs().max() < right
    torch.testing.assert_close(heights[50, -1], torch.tensor(2 * right**2).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(heights[-1, 50], torch.tensor(-3 * top**2).double(), rtol=1e-6, atol=0)
    assert image.get_clim()[0] == -image.get_clim()[1], "white is zero"
    assert axes.get_xlabel() == "along the eigenvector of +2.00"
    assert axes.get_ylabel() == "along the eigenvector of -3.00" and bar.get_ylabel() == "contribution"
    assert not plots.eigenplane(points[:0], vectors, values).axes[0].texts


def test_scatter():
    x = randn(50)
    y = 0.5 * x + 0.1 * randn(50)
    (axes,) = plots.scatter(x, y, xlabel="feature", ylabel="layer").axes
    torch.testing.assert_close(torch.as_tensor(axes.collections[0].get_offsets().data), torch.stack([x, y], 1).double())
    assert axes.get_title() == f"correlation {torch.corrcoef(torch.stack([x, y]))[0, 1]:.2f}"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("feature", "layer")


def test_distribution():
    values = torch.stack([torch.rand(100), torch.rand(100) / 2])
    values[1, :10] = torch.nan
    (axes,) = plots.distribution(values, labels=["all", "some"], bins=10, xlabel="correlation").axes
    for sample, steps in zip(values, axes.patches, strict=True):
        shares, edges, _ = steps.get_data()
        assert len(shares) == 10
        known = sample[~sample.isnan()]
        expected = [((known >= a) & (known < b)).double().mean() for a, b in itertools.pairwise(edges)]
        expected[-1] += (known == edges[-1]).double().mean()
        torch.testing.assert_close(torch.as_tensor(shares), torch.stack(expected))
        assert (edges[0], edges[-1]) == (values.nan_to_num(1).min(), values.nan_to_num(0).max())
    assert names(axes) == ["all", "some"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("correlation", "share")


@pytest.mark.parametrize("values", [torch.zeros(0), torch.full((3,), torch.nan), torch.ones(4)])
def test_a_distribution_of_little(values):
    (axes,) = plots.distribution(values, bins=3).axes
    assert axes.patches[0].get_data().values.sum() == (1 if values.isfinite().any() else 0)


def test_any_tensor_can_be_drawn():
    values = randn(2, 3, dtype=torch.bfloat16, requires_grad=True)
    (axes,) = plots.spectrum(values).axes
    assert curves(axes).shape == (2, 3) and axes.get_legend() is None


def test_truncation_of_one_layer():
    curve = torch.rand(6)
    (axes,) = plots.truncation(curve, full=torch.tensor(0.5)).axes
    torch.testing.assert_close(curves(axes), curve[None].double())
    assert axes.get_lines()[0].get_xdata().tolist() == [1, 2, 3, 4, 5, 6] and levels(axes) == [0.5]
    assert axes.get_xlabel() == "eigenvectors kept for each output" and axes.get_ylabel() == "accuracy"


@pytest.mark.parametrize("labels", (range(3, 5), [3, 4], torch.tensor([3, 4]), np.array([3, 4]), ["3", 4], (3, 4)))
def test_labels_are_strings_or_integers(labels):
    assert names(plots.spectrum(randn(2, 5), labels=labels).axes[0]) == ["3", "4"]


def test_axes_say_what_they_show():
    (axes,) = plots.spectrum(randn(2, 5)).axes
    assert axes.get_xlabel() == "eigenvector, from the most positive to the most negative"
    assert axes.get_ylabel() == "eigenvalue"
    axes, bar = plots.similarity(randn(4, 3, 7), randn(4, 2, 7)).axes
    assert axes.get_ylabel() == "eigenvector of the first" and axes.get_xlabel() == "eigenvector of the second run"
    assert [[tick.get_text() for tick in ticks] for ticks in (axes.get_yticklabels(), axes.get_xticklabels())] == [
        ["1", "2", "3"],
        ["1", "2"],
    ]
    assert axes.get_yticks().tolist() == [0, 1, 2] and axes.get_xticks().tolist() == [0, 1]
    assert bar.get_ylabel() == "mean |cos|"
    assert [text.get_position() for text in axes.texts[:3]] == [(0, 0), (1, 0), (0, 1)]
    q = torch.arange(9.0).view(3, 3)
    axes, _bar = plots.interactions(q, labels=[7, 8, 9]).axes
    for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [tick.get_text() for tick in ticks] == ["7", "8", "9"]
    assert {tick.get_rotation() for tick in axes.get_xticklabels()} == {90}
    assert axes.get_xticks().tolist() == axes.get_yticks().tolist() == [0, 1, 2]


def test_figures_grow_with_what_they_show():
    """In inches: an image keeps its size, however many there are."""
    vectors, values = randn(3, 2, 12), randn(3, 2)
    for figure, size in (
        (plots.spectrum(values), (6, 3.6)),
        (plots.truncation(values), (6, 3.6)),
        (plots.interactions(randn(3, 3)), (5.6, 4.8)),
        (plots.eigenvectors(vectors, (3, 4)), (2.3, 2.8)),
        (plots.eigenvectors(vectors, (3, 4), values=values), (2.3, 3.4)),
        (plots.similarity(randn(2, 3, 4), randn(2, 5, 4)), (4.7, 2.5)),
    ):
        assert figure.get_size_inches().tolist() == pytest.approx(size)


@pytest.mark.parametrize(("lines", "columns"), ((7, 1), (8, 2), (16, 3)))
def test_a_long_legend_takes_another_column_for_eight_lines(lines, columns):
    (axes,) = plots.spectrum(randn(lines, 5), labels=range(lines)).axes
    assert axes.get_legend()._ncols == columns


def test_images_are_upright():
    """Row 0 above, column 0 at the left: the first of a heat map's pixels, and of an eigenvector's."""
    heat, image, cosines = (
        plots.interactions(randn(3, 3)),
        plots.eigenvectors(randn(1, 1, 12), (3, 4)),
        plots.similarity(randn(2, 3, 4), randn(2, 2, 4)),
    )
    for figure in (heat, image, cosines):
        axes = figure.axes[0]
        (top, bottom), (left, right) = axes.get_ylim()[::-1], axes.get_xlim()
        assert top < bottom and left < right
        assert axes.get_images()[0].origin == "upper"


def test_a_notebook_shows_figures(monkeypatch):
    """Through the hook that notebooks ask for; no figure that others make gets one."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    figure = plots.spectrum(randn(2, 5))
    image = figure._repr_png_()
    assert image.startswith(b"\x89PNG\r\n\x1a\n") and len(image) > 1000
    assert isinstance(figure, matplotlib.figure.Figure)
    assert not hasattr(matplotlib.figure.Figure, "_repr_png_")


def test_formatters_of_notebooks_show_figures():
    formatters = pytest.importorskip("IPython.core.formatters")
    data, _ = formatters.DisplayFormatter().format(plots.spectrum(randn(2, 5)))
    assert data["image/png"].startswith(b"\x89PNG")


def test_figures_are_pickled():
    again = pickle.loads(pickle.dumps(plots.spectrum(randn(2, 5))))
    assert curves(again.axes[0]).shape == (2, 5) and again._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("draw", "error", "message"),
    [
        (lambda: plots.spectrum(randn(3)), RuntimeError, r"values must have shape \[K, n\], got \[3\]"),
        (lambda: plots.spectrum([1.0]), TypeError, "values must be a torch.Tensor, got list"),
        (lambda: plots.spectrum(randn(2, 3), labels=["a"]), ValueError, "labels must be 2 names, got 1"),
        (lambda: plots.spectrum(randn(2, 3), labels=[]), ValueError, "labels must be 2 names, got 0"),
        (lambda: plots.spectrum(randn(2, 3), labels=2), TypeError, "labels must be strings or integers, got int"),
        (
            lambda: plots.spectrum(randn(2, 3), labels=[1.0, 2.0]),
            TypeError,
            "strings or integers, got float",
        ),
        (lambda: plots.spectrum(randn(1, 3), labels=[True]), TypeError, "strings or integers, got bool"),
        (
            lambda: plots.spectrum(randn(1, 3), labels=[None]),
            TypeError,
            "strings or integers, got NoneType",
        ),
        (lambda: plots.truncation(torch.tensor(1.0)), RuntimeError, r"scores must have shape \[M, n\], got \[\]"),
        (lambda: plots.eigenvectors(randn(1, 2, 9), (2, 4)), RuntimeError, r"\[K, n, 8\] for images of 2 x 4, got"),
        (lambda: plots.interactions(randn(3, 4)), RuntimeError, r"q must have shape"),
        (lambda: plots.interactions(randn(3, 3), clusters=4), ValueError, "clusters must be from 1 to 3, got 4"),
        (lambda: plots.truncation(randn(2, 3), full=randn(3)), RuntimeError, r"full must broadcast to \[2\]"),
        (lambda: plots.scatter(randn(3), randn(4)), RuntimeError, r"y must have shape \[N=3\], got \[4\]"),
        (lambda: plots.distribution(randn(2, 3), bins=0), ValueError, "bins must be at least 1, got 0"),
        (lambda: plots.distribution(randn(2, 3), bins=2.0), TypeError, "bins must be an int, got float"),
        (lambda: plots.distribution(randn(3) / 0), ValueError, "values must not be infinite"),
        (lambda: plots.distribution(randn(2, 3), labels="abc"), ValueError, "labels must be 2 names, got 3"),
        (
            lambda: plots.eigenplane(randn(4, 5), randn(3, 5), randn(3)),
            RuntimeError,
            r"vectors must have shape \[2, d\]",
        ),
        (lambda: plots.eigenplane(randn(4, 5), randn(2, 6), randn(2)), RuntimeError, r"points must have shape"),
        (lambda: plots.explanation(randn(6), None, 1, (2, 4)), RuntimeError, r"x must have shape \[8\] for images"),
        (lambda: plots.explanation(randn(6), None, 1, (2, 3)), TypeError, "pairs must be EigenPairs"),
        (lambda: plots.similarity(randn(2, 3, 4), randn(2, 3, 5)), RuntimeError, "second must have shape"),
    ],
)
def test_errors(draw, error, message):
    with pytest.raises(error, match=message):
        draw()


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install matplotlib"):
        plots.spectrum(randn(2, 3))


def test_nothing_global_is_touched(monkeypatch):
    """No figure is registered and no window could open: pyplot is not asked."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    plots.interactions(randn(2, 2), labels=["a", "b"])
