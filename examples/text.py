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
from bilinear_ops.analysis import interaction_eigh, truncation_correlation

RANKS = (1, 2, 4, 8)  # of the truncations reported
PAIRS = 15  # of input features, to explain an output feature by
ENOUGH = 30  # words at which a feature must be active for its correlation to count
STORIES = 3  # output features described


class Sizes(NamedTuple):
    """Everything that --quick makes smaller."""

    documents: int | None
    vocabulary: int
    d: int
    h: int
    context: int
    batch: int
    steps: int
    words: int  # whose activations are studied; as many again, at most, are held out
    features: int
    active: tuple[int, int]  # features at a word, of the input and of the output
    sae_steps: int


FULL = Sizes(None, 2048, 256, 1024, 64, 16, 800, 1 << 16, 512, (16, 8), 600)
QUICK = Sizes(40, 256, 32, 64, 32, 8, 60, 1 << 12, 64, (4, 4), 200)


class Activations(NamedTuple):
    """N words, what the MLP reads and what it writes there, `[N, d]` both; y less its mean over the training text."""

    words: Tensor
    x: Tensor
    y: Tensor


class Features(NamedTuple):
    """A bilinear MLP between the features of two autoencoders."""

    mlp: bo.nn.GatedMLP
    inputs: TopKSAE
    outputs: TopKSAE

    @property
    def layer(self) -> tuple[Tensor, Tensor, bo.Directions]:
        """w, v and c of the layer from what the MLP reads to its output features."""
        return self.mlp.w, self.mlp.v, bo.Directions(self.outputs.encoder, self.mlp.p)

    @property
    def basis(self) -> Tensor:
        """`[d, F]`: the directions in which input features act."""
        return self.inputs.decoder.t()


class Findings(NamedTuple):
    """What the paper's claims come to on held-out text; losses in nats, correlations averaged over features."""

    loss: float
    bigram_loss: float
    truncated: tuple[float, ...]  # output features by their top eigenvectors, at RANKS
    control: tuple[float, ...]  # the same of random directions
    by_size: float  # output features by their largest interactions alone
    by_coactivation: float  # by the largest once weighted by how input features act together

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
    """Train, autoencode and measure, printing what happens."""
    torch.manual_seed(seed)
    text = corpus.load(sizes.vocabulary, sizes.documents)
    print(f"Python's documentation: {len(text.train)} words, and {len(text.test)} in other documents held out")
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
    print("Output features by the top eigenvectors of their interaction matrices: correlation where they are active")
    print("  rank              " + "".join(f"{rank:>8}" for rank in RANKS))
    print("  output features   " + "".join(f"{r:8.3f}" for r in truncated))
    print("  random directions " + "".join(f"{r:8.3f}" for r in control))

    together = CoActivation(inputs.encode(train.x), outputs.encode(train.y), sizes.features)
    largest, weighted = (strongest(features, weight) for weight in (None, together))
    by_size, by_coactivation = (explained(features, test, top) for top in (largest, weighted))
    print(f"Output features by {PAIRS} pairs of input features: correlation where they are active")
    print(f"  the largest interactions {mean(by_size):.3f}; weighted by co-activation {mean(by_coactivation):.3f}")
    print(f"  all pairs, as far as input features go {mean(reconstructed(features, test)):.3f}")
    describe(features, model.embed.weight, text.words, train, weighted, by_coactivation)
    return Findings(loss, bigram_loss, truncated, control, mean(by_size), mean(by_coactivation))


@torch.no_grad()
def activations(model: text_model.Transformer, text: corpus.Corpus, sizes: Sizes) -> tuple[Activations, Activations]:
    """At random passages of the training text, and of the text held out; the model is fixed from here on."""
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
    """How well each direction's top eigenvectors alone follow its activation, at RANKS ([P] section 5)."""
    pairs = interaction_eigh(mlp.w, mlp.v, bo.Directions(directions, mlp.p), max(RANKS))
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
    """`[F]`: how well the contributions of an output feature's top pairs follow its activation."""
    acts = features.inputs.encode(test.x).dense(features.basis.shape[1])  # [N, F]
    codes = features.outputs.encode(test.y)
    row = torch.arange(len(acts)).repeat_interleave(codes.indices.shape[1]).unsqueeze(1)
    values, i, j = (t[codes.indices.flatten()] for t in (top.values, top.i, top.j))  # [N a, PAIRS]
    return correlations(codes, (values * acts[row, i] * acts[row, j]).sum(1), len(top.values))


def reconstructed(features: Features, test: Activations) -> Tensor:
    """`[F]`: how well all pairs together do, which is the MLP on what the input features make of x."""
    codes = features.outputs.encode(test.y)
    y = features.mlp(features.inputs(test.x)) @ features.outputs.encoder.t()  # [N, F]
    return correlations(codes, y.gather(1, codes.indices).flatten(), y.shape[1])


def correlations(codes: Codes, estimates: Tensor, features: int) -> Tensor:
    """`[F]`: of activations with estimates `[N a]`, where active; 0 for constant ones, NaN where too rarely active."""
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
    """Print the output features of the best scores: the words they promote, and the pairs that make them."""
    codes = features.inputs.encode(train.x)

    def name(feature: int) -> str:
        """The two commonest words where an input feature acts most."""
        peaks = (codes.acts * (codes.indices == feature)).amax(1).topk(50).indices
        found, counts = train.words[peaks].unique(return_counts=True)
        return "/".join(words[n] for n in found[counts.argsort(descending=True, stable=True)[:2]])

    print("Those explained best: the words they promote, and pairs of input features, named by words they act at")
    for k in scores.nan_to_num(0).topk(STORIES).indices.tolist():
        promoted = (unembed @ features.outputs.decoder[k]).topk(4).indices
        print(f"  feature {k}: {' '.join(words[n] for n in promoted)}")
        for value, i, j in zip(*(t[k, :3].tolist() for t in (top.values, top.i, top.j)), strict=True):
            print(f"    {value:+.3f}  {name(i)} x {name(j)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny and barely trained: to see it run")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found = experiment(QUICK if options.quick else FULL, options.seed)
    if options.quick:
        print("A model this small and short-lived shows nothing of what the paper found: run without --quick.")
        return
    print(f"Gained on the bigram model: {found.below_bigram:.3f} nats (expected: at least 0.2)")
    print(f"Rank 2 above random directions: {found.above_control:.3f} (at least 0.15)")
    print(f"Weighted pairs above the largest: {found.above_size:.3f} (more than 0.15)")


if __name__ == "__main__":
    main()
