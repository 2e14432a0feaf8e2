"""What the paper claims of image classifiers, beside what digits.py measured: every verdict is computed.

A receipt is what `digits.study` returns; a regulariser is named there by a text.
"""

from __future__ import annotations

from statistics import mean
from typing import Any

from findings_page import Finding, Receipt, differences, spread, verdict

PLAIN, LIGHT, REGULARISED = "noise 0.0, decay 0.0", "noise 0.15, decay 0.0", "noise 0.4, decay 1.0"
NOISES, DECAYS = ("0.0", "0.15", "0.4"), ("0.0", "1.0")
NOISE = "noise 0.4, decay 0.0"


def values(receipt: Receipt, regulariser: str, key: str, *, size: int | None = None) -> list[Any]:
    """One value a seed; a key of a nested table has dots."""
    size = size or receipt["scale"]["size"]
    found = [r for r in receipt["networks"] if (r["regulariser"], r["size"]) == (regulariser, size)]
    for part in key.split("."):
        found = [record[part] for record in found]
    return found


def mask_cost(receipt: Receipt, regulariser: str, pixels: str, of: str = "") -> list[float]:
    """Accuracy under permuted masks less accuracy under masks, a seed each."""
    accuracies = (
        values(receipt, regulariser, f"masks.{pixels}{control}.accuracy{of}") for control in ("_permuted", "")
    )
    return differences(*accuracies)


def cosines(receipt: Receipt, first: int, second: int, which: str) -> list[float]:
    """Of the top eigenvectors of all pairs of networks of two sizes."""
    pairs = receipt["consistency"]
    return [pair["cosine"] for pair in pairs if pair["sizes"] == [first, second] and pair["which"] == which]


def names(receipt: Receipt) -> list[str]:
    """The regularisers of the base size, in order."""
    return list(dict.fromkeys(r["regulariser"] for r in receipt["networks"] if r["size"] == receipt["scale"]["size"]))


def claims(receipt: Receipt) -> list[Finding]:
    """All that the runs can say about section 4 and its appendices."""
    return [
        *spectra(receipt),
        *truncation(receipt),
        *consistency(receipt),
        *target(receipt),
        *masks(receipt),
        *others(receipt),
    ]


def spectra(receipt: Receipt) -> list[Finding]:
    """Section 4.1 and the appendix on sparsity."""
    by_noise = {
        key: {d: [values(receipt, f"noise {n}, decay {d}", key) for n in NOISES] for d in DECAYS}
        for key in ("rank_embedded", "rank_pixels", "pixels", "edge_energy")
    }

    def over_noise(key: str, form: str) -> str:
        return "; ".join(
            f"decay {d}: {', '.join(f'{mean(case):{form}}' for case in found)}" for d, found in by_noise[key].items()
        )

    def cases(key: str) -> list[tuple[float, ...]]:
        return [case for d in DECAYS for case in zip(*by_noise[key][d], strict=True)]

    size = receipt["scale"]["size"]
    ranks = values(receipt, REGULARISED, "rank_embedded")
    pixel_ranks = values(receipt, REGULARISED, "rank_pixels")
    decays = [
        with_decay < without
        for n in NOISES
        for without, with_decay in zip(
            *(values(receipt, f"noise {n}, decay {d}", "rank_embedded") for d in DECAYS), strict=True
        )
    ]
    by_decay = differences(*(values(receipt, f"noise 0.0, decay {d}", "pixels") for d in DECAYS))
    by_input = differences(values(receipt, PLAIN, "pixels"), values(receipt, NOISE, "pixels"))
    both = "seeds and decays"
    return [
        Finding(
            "Few eigenvalues are not negligible (read as: effective rank under a tenth of the size)",
            "4.1, Figure 3",
            f"{spread(ranks, '.1f')} embedded, {spread(pixel_ranks, '.1f')} in pixels, size {size}",
            verdict([rank < size / 10 for rank in ranks])
            + " embedded, "
            + verdict([rank < size / 10 for rank in pixel_ranks])
            + " in pixels",
        ),
        Finding(
            "Without noise, eigenvectors lie on outlying pixels; noise removes this: edge energy falls",
            "4.1, Figure 4",
            f"edge energy at noise {', '.join(NOISES)}: {over_noise('edge_energy', '.3f')}",
            verdict([none > light > most for none, light, most in cases("edge_energy")], both),
        ),
        Finding(
            "More noise gives a spectrum of lower rank; the appendix on sparsity says that it gives more eigenvectors",
            "4.1 against the appendix",
            f"embedded: {over_noise('rank_embedded', '.1f')}; in pixels: {over_noise('rank_pixels', '.1f')}",
            f"4.1: {verdict([most < none for none, _, most in cases('rank_embedded')], both)}; "
            f"appendix: {verdict([most > none for none, _, most in cases('rank_embedded')], both)}",
        ),
        Finding(
            "Weight decay lowers the rank",
            "appendix on sparsity",
            "; ".join(
                f"noise {n}: {mean(values(receipt, f'noise {n}, decay 0.0', 'rank_embedded')):.1f} to "
                f"{mean(values(receipt, f'noise {n}, decay 1.0', 'rank_embedded')):.1f}"
                for n in NOISES
            )
            + " embedded",
            verdict(decays, "seeds and noises"),
        ),
        Finding(
            "Noise makes eigenvectors sparser in pixels, and decay does less (read as: noise 0.4 against decay 1)",
            "appendix on sparsity",
            f"pixels of an eigenvector at noise {', '.join(NOISES)}: {over_noise('pixels', '.0f')}",
            verdict([noise > 0 and noise > abs(decay) for noise, decay in zip(by_input, by_decay, strict=True)]),
        ),
    ]


def truncation(receipt: Receipt) -> list[Finding]:
    """Section 4.2 and the appendix on HOSVD."""
    rows = []
    for name in (REGULARISED, PLAIN):
        whole, curve = values(receipt, name, "accuracy"), values(receipt, name, "truncated")
        kept = [accuracies[7] for accuracies in curve]
        rows.append(
            Finding(
                f"A handful of eigenvectors a class keeps the accuracy (read as: 8 within a point); {name}",
                "4.2, Figure 5B",
                f"whole {spread(whole, '.1%')}, 8 eigenvectors {spread(kept, '.1%')}, "
                f"1 {mean(c[0] for c in curve):.1%}, 4 {mean(c[3] for c in curve):.1%}",
                verdict([loss <= 0.01 for loss in differences(whole, kept)]),
            )
        )
    few, many = (values(receipt, REGULARISED, f"components.{n}") for n in (8, 80))
    kept = [accuracies[7] for accuracies in values(receipt, REGULARISED, "truncated")]
    rows.append(
        Finding(
            "8 eigenvectors a class keep more than 8 principal components of the images; they are 80 directions in all",
            "not in [P]",
            f"8 components {spread(few, '.1%')}, 80 components {spread(many, '.1%')}",
            f"above 8: {verdict([a > b for a, b in zip(kept, few, strict=True)])}; "
            f"above 80: {verdict([a > b for a, b in zip(kept, many, strict=True)])}",
        )
    )
    directions = values(receipt, REGULARISED, "shared_direction")
    rows.append(
        Finding(
            "The first output direction of HOSVD parts 1, 4 and 7 from 5",
            "appendix on HOSVD, Figure 17",
            f"its share of the tensor's squared norm {spread(values(receipt, REGULARISED, 'shared_share'), '.2f')}",
            verdict([all(u[digit] * u[5] < 0 for digit in (1, 4, 7)) for u in directions]),
        )
    )
    return rows


def consistency(receipt: Receipt) -> list[Finding]:
    """Section 4.2."""
    base = receipt["scale"]["size"]
    sizes = sorted([base, *receipt["scale"]["other_sizes"]])
    same = {size: cosines(receipt, size, size, "positive") for size in sizes}
    by_magnitude = [mean(cosines(receipt, size, size, "abs")) for size in sizes]
    means = [mean(found) for found in same.values()]
    across = [cosines(receipt, *sorted((base, size)), "positive") for size in sizes if size != base]
    return [
        Finding(
            "Top eigenvectors of two runs have |cos| between .8 and .9, by size (read as: at least .8)",
            "4.2, Figure 5A",
            "; ".join(f"size {size}: {spread(found)}" for size, found in same.items())
            + f"; by |eigenvalue| {', '.join(f'{found:.2f}' for found in by_magnitude)}",
            verdict([found >= 0.8 for found in means], "sizes"),
        ),
        Finding(
            "Larger networks are more alike",
            "4.2, Figure 5A",
            f"sizes {', '.join(map(str, sizes))}: {', '.join(f'{found:.3f}' for found in means)}",
            verdict([a < b for a, b in zip(means, means[1:], strict=False)], "steps in size"),
        ),
        Finding(
            "Networks of different sizes have similar top eigenvectors (read as: |cos| at least .8)",
            "appendix on truncation, Figure 20",
            "; ".join(
                f"{base} and {size}: {spread(found)}"
                for size, found in zip((size for size in sizes if size != base), across, strict=True)
            ),
            verdict([mean(found) >= 0.8 for found in across], "sizes"),
        ),
    ]


def target(receipt: Receipt) -> list[Finding]:
    """Section 4.3."""

    def of(bias: bool, key: str) -> list[float]:
        return [record[key] for record in receipt["targets"] if record["bias"] == bias]

    with_bias, without = of(True, "accuracy"), of(False, "accuracy")
    ratios, correlations, alone = of(True, "ratio"), of(True, "correlation"), of(True, "first_alone")
    return [
        Finding(
            "One high positive eigenvalue, the rest near zero (read as: twice the next largest magnitude)",
            "4.3, Figure 6",
            f"ratio {spread(ratios, '.1f')}; without biases {spread(of(False, 'ratio'), '.1f')}",
            verdict([ratio > 2 for ratio in ratios]),
        ),
        Finding(
            "The most positive eigenvector is the target (read as: a correlation of .8)",
            "4.3, Figure 6",
            f"correlation {spread(correlations)}; without biases {spread(of(False, 'correlation'))}",
            verdict([found > 0.8 for found in correlations]),
        ),
        Finding(
            "The task benefits greatly from biases (read as: by a point)",
            "4.3",
            f"accuracy {spread(with_bias, '.1%')} with, {spread(without, '.1%')} without",
            verdict([gain > 0.01 for gain in differences(with_bias, without)]),
        ),
        Finding(
            "The most positive eigenvector alone is sufficient (read as: within a point)",
            "4.3",
            f"{spread(alone, '.1%')} by its activation's median",
            verdict([loss <= 0.01 for loss in differences(with_bias, alone)]),
        ),
    ]


def masks(receipt: Receipt) -> list[Finding]:
    """Section 4.4; masks half an image long."""
    rows = []
    cases = (
        (
            "Masks lower the accuracy more than permuted ones, and steer towards their digit, despite noise 0.15",
            "A",
            LIGHT,
            "all",
        ),
        ("The same, for masks on the edge alone, without regularisation", "B", PLAIN, "edge"),
    )
    for claim, panel, name, pixels in cases:
        found = {
            key: [values(receipt, name, f"masks.{pixels}{control}.{key}") for control in ("", "_permuted")]
            for key in ("accuracy", "targeted", "accuracy_of_3", "targeted_of_3")
        }
        lower = [d < 0 for d in differences(*found["accuracy"])]
        steers = [d > 0 for d in differences(*found["targeted"])]
        of_3 = ", ".join(
            f"{mean(found[key][0]):.1%} against {mean(found[key][1]):.1%}" for key in ("accuracy_of_3", "targeted_of_3")
        )
        shown = [
            f"{spread(found[key][0], '.1%')} against {spread(found[key][1], '.1%')}" for key in ("accuracy", "targeted")
        ]
        rows.append(
            Finding(
                claim,
                f"4.4, Figure 7{panel}",
                f"accuracy {shown[0]}; taken for the mask's digit {shown[1]}; masks of 3 alone {of_3}",
                verdict([a and b for a, b in zip(lower, steers, strict=True)]),
            )
        )
    costs = {name: mask_cost(receipt, name, "edge") for name in (PLAIN, LIGHT, NOISE, REGULARISED)}
    rows.append(
        Finding(
            "Masks on the edge exploit overfitting: noise takes their effect away",
            "4.4",
            "points more than permuted: "
            + "; ".join(f"{name}: {spread([100 * c for c in found], '.1f')}" for name, found in costs.items()),
            verdict([a > b > c for a, b, c in zip(costs[PLAIN], costs[LIGHT], costs[NOISE], strict=True)]),
        )
    )
    return rows


def others(receipt: Receipt) -> list[Finding]:
    """The appendix on regularisation and augmentation, all without decay."""
    energy = {name: values(receipt, name, "edge_energy") for name in names(receipt)}
    accuracy = {name: values(receipt, name, "accuracy") for name in names(receipt)}
    where = "appendix on regularisation"
    rest = [name for name in energy if not name.startswith("noise")]
    best = min(rest, key=lambda name: mean(energy[name]))

    def unmoved(name: str) -> str:
        return verdict([0.9 < a / b < 1.1 for a, b in zip(energy[name], energy[PLAIN], strict=True)])

    def lower(name: str) -> str:
        return verdict([a < b for a, b in zip(accuracy[name], accuracy[NOISE], strict=True)])

    dropout, latent, salt, perlin, translation = (
        next(name for name in rest if name.startswith(start))
        for start in ("dropout", "latent", "salt", "Perlin", "translation")
    )
    ranks = [values(receipt, name, "rank_embedded") for name in (translation, PLAIN)]
    return [
        Finding(
            "Of all regularisers, input noise changes features most (read as: the lowest edge energy)",
            where,
            f"{spread(energy[NOISE], '.3f')}; of the others {best} {spread(energy[best], '.3f')}",
            verdict(
                [
                    noise < min(others)
                    for noise, *others in zip(energy[NOISE], *(energy[name] for name in rest), strict=True)
                ]
            ),
        ),
        Finding(
            "Salt and pepper costs accuracy against Gaussian noise; so does Perlin noise, and does not fix overfitting",
            where,
            f"{spread(accuracy[salt], '.1%')} and {spread(accuracy[perlin], '.1%')} against "
            f"{spread(accuracy[NOISE], '.1%')}; edge energy of Perlin noise {spread(energy[perlin])}",
            f"salt and pepper: {lower(salt)}; Perlin noise: {lower(perlin)}",
        ),
        Finding(
            "Dropout and noise on the embedded image have no effect (read as: edge energy within a tenth of none)",
            where,
            f"{spread(energy[dropout])} and {spread(energy[latent])} against {spread(energy[PLAIN])}",
            f"dropout: {unmoved(dropout)}; latent noise: {unmoved(latent)}",
        ),
        Finding(
            "Translation results in a higher rank",
            where,
            f"{spread(ranks[0], '.1f')} against {spread(ranks[1], '.1f')}, embedded",
            verdict([a > b for a, b in zip(*ranks, strict=True)]),
        ),
    ]
