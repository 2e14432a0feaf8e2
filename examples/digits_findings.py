"""The measurements of digits.py as text: claims with their verdicts, expectations, and a table of regularisers.

The page docs/findings.md holds this text between two marks; `check` compares it with its receipt.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

import findings_page
from digits_claims import NOISES, PLAIN, REGULARISED, claims, mask_cost, names, values
from findings_page import Receipt, spread, table

RECEIPT = findings_page.DOCS / "receipts" / "digits.json"


def text(receipt: Receipt) -> str:
    """Tables of all measurements and findings, as Markdown; figures are means over seeds with their range."""
    scale, images = receipt["scale"], receipt["images"]
    versions = ", ".join(f"{name} {version}" for name, version in receipt["versions"].items())
    parts = [
        f"{images['train']} images to train, {images['test']} held out; embedding and layer of size {scale['size']}, "
        f"{scale['steps']} steps; seeds {', '.join(map(str, scale['seeds']))}; {images['edge_pixels']} edge pixels. "
        f"{versions}.",
        "### Claims",
        table(("claim", "in [P]", "here", "verdict"), claims(receipt)),
        "### Expectations set before the runs",
        table(("expected", "found", "met"), expectations(receipt)),
        "### Noise, decay and other regularisers",
        table(
            (
                "training",
                "accuracy",
                "rank, embedded",
                "rank, pixels",
                "pixels of an eigenvector",
                "edge energy",
                "edge masks cost",
            ),
            regularisers(receipt),
        ),
    ]
    return "\n\n".join(parts) + "\n"


def points(found: Sequence[float]) -> str:
    """Mean and range, as percentage points."""
    return spread([100 * share for share in found], ".1f")


def regularisers(receipt: Receipt) -> list[list[str]]:
    """One row each."""
    columns = (
        ("accuracy", ".1%"),
        ("rank_embedded", ".1f"),
        ("rank_pixels", ".1f"),
        ("pixels", ".0f"),
        ("edge_energy", ".3f"),
    )
    return [
        [
            name,
            *(spread(values(receipt, name, key), form) for key, form in columns),
            points(mask_cost(receipt, name, "edge")),
        ]
        for name in names(receipt)
    ]


def expectations(receipt: Receipt) -> list[tuple[str, str, str]]:
    """Figures named before the runs, in single trials with masks of digit 3; nothing was changed to meet them."""
    rows = []
    for of, name in (("", "all digits"), ("_of_3", "masks of 3")):
        plain, regularised = (mask_cost(receipt, setting, "edge", of) for setting in (PLAIN, REGULARISED))
        rates = [values(receipt, PLAIN, f"masks.all{control}.targeted{of}") for control in ("", "_permuted")]
        rows += [
            (
                f"edge masks cost 25 points more than permuted ones without regularisation ({name})",
                f"{points(plain)} points",
                mean(plain) >= 0.25,
            ),
            (f"at most 5 points with it ({name})", f"{points(regularised)} points", mean(regularised) <= 0.05),
            (
                f"targeted rate 4 times the permuted one ({name}, all pixels, no regularisation)",
                " against ".join(spread(rate, ".1%") for rate in rates),
                mean(rates[0]) >= 4 * mean(rates[1]),
            ),
        ]
    losses = [
        a - b[7]
        for a, b in zip(
            values(receipt, REGULARISED, "accuracy"), values(receipt, REGULARISED, "truncated"), strict=True
        )
    ]
    energies = [values(receipt, f"noise {n}, decay 0.0", "edge_energy") for n in NOISES]
    means = [mean(energy) for energy in energies]
    rows += [
        ("8 eigenvectors a class within a point of the whole", f"{points(losses)} points", max(losses) <= 0.01),
        (
            "edge energy falls over noise 0, .15, .4",
            ", ".join(spread(energy, ".3f") for energy in energies),
            means[0] > means[1] > means[2],
        ),
    ]
    return [(expected, found, "yes" if met else "no") for expected, found, met in rows]


def check() -> int:
    """Whether the page holds the text of its receipt; returns the exit status."""
    return findings_page.check("digits", RECEIPT, text)
