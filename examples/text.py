"""A bilinear transformer trained on Python's documentation, its features read from its weights: section 5 of [P].

    python examples/text.py [--quick] [--seed N]

[P] is Pearce et al., "Bilinear MLPs enable weight-based mechanistic interpretability" (arXiv 2410.08417). Sparse
autoencoders name features of what the MLP reads and of what it writes. An output feature with encoder direction e is
the quadratic form e . y = x^T Q x of the MLP's input, so its matrix Q says which input features it is made of.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import text_corpus as corpus
import text_model
import text_sae
import torch
from text_sae import Codes, TopKSAE
from torch import Tensor

import bilinear_ops as bo
from bilinear_ops.analysis import interaction_eigh

RANKS = (1, 2, 4, 8)  # of the truncations reported
PAIRS = 15  # of input features, to explain an output feature by
ENOUGH = 30  # held-out tokens on which a feature must be active for its correlation to count


class Sizes(NamedTuple):
    """Everything that --quick makes smaller."""

    documents: int | None
    vocabulary: int
    d: int
    h: int
    context: int
    batch: int
    steps: int
    tokens: int  # whose activations are studied; as many again, at most, are held out
    features: int
    active: int
    sae_steps: int


FULL = Sizes(None, 2048, 256, 1024, 64, 16, 800, 1 << 16, 512, 8, 600)
QUICK = Sizes(40, 256, 32, 64, 32, 8, 60, 1 << 12, 64, 4, 200)


class Activations(NamedTuple):
    """What the MLP reads and writes at N tokens, `[N, d]` both; y less its mean over the training tokens."""

    x: Tensor
    y: Tensor


class Findings(NamedTuple):
    """What the paper's claims come to on held-out text; losses in nats, correlations averaged over features."""

    loss: float
    bigram_loss: float
    truncated: tuple[float, ...]  # output features by their top eigenvectors, at RANKS
    control: tuple[float, ...]  # the same of random directions
    by_size: float  # output features by their largest interactions alone
    by_coactivation: float  # by the largest once weighted by how input features act together

    def report(self) -> str:
        """Each claim with its figures."""
        gain = self.bigram_loss - self.loss
        rank_2 = self.truncated[1] - self.control[1]
        weighting = self.by_coactivation - self.by_size
        return "\n".join(
            (
                f"  {gain:.3f} nats below the bigram model (the claim: at least 0.2)",
                f"  rank 2: {rank_2:.3f} above random directions (at least 0.15)",
                f"  pairs weighted by co-activation: {weighting:.3f} above the largest (more than 0.15)",
            )
        )


def experiment(sizes: Sizes = FULL, seed: int = 0) -> Findings:
    """Train, autoencode and measure, printing what happens."""
    torch.manual_seed(seed)
    text = corpus.load(sizes.vocabulary, sizes.documents)
    print(
        f"Python's documentation: {len(text.train)} words to learn from, {len(text.test)} of other documents held out"
    )
    bigram_loss = corpus.KneserNey(text.train, sizes.vocabulary).loss(text.test)

    model = text_model.Transformer(sizes.vocabulary, sizes.d, sizes.h)
    print(f"A one-layer transformer, d = {sizes.d}, bilinear MLP of {sizes.h} hidden units: {sizes.steps} steps")
    text_model.train(model, text.train, context=sizes.context, batch=sizes.batch, steps=sizes.steps)
    loss = text_model.mean_loss(model, text.test, sizes.context)
    print(f"  held-out loss {loss:.3f} nats a word; a Kneser-Ney bigram model's {bigram_loss:.3f}")

    train, test = activations(model, text, sizes)
    inputs, outputs = autoencoders(train, sizes)
    print(f"TopK autoencoders of the MLP's input and output: {sizes.active} of {sizes.features} features active")
    missed = text_sae.unexplained(inputs, test.x), text_sae.unexplained(outputs, test.y)
    print(f"  held-out variance unexplained: input {missed[0]:.1%}, output {missed[1]:.1%}")

    mlp = model.mlp.requires_grad_(False)
    random = torch.nn.functional.normalize(torch.randn(sizes.features, sizes.d), dim=1)
    truncated = truncation(mlp, outputs.encoder, test, sizes.active)
    control = truncation(mlp, random, test, sizes.active)
    print("Features of the output by the top eigenvectors of their interaction matrices, where they are active:")
    print("  correlation at rank" + "".join(f"{rank:>8}" for rank in RANKS))
    print("  output features    " + "".join(f"{r:8.3f}" for r in truncated))
    print("  random directions  " + "".join(f"{r:8.3f}" for r in control))

    together = CoActivation(inputs.encode(train.x), outputs.encode(train.y), sizes.features)
    by_size, by_coactivation = (
        explained(mlp, inputs, outputs, test, strongest(mlp, inputs, outputs, weight)) for weight in (None, together)
    )
    print(f"Features of the output by {PAIRS} pairs of input features: correlation where they are active")
    print(f"  the largest interactions {by_size:.3f}; weighted by co-activation {by_coactivation:.3f}")
    return Findings(loss, bigram_loss, truncated, control, by_size, by_coactivation)


@torch.no_grad()
def activations(model: text_model.Transformer, text: corpus.Corpus, sizes: Sizes) -> tuple[Activations, Activations]:
    """Of random passages of the training text, and of held-out ones."""

    def inputs(words: Tensor) -> Tensor:
        passages = words[: len(words) // sizes.context * sizes.context].view(-1, sizes.context)
        chosen = passages[torch.randperm(len(passages))[: sizes.tokens // sizes.context]]
        return torch.cat([text_model.norm(model.residual(part)).flatten(0, 1) for part in chosen.split(64)])

    train, test = inputs(text.train), inputs(text.test)
    y = model.mlp(train)
    return Activations(train, y - y.mean(0)), Activations(test, model.mlp(test) - y.mean(0))


def autoencoders(train: Activations, sizes: Sizes) -> tuple[TopKSAE, TopKSAE]:
    """Of the MLP's inputs and of its outputs."""
    options = {"features": sizes.features, "active": sizes.active, "steps": sizes.sae_steps}
    return text_sae.train(train.x, **options), text_sae.train(train.y, **options)


def truncation(mlp: bo.nn.GatedMLP, directions: Tensor, test: Activations, active: int) -> tuple[float, ...]:
    """How well each direction's top eigenvectors alone follow its activation, where it is active ([P] Fig. 9)."""
    pairs = interaction_eigh(mlp.w, mlp.v, bo.Directions(directions, mlp.p), max(RANKS))
    codes = text_sae.encode(test.y, directions, active)
    token = torch.arange(len(test.x)).repeat_interleave(active)
    sums = bo.eigen_form(
        test.x, pairs.values, pairs.vectors, pairs=(token, codes.indices.flatten()), reduce="cumsum"
    )  # [N a, max(RANKS)]
    return tuple(mean_correlation(codes, sums[:, rank - 1], len(directions)) for rank in RANKS)


class CoActivation:
    """E[f_i f_j | output feature k is active], `[F, F]` for each k, over the training tokens."""

    def __init__(self, inputs: Codes, outputs: Codes, features: int):
        self.inputs, self.outputs, self.features = inputs, outputs, features

    def __call__(self, k: int) -> Tensor:
        tokens = (self.outputs.indices == k).any(1)
        acts = Codes(self.inputs.indices[tokens], self.inputs.acts[tokens]).dense(self.features)
        return acts.t() @ acts / max(1, len(acts))


def strongest(
    mlp: bo.nn.GatedMLP, inputs: TopKSAE, outputs: TopKSAE, weight: CoActivation | None
) -> bo.TopInteractions:
    """Each output feature's strongest pairs of input features, `[F, PAIRS]`."""
    c = bo.Directions(outputs.encoder, mlp.p)
    return bo.interaction_topk(mlp.w, mlp.v, c, PAIRS, score="pair", weight=weight, basis=inputs.decoder.t())


def explained(
    mlp: bo.nn.GatedMLP, inputs: TopKSAE, outputs: TopKSAE, test: Activations, top: bo.TopInteractions
) -> float:
    """How well the contributions of an output feature's top pairs follow its activation, where it is active."""
    read, written = inputs.encode(test.x), outputs.encode(test.y)
    c, basis = bo.Directions(outputs.encoder, mlp.p), inputs.decoder.t()
    found = bo.active_interactions(mlp.w, mlp.v, c, basis, read.indices, read.acts, written.indices)
    features = len(inputs.decoder)
    chosen = torch.isin(
        (found.k * features + found.i) * features + found.j, (top.k * features + top.i) * features + top.j
    )
    return mean_correlation(written, (found.values * chosen).sum(2).flatten(), len(outputs.encoder))


def mean_correlation(codes: Codes, estimates: Tensor, features: int) -> float:
    """Mean over features of the correlation of activations with their estimates `[N a]`; 0 where these are constant."""
    feature = codes.indices.flatten()
    count = feature.bincount(minlength=features)

    def mean(t: Tensor) -> Tensor:
        return t.new_zeros(features).index_add(0, feature, t) / count

    a, b = (t - mean(t)[feature] for t in (codes.acts.flatten().double(), estimates.double()))
    correlation = mean(a * b) / (mean(a * a) * mean(b * b)).sqrt()
    return correlation[count >= ENOUGH].nan_to_num(0).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny and untrained: to see it run, not the findings")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    findings = experiment(QUICK if options.quick else FULL, options.seed)
    print("The claims:\n" + findings.report())


if __name__ == "__main__":
    main()
