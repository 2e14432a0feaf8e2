"""What a bilinear language model has learned, read from its weights: section 5 of [P] on Python's documentation.

    python examples/text.py [--quick] [--out DIRECTORY]    # train, measure, print the findings
    python examples/text.py --check                        # is docs/findings.md what its receipt says?

[P] is Pearce et al., "Bilinear MLPs enable weight-based mechanistic interpretability" (arXiv 2410.08417). The text is
what ships with Python; nothing is downloaded. Sparse autoencoders give features of the MLP's input and of its output.
Beside it stands a circuit that a grammar plants (text_circuit.py). It needs matplotlib for drawing.
"""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path
from typing import Any, NamedTuple

import text_circuit
import text_corpus as corpus
import text_features as measures
import text_findings as findings
import text_model
import text_sae
import torch
import torch.nn.functional as F
from findings_page import written
from text_features import Activations, Features
from torch import Tensor

import bilinear_ops as bo

STORIES, CONTEXTS, PARTNERS = 3, 3, 3  # output features described; contexts and pairs of input features of each


class Scale(NamedTuple):
    """How large a study is."""

    seeds: tuple[int, ...]
    documents: int | None  # at most
    vocabulary: int
    d: int
    h: int
    context: int
    batch: int
    steps: int
    words: int  # whose activations are studied, and at most a quarter as many held out
    features: int
    active: tuple[int, int]  # active features at a word, of the input and of the output
    sae_steps: int


FULL = Scale((0, 1, 2), None, 1024, 192, 768, 64, 16, 800, 1 << 16, 512, (16, 8), 600)
QUICK = Scale((0,), 150, 512, 48, 96, 32, 8, 300, 1 << 13, 192, (8, 4), 200)


class Trained(NamedTuple):
    """What the measurements of one seed read, for the figures."""

    features: Features
    train: Activations
    test: Activations
    pairs: bo.TopInteractions  # weighted by co-activation
    scores: Tensor  # [F]: how well these explain each output feature
    circuit: text_circuit.Model


def measure(text: corpus.Corpus, scale: Scale, seed: int) -> tuple[dict[str, Any], Trained]:
    """Train the model and the autoencoders of one seed and measure everything."""
    torch.manual_seed(seed)
    model = text_model.Transformer(scale.vocabulary, scale.d, scale.h)
    text_model.train(model, text.train, context=scale.context, batch=scale.batch, steps=scale.steps)
    model.requires_grad_(False)
    train, test, centre = measures.activations(model, text, context=scale.context, words=scale.words)
    test = Activations(*(t[: scale.words // 4] for t in test))
    inputs, outputs = (
        text_sae.train(data, features=scale.features, active=active, steps=scale.sae_steps)
        for data, active in zip((train.x, train.y), scale.active, strict=True)
    )
    features = Features(model.mlp, centre, inputs, outputs)
    random = F.normalize(torch.randn(scale.features, scale.d), dim=1)
    forms = {
        "output features": measures.of_directions(model.mlp, outputs.encoder, test),
        "random directions": measures.of_directions(model.mlp, random, test),
        "random matrices": measures.of_random_matrices(scale.features, train, test),
    }
    curves = {name: measures.truncation(form, test, scale.active[1])._asdict() for name, form in forms.items()}
    together = measures.CoActivation(inputs.encode(train.x), outputs.encode(train.y), scale.features)
    largest, weighted = (measures.strongest(features, weight) for weight in (None, together))
    by_size, by_both = (measures.explained(features, test, top) for top in (largest, weighted))
    counted = ~by_both.isnan()
    circuit, planted = text_circuit.run(seed)
    record = {
        "seed": seed,
        "loss": text_model.mean_loss(model, text.test, scale.context),
        "unexplained": [text_sae.unexplained(inputs, test.x), text_sae.unexplained(outputs, test.y)],
        "loss_added": measures.loss_added(model, features, test),
        "truncated": curves,
        "counted": int(counted.sum()),
        "pairs": {
            "largest": by_size.nanmean().item(),
            "weighted": by_both.nanmean().item(),
            "all": measures.reconstructed(features, test).nanmean().item(),
        },
        "plane": {
            name: measures.on_plane(features, top)[counted].mean().item()
            for name, top in (("largest", largest), ("weighted", weighted))
        },
        "circuit": planted,
    }
    found = Trained(features, train, test, weighted, by_both, circuit)
    return record | {"stories": stories(found, model, text.words, scale)}, found


def stories(found: Trained, model: text_model.Transformer, words: list[str], scale: Scale) -> list[dict[str, Any]]:
    """The best explained output features: the words that they promote, their contexts and their strongest pairs."""
    features, train = found.features, found.train
    described = []
    for k in best(found.scores):
        promoted = (model.embed.weight @ features.outputs.decoder[k]).topk(4).indices
        pairs = zip(*(t[k, :PARTNERS].tolist() for t in found.pairs[:1] + found.pairs[2:]), strict=True)
        described.append(
            {
                "feature": k,
                "correlation": found.scores[k].item(),
                "promotes": [words[n] for n in promoted],
                "contexts": measures.contexts(features, train, k, words, scale.context, CONTEXTS),
                "pairs": [
                    [
                        round(value, 3),
                        measures.name(features, train, i, words),
                        measures.name(features, train, j, words),
                    ]
                    for value, i, j in pairs
                ],
            }
        )
    return described


def best(scores: Tensor) -> list[int]:
    """The output features that their pairs explain best."""
    return scores.nan_to_num(0).topk(STORIES).indices.tolist()


def study(scale: Scale) -> tuple[dict[str, Any], Trained, corpus.Corpus]:
    """The receipt, which holds numbers and words only, and of the first seed what the figures show."""
    text = corpus.load(scale.vocabulary, scale.documents)
    records, drawn = [], []
    for seed in scale.seeds:
        record, found = measure(text, scale, seed)
        records.append(record)
        drawn = drawn or [found]
        print(f"  seed {seed}: held-out loss {record['loss']:.3f}", file=sys.stderr, flush=True)
    receipt = {
        "versions": {"bilinear_ops": bo.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "scale": scale._asdict(),
        "text": {
            "train": len(text.train),
            "test": len(text.test),
            "bigram_loss": corpus.KneserNey(text.train, scale.vocabulary).loss(text.test),
        },
        "runs": records,
    }
    return receipt, drawn[0], text


def draw(receipt: dict[str, Any], found: Trained, words: list[str], out: Path) -> list[Path]:
    """Save the figures of the first seed; returns where. Needs matplotlib."""
    curves = receipt["runs"][0]["truncated"]
    figures = {
        kind: bo.plots.truncation(
            torch.tensor([curve[kind] for curve in curves.values()]), labels=list(curves), ylabel="correlation"
        )
        for kind in ("active", "everywhere")
    }
    features, (k, *_) = found.features, best(found.scores)
    values, vectors = measures.ends(features)
    shown = torch.cat([found.pairs.i[k], found.pairs.j[k]]).unique()
    figures["plane"] = bo.plots.eigenplane(
        features.basis[:, shown].t(),
        vectors[k],
        values[k],
        labels=[measures.name(features, found.train, n, words) for n in shown.tolist()],
    )
    figures["circuit"] = text_circuit.plane(found.circuit)
    paths = [out / f"text_{name}.png" for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        figure.savefig(path, dpi=120)
    return paths


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="What a bilinear language model has learned, read from its weights.")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one seed: rough figures")
    parser.add_argument("--out", type=Path, default=Path("figures"), help="for figures and receipt; default: figures")
    parser.add_argument("--check", action="store_true", help="train nothing; compare docs/findings.md with its receipt")
    options = parser.parse_args(arguments)
    if options.check:
        return findings.check()
    receipt, found, text = study(QUICK if options.quick else FULL)
    print(findings.text(receipt))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "text.json").write_text(written(receipt), encoding="utf-8")
    try:
        print(f"\nFigures: {', '.join(map(str, draw(receipt, found, text.words, options.out)))}")
    except ModuleNotFoundError as error:
        print(f"\nNo figures: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
