"""What the paper claims of language models, beside what text.py measured: every verdict is computed.

A receipt is what `text.study` returns. Claims that [P] does not make are marked so.
"""

from __future__ import annotations

from statistics import mean
from typing import Any

import text_circuit
from findings_page import Finding, Receipt, differences, spread, verdict

FEATURES, RANDOM, MATRICES = "output features", "random directions", "random matrices"
RANK = 2  # eigenvectors at which features and controls are compared
OURS = "not in [P]"


def values(receipt: Receipt, key: str) -> list[Any]:
    """One value a seed; a key of a nested table has slashes."""
    found = receipt["runs"]
    for part in key.split("/"):
        found = [record[part] for record in found]
    return found


def at_rank(receipt: Receipt, forms: str, inputs: str, rank: int = RANK) -> list[float]:
    """Mean correlation of forms with their first eigenvectors, a seed each; inputs are "active" or "everywhere"."""
    return [curve[rank - 1] for curve in values(receipt, f"truncated/{forms}/{inputs}")]


def ratios(receipt: Receipt, inputs: str, control: str = RANDOM) -> list[float]:
    """Correlation of output features over that of a control, a seed each."""
    pairs = zip(at_rank(receipt, FEATURES, inputs), at_rank(receipt, control, inputs), strict=True)
    return [features / of_control for features, of_control in pairs]


def claims(receipt: Receipt) -> list[Finding]:
    """All that the runs can say about section 5 and its appendices."""
    return [*reconstruction(receipt), *low_rank(receipt), *pairs(receipt), *circuit(receipt)]


def reconstruction(receipt: Receipt) -> list[Finding]:
    """The model and its autoencoders."""
    added = {name: values(receipt, f"loss_added/{name}") for name in receipt["runs"][0]["loss_added"]}
    first, *others = (f"{name} {spread(found, '.1%')}" for name, found in added.items())
    return [
        Finding(
            "Autoencoders keep most of what the MLP does (read as: a tenth of the loss that zeroing it adds)",
            "5.1 and the appendix on autoencoders",
            f"{first}; {'; '.join(others)}",
            verdict([loss <= 0.1 for loss in added["output features"]]),
        )
    ]


def low_rank(receipt: Receipt) -> list[Finding]:
    """Section 5.2."""
    above = values(receipt, f"truncated/{FEATURES}/above")
    rows = [
        Finding(
            "Two eigenvectors give most output features a correlation above .75 where active",
            "5.2, Figure 9",
            f"{spread(above, '.0%')} of features; of {RANDOM} "
            f"{spread(values(receipt, f'truncated/{RANDOM}/above'), '.0%')}",
            verdict([share > 0.5 for share in above]),
        )
    ]
    for inputs, said in (("active", "where active"), ("everywhere", "over all inputs")):
        found = {forms: at_rank(receipt, forms, inputs) for forms in (FEATURES, RANDOM, MATRICES)}
        features, *controls = found.values()
        rows.append(
            Finding(
                f"Two eigenvectors say more of output features than of controls, {said}",
                "5.2 and its appendix",
                "; ".join(f"{forms} {spread(values)}" for forms, values in found.items()),
                "; ".join(
                    f"{forms}: {verdict([a > b for a, b in zip(features, control, strict=True)])}"
                    for forms, control in zip((RANDOM, MATRICES), controls, strict=True)
                ),
            )
        )
    return rows


def pairs(receipt: Receipt) -> list[Finding]:
    """Interactions of input features."""
    largest, weighted, everything = (values(receipt, f"pairs/{name}") for name in ("largest", "weighted", "all"))
    plane = values(receipt, "plane/weighted")
    return [
        Finding(
            "The 15 largest interactions of an output feature explain little of it (read as: a correlation under .5)",
            OURS,
            f"{spread(largest)}; of all interactions {spread(everything)}",
            verdict([found < 0.5 for found in largest]),
        ),
        Finding(
            "Weighted by co-activation, 15 interactions explain more",
            OURS,
            spread(weighted),
            verdict([a > b for a, b in zip(weighted, largest, strict=True)]),
        ),
        Finding(
            "The most positive and the most negative eigenvector show which features interact "
            "(read as: their plane gives the 15 weighted interactions with a cosine of .8)",
            "5.1, Figure 8",
            f"{spread(plane)}; the 15 largest {spread(values(receipt, 'plane/largest'))}",
            verdict([found > 0.8 for found in plane]),
        ),
    ]


def circuit(receipt: Receipt) -> list[Finding]:
    """What the grammar planted."""
    found = values(receipt, "circuit")
    smallest = [min(abs(s) for s in record["strengths"].values()) for record in found]
    count = len(text_circuit.PLANTED)
    positive, negative, third = zip(*(record["eigenvalues"] for record in found), strict=True)
    kept = [record["accuracy"]["two eigenvectors"] for record in found]
    without = [record["accuracy"]["no layer"] for record in found]
    return [
        Finding(
            'Planted: "not" is an AND-gate with each good adjective, of the other sign with each bad one',
            "5.1, Figure 8",
            f"strength at least {spread(smallest, '.1f')}; of the {count} strongest pairs of words "
            f"{spread([record['found'] for record in found], '.1f')} are planted ones",
            verdict([text_circuit.gate(record) and record["found"] == count for record in found]),
        ),
        Finding(
            "Planted: one large positive and one large negative eigenvalue (read as: twice the third's magnitude)",
            "5.1, Figure 8",
            f"{spread(positive, '.1f')}, {spread(negative, '.1f')}, the third {spread([abs(t) for t in third], '.2f')}",
            verdict([text_circuit.two_large(record) for record in found]),
        ),
        Finding(
            "Planted: these two eigenvectors do the layer's work (read as: within a point of it)",
            "5.1",
            f'right after "not" {spread([a["negated"] for a in kept], ".1%")}, without the layer '
            f"{spread([a['negated'] for a in without], '.1%')}; after other adverbs "
            f"{spread([a['plain'] for a in kept], '.1%')}, without {spread([a['plain'] for a in without], '.1%')}",
            verdict(
                [
                    all(record["accuracy"]["the layer"][kind] - two[kind] <= 0.01 for kind in two)
                    for record, two in zip(found, kept, strict=True)
                ]
            ),
        ),
    ]


def expectations(receipt: Receipt) -> list[tuple[str, str, str]]:
    """Figures named before the runs; nothing was changed to meet them."""
    added = values(receipt, "loss_added/output features")
    active = ratios(receipt, "active")
    below = [receipt["text"]["bigram_loss"] - loss for loss in values(receipt, "loss")]
    above_random = differences(at_rank(receipt, FEATURES, "active"), at_rank(receipt, RANDOM, "active"))
    above_largest = differences(values(receipt, "pairs/weighted"), values(receipt, "pairs/largest"))
    planted = [
        text_circuit.gate(record) and text_circuit.two_large(record) and record["found"] == len(text_circuit.PLANTED)
        for record in values(receipt, "circuit")
    ]
    rows = [
        (
            "the reconstruction of the output adds at most a tenth of the loss that zeroing adds",
            spread(added, ".1%"),
            max(added) <= 0.1,
        ),
        (
            "where active, the correlation of features is 1.5 times that of random directions (two eigenvectors)",
            f"{spread(active)} times; over all inputs {spread(ratios(receipt, 'everywhere'))} times",
            mean(active) >= 1.5,
        ),
        ("the same as a difference: at least .15", spread(above_random), mean(above_random) >= 0.15),
        (
            "interactions weighted by co-activation explain more by .15 than the largest",
            spread(above_largest),
            mean(above_largest) > 0.15,
        ),
        ("the model is better than a bigram model by .2 nats", spread(below), mean(below) >= 0.2),
        ("the planted circuit is found in every seed", f"{sum(planted)} of {len(planted)}", all(planted)),
    ]
    return [(expected, found, "yes" if met else "no") for expected, found, met in rows]
