"""A trained SwiGLU network becomes a bilinear one while it trains on ([P], the appendix on fine-tuning).

    python examples/bilinearise.py [--quick] [--out DIRECTORY]    # train, measure, print the tables
    python examples/bilinearise.py --check                        # is docs/findings.md what its receipt says?

A SwiGLU network is trained, then trained on in three ways over the same batches with the same schedule:

- "continued": as it is;
- "annealed": the slope of swish goes from 1 to 0 over the first 30% of the steps (`nn.anneal_beta`);
- "abrupt": the slope is 0 from the first step on, the control.

The latter two end as bilinear networks (`nn.bilinearise_`). Images and split are those of digits.py, the text is that
of text.py.
"""

from __future__ import annotations

import argparse
import copy
import platform
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import findings_page
import swiglu
import text_corpus
import text_model
import torch
import torch.nn.functional as F
from findings_page import Finding, Receipt, differences, spread, table, verdict, written
from torch import nn

import bilinear_ops as bo
from bilinear_ops.demo import Digits, accuracy, load_digits

RECEIPT = findings_page.DOCS / "receipts" / "bilinearise.json"
DECIMALS = {"images": "+.1%", "text": "+.2%"}  # of a gap, so that both ways differ
WAYS = CONTINUED, ANNEALED, ABRUPT = "continued", "annealed", "abrupt"
CONTEXT, TEXT_BATCH = 64, 16

Fit = Callable[[nn.Module, int, Callable[[int], object]], None]  # a network, steps, what to do before each step


class Images(NamedTuple):
    """How large the study of images is."""

    size: int
    steps: int
    more: int  # steps in each way
    seeds: tuple[int, ...]


class Text(NamedTuple):
    """How large the study of text is."""

    documents: int | None
    vocabulary: int
    d: int
    h: int
    steps: int
    more: int
    seeds: tuple[int, ...]


class Scale(NamedTuple):
    """How large a study is."""

    images: Images
    text: Text


FULL = Scale(Images(64, 500, 500, (0, 1, 2, 3, 4)), Text(None, 512, 64, 256, 400, 300, (0, 1, 2)))
QUICK = Scale(Images(32, 200, 100, (0, 1)), Text(150, 256, 32, 64, 200, 100, (0,)))


def trained_on(network: nn.Module, way: str, fit: Fit, steps: int, seed: int) -> nn.Module:
    """A copy of a SwiGLU network after as many more steps in one of WAYS."""
    network = copy.deepcopy(network).requires_grad_(True)
    if way != CONTINUED:
        bo.nn.swish_(network)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if way == ANNEALED:
            fit(network, steps, lambda done: bo.nn.anneal_beta(network, done, steps))
        else:
            if way == ABRUPT:
                bo.nn.anneal_beta(network, steps, steps)
            fit(network, steps, lambda done: None)
    return network if way == CONTINUED else bo.nn.bilinearise_(network)


def images(scale: Images, data: Digits) -> list[dict[str, Any]]:
    """One record a seed and way, and one of the network before."""

    def fit(network: nn.Module, steps: int, before_step: Callable[[int], object]) -> None:
        swiglu.fit(network, data, steps, before_step)

    @torch.no_grad()
    def measured(network: nn.Module) -> dict[str, float]:
        loss = F.cross_entropy(network(data.test_x), data.test_y).item()
        return {"loss": loss, "accuracy": accuracy(network, data.test_x, data.test_y)}

    def make(seed: int) -> nn.Module:
        return swiglu.train(data, swiglu.Scale(scale.size, (), scale.steps), seed)

    return records("images", scale.seeds, make, fit, scale.more, measured)


def text(scale: Text) -> list[dict[str, Any]]:
    """The same of a language model."""
    corpus = text_corpus.load(scale.vocabulary, scale.documents)
    train = partial(text_model.train, context=CONTEXT, batch=TEXT_BATCH)

    def fit(network: nn.Module, steps: int, before_step: Callable[[int], object]) -> None:
        train(network, corpus.train, steps=steps, before_step=before_step)

    def measured(network: nn.Module) -> dict[str, float]:
        return {"loss": text_model.mean_loss(network, corpus.test, CONTEXT)}

    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = text_model.Transformer(scale.vocabulary, scale.d, scale.h, activation="silu")
        train(model, corpus.train, steps=scale.steps)
        return model

    return records("text", scale.seeds, make, fit, scale.more, measured)


def records(
    task: str,
    seeds: tuple[int, ...],
    make: Callable[[int], nn.Module],
    fit: Fit,
    more: int,
    measured: Callable[[nn.Module], dict[str, float]],
) -> list[dict[str, Any]]:
    found = []
    for seed in seeds:
        network = make(seed)
        networks = {"before": network}
        networks |= {way: trained_on(network, way, fit, more, 1000 + seed) for way in WAYS}
        found += [{"task": task, "seed": seed, "way": way, **measured(n)} for way, n in networks.items()]
        print(f"  {task}, seed {seed}: {[round(r['loss'], 3) for r in found[-4:]]}", file=sys.stderr, flush=True)
    return found


def study(scale: Scale) -> Receipt:
    """The receipt."""
    return {
        "versions": {"bilinear_ops": bo.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "scale": {"images": scale.images._asdict(), "text": scale.text._asdict()},
        "runs": images(scale.images, load_digits()) + text(scale.text),
    }


def values(receipt: Receipt, task: str, way: str, key: str = "loss") -> list[float]:
    """One value a seed."""
    return [r[key] for r in receipt["runs"] if (r["task"], r["way"]) == (task, way)]


def gap(receipt: Receipt, task: str, way: str) -> list[float]:
    """Loss above that of continued training, as a share of it, a seed each."""
    base = values(receipt, task, CONTINUED)
    return [d / b for d, b in zip(differences(values(receipt, task, way), base), base, strict=True)]


def claims(receipt: Receipt) -> list[Finding]:
    """What the runs can say about the appendix."""
    rows = []
    for task in ("images", "text"):
        annealed, abrupt = (gap(receipt, task, way) for way in (ANNEALED, ABRUPT))
        figure = f"{spread(annealed, DECIMALS[task])} annealed, {spread(abrupt, DECIMALS[task])} abrupt"
        where = "appendix on fine-tuning"
        rows += [
            Finding(
                f"A trained SwiGLU becomes bilinear at little cost (read as: 5% of the loss); {task}",
                where,
                figure,
                verdict([g <= 0.05 for g in annealed]),
            ),
            Finding(
                f"Annealing costs less than an abrupt switch; {task}",
                "not in [P]",
                figure,
                verdict([a < b for a, b in zip(annealed, abrupt, strict=True)]),
            ),
        ]
    return rows


def page(receipt: Receipt) -> str:
    """The tables, as Markdown; figures are means over seeds with their range."""
    scale, rows = receipt["scale"], []
    for task in ("images", "text"):
        for way in ("before", *WAYS):
            right = spread(values(receipt, task, way, "accuracy"), ".1%") if task == "images" else ""
            above = spread(gap(receipt, task, way), DECIMALS[task]) if way in (ANNEALED, ABRUPT) else ""
            rows.append((task, way, spread(values(receipt, task, way), ".3f"), right, above))
    of_images, of_text = scale["images"], scale["text"]
    versions = ", ".join(f"{name} {version}" for name, version in receipt["versions"].items())
    seeds = {task: ", ".join(map(str, scale[task]["seeds"])) for task in scale}
    head = (
        f"Images: embedding of size {of_images['size']}, {of_images['steps']} steps, then {of_images['more']} in each "
        f"way; seeds {seeds['images']}. Text: {of_text['vocabulary']} different words, d {of_text['d']}, "
        f"{of_text['h']} hidden units, {of_text['steps']} steps, then {of_text['more']}; seeds {seeds['text']}. "
        f"{versions}."
    )
    measured = table(("task", "way", "held-out loss", "accuracy", "loss above continued"), rows)
    return f"{head}\n\n{table(('claim', 'in [P]', 'here', 'verdict'), claims(receipt))}\n\n{measured}\n"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="A trained SwiGLU network becomes bilinear while it trains on.")
    parser.add_argument("--quick", action="store_true", help="small networks, few seeds: rough figures")
    parser.add_argument("--out", type=Path, default=Path("figures"), help="for the receipt; default: figures")
    parser.add_argument("--check", action="store_true", help="train nothing; compare docs/findings.md with its receipt")
    options = parser.parse_args(arguments)
    if options.check:
        return findings_page.check("bilinearise", RECEIPT, page)
    receipt = study(QUICK if options.quick else FULL)
    print(page(receipt))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "bilinearise.json").write_text(written(receipt), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
