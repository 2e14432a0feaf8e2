"""Layers of known structure, decomposed: do the planted components come back?

Two kinds of target with a known answer, each decomposed by stochastic parameter decomposition (arXiv 2506.20790):

- toy models of superposition, n sparse features through m < n dimensions and back: two linear layers, of which every
  feature should get one rank-1 subcomponent of its own in each;
- a planted sparse bilinear layer, a sum of terms (w_i.x)^2 p_i of which few are active for an input, decomposed into
  terms (w_i.x)(v_i.x) p_i by `bo.stochastic_gated_mlp` from random weights, faithful by `bo.analysis.layer_distance`.

The toy model of 5 features does not come back yet: one component often takes two opposite features, and a toy may have
dropped a feature. Twice the steps changed nothing on seeds 1 to 3 (cosines of 0.88, 0.84 and 0.85).

Planted squares come back on most seeds (docs/findings.md). Planted products (w_i.x)(v_i.x) p_i often come back as two
squares: on seed 0 at cosines of 0.80 to 0.89.
"""

from __future__ import annotations

import math
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import bilinear_ops as bo

SAMPLES = 1
WARM_UP = 200  # steps of faithfulness alone
CLOSED = -1.0  # first logit: where gates begin open, one component often takes two opposite features
ACTIVE = 0.1  # a component counts as active where its gate is above


class Recovery(NamedTuple):
    """What came back of the planted components."""

    cosine: float  # mean over planted components of the largest cosine with a learned one
    active: float  # learned components active for an input, in the mean
    planted: float  # planted ones
    error: float  # mean squared error of the masked model, relative to the target's output


class Setting(NamedTuple):
    """One target and how it is decomposed."""

    features: int
    dimensions: int
    components: int
    probability: float
    steps: int
    rate: float
    importance: float
    batch: int = 256
    hidden: int = 16  # units of a gate network


TOYS = {"toy 5-2": Setting(5, 2, 20, 0.05, 1000, 5e-3, 3e-3, hidden=8)}
PLANTED = Setting(16, 8, 16, 0.1, 1000, 1e-2, 1e-2)  # dimensions is the number of terms


def sparse_features(setting: Setting, features: int, batch: int) -> Tensor:
    """`[batch, features]`: each on with the setting's probability, and then uniform in [0, 1]."""
    on = torch.rand(batch, features) < setting.probability
    return torch.rand(batch, features) * on


def active_features(setting: Setting) -> Tensor:
    """A batch of `sparse_features` of which each has at least one: the others teach nothing and are most of them."""
    some = 1 - (1 - setting.probability) ** setting.features
    x = sparse_features(setting, setting.features, int(1.5 * setting.batch / some) + 20)
    return x[x.any(1)][: setting.batch]


def progress(name: str, step: int, steps: int, loss: Tensor) -> None:
    if step % 200 == 0 or step == steps - 1:
        print(f"\r{name}: step {step + 1} of {steps}, loss {loss.item():.2e} ", end="", file=sys.stderr)


def schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=optimizer.defaults["lr"] / 100)


# Toy models of superposition


class Toy(NamedTuple):
    """relu(W^T W x + b)."""

    w: Tensor  # [m, n]
    b: Tensor  # [n]

    def __call__(self, x: Tensor) -> Tensor:
        return F.relu(x @ self.w.t() @ self.w + self.b)


def train_toy(setting: Setting, steps: int = 2000) -> Toy:
    w = (torch.randn(setting.dimensions, setting.features) / math.sqrt(setting.dimensions)).requires_grad_()
    b = torch.zeros(setting.features, requires_grad=True)
    optimizer = torch.optim.AdamW([w, b], lr=5e-3, weight_decay=0.01)
    rates = schedule(optimizer, steps)
    for _ in range(steps):
        x = active_features(setting)
        loss = (Toy(w, b)(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
    return Toy(w.detach(), b.detach())


def decompose_toy(name: str, setting: Setting, seed: int) -> Recovery:
    """Both layers of a toy model as subcomponents, under drawn masks together and one layer at a time."""
    torch.manual_seed(seed)
    toy = train_toy(setting)
    n, m, c = setting.features, setting.dimensions, setting.components
    inward, outward = bo.nn.Rank1Linear(n, m, c, weight=toy.w), bo.nn.Rank1Linear(m, n, c, weight=toy.w.t(), bias=toy.b)
    components = [*inward.parameters(), *outward.parameters()]

    def faithfulness() -> Tensor:
        layers = ((toy.w, inward.read, inward.write), (toy.w.t(), outward.read, outward.write))
        return bo.pooled_faithfulness_loss(layers)

    optimizer: torch.optim.Optimizer = torch.optim.AdamW(components, lr=0.01, weight_decay=0.1)
    for _ in range(WARM_UP):
        optimizer.zero_grad()
        faithfulness().backward()
        optimizer.step()
    gates = torch.nn.ModuleList([bo.nn.Gates(0, c, setting.hidden) for _ in range(2)])
    for network in gates:
        torch.nn.init.constant_(network.b2, CLOSED)
    optimizer = torch.optim.Adam([*components, *gates.parameters()], lr=setting.rate)
    rates = schedule(optimizer, setting.steps)
    options = {"samples": SAMPLES, "delta": "uniform"}
    loss = torch.zeros(())
    for step in range(setting.steps):
        x = active_features(setting)
        hidden = x @ toy.w.t()
        target = F.relu(hidden @ toy.w + toy.b)
        first, second = gates[0](x @ inward.read), gates[1](hidden @ outward.read)
        seeds = torch.tensor([2 * step, 2 * step + 1])
        through = inward.stochastic(x, first.lower, seed=seeds[0], **options)  # [samples, batch, m]
        both = outward.stochastic(through, second.lower, seed=seeds[1], delta="uniform")[0]
        alone = outward.stochastic(hidden, second.lower, seed=seeds[0], stream=1, **options)
        of_both, *of_one = ((F.relu(y) - target).square().mean() for y in (both, through @ toy.w + toy.b, alone))
        reconstruction = of_both + torch.stack(of_one).mean()
        minimality = torch.stack([bo.importance_minimality(g.upper, pnorm=1.0).sum() for g in (first, second)]).sum()
        loss = faithfulness() + reconstruction + setting.importance * minimality
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        progress(name, step, setting.steps, loss)
    with torch.no_grad():
        x = sparse_features(setting, n, 20_000)
        hidden = x @ toy.w.t()
        target = F.relu(hidden @ toy.w + toy.b)
        first, second = gates[0](x @ inward.read).lower, gates[1](hidden @ outward.read).lower
        y = F.relu(outward(inward(x, first), second))
        cosines = []
        for site, planted, weight in ((inward, torch.eye(n), toy.w), (outward, toy.w.t(), toy.w.t())):
            cosines.append(_cosines(planted, site.read.t()) * _cosines((planted @ weight.t()), site.write))
        return Recovery(
            torch.stack([cosine.amax(1).mean() for cosine in cosines]).mean().item(),
            torch.stack([(g > ACTIVE).float().sum(1).mean() for g in (first, second)]).mean().item(),
            (x > 0).float().sum(1).mean().item(),
            ((y - target).square().mean() / target.square().mean()).item(),
        )


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """|cosine| of every row of a with every row of b."""
    return (F.normalize(a, dim=1) @ F.normalize(b, dim=1).t()).abs()


# A planted bilinear layer


class Terms(NamedTuple):
    """sum_i (w_i.x)(v_i.x) p_i."""

    w: Tensor  # [h, d]
    v: Tensor  # [h, d]
    p: Tensor  # [o, h]


def plant(setting: Setting, outputs: int = 10) -> Terms:
    """Squares of one feature each, along directions of a random orthonormal basis.

    Squares, because a product of two features is also a difference of two squares, as which it often comes back.
    """
    basis = torch.linalg.qr(torch.randn(setting.features, setting.features))[0]
    w = basis[: setting.dimensions]
    return Terms(w, w, F.normalize(torch.randn(outputs, setting.dimensions), dim=0))


def planted_inputs(setting: Setting, terms: Terms, batch: int) -> tuple[Tensor, Tensor]:
    """Inputs that hold each term's feature at the setting's rate, `[batch, d]`, and which they hold, `[batch, h]`."""
    on = torch.rand(batch, setting.dimensions) < setting.probability
    signs = torch.randn(batch, setting.dimensions).sign()
    return ((0.5 + torch.rand(batch, setting.dimensions)) * signs * on) @ terms.w, on


def decompose_planted(name: str, setting: Setting, seed: int) -> Recovery:
    """A planted layer by a gated layer of more terms from random weights, its terms gated by their own activation."""
    torch.manual_seed(seed)
    terms = plant(setting)
    d, c = setting.features, setting.components
    layer = bo.nn.GatedMLP(d, c, terms.p.shape[0])
    gates = bo.nn.Gates(0, c, setting.hidden)
    optimizer = torch.optim.Adam([*layer.parameters(), *gates.parameters()], lr=setting.rate)
    rates = schedule(optimizer, setting.steps)
    norm = bo.layer_inner(*terms, *terms)
    loss = torch.zeros(())
    for step in range(setting.steps):
        x, _ = planted_inputs(setting, terms, setting.batch)
        target = bo.gated_mlp(x, *terms)
        importances = gates(bo.gated_bilinear(x, layer.w, layer.v))
        seeds = torch.tensor(step)
        y = bo.stochastic_gated_mlp(
            x, layer.w, layer.v, layer.p, importances.lower, samples=SAMPLES, seed=seeds, target=target, delta="uniform"
        )
        reconstruction = (y - target).square().mean() / target.square().mean()
        distance = bo.analysis.layer_distance(layer.w, layer.v, layer.p, *terms) / norm
        minimality = bo.importance_minimality(importances.upper, pnorm=1.0).sum()
        loss = distance + reconstruction + setting.importance * minimality
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        progress(name, step, setting.steps, loss)
    with torch.no_grad():
        x, on = planted_inputs(setting, terms, 20_000)
        target = bo.gated_mlp(x, *terms)
        lower = gates(bo.gated_bilinear(x, layer.w, layer.v)).lower
        y = bo.gated_mlp(x, layer.w, layer.v, layer.p, mask=lower)
        return Recovery(
            term_cosines(terms, Terms(layer.w, layer.v, layer.p)).abs().amax(1).mean().item(),
            (lower > ACTIVE).float().sum(1).mean().item(),
            on.float().sum(1).mean().item(),
            ((y - target).square().mean() / target.square().mean()).item(),
        )


def term_cosines(a: Terms, b: Terms) -> Tensor:
    """Cosines `[h_a, h_b]` of the terms' symmetric tensors p (x) sym(w v^T)."""
    norms = [(bo.neuron_gram(t.w, t.v).diagonal() * t.p.square().sum(0)).sqrt().clamp(min=1e-12) for t in (a, b)]
    return bo.neuron_gram(a.w, a.v, b.w, b.v) * (a.p.t() @ b.p) / (norms[0][:, None] * norms[1])


STUDIES = {"planted terms": (decompose_planted, PLANTED), **{name: (decompose_toy, s) for name, s in TOYS.items()}}
