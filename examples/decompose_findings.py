"""The measurements of decompose.py as text and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, median
from typing import Any

import findings_page
from decompose_toys import PROBE
from findings_page import Receipt, spread, table

RECEIPT = findings_page.DOCS / "receipts" / "decompose.json"
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's
RECOVERED, OFF = 0.95, 0.1  # the least mean cosine, and how far active components may be from those planted


def text(receipt: Receipt) -> str:
    """Tables and a paragraph, as Markdown; figures are means over seeds with their range."""
    study, target = receipt["study"], receipt["target"]
    versions = ", ".join(f"{name} {version}" for name, version in receipt["versions"].items())
    parts = [
        f"{versions}.",
        "### Planted components",
        f"Components come back where their mean largest cosine is above {RECOVERED} and the mean number of active ones "
        f"is within {OFF:.0%} of that of planted ones. A cosine is that of read directions times that of write "
        "directions, or that of the terms' tensors. In trained models figures are means over both layers, in the "
        "residual MLP the first's, and active components are counted for one feature at a time, of strength "
        f"{PROBE}. The error is that of outputs under the gates at drawn inputs, relative to the target's.",
        table(("target", "seed", "cosine", "active", "planted", "error", "come back"), known(receipt)),
        "### Ways to decompose a SwiGLU layer",
        f"The layer, {study['d']} -> {study['h']} -> {study['d']}, is that of a one-layer transformer on Python's "
        f"documentation: {target['loss']:.2f} nats a word, a Kneser-Ney bigram model's are "
        f"{target['bigram_loss']:.2f}. {study['kept']} units are kept for a word; kept by strength and not trained, "
        f"the layer's own leave an error of {target['strongest']:.3f}. The error to reach is {study['error']}, within "
        f"{study['steps']} steps of {study['batch']} words; it is measured every {study['every']} steps. Learning "
        f"rates {listed(study['rates'])}, chosen for each way on seed {listed(study['tuning'])}. Steps and CPU "
        f"seconds are medians over seeds {listed(study['seeds'])} with their range; a run that misses the error counts "
        "as beyond the budget. Distance is |B - B'|^2 / |B|^2 of the bilinear layers of the same weights, all units "
        "together, at the end.",
        table(("way", "units", "rate", "reached", "steps", "seconds", "error at the end", "distance"), ways(receipt)),
        paragraph(receipt),
    ]
    return "\n\n".join(parts) + "\n"


def listed(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))


def known(receipt: Receipt) -> list[list[str]]:
    """One row a target and seed."""
    rows = []
    for r in receipt["known"]:
        good = r["cosine"] > RECOVERED and abs(r["active"] / r["planted"] - 1) <= OFF
        figures = [f"{r[key]:.3f}" for key in ("cosine", "active", "planted", "error")]
        rows.append([r["target"], str(r["seed"]), *figures, "yes" if good else "no"])
    return rows


def runs(receipt: Receipt, way: str) -> list[dict[str, Any]]:
    return [r for r in receipt["runs"] if r["way"] == way]


def names(receipt: Receipt) -> list[str]:
    return list(dict.fromkeys(r["way"] for r in receipt["runs"]))


def ways(receipt: Receipt) -> list[list[str]]:
    """One row a way."""
    rows = []
    for name in names(receipt):
        found = runs(receipt, name)
        distances = [r["distance"] for r in found if r["distance"] is not None]
        rows.append(
            [
                name,
                str(found[0]["units"]),
                str(found[0]["rate"]),
                f"{len(reached(found))} of {len(found)}",
                censored(found, "step", receipt["study"]["steps"], ".0f"),
                censored(found, "seconds", mean(r["all_seconds"] for r in found), ".1f"),
                spread([r["errors"][-1] for r in found], ".3f"),
                spread(distances, ".3f") if distances else "no weights",
            ]
        )
    return rows


def reached(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [r for r in found if r["step"] is not None]


def censored(found: Sequence[dict[str, Any]], key: str, budget: float, form: str) -> str:
    """Median and range; a run that missed the error is beyond the budget."""
    values = sorted(float("inf") if r[key] is None else r[key] for r in found)

    def shown(value: float) -> str:
        return f"> {budget:{form}}" if value == float("inf") else f"{value:{form}}"

    if values[0] == values[-1]:
        return shown(values[0])
    return f"{shown(median(values))} ({shown(values[0])} to {shown(values[-1])})"


def paragraph(receipt: Receipt) -> str:
    """Which ways reached the error, in what order, and how the others compare with the layer's own units."""
    of = {name: runs(receipt, name) for name in names(receipt)}
    groups: dict[str, list[str]] = {"all seeds": [], "some seeds": [], "no seed": []}
    for name, found in of.items():
        count = len(reached(found))
        groups["all seeds" if count == len(found) else "some seeds" if count else "no seed"].append(name)
    order = sorted(groups["all seeds"], key=lambda name: median(r["step"] for r in of[name]))
    parts = [
        f"The error of {receipt['study']['error']} is reached "
        + "; ".join(
            f"in {which} by {', '.join(order if which == 'all seeds' else named) or 'none'}"
            for which, named in groups.items()
        )
        + (" (in order of their median steps)." if len(order) > 1 else ".")
    ]
    reference = "own x2"
    for name in of:
        if name != reference:
            lower = [a["errors"][-1] < b["errors"][-1] for a, b in zip(of[name], of[reference], strict=True)]
            sooner = [
                (a["step"] or float("inf")) < (b["step"] or float("inf"))
                for a, b in zip(of[name], of[reference], strict=True)
            ]
            parts.append(
                f"{name} ends lower than {reference} in {sum(lower)} of {len(lower)} seeds and is sooner in "
                f"{sum(sooner)}."
            )
    rates = receipt["study"]["rates"]
    at_edge = [name for name in of if of[name][0]["rate"] in (min(rates), max(rates))]
    if len(rates) > 2 and at_edge:
        parts.append(f"The rate of {', '.join(at_edge)} is at an edge of the grid: a wider one might do better.")
    return " ".join(parts)


def plot(receipt: Receipt) -> Any:
    """Error over the steps, the mean over seeds with their range; needs matplotlib."""
    from matplotlib.figure import Figure

    study = receipt["study"]
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    for name, colour in zip(names(receipt), LINES, strict=False):
        curves = list(zip(*(r["errors"] for r in runs(receipt, name)), strict=True))
        steps = [study["every"] * (i + 1) for i in range(len(curves))]
        axes.plot(steps, [mean(c) for c in curves], color=colour, label=name)
        axes.fill_between(steps, [min(c) for c in curves], [max(c) for c in curves], color=colour, alpha=0.2, lw=0)
    axes.axhline(study["error"], color="0.5", linewidth=0.8, linestyle="--")
    axes.set(xlabel="step", ylabel=f"relative squared error, {study['kept']} units kept", yscale="log")
    axes.legend(fontsize=7)
    return figure


def check() -> int:
    """Whether the page holds the text of its receipt; returns the exit status."""
    return findings_page.check("decompose", RECEIPT, text)
