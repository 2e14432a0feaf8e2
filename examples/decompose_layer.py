"""Ways to decompose a SwiGLU layer of a trained text model, raced to one reconstruction error.

Every way ends as units (w_i.x) silu(v_i.x) p_i, of which the k with the largest gates are kept for a word; its error is
the squared one of the output at held-out words, relative to the output's. A way differs in where its units start and in
what its gradients reach:

- "own" starts from the layer's own units, copied 1, 2 or 4 times with a little noise (`bo.init.expand_gated_mlp`);
- "random" starts from random units;
- "mixed" learns units as mixtures of the layer's own (`bo.nn.MixedWeights`), from copies;
- "routed" starts as own does; w, v and p of a unit learn only from words where its original is among the k strongest,
  by reconstruction (`bo.nn.routed_gated_mlp`), and from the distance to the layer;
- "data" knows the layer's inputs and outputs alone: a TopK transcoder (`bo.nn.Transcoder`).

All but "data" learn by stochastic parameter decomposition (arXiv 2506.20790): reconstruction under drawn masks,
minimality of the gates, and the relative `bo.analysis.layer_distance` to the layer as faithfulness.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import text_corpus
import text_model
import torch
from torch import Tensor, nn

import bilinear_ops as bo


class Study(NamedTuple):
    """Sizes and budget, the same for every way."""

    vocabulary: int = 1024
    documents: int | None = None
    d: int = 32
    h: int = 128
    model_steps: int = 800
    words: int = 1 << 15  # whose activations are trained on; a sixteenth as many are held out
    kept: int = 4  # units kept for a word
    error: float = 0.1  # to be reached
    steps: int = 200
    every: int = 10  # steps between measurements
    batch: int = 256
    importance: float = 3e-3
    mixing: float = 1e-5  # weight of the L1 norm of mixtures
    noise: float = 0.1  # of copies
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    tuning: tuple[int, ...] = (100,)  # seeds that choose the learning rate
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)


class Target(NamedTuple):
    """The layer, and its inputs at words of the text."""

    layer: bo.nn.GatedMLP
    train: Tensor  # [N, d]
    test: Tensor  # [n, d]
    loss: float  # of the model, in nats a word
    bigram_loss: float


WAYS = {"own x1": 1, "own x2": 2, "own x4": 4, "random x2": 2, "mixed x2": 2, "routed x2": 2, "data x2": 2}


def target(study: Study, cache: Path) -> Target:
    """The layer of a model that is trained once: later calls read `cache`."""
    sizes = f"{study.vocabulary}-{study.documents}-{study.d}-{study.h}-{study.model_steps}-{study.words}"
    path = cache / f"decompose_text_{sizes}.pt"
    layer = bo.nn.GatedMLP(study.d, study.h, activation="silu")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(_trained(study), path)
    found = torch.load(path)
    layer.load_state_dict(found.pop("layer"))
    layer.requires_grad_(False)
    layer.p /= layer(found["train"]).square().mean().sqrt()  # the scale that random weights give
    return Target(layer, **found)


def _trained(study: Study) -> dict[str, Any]:
    torch.manual_seed(0)
    text = text_corpus.load(study.vocabulary, study.documents)
    model = text_model.Transformer(study.vocabulary, study.d, study.h, activation="silu")
    context = 64
    print(f"A one-layer transformer with a SwiGLU layer {study.d} -> {study.h}: {study.model_steps} steps")
    text_model.train(model, text.train, context=context, batch=16, steps=study.model_steps)
    inputs = []
    with torch.no_grad():
        for words, count in ((text.train, study.words), (text.test, study.words // 16)):
            passages = words[: len(words) // context * context].view(-1, context)
            chosen = passages[torch.randperm(len(passages))[: count // context]]
            inputs.append(torch.cat([text_model.norm(model.residual(part)).flatten(0, 1) for part in chosen.split(64)]))
    return {
        "layer": model.mlp.state_dict(),
        "train": inputs[0],
        "test": inputs[1],
        "loss": text_model.mean_loss(model, text.test, context),
        "bigram_loss": text_corpus.KneserNey(text.train, study.vocabulary).loss(text.test),
    }


class Gated(nn.Module):
    """Units with learned gates. `layer` holds their weights; `mixtures`, if any, say what these are made of."""

    def __init__(self, layer: bo.nn.GatedMLP, original: Target, study: Study, *, mixed: bool, routed: bool):
        super().__init__()
        self.study, self.original, self.routed = study, original.layer, routed
        h = layer.w.shape[0]
        self.gates = bo.nn.Gates(study.d, h, 2 * study.d, "shared")
        nn.init.constant_(self.gates.b2, 0.5)  # all gates begin half open
        own, copies = original.layer, h // study.h
        self.norm = bo.layer_inner(own.w, own.v, own.p, own.w, own.v, own.p)
        self.layer = None if mixed else layer
        self.mixtures: nn.ModuleList | None = None
        if mixed:
            self.mixtures = nn.ModuleList([bo.nn.MixedWeights(t, h) for t in (own.w, own.v, own.p.t() / copies)])
            for mixture in self.mixtures:
                mixture.entries.data += study.noise / study.h**0.5 * torch.randn_like(mixture.entries)

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.mixtures is None:
            return self.layer.w, self.layer.v, self.layer.p
        w, v, p = (mixture.weight for mixture in self.mixtures)
        return w, v, p.t()

    def distance(self) -> Tensor:
        """|B - B'|^2 / |B|^2, whatever units the two layers are written in."""
        own = self.original
        return bo.analysis.layer_distance(*self.weights(), own.w, own.v, own.p) / self.norm

    def loss(self, x: Tensor, y: Tensor, step: int) -> Tensor:
        w, v, p = self.weights()
        importances = self.gates(x)
        seed = torch.tensor(step)
        if self.routed:
            found = self._routed(x, importances.lower, seed)
        else:
            found = bo.stochastic_gated_mlp(x, w, v, p, importances.lower, activation="silu", seed=seed)
        reconstruction = (found[0] - y).square().sum() / y.square().sum()
        minimality = bo.importance_minimality(importances.upper, pnorm=1.0).sum()
        loss = reconstruction + self.study.importance * minimality + self.distance()
        if self.mixtures is None:
            return loss
        return loss + self.study.mixing * torch.stack([mixture.penalty() for mixture in self.mixtures]).sum()

    def _routed(self, x: Tensor, gates: Tensor, seed: Tensor) -> Tensor:
        """The output under drawn masks; the gradients of w, v and the columns of p come from routed words alone."""
        w, v, p = self.weights()
        route = self._route(x)
        unread = torch.zeros_like(w).t()  # acts stand for x read

        def written(hid: Tensor, p: Tensor, gates: Tensor) -> Tensor:
            return bo.stochastic_rank1_linear(x, unread, p.t(), gates, acts=hid, seed=seed)

        hid = bo.nn.routed_gated_mlp(x, w, v, torch.eye(len(w)), route=route, activation="silu")
        of_p = written((hid * route).detach(), p, gates.detach())
        return written(hid, p.detach(), gates) + of_p - of_p.detach()

    def _route(self, x: Tensor) -> Tensor:
        """1 for the copies of a word's strongest original units."""
        own = self.original
        strength = bo.gated_bilinear(x, own.w, own.v, activation="silu").abs() * own.p.norm(dim=0)
        copies = self.gates.c // self.study.h
        return bo.nn.route(strength, "topk", k=self.study.kept).repeat(1, copies)

    def forward(self, x: Tensor) -> Tensor:
        """The units with the largest gates."""
        importances = self.gates(x)
        largest = importances.logits.topk(self.study.kept).indices
        mask = torch.zeros_like(importances.lower).scatter_(1, largest, importances.lower.gather(1, largest))
        return bo.gated_mlp(x, *self.weights(), activation="silu", mask=mask)


class FromData(nn.Module):
    """A transcoder that never sees the layer's weights."""

    def __init__(self, study: Study, units: int):
        super().__init__()
        self.transcoder = bo.nn.Transcoder(study.d, study.d, units, k=study.kept)

    def loss(self, x: Tensor, y: Tensor, step: int) -> Tensor:
        return (self.transcoder(x) - y).square().sum() / y.square().sum()

    def forward(self, x: Tensor) -> Tensor:
        return self.transcoder(x)


def start(way: str, original: Target, study: Study) -> Gated | FromData:
    kind, units = way.split()[0], WAYS[way] * study.h
    if kind == "data":
        return FromData(study, units)
    if kind == "random":
        layer = bo.nn.GatedMLP(study.d, units, activation="silu")
    else:
        layer, _ = bo.init.expand_gated_mlp(original.layer, WAYS[way], noise=study.noise)
    return Gated(layer.requires_grad_(True), original, study, mixed=kind == "mixed", routed=kind == "routed")


def run(way: str, original: Target, study: Study, rate: float, seed: int) -> dict[str, Any]:
    """Train one way; its errors over the steps, and the step and the CPU seconds that reach the study's error."""
    torch.manual_seed(seed)
    model = start(way, original, study)
    optimizer = torch.optim.Adam([t for t in model.parameters() if t.requires_grad], lr=rate)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, study.steps, eta_min=rate / 100)
    train_y, test_y = original.layer(original.train), original.layer(original.test)
    errors, seconds, spent = [], [], 0.0
    for step in range(1, study.steps + 1):
        since = time.process_time()
        chosen = torch.randint(len(train_y), (study.batch,))
        loss = model.loss(original.train[chosen], train_y[chosen], step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        spent += time.process_time() - since
        if step % study.every == 0:
            with torch.no_grad():
                error = (model(original.test) - test_y).square().sum() / test_y.square().sum()
            errors.append(error.item())
            seconds.append(spent)
            print(f"\r{way}, rate {rate}, seed {seed}: step {step}, error {errors[-1]:.3f} ", end="", file=sys.stderr)
    reached = next((i for i, error in enumerate(errors) if error <= study.error), None)
    with torch.no_grad():
        distance = model.distance().item() if isinstance(model, Gated) else None
    return {
        "way": way,
        "units": WAYS[way] * study.h,
        "rate": rate,
        "seed": seed,
        "step": None if reached is None else (reached + 1) * study.every,
        "seconds": None if reached is None else seconds[reached],
        "all_seconds": spent,
        "errors": errors,
        "distance": distance,
    }


def compare(study: Study, cache: Path) -> dict[str, Any]:
    """Every way with the learning rate that its tuning seeds like best, at the reporting seeds."""
    original = target(study, cache)
    tuning, runs = [], []
    for way in WAYS:
        tried = [run(way, original, study, rate, seed) for rate in study.rates for seed in study.tuning]
        rate = min(study.rates, key=lambda rate: _score([r for r in tried if r["rate"] == rate], study))
        chosen = [run(way, original, study, rate, seed) for seed in study.seeds]
        last = ", ".join(f"{r['errors'][-1]:.3f}" for r in chosen)
        print(f"\r{way}: rate {rate}, errors at the end {last}{'':30}", flush=True)
        tuning += [{key: r[key] for key in ("way", "rate", "seed", "step")} | {"error": r["errors"][-1]} for r in tried]
        runs += chosen
    return {
        "study": study._asdict(),
        "target": {
            "loss": original.loss, "bigram_loss": original.bigram_loss, "strongest": strongest(original, study.kept)
        },
        "tuning": tuning,
        "runs": runs,
    }  # fmt: skip


def _score(found: list[dict[str, Any]], study: Study) -> tuple[float, float]:
    """Steps to the error, those that miss it at the whole budget, then the error at the end."""
    steps = sum(study.steps if r["step"] is None else r["step"] for r in found)
    return steps, sum(r["errors"][-1] for r in found)


@torch.no_grad()
def strongest(original: Target, kept: int) -> float:
    """The error where the layer's own units of largest |output| are kept, of each held-out word."""
    w, v, p = original.layer.w, original.layer.v, original.layer.p
    hid = bo.gated_bilinear(original.test, w, v, activation="silu")
    mask = bo.nn.route(hid.abs() * p.norm(dim=0), "topk", k=kept)
    y = hid @ p.t()
    return (((hid * mask) @ p.t() - y).square().sum() / y.square().sum()).item()
