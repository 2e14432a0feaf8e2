"""A small Llama turned bilinear by further training ([P] appendix H), and what its layers' spectra become.

    python examples/llama.py [--quick] [--out DIR]     train, measure, print; needs the extra `transformers`
    python examples/llama.py --check                   compare docs/transformers.md with its receipt

[P] is Pearce et al., "Bilinear MLPs enable weight-based mechanistic interpretability" (arXiv 2410.08417). One trained
model goes on in three ways over the same words: as it is, with the slope of its activation annealed from 1 to 0, and
with the slope set to 0 at once. The annealed one is folded, saved, and loaded again by the library itself.
"""

from __future__ import annotations

import argparse
import copy
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import findings_page
import text_corpus as corpus
import torch
from findings_page import spread, table, written
from torch import Tensor, nn

import bilinear_ops as bo
from bilinear_ops.analysis import effective_rank, hosvd, layer_similarity
from bilinear_ops.integrations.transformers import bilinearise, gated_weights

PAGE, RECEIPT = findings_page.DOCS / "transformers.md", findings_page.DOCS / "receipts" / "llama.json"
LEADING = 8  # output directions whose matrices are decomposed, and eigenvalues counted as leading
RATES, WARM_UP, DECAY, BETAS = (3e-3, 1e-3), 20, 0.1, (0.9, 0.99)  # of the training and of what follows it


class Sizes(NamedTuple):
    """Sizes of the study; --quick has smaller ones."""

    seeds: list[int]
    documents: int | None
    vocabulary: int
    d: int
    h: int
    layers: int
    context: int
    batch: int
    steps: int  # of the training, and again of each way on


FULL = Sizes([0, 1, 2], None, 1024, 64, 256, 2, 64, 8, 300)
QUICK = Sizes([0], 40, 128, 32, 64, 2, 16, 4, 20)


def study(sizes: Sizes) -> dict[str, Any]:
    """The receipt: held-out losses and spectra of every seed."""
    import transformers

    versions = {"transformers": transformers.__version__, "torch": torch.__version__, "bilinear_ops": bo.__version__}
    return {
        "versions": {**versions, "python": platform.python_version()},
        "sizes": sizes._asdict(),
        "models": [one(sizes, seed) for seed in sizes.seeds],
    }


def one(sizes: Sizes, seed: int) -> dict[str, Any]:
    """One model's losses, in nats a word, and the spectra of its layers before and after it was annealed."""
    torch.manual_seed(seed)
    text = corpus.load(sizes.vocabulary, sizes.documents)
    swiglu, bilinear, abrupt = train_all(sizes, text.train, seed)
    words = text.test[: 1 << 16]
    with tempfile.TemporaryDirectory() as folder:
        bilinear.save_pretrained(folder)
        loaded = type(bilinear).from_pretrained(folder)
    random = model_of(sizes)
    found = {
        "seed": seed,
        "loss": {
            name: mean_loss(model, words, sizes)
            for name, model in (("swiglu", swiglu), ("bilinear", bilinear), ("loaded", loaded), ("abrupt", abrupt))
        },
        "spectra": {
            name: [spectrum(model, layer) for layer in range(sizes.layers)]
            for name, model in (("random", random), ("swiglu", swiglu), ("bilinear", bilinear))
        },
        "similarity": [
            layer_similarity(*weights(swiglu, n), *weights(bilinear, n)).item() for n in range(sizes.layers)
        ],
    }
    print(f"seed {seed}: " + ", ".join(f"{name} {loss:.3f}" for name, loss in found["loss"].items()), flush=True)
    return found


def train_all(sizes: Sizes, words: Tensor, seed: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    """A trained SwiGLU model trained on as it is, annealed to a bilinear one, and made bilinear at once."""
    model = model_of(sizes)
    train(model, words, sizes, seed, RATES[0])
    swiglu, annealed, abrupt = model, copy.deepcopy(model), copy.deepcopy(model)
    train(swiglu, words, sizes, seed + 1000, RATES[1])
    annealing, switch = bilinearise(annealed, steps=sizes.steps), bilinearise(abrupt, steps=sizes.steps)
    train(annealed, words, sizes, seed + 1000, RATES[1], annealing)
    train(abrupt, words, sizes, seed + 1000, RATES[1], lambda step: switch(sizes.steps))
    return swiglu, annealing.fold(), switch.fold()


def model_of(sizes: Sizes) -> nn.Module:
    """A random Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    options: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True}
    options |= {"vocab_size": sizes.vocabulary, "hidden_size": sizes.d, "intermediate_size": sizes.h}
    options |= {"num_hidden_layers": sizes.layers, "max_position_embeddings": sizes.context}
    return LlamaForCausalLM(LlamaConfig(**options))


def train(
    model: nn.Module,
    words: Tensor,
    sizes: Sizes,
    seed: int,
    rate: float,
    before_step: Callable[[int], object] = lambda step: None,
) -> None:
    """Train next-word prediction over random passages, the same for the same seed, under a cosine schedule."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=DECAY, betas=BETAS)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARM_UP, 1.0, min(WARM_UP, sizes.steps))
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, sizes.steps - WARM_UP))
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], [WARM_UP])
    window = torch.arange(sizes.context)
    for step in range(sizes.steps):
        before_step(step)
        starts = torch.randint(len(words) - sizes.context, (sizes.batch, 1), generator=generator)
        passages = words[starts + window]
        loss = model(input_ids=passages, labels=passages).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def mean_loss(model: nn.Module, words: Tensor, sizes: Sizes) -> float:
    """Mean negative log likelihood of the words after the first of each passage, in nats."""
    passages = words[: len(words) // sizes.context * sizes.context].view(-1, sizes.context)
    losses = [model(input_ids=b, labels=b).loss.item() * len(b) for b in passages.split(32)]
    return sum(losses) / len(passages)


def weights(model: nn.Module, layer: int) -> tuple[Tensor, ...]:
    """(w, v, p) of a layer, with the norm before it."""
    return gated_weights(model, layer)[:3]


@torch.no_grad()
def spectrum(model: nn.Module, layer: int) -> dict[str, float]:
    """How concentrated a layer's tensor is, read as a bilinear layer.

    Over output directions by its singular values, and within the leading ones by the eigenvalues of their matrices.
    """
    w, v, p = weights(model, layer)
    found = hosvd(w, v, p, min(p.shape))
    values = torch.linalg.eigvalsh(bo.interaction_matrices(w, v, found.U.t()[:LEADING] @ p))
    strengths = values.square().sort(-1, descending=True).values
    return {
        "outputs_rank": effective_rank(found.S).item(),
        "outputs_leading": (found.S[:LEADING].square().sum() / found.S.square().sum()).item(),
        "inputs_rank": effective_rank(values).mean().item(),
        "inputs_leading": (strengths[:, :LEADING].sum(-1) / strengths.sum(-1)).mean().item(),
    }


def text(receipt: dict[str, Any]) -> str:
    """Tables of losses and spectra, as Markdown; figures are means over seeds with their range."""
    sizes, models = receipt["sizes"], receipt["models"]
    versions = ", ".join(f"{name} {version}" for name, version in receipt["versions"].items())
    losses = {name: [m["loss"][name] for m in models] for name in models[0]["loss"]}
    gaps = {name: [b - a for a, b in zip(losses["swiglu"], losses[name], strict=True)] for name in losses}
    ways = {
        "swiglu": "trained on as it is",
        "bilinear": "annealed over the first 30 %, folded",
        "loaded": "the same, saved and loaded by the library",
        "abrupt": "slope 0 from the first step",
    }
    kinds = {"random": "random weights", "swiglu": "SwiGLU, read as bilinear", "bilinear": "annealed"}
    spectra = [
        [kind, str(layer), *(spread([m["spectra"][name][layer][key] for m in models], form) for key, form in COLUMNS)]
        for layer in range(sizes["layers"])
        for name, kind in kinds.items()
    ]
    similarity = [spread([m["similarity"][layer] for m in models], ".2f") for layer in range(sizes["layers"])]
    return "\n\n".join(
        [
            f"A Llama of {sizes['layers']} layers, d {sizes['d']}, h {sizes['h']}, {sizes['vocabulary']} words of "
            f"Python's documentation; {sizes['steps']} steps of {sizes['batch']} x {sizes['context']} words, then as "
            f"many in each way; seeds {', '.join(map(str, sizes['seeds']))}. {versions}.",
            table(
                ("way", "held-out loss, nats a word", "more than trained on"),
                [[way, spread(losses[name], ".3f"), spread(gaps[name], "+.3f")] for name, way in ways.items()],
            ),
            table(("weights", "layer", *(HEADS[key] for key, _ in COLUMNS)), spectra),
            f"Cosine between the layers before and after annealing: {', '.join(similarity)} (layers 0, 1, ...).",
        ]
    )


COLUMNS = (("outputs_rank", ".1f"), ("outputs_leading", ".0%"), ("inputs_rank", ".1f"), ("inputs_leading", ".0%"))
HEADS = {
    "outputs_rank": "effective rank over outputs",
    "outputs_leading": f"of its square in {LEADING} directions",
    "inputs_rank": "effective rank of a direction's matrix",
    "inputs_leading": f"of its square in {LEADING} eigenvalues",
}


def check() -> int:
    """Whether the page holds the text of its receipt; returns the exit status."""
    return findings_page.check("llama", RECEIPT, text, PAGE)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="A small Llama turned bilinear by further training.")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one seed, a few steps: rough figures")
    parser.add_argument("--out", type=Path, default=Path("figures"), help="for the receipt; default: figures")
    parser.add_argument("--check", action="store_true", help="train nothing; compare the page with its receipt")
    options = parser.parse_args(arguments)
    if options.check:
        return check()
    receipt = study(QUICK if options.quick else FULL)
    print(text(receipt))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "llama.json").write_text(written(receipt), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
