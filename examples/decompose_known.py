"""Targets of known structure, decomposed: do the planted components come back?

`decompose_toys.py` has small trained models. Here is a planted sparse bilinear layer: a sum of terms (w_i.x)^2 p_i of
which few are active for an input, decomposed into terms (w_i.x)(v_i.x) p_i by `bo.stochastic_gated_mlp` from random
weights, faithful by `bo.analysis.layer_distance`.

Planted squares come back on most seeds (docs/findings.md). Planted products (w_i.x)(v_i.x) p_i often come back as two
squares: on seed 0 at cosines of 0.80 to 0.89.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from decompose_pairs import ACTIVE, Recovery, Setting, progress, schedule
from decompose_toys import RESIDUAL, TOYS, decompose_residual, decompose_toy
from torch import Tensor

import bilinear_ops as bo

PLANTED = Setting(16, 8, 16, 0.1, 1000, 1e-2, 1e-2, hidden=16)  # dimensions is the number of terms


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
            x, layer.w, layer.v, layer.p, importances.lower, seed=seeds, target=target, delta="uniform"
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


STUDIES = {
    "planted terms": (decompose_planted, PLANTED),
    **{name: (decompose_toy, setting) for name, setting in TOYS.items()},
    "residual MLP": (decompose_residual, RESIDUAL),
}
