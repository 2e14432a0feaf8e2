"""Train a bilinear transformer on Python's documentation and read its features from its weights ([P] section 5).

    python examples/text.py [--quick] [--seed N]

[P] is Pearce et al., "Bilinear MLPs enable weight-based mechanistic interpretability" (arXiv 2410.08417). Sparse
autoencoders give features of the MLP's input and of its output. An output feature with encoder direction e is the
quadratic form e . y = x^T Q x of the MLP's input, so the matrix Q shows which input features it is made of.
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
from bilinear_ops.analysis import interaction_eigh, layer_weights, truncation_correlation

RANKS = (1, 2, 4, 8)  # numbers of eigenvectors reported
PAIRS = 15  # pairs of input features that explain an output feature
ENOUGH = 30  # a feature's correlation counts if it is active at this many words
STORIES = 3  # number of output features described


class Sizes(NamedTuple):
    """Sizes of the experiment; --quick has smaller ones."""

    documents: int | None
    vocabulary: int
    d: int
    h: int
    context: int
    batch: int
    steps: int
    words: int  # words whose activations are studied, and at most as many held out
    features: int
    active: tuple[int, int]  # active features at a word, of the input and of the output
    sae_steps: int


FULL = Sizes(None, 2048, 256, 1024, 64, 16, 800, 1 << 16, 512, (16, 8), 600)
QUICK = Sizes(40, 256, 32, 64, 32, 8, 60, 1 << 12, 64, (4, 4), 200)


class Activations(NamedTuple):
    """N words, the MLP's inputs x `[N, d]` and outputs y `[N, d]` there; y minus its mean over the training text."""

    words: Tensor
    x: Tensor
    y: Tensor


class Features(NamedTuple):
    """A bilinear MLP with autoencoders of its input and its output."""

    mlp: bo.nn.GatedMLP
    inputs: TopKSAE
    outputs: TopKSAE

    @property
    def layer(self) -> tuple[Tensor, Tensor, bo.Directions]:
        """w, v and c of the layer from the MLP's input to the output features."""
        w, v, p = layer_weights(self.mlp)
        return w, v, bo.Directions(self.outputs.encoder, p)

    @property
    def basis(self) -> Tensor:
        """`[d, F]`: the directions in which input features act."""
        return self.inputs.decoder.t()


class Findings(NamedTuple):
    """Measurements of the paper's claims on held-out text; losses in nats, correlations averaged over features."""

    loss: float
    bigram_loss: float
    truncated: tuple[float, ...]  # correlation of output features with their top eigenvectors, at RANKS
    control: tuple[float, ...]  # the same for random directions
    by_size: float  # correlation of output features with their largest interactions
    by_coactivation: float  # with the largest interactions weighted by co-activation

    @property
    def below_bigram(self) -> float:
        return self.bigram_loss - self.loss

    @property
    def above_control(self) -> float:
        """At rank 2."""
        return self.truncated[RANKS.index(2)] - self.control[RANKS.index(2)]

    @property
    def above_size(self) -> float:
        return self.by_coactivation - self.by_size


def experiment(sizes: Sizes = FULL, seed: int = 0) -> Findings:
    """Train the model and the autoencoders, measure, and print a report."""
    torch.manual_seed(seed)
    text = corpus.load(sizes.vocabulary, sizes.documents)
    print(f"Python's documentation: {len(text.train)} words, and {len(text.test)} in held-out documents")
    bigram_loss = corpus.KneserNey(text.train, sizes.vocabulary).loss(text.test)

    model = text_model.Transformer(sizes.vocabulary, sizes.d, sizes.h)
    print(f"A one-layer transformer, d = {sizes.d}, bilinear MLP of {sizes.h} hidden units: {sizes.steps} steps")
    text_model.train(model, text.train, context=sizes.context, batch=sizes.batch, steps=sizes.steps)
    loss = text_model.mean_loss(model, text.test, sizes.context)
    print(f"  held-out loss {loss:.3f} nats a word; a Kneser-Ney bigram model's {bigram_loss:.3f}")

    train, test = activations(model, text, sizes)
    inputs, outputs = (
        text_sae.train(data, features=sizes.features, active=active, steps=sizes.sae_steps)
        for data, active in zip((train.x, train.y), sizes.active, strict=True)
    )
    features = Features(model.mlp, inputs, outputs)
    active = "{} active at the MLP's input, {} at its output".format(*sizes.active)
    print(f"TopK autoencoders of {sizes.features} features: {active}")
    missed = text_sae.unexplained(inputs, test.x), text_sae.unexplained(outputs, test.y)
    print(f"  held-out variance unexplained: input {missed[0]:.1%}, output {missed[1]:.1%}")

    random = torch.nn.functional.normalize(torch.randn(sizes.features, sizes.d), dim=1)
    truncated = truncation(model.mlp, outputs.encoder, test, sizes.active[1])
    control = truncation(model.mlp, random, test, sizes.active[1])
    print("Correlation of active output features with the top eigenvectors of their interaction matrices")
    print("  rank              " + "".join(f"{rank:>8}" for rank in RANKS))
    print("  output features   " + "".join(f"{r:8.3f}" for r in truncated))
    print("  random directions " + "".join(f"{r:8.3f}" for r in control))

    together = CoActivation(inputs.encode(train.x), outputs.encode(train.y), sizes.features)
    largest, weighted = (strongest(features, weight) for weight in (None, together))
    by_size, by_coactivation = (explained(features, test, top) for top in (largest, weighted))
    print(f"Correlation of active output features with {PAIRS} pairs of input features")
    print(f"  the largest interactions {mean(by_size):.3f}; weighted by co-activation {mean(by_coactivation):.3f}")
    print(f"  all pairs of input features {mean(reconstructed(features, test)):.3f}")
    describe(features, model.embed.weight, text.words, train, weighted, by_coactivation)
    return Findings(loss, bigram_loss, truncated, control, mean(by_size), mean(by_coactivation))


@torch.no_grad()
def activations(model: text_model.Transformer, text: corpus.Corpus, sizes: Sizes) -> tuple[Activations, Activations]:
    """Activations at random passages of the training text and of the held-out text; the model is frozen."""
    model.requires_grad_(False)

    def read(words: Tensor) -> tuple[Tensor, Tensor]:
        passages = words[: len(words) // sizes.context * sizes.context].view(-1, sizes.context)
        chosen = passages[torch.randperm(len(passages))[: sizes.words // sizes.context]]
        x = torch.cat([text_model.norm(model.residual(part)).flatten(0, 1) for part in chosen.split(64)])
        return chosen.flatten(), x

    (train_words, train_x), (test_words, test_x) = read(text.train), read(text.test)
    train_y, test_y = model.mlp(train_x), model.mlp(test_x)
    centre = train_y.mean(0)
    return Activations(train_words, train_x, train_y - centre), Activations(test_words, test_x, test_y - centre)


def truncation(mlp: bo.nn.GatedMLP, directions: Tensor, test: Activations, active: int) -> tuple[float, ...]:
    """Correlation of each direction's activation with its top eigenvectors, at RANKS ([P] section 5)."""
    w, v, p = layer_weights(mlp)
    pairs = interaction_eigh(w, v, bo.Directions(directions, p), max(RANKS))
    codes = text_sae.encode(test.y, directions, active)
    found = truncation_correlation(test.x, pairs, codes.indices, codes.acts)
    by_rank = found.corr[found.count >= ENOUGH].nanmean(0)  # [max(RANKS)]
    return tuple(by_rank[rank - 1].item() for rank in RANKS)


class CoActivation:
    """E[f_i f_j | output feature k is active], `[F, F]` for each k, over the training text."""

    def __init__(self, inputs: Codes, outputs: Codes, features: int):
        self.inputs, self.outputs, self.features = inputs, outputs, features

    def __call__(self, k: int) -> Tensor:
        rows = (self.outputs.indices == k).any(1)
        acts = Codes(self.inputs.indices[rows], self.inputs.acts[rows]).dense(self.features)
        return acts.t() @ acts / max(1, len(acts))


def strongest(features: Features, weight: CoActivation | None) -> bo.TopInteractions:
    """Each output feature's strongest pairs of input features, `[F, PAIRS]`."""
    return bo.interaction_topk(*features.layer, PAIRS, score="pair", weight=weight, basis=features.basis)


def explained(features: Features, test: Activations, top: bo.TopInteractions) -> Tensor:
    """`[F]`: correlation of an output feature's activation with the contributions of its top pairs."""
    acts = features.inputs.encode(test.x).dense(features.basis.shape[1])  # [N, F]
    codes = features.outputs.encode(test.y)
    row = torch.arange(len(acts)).repeat_interleave(codes.indices.shape[1]).unsqueeze(1)
    values, i, j = (t[codes.indices.flatten()] for t in (top.values, top.i, top.j))  # [N a, PAIRS]
    return correlations(codes, (values * acts[row, i] * acts[row, j]).sum(1), len(top.values))


def reconstructed(features: Features, test: Activations) -> Tensor:
    """`[F]`: the same for all pairs: the MLP applied to the autoencoder's reconstruction of x."""
    codes = features.outputs.encode(test.y)
    y = features.mlp(features.inputs(test.x)) @ features.outputs.encoder.t()  # [N, F]
    return correlations(codes, y.gather(1, codes.indices).flatten(), y.shape[1])


def correlations(codes: Codes, estimates: Tensor, features: int) -> Tensor:
    """`[F]`: correlations of active features with estimates `[N a]`; 0 if constant, NaN if active too rarely."""
    feature = codes.indices.flatten()
    count = feature.bincount(minlength=features)

    def average(t: Tensor) -> Tensor:
        return t.new_zeros(features).index_add(0, feature, t) / count

    a, b = (t - average(t)[feature] for t in (codes.acts.flatten().double(), estimates.double()))
    correlation = average(a * b) / (average(a * a) * average(b * b)).sqrt()
    return correlation.nan_to_num(0).where(count >= ENOUGH, torch.nan)


def mean(correlation: Tensor) -> float:
    return correlation.nanmean().item()


def describe(
    features: Features, unembed: Tensor, words: list[str], train: Activations, top: bo.TopInteractions, scores: Tensor
) -> None:
    """Print the output features of highest score, the words that they promote, and their strongest pairs."""
    codes = features.inputs.encode(train.x)

    def name(feature: int) -> str:
        """The two commonest words at which an input feature is most active."""
        peaks = (codes.acts * (codes.indices == feature)).amax(1).topk(50).indices
        found, counts = train.words[peaks].unique(return_counts=True)
        return "/".join(words[n] for n in found[counts.argsort(descending=True, stable=True)[:2]])

    print("Best explained output features: promoted words, and pairs of input features (named by their words)")
    for k in scores.nan_to_num(0).topk(STORIES).indices.tolist():
        promoted = (unembed @ features.outputs.decoder[k]).topk(4).indices
        print(f"  feature {k}: {' '.join(words[n] for n in promoted)}")
        for value, i, j in zip(*(t[k, :3].tolist() for t in (top.values, top.i, top.j)), strict=True):
            print(f"    {value:+.3f}  {name(i)} x {name(j)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes and little training, to see it run")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found = experiment(QUICK if options.quick else FULL, options.seed)
    if options.quick:
        print("This model is too small to show the paper's findings: run without --quick.")
        return
    print(f"Loss below the bigram model's: {found.below_bigram:.3f} nats (expected: at least 0.2)")
    print(f"Rank 2 above random directions: {found.above_control:.3f} (at least 0.15)")
    print(f"Weighted pairs above the largest: {found.above_size:.3f} (more than 0.15)")


if __name__ == "__main__":
    main()
