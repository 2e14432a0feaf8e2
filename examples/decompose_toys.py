"""Small trained models of known structure, both of their layers decomposed (arXiv 2506.20790).

- Toy models of superposition: n sparse features through m < n dimensions and back, relu(W^T W x + b). In each layer
  every feature should get one component of its own, which in the first reads e_i and writes W[:, i] and in the second
  reads W[:, i] and writes e_i.
- A residual MLP with fewer neurons than features, which learns x + relu(x) of features embedded in a wider space. Its
  first layer should give every feature a component. What the second's should be is not known: the first alone counts.

Active components are counted for one feature at a time, at the strength `PROBE`, as the paper's code probes its gates:
below 0.2 a toy's bias hides a feature, and several at once make other outputs than their own positive.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from decompose_pairs import ACTIVE, Decomposition, Pair, Recovery, Setting, cosines, decompose, schedule
from torch import Tensor

PROBE = 0.75
TOYS = {
    "toy 5-2": Setting(5, 2, 40, 0.05, 1000, 1e-2, 1e-2, attempts=2),
    "toy 40-10": Setting(40, 10, 320, 0.05, 800, 2e-2, 1.5e-3, exponent=2.0, rising=True),
}
RESIDUAL = Setting(20, 10, 120, 0.05, 1000, 1e-2, 1e-3, exponent=2.0, rising=True)  # dimensions: its neurons
EMBEDDING = 200  # of the residual stream


def sparse_features(setting: Setting, batch: int, low: float = 0.0) -> Tensor:
    """`[batch, features]`: each on with the setting's probability, and then uniform in [low, 1]."""
    on = torch.rand(batch, setting.features) < setting.probability
    return (low + (1 - low) * torch.rand(batch, setting.features)) * on


def active_features(setting: Setting, batch: int, low: float = 0.0) -> Tensor:
    """A batch of `sparse_features` of which each has at least one: the others teach nothing and may be most of them."""
    some = 1 - (1 - setting.probability) ** setting.features
    x = sparse_features(setting, int(1.5 * batch / some) + 20, low)
    return x[x.any(1)][:batch]


def least(weights: list[Tensor], losses: Callable[[], Tensor], rate: float, steps: int) -> list[Tensor]:
    """Weights `[models, ...]` trained side by side; those of the model whose loss is the least at the end."""
    optimizer = torch.optim.AdamW([t.requires_grad_() for t in weights], lr=rate, weight_decay=0.01)
    rates = schedule(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        losses().sum().backward()
        optimizer.step()
        rates.step()
    with torch.no_grad():
        best = torch.stack([losses() for _ in range(20)]).mean(0).argmin()
    return [t.detach()[best] for t in weights]


def decompose_toy(name: str, setting: Setting, seed: int) -> Recovery:
    """A toy model of superposition: of several that are trained the best, as some drop features."""
    torch.manual_seed(seed)
    n, m = setting.features, setting.dimensions
    models = max(2, 40 // n)

    def losses() -> Tensor:
        x = active_features(setting, 500)
        return (F.relu(x @ w.mT @ w + b) - x).square().mean((1, 2))

    w, b = torch.randn(models, m, n) / math.sqrt(m), torch.zeros(models, 1, n)
    w, b = least([w, b], losses, 5e-3, 2000)
    pair = Pair(w, lambda hidden: hidden, w.t(), b[0], lambda y, x: F.relu(y))
    found = decompose(name, pair, setting, lambda batch: active_features(setting, batch))
    features = torch.eye(n)
    inward = cosines(features, found.inward.read.t()) * cosines(w.t(), found.inward.write)
    outward = cosines(w.t(), found.outward.read.t()) * cosines(features, found.outward.write)
    return recovery(found, features, [inward, outward], sparse_features(setting, 20_000))


def decompose_residual(name: str, setting: Setting, seed: int) -> Recovery:
    """A residual MLP: features embedded by fixed random unit vectors and read off by the same."""
    torch.manual_seed(seed)
    n, m = setting.features, setting.dimensions
    embed = F.normalize(torch.randn(n, EMBEDDING), dim=1)

    def losses() -> Tensor:
        x = active_features(setting, 500, low=-1.0)
        return ((F.relu(x @ embed @ inner.mT) @ outer.mT + x @ embed) @ embed.t() - x - F.relu(x)).square().mean((1, 2))

    inner, outer = torch.randn(3, m, EMBEDDING) / math.sqrt(EMBEDDING), torch.randn(3, EMBEDDING, m) / math.sqrt(m)
    inner, outer = least([inner, outer], losses, 3e-3, 2000)
    pair = Pair(inner, F.relu, outer, None, lambda y, x: (x + y) @ embed.t())
    found = decompose(name, pair, setting, lambda batch: active_features(setting, batch, low=-1.0) @ embed)
    read = embed @ found.inward.read  # what a component reads of every feature, [n, C]
    inward = cosines(torch.eye(n), read.t()) * cosines(embed @ inner.t(), found.inward.write)
    return recovery(found, embed, [inward], sparse_features(setting, 20_000, low=-1.0))


@torch.no_grad()
def recovery(found: Decomposition, embed: Tensor, of_sites: list[Tensor], drawn: Tensor) -> Recovery:
    """Means over the sites whose cosines `[features, components]` are given; the error is at the features `drawn`."""
    gates = found.importances(PROBE * embed)[: len(of_sites)]
    x = drawn @ embed
    target = found.pair(x)
    return Recovery(
        torch.stack([cosine.amax(1).mean() for cosine in of_sites]).mean().item(),
        torch.stack([(g.lower > ACTIVE).float().sum(1).mean() for g in gates]).mean().item(),
        1.0,
        ((found(x) - target).square().mean() / target.square().mean()).item(),
    )
