"""What a bilinear digit classifier has learned, read from its weights: section 4 of [P] on 8x8 images.

    python examples/digits.py [--quick] [--out DIRECTORY]

[P] is Pearce et al., "Bilinear MLPs enable weight-based mechanistic interpretability" (arXiv 2410.08417). Its MNIST
becomes the 1797 images that ship inside scikit-learn, so that nothing is downloaded and a network trains in seconds.
It needs `pip install "bilinear-ops[demo,plots]"`, the second for drawing only.

Each function below is one measurement; `main` tells the story, and what of it carries over to images this small.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import bilinear_ops as bo
from bilinear_ops.demo import Digits, accuracy, load_digits

STEPS, BATCH, RATE = 1500, 128, 3e-3
NOISE, DECAY = 0.3, 1.0  # of the inputs, and of the weights: the two regularisers
HIDDEN = (64, 256)
SEEDS = 3
QUICK_STEPS, QUICK_SEEDS = 200, 2  # and the first size only
TOP = 8  # eigenvectors that should carry a class
RANKS = 16  # of the truncation curves
MASKS = 10  # for each digit

Network = bo.nn.GatedMLP


def train(
    x: Tensor,
    labels: Callable[[Tensor, Tensor], Tensor],
    classes: int,
    *,
    hidden: int = HIDDEN[0],
    seed: int,
    noise: float = NOISE,
    decay: float = DECAY,
    bias: bool = False,
    steps: int = STEPS,
) -> Network:
    """A bilinear classifier of the images x under Gaussian noise; `labels(rows, noised images)` are its targets."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = Network(x.shape[1], hidden, classes, bias=bias)
        optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            rows = torch.randint(len(x), (BATCH,))
            noised = x[rows] + noise * torch.randn(BATCH, x.shape[1])
            loss = F.cross_entropy(network(noised), labels(rows, noised))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.requires_grad_(False)


def eigenpairs(network: Network, n: int | None = None, which: str = "abs") -> bo.analysis.EigenPairs:
    """Those of the ten classes' interaction matrices."""
    return bo.analysis.interaction_eigh(network.w, network.v, network.p, n, which=which)


class Spectrum(NamedTuple):
    """How concentrated a classifier is, on average over the classes."""

    accuracy: float
    share: float  # of |Q|^2 in the top eigenvalues, in the class where it is least
    rank: float  # (L1/L2)^2 of the eigenvalues
    size: float  # (L1/L2)^2 of the top eigenvectors: pixels they spread over


def spectrum(network: Network, data: Digits) -> Spectrum:
    """Section 4.1 and appendix D: few eigenvectors, and how many pixels each of them takes."""
    values, vectors, *_ = eigenpairs(network)
    energy = values.square()
    return Spectrum(
        accuracy(network, data.test_x, data.test_y),
        (energy[:, :TOP].sum(1) / energy.sum(1)).min().item(),
        bo.analysis.effective_rank(values).mean().item(),
        bo.analysis.effective_rank(vectors[:, :TOP]).mean().item(),
    )


def agreement(first: Network, second: Network, which: str) -> float:
    """Section 4.2: |cos| between the top eigenvectors of two networks, averaged over the classes."""
    a, b = (eigenpairs(network, 1, which).vectors for network in (first, second))
    return F.cosine_similarity(a, b, dim=2).abs().mean().item()


def truncated(network: Network, data: Digits, ranks: int) -> Tensor:
    """Section 4.2: accuracy with 1 to `ranks` eigenvectors of each class `[ranks]`."""
    return bo.analysis.truncation_curve(data.test_x, eigenpairs(network, ranks), data.test_y)


def projected(network: Network, data: Digits, ranks: int) -> Tensor:
    """The baseline for that: accuracy on images reduced to their first 1 to `ranks` principal components `[ranks]`.

    Components of the images as the network takes them, not about their mean, which would be a direction for free.
    """
    components = torch.linalg.svd(data.train_x, full_matrices=False).Vh
    reduced = (data.test_x @ components[:n].t() @ components[:n] for n in range(1, ranks + 1))
    return torch.tensor([accuracy(network, x, data.test_y) for x in reduced])


class Target(NamedTuple):
    """What a network trained to recognise a target, or the target's complement, made of it."""

    target: Tensor  # [64], about the mean image
    vectors: Tensor  # [n, 64]: the strongest eigenvectors for yes against no
    correlation: float  # |that| of the first eigenvector with the target
    ratio: float  # first eigenvalue to the next


def recover_target(data: Digits, *, seed: int, noised_labels: bool = True, steps: int = STEPS) -> Target:
    """Section 4.3: is an image similar to a target, or to its complement about the mean image, or to neither?

    Yes where |target . (x - mean)| is above its median, with x as the network sees it or, without `noised_labels`, as
    it was before the noise. The target is a training image; biases let the network subtract the mean.
    """
    mean = data.train_x.mean(0)
    target = data.train_x[seed] - mean

    def similarity(x: Tensor) -> Tensor:
        return ((x - mean) @ target).abs()

    generator = torch.Generator().manual_seed(seed)
    middle = similarity(data.train_x + NOISE * torch.randn(data.train_x.shape, generator=generator)).median()

    def labels(rows: Tensor, noised: Tensor) -> Tensor:
        return (similarity(noised if noised_labels else data.train_x[rows]) > middle).long()

    network = train(data.train_x, labels, 2, seed=seed, bias=True, steps=steps)
    yes = (network.p[1] - network.p[0])[None]
    values, vectors, *_ = bo.analysis.interaction_eigh(network.w, network.v, yes, 4)
    correlation = torch.corrcoef(torch.stack([vectors[0, 0], target]))[0, 1].abs().item()
    return Target(target, vectors[0], correlation, (values[0, 0] / values[0, 1]).abs().item())


def masks(network: Network, data: Digits) -> tuple[Tensor, Tensor]:
    """Section 4.4: adversarial masks, each of half an image's mean norm.

    Those of ten positive eigenvectors of every digit `[100, 64]`: orthogonal, so the pseudo-inverse gives them back.
    Those of the ten digits' first ones `[10, 64]`, which are not: a mask moves that of its digit and no other.
    """
    vectors = eigenpairs(network, MASKS, "positive").vectors
    found = bo.analysis.adversarial_masks(vectors).flatten(0, 1), bo.analysis.adversarial_masks(vectors[:, 0])
    norm = data.test_x.norm(dim=1).mean() / 2
    within, across = (F.normalize(rows, dim=1) * norm for rows in found)
    return within, across


class Fooled(NamedTuple):
    """Shares of the test images, on average over masks, that a mask turns wrong or leaves so."""

    either: float  # added or subtracted, whichever works
    permuted: float  # the same of masks with their pixels permuted
    once: float  # added alone, or subtracted alone, on average
    permuted_once: float


def fool(network: Network, data: Digits, masks: Tensor, *, seed: int) -> Fooled:
    """Section 4.4: a step along an eigenvector, against one as long with the same pixels in another order."""

    def wrong(masks: Tensor) -> Tensor:
        return network(data.test_x[:, None] + masks).argmax(2) != data.test_y[:, None]  # [N, M]

    order = torch.rand(masks.shape, generator=torch.Generator().manual_seed(seed)).argsort(1)
    shares = []
    for shown in (masks, masks.gather(1, order)):
        added, subtracted = wrong(shown), wrong(-shown)
        shares.append((added | subtracted, torch.stack([added, subtracted])))
    (either, once), (permuted, permuted_once) = shares
    return Fooled(*(share.float().mean().item() for share in (either, permuted, once, permuted_once)))


class Run(NamedTuple):
    """Everything measured on the networks of one size and one seed."""

    network: Network  # trained with both regularisers, as all that follows but `spectra`
    spectra: dict[tuple[float, float], Spectrum]  # by noise and decay
    truncated: Tensor
    projected: Tensor
    fooled: tuple[Fooled, Fooled]  # by masks of one digit's eigenvectors, and of all digits' first ones


def measure(data: Digits, hidden: int, seed: int, steps: int) -> Run:
    """Train with and without each regulariser, and measure."""

    def labels(rows: Tensor, _: Tensor) -> Tensor:
        return data.train_y[rows]

    networks = {
        (noise, decay): train(data.train_x, labels, 10, hidden=hidden, seed=seed, noise=noise, decay=decay, steps=steps)
        for noise, decay in itertools.product((NOISE, 0.0), (DECAY, 0.0))
    }
    network = networks[NOISE, DECAY]
    return Run(
        network,
        {setting: spectrum(trained, data) for setting, trained in networks.items()},
        truncated(network, data, RANKS),
        projected(network, data, RANKS),
        tuple(fool(network, data, rows, seed=seed) for rows in masks(network, data)),  # type: ignore[arg-type]
    )


class Study(NamedTuple):
    """All measurements: what the tests hold to the paper."""

    runs: dict[int, list[Run]]  # by size, one for each seed
    targets: list[Target]  # one for each seed
    clean_targets: list[Target]  # those of labels from before the noise


def study(data: Digits, sizes: Iterable[int], seeds: int, steps: int) -> Study:
    """Train and measure networks of these sizes, each from that many seeds."""
    runs = {hidden: [measure(data, hidden, seed, steps) for seed in range(seeds)] for hidden in sizes}
    targets, clean = (
        [recover_target(data, seed=seed, noised_labels=noised, steps=steps) for seed in range(seeds)]
        for noised in (True, False)
    )
    return Study(runs, targets, clean)


def spread(values: Iterable[float], form: str = ".2f") -> str:
    """Mean and range over the seeds."""
    found = list(values)
    return f"{sum(found) / len(found):{form}} ({min(found):{form}} to {max(found):{form}})"


def tell(found: Study) -> None:
    """Print the figures, as means over the seeds and where it matters their range."""
    print("\nRegularisation ([P] 4.1, appendix D): what input noise and weight decay do to the spectrum")
    print(f"  hidden  noise  decay  accuracy  |Q|^2 in top {TOP}  effective rank  pixels of a top eigenvector")
    for hidden, runs in found.runs.items():
        for noise, decay in runs[0].spectra:
            means = torch.tensor([run.spectra[noise, decay] for run in runs]).mean(0).tolist()
            columns = "{:9.1%} {:15.1%} {:15.1f} {:29.1f}".format(*means)
            print(f"  {hidden:<7} {noise:<6} {decay:<5}{columns}")
    print("  Decay lowers the rank. Noise makes eigenvectors sparser and raises the rank, as [P] finds in appendix D.")

    print("\nTruncation ([P] 4.2): test accuracy, with the whole layer and with what 8 directions leave of it")
    for hidden, runs in found.runs.items():
        whole = spread((run.spectra[NOISE, DECAY].accuracy for run in runs), ".1%")
        kept = spread((run.truncated[TOP - 1].item() for run in runs), ".1%")
        baseline = spread((run.projected[TOP - 1].item() for run in runs), ".1%")
        print(f"  {hidden} hidden: {whole}; {TOP} eigenvectors a class {kept}; {TOP} principal components {baseline}")

    print("  The components are the training images'; the eigenvectors come from the weights alone.")

    print("\nConsistency ([P] 4.2): |cos| of the classes' top eigenvectors between networks")
    for which, name in (("positive", "largest eigenvalue"), ("abs", "largest |eigenvalue|")):
        for hidden, runs in found.runs.items():
            pairs = itertools.combinations((run.network for run in runs), 2)
            print(f"  {name}, two seeds of {hidden} hidden: {spread(agreement(a, b, which) for a, b in pairs)}")
        for (small, first), (large, second) in itertools.pairwise(found.runs.items()):
            both = zip((run.network for run in first), (run.network for run in second), strict=True)
            print(f"  {name}, {small} and {large} hidden: {spread(agreement(a, b, which) for a, b in both)}")
    print("  By magnitude they agree less: a class's strongest positive and negative eigenvalues are close rivals.")

    print("\nGround truth ([P] 4.3): a network asked whether an image resembles a target or its complement, or neither")
    for name, targets in (("the image it sees", found.targets), ("the image before noise", found.clean_targets)):
        correlation = spread((target.correlation for target in targets), ".3f")
        ratio = spread((target.ratio for target in targets), ".1f")
        print(f"  labels from {name}: first eigenvector's correlation with the target {correlation},")
        print(f"    its eigenvalue over the next {ratio}")

    print("\nAdversarial masks ([P] 4.4): test images turned wrong by a step along an eigenvector, half an image long")
    for hidden, runs in found.runs.items():
        for kind, name in enumerate((f"a digit's {MASKS} eigenvectors", "the digits' first eigenvectors")):
            print(f"  {hidden} hidden, {name}, and the same with pixels permuted:")
            either, permuted, once, permuted_once = zip(*(run.fooled[kind] for run in runs), strict=True)
            print(f"    added or subtracted, whichever works: {spread(either, '.1%')}; {spread(permuted, '.1%')}")
            print(f"    added alone or subtracted alone: {spread(once, '.1%')}; {spread(permuted_once, '.1%')}")


def draw(found: Study, data: Digits, out: Path) -> list[Path]:
    """Save the figures; returns where. Needs matplotlib."""
    digits = [str(digit) for digit in range(10)]
    runs = {f"{hidden} hidden": runs[0] for hidden, runs in found.runs.items()}
    network = next(iter(runs.values())).network
    values, vectors, *_ = eigenpairs(network)
    positive = eigenpairs(network, 3, "positive")
    pairs = itertools.combinations([eigenpairs(run.network, 4, "positive").vectors for run in found.runs[HIDDEN[0]]], 2)
    first, second = map(torch.cat, zip(*pairs, strict=True))
    curves = torch.stack([curve for run in runs.values() for curve in (run.truncated, run.projected)])
    labels = [f"{name}: {what}" for name in runs for what in ("eigenvectors", "principal components")]
    target = torch.stack([found.targets[0].target, *found.targets[0].vectors])[None]
    figures = {
        "spectrum": bo.plots.spectrum(values, labels=digits),
        "eigenvectors": bo.plots.eigenvectors(positive.vectors, (8, 8), values=positive.values, labels=digits),
        "truncation": bo.plots.truncation(curves, labels=labels),
        "similarity": bo.plots.similarity(first, second),
        "target": bo.plots.eigenvectors(target, (8, 8), labels=["target, then eigenvectors"]),
        "masks": bo.plots.eigenvectors(masks(network, data)[1][None], (8, 8), labels=["masks"]),
    }
    paths = [out / f"digits_{name}.png" for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        figure.savefig(path, dpi=120)
    return paths


def main(arguments: list[str] | None = None) -> Study:
    """The command line; returns what was measured."""
    parser = argparse.ArgumentParser(description="What a bilinear digit classifier has learned, read from its weights.")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter trainings: seconds, rougher figures")
    parser.add_argument("--out", type=Path, default=Path("figures"), help="where figures are saved; default: figures")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    sizes, seeds, steps = (HIDDEN[:1], QUICK_SEEDS, QUICK_STEPS) if options.quick else (HIDDEN, SEEDS, STEPS)

    data = load_digits()
    print(
        f"Training {4 * seeds * len(sizes) + 2 * seeds} networks for {steps} steps each, {seeds} seeds of every kind."
    )
    found = study(data, sizes, seeds, steps)
    tell(found)
    try:
        paths = draw(found, data, options.out)
    except ModuleNotFoundError as error:
        print(f"\nNo figures: {error}")
    else:
        print(f"\nFigures: {', '.join(map(str, paths))}")
    return found


if __name__ == "__main__":
    main()
