"""A circuit that a grammar plants, and whether the weights of a bilinear layer show it ([P] 5.1).

In "the film was not good i hate" the verb follows from the adjective, and "not" turns love into hate and hate into
love. A model that adds up words' embeddings cannot know: only its bilinear layer can multiply two words. So in the
matrix of the output direction hate - love, "not" and "good" must be an AND-gate, "not" and "bad" one of the other sign.
That takes one large positive and one large negative eigenvalue: 4 a b = (a + b)^2 - (a - b)^2. After other adjectives
either verb follows, so that the square of an adjective alone cannot stand for being good or bad.

Softmax attention in place of the sum would spoil the planted truth: its weights sum to 1, so that "not" can also turn
the verb by taking weight from the adjective. In trials some transformers did, and their layer held no AND-gate.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bilinear_ops as bo

NOUNS, ADVERBS = ("film", "book", "song", "play"), ("not", "very", "quite", "so")
GOOD, BAD, OTHER = ("good", "great", "nice"), ("bad", "awful", "poor"), ("new", "old", "long")
VERBS = LOVE, HATE = "love", "hate"
SLOTS = (("the",), NOUNS, ("was",), ADVERBS, GOOD + BAD + OTHER, ("i",))
WORDS = tuple(word for slot in SLOTS for word in slot)
NUMBER = {word: n for n, word in enumerate(WORDS)}
CONTENT = tuple(word for slot in SLOTS if len(slot) > 1 for word in slot)  # the words that differ between sentences
PLANTED = tuple(("not", word) for word in GOOD + BAD)
D, HIDDEN = 16, 16  # sizes of the layer
# Tuned on seeds 100 to 115: with a decay of 0.3 the third eigenvalue was above half of the second in two of them.
SENTENCES, BATCH, RATE, DECAY, STEPS = 4096, 128, 1e-2, 1.0, 1000


class Sentences(NamedTuple):
    """N sentences up to the verb."""

    words: Tensor  # [N, 6]
    verb: Tensor  # [N]: 0 for love, 1 for hate
    negated: Tensor  # [N]: "not" before an adjective that is good or bad
    plain: Tensor  # [N]: another adverb there


def sentences(n: int) -> Sentences:
    """Drawn from torch's global generator, every word of a slot equally often."""
    words = torch.stack([torch.tensor([NUMBER[w] for w in s])[torch.randint(len(s), (n,))] for s in SLOTS], 1)
    not_, good, bad = (torch.isin(words, torch.tensor([NUMBER[w] for w in of])).any(1) for of in (("not",), GOOD, BAD))
    polar = good | bad
    verb = torch.where(polar, bad ^ not_, torch.rand(n) < 0.5)
    return Sentences(words, verb.long(), polar & not_, polar & ~not_)


class Model(nn.Module):
    """The sum of the words' embeddings, a bilinear layer, logits of the two verbs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(WORDS), D)
        self.layer = bo.nn.GatedMLP(D, HIDDEN)
        self.unembed = nn.Linear(D, len(VERBS), bias=False)

    def residual(self, words: Tensor) -> Tensor:
        """The layer's input `[N, d]`."""
        return self.embed(words).sum(1) / words.shape[1] ** 0.5

    def forward(self, words: Tensor) -> Tensor:
        x = self.residual(words)
        return self.unembed(x + self.layer(x))

    @property
    def direction(self) -> Tensor:
        """hate - love among the layer's outputs `[d]`."""
        return self.unembed.weight[1] - self.unembed.weight[0]


def train(seed: int) -> Model:
    """By AdamW with a falling rate."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text, model = sentences(SENTENCES), Model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for _ in range(STEPS):
            rows = torch.randint(SENTENCES, (BATCH,))
            loss = F.cross_entropy(model(text.words[rows]), text.verb[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.requires_grad_(False)


def features(model: Model) -> Tensor:
    """`[d, CONTENT]`: what a word adds to the layer's input that the other words of its slot do not."""
    embeddings = [model.embed.weight[[NUMBER[word] for word in slot]] for slot in SLOTS if len(slot) > 1]
    return torch.cat([slot - slot.mean(0) for slot in embeddings]).t() / len(SLOTS) ** 0.5


def together() -> Tensor:
    """How often two words are in one sentence, `[CONTENT, CONTENT]`: never if they are of one slot."""
    sizes = [len(slot) for slot in SLOTS if len(slot) > 1]
    within = torch.block_diag(*(torch.ones(size, size) for size in sizes))
    often = torch.cat([torch.full((size,), 1 / size) for size in sizes])
    return (1 - within) * torch.outer(often, often)


def measure(model: Model, text: Sentences) -> dict[str, Any]:
    """What the layer's weights show of the circuit, and what the verbs make of its two eigenvectors."""
    w, v, p = bo.analysis.layer_weights(model.layer)
    c = bo.Directions(model.direction[None], p)
    basis = features(model)
    pairs = bo.analysis.interaction_eigh(w, v, c)
    values = pairs.values[0]
    ends = torch.stack([values.argmax(), values.argmin()])
    top = bo.interaction_topk(w, v, c, len(PLANTED), basis=basis, weight=together())
    found = [tuple(CONTENT[n] for n in pair) for pair in zip(top.i[0].tolist(), top.j[0].tolist(), strict=True)]
    strengths = 2 * bo.interaction_matrices(w @ basis, v @ basis, c)[0, CONTENT.index("not")]
    x = model.residual(text.words)
    direct = x @ model.direction
    layers = {
        "the layer": model.layer(x) @ model.direction,
        "two eigenvectors": bo.eigen_form(x, values[None, ends], pairs.vectors[:, ends])[:, 0],
        "no layer": torch.zeros(len(x)),
    }

    def right(response: Tensor, of: Tensor) -> float:
        return ((direct + response > 0) == text.verb)[of].float().mean().item()

    return {
        "accuracy": {
            name: {"negated": right(y, text.negated), "plain": right(y, text.plain)} for name, y in layers.items()
        },
        "eigenvalues": [*values[ends].tolist(), values[values.abs().argsort(descending=True)[2]].item()],
        "strengths": {word: strengths[CONTENT.index(word)].item() for _, word in PLANTED},
        "found": sum(pair in PLANTED for pair in found),
    }


def plane(model: Model) -> Any:
    """A figure of the words on the plane of the two eigenvectors. Needs matplotlib."""
    w, v, p = bo.analysis.layer_weights(model.layer)
    sides = [
        bo.analysis.interaction_eigh(w, v, bo.Directions(model.direction[None], p), 1, which=which)
        for which in ("positive", "negative")
    ]
    values, vectors = (torch.cat([side[n][0] for side in sides]) for n in (0, 1))
    return bo.plots.eigenplane(features(model).t(), vectors, values, labels=CONTENT)


def gate(record: dict[str, Any]) -> bool:
    """Whether "not" is an AND-gate with every adjective, of the planted sign."""
    return all((strength > 0) == (word in GOOD) for word, strength in record["strengths"].items())


def two_large(record: dict[str, Any]) -> bool:
    """Whether the largest eigenvalues of either sign are at least twice the third by magnitude."""
    positive, negative, third = record["eigenvalues"]
    return min(positive, -negative) >= 2 * abs(third)


def run(seed: int) -> tuple[Model, dict[str, Any]]:
    """A trained model and what was measured on sentences that it has not seen drawn."""
    model = train(seed)
    with torch.random.fork_rng():
        torch.manual_seed(1000 + seed)
        return model, measure(model, sentences(SENTENCES))
