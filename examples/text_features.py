"""What sparse autoencoders and eigenvectors say of a bilinear MLP in a language model ([P] section 5).

One function is one measurement. An output feature with encoder direction e is the quadratic form e . y = x^T Q x of the
MLP's input, so the matrix Q shows which input features it is made of.
"""

from __future__ import annotations

from typing import NamedTuple

import text_corpus as corpus
import text_model
import torch
import torch.nn.functional as F
from text_sae import Codes, TopKSAE
from torch import Tensor

import bilinear_ops as bo
from bilinear_ops.analysis import EigenPairs, interaction_eigh, layer_weights, truncation_correlation, truncation_curve

MOST = 8  # eigenvectors of an output feature, at most
PAIRS = 15  # pairs of input features that explain an output feature
ENOUGH = 30  # a feature counts if it is active at this many words
EVERYWHERE = 4096  # words at which correlations over all inputs are taken
JUDGED = 8192  # words whose loss is taken
BEFORE = 6  # words of a context before the one at which a feature is active


class Activations(NamedTuple):
    """N words in passages of equal length, the word after each, and what the MLP reads and writes there."""

    words: Tensor  # [N]
    following: Tensor  # [N]
    residual: Tensor  # [N, d]
    x: Tensor  # [N, d]: the MLP's inputs, the residual's norm
    y: Tensor  # [N, d]: its outputs, less their mean over the training text


class Features(NamedTuple):
    """A bilinear MLP with autoencoders of its input and of its output."""

    mlp: bo.nn.GatedMLP
    centre: Tensor  # [d]: the mean output, which the autoencoder does not see
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


@torch.no_grad()
def activations(
    model: text_model.Transformer, text: corpus.Corpus, *, context: int, words: int
) -> tuple[Activations, Activations, Tensor]:
    """At random passages of the training text and of the held-out text, and the mean output over the former."""

    def read(source: Tensor) -> Activations:
        end = (len(source) - 1) // context * context
        passages, following = (source[i : i + end].view(-1, context) for i in (0, 1))
        chosen = torch.randperm(len(passages))[: words // context]
        residual = torch.cat([model.residual(passages[part]).flatten(0, 1) for part in chosen.split(64)])
        x = text_model.norm(residual)
        return Activations(passages[chosen].flatten(), following[chosen].flatten(), residual, x, model.mlp(x))

    train, test = read(text.train), read(text.test)
    centre = train.y.mean(0)
    return train._replace(y=train.y - centre), test._replace(y=test.y - centre), centre


@torch.no_grad()
def loss_added(model: text_model.Transformer, features: Features, test: Activations) -> dict[str, float]:
    """What replacing the MLP's output adds to the loss, as a share of what zeroing it adds ([P] 5.1)."""
    test = Activations(*(t[:JUDGED] for t in test))
    codes = features.outputs.encode(test.y)
    pairs = interaction_eigh(*features.layer, MOST)
    row = torch.arange(len(test.x)).repeat_interleave(codes.indices.shape[1])
    forms = bo.eigen_form(
        test.x, pairs.values, pairs.vectors, pairs=(row, codes.indices.flatten()), reduce="cumsum"
    )  # [N a, MOST]
    shift = (features.outputs.encoder @ features.centre)[codes.indices]

    def low_rank(n: int) -> Tensor:
        acts = forms[:, n - 1].view_as(shift) - shift
        return Codes(codes.indices, acts).dense(len(features.outputs.decoder)) @ features.outputs.decoder

    replaced = {
        "output features": features.outputs(test.y) + features.centre,
        "input features": features.mlp(features.inputs(test.x)),
        "2 eigenvectors of each output feature": low_rank(2) + features.centre,
        f"{MOST} eigenvectors of each output feature": low_rank(MOST) + features.centre,
        "the mean output": features.centre.expand_as(test.y),
    }

    def logits(y: Tensor) -> Tensor:
        return text_model.norm(test.residual + y) @ model.embed.weight.t()

    clean, zeroed = logits(test.y + features.centre), logits(torch.zeros_like(test.y))
    return {
        name: bo.analysis.loss_added(clean, logits(y), zeroed, test.following).item() for name, y in replaced.items()
    }


class Forms(NamedTuple):
    """F quadratic forms of the MLP's input: leading eigenpairs, and their values at words, less a constant each."""

    pairs: EigenPairs
    acts: Tensor  # [N, F]


def of_directions(mlp: bo.nn.GatedMLP, directions: Tensor, test: Activations) -> Forms:
    """Those of output directions `[F, d]`."""
    w, v, p = layer_weights(mlp)
    return Forms(interaction_eigh(w, v, bo.Directions(directions, p), MOST), test.y @ directions.t())


def of_random_matrices(count: int, train: Activations, test: Activations) -> Forms:
    """Those of symmetric matrices with normal entries, which no layer has: a control."""
    drawn = torch.randn(count, train.x.shape[1], train.x.shape[1])
    q = (drawn + drawn.mT) / 2
    values, vectors = torch.linalg.eigh(q)
    order = values.abs().argsort(dim=1, descending=True)
    values = values.gather(1, order)
    first = vectors.mT.gather(1, order[:, :MOST, None].expand(-1, -1, vectors.shape[1]))
    exact = torch.zeros(count, MOST), torch.ones(count, dtype=torch.bool), values[:, MOST].abs()
    centre = bo.quadratic_form(train.x[:EVERYWHERE], q).mean(0)
    return Forms(EigenPairs(values[:, :MOST], first, *exact), bo.quadratic_form(test.x, q) - centre)


class Curves(NamedTuple):
    """Correlation of forms with their first 1, ..., MOST eigenvectors, averaged over the forms."""

    active: list[float]  # where a form is among the largest ones
    everywhere: list[float]
    above: float  # the share of forms whose two eigenvectors correlate above 0.75 where active


def truncation(forms: Forms, test: Activations, active: int) -> Curves:
    """[P] 5.2. A form is active at a word if it is among the `active` largest there."""
    top = forms.acts.topk(active, dim=1)
    found = truncation_correlation(test.x, forms.pairs, top.indices, top.values)
    everywhere = truncation_curve(test.x[:EVERYWHERE], forms.pairs, forms.acts[:EVERYWHERE])
    counted = found.corr[found.count >= ENOUGH]
    above = (counted[:, 1] > 0.75).double().mean().item()
    return Curves(counted.nanmean(0).tolist(), everywhere.corr.nanmean(0).tolist(), above)


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


def ends(features: Features) -> tuple[Tensor, Tensor]:
    """Each output feature's largest and smallest eigenvalue `[F, 2]`, and their eigenvectors `[F, 2, d]`."""
    sides = [interaction_eigh(*features.layer, 1, which=which) for which in ("positive", "negative")]
    return torch.cat([side.values for side in sides], 1), torch.cat([side.vectors for side in sides], 1)


def on_plane(features: Features, top: bo.TopInteractions) -> Tensor:
    """`[F]`: cosine of the strengths of pairs with what they are on the plane of the two end eigenvectors ([P] 5.1)."""
    values, vectors = ends(features)
    places = vectors @ features.basis  # [F, 2, inputs]
    a, b = (places.gather(2, of.unsqueeze(1).expand(-1, 2, -1)) for of in (top.i, top.j))  # [F, 2, PAIRS]
    twice = 2 - (top.i == top.j).to(a.dtype)
    return F.cosine_similarity(top.values, twice * (values[..., None] * a * b).sum(1), dim=1)


def contexts(features: Features, train: Activations, k: int, vocabulary: list[str], context: int, n: int) -> list[str]:
    """The n passages at whose last word an output feature is most active; the last word is in brackets."""
    acts = train.y @ features.outputs.encoder[k]
    found: list[str] = []
    for at in acts.argsort(descending=True, stable=True).tolist():
        begin = max(at - BEFORE, at // context * context)
        *before, last = (vocabulary[word] for word in train.words[begin : at + 1].tolist())
        text = " ".join([*before, f"[{last}]"])
        if text not in found:
            found.append(text)
        if len(found) == n:
            break
    return found


def name(features: Features, train: Activations, feature: int, vocabulary: list[str]) -> str:
    """The two commonest words at which an input feature is most active."""
    codes = features.inputs.encode(train.x)
    peaks = (codes.acts * (codes.indices == feature)).amax(1).topk(50).indices
    found, counts = train.words[peaks].unique(return_counts=True)
    return "/".join(vocabulary[n] for n in found[counts.argsort(descending=True, stable=True)[:2]])
