"""Which MLP learns most in the same time? Bilinear, ReGLU and SwiGLU in a language model ([P] appendix G, Table 4).

    python examples/constant_time.py          # on a GPU: d_model 512, hidden 2048
    python examples/constant_time.py --quick  # a small model on any machine, to see that it runs; it answers nothing

A bilinear layer may learn a little less in a step than a gated one, and take less time for it: what counts is the time
of a step times the loss that a step leaves. The time depends on how the layer is computed, so each activation is timed
twice: op by op, as PyTorch runs it (`reference.gated_mlp`), and with the package's ops. All models are trained on the
same batches from the same initial weights, step by step in turn, so that a slow moment of the machine slows all.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from statistics import mean, median
from typing import NamedTuple

import text_corpus
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bilinear_ops as bo

ACTIVATIONS = {"bilinear": "identity", "ReGLU": "relu", "SwiGLU": "silu"}
MLPS = {"op by op": bo.reference.gated_mlp, "our ops": bo.gated_mlp}
HEADS = 4
RATE, WARM_UP = 1e-3, 20


class Sizes(NamedTuple):
    """Of the models and of their training."""

    vocabulary: int = 4096
    d: int = 512
    h: int = 2048
    layers: int = 4
    context: int = 128
    batch: int = 64
    steps: int = 1000
    documents: int | None = None


QUICK = Sizes(vocabulary=128, d=16, h=32, layers=1, context=16, batch=4, steps=24, documents=40)


class Row(NamedTuple):
    """One activation, computed in one way."""

    activation: str
    way: str
    milliseconds: float  # of a step, the median
    losses: list[float]  # of every step


class Model(nn.Module):
    """Words `[B, T]` -> logits `[B, T, V]`: attention and a gated MLP in each layer."""

    def __init__(self, sizes: Sizes, activation: str, way: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(sizes.vocabulary, sizes.d)
        self.place = nn.Parameter(torch.empty(sizes.context, sizes.d))
        self.layers = nn.ModuleList(Layer(sizes, activation, way) for _ in range(sizes.layers))
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.02)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words) + self.place[: words.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return F.rms_norm(x, x.shape[-1:]) @ self.embed.weight.t()


class Layer(nn.Module):
    """Causal attention, then the MLP, each on the norm of the residual stream."""

    def __init__(self, sizes: Sizes, activation: str, way: str) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(sizes.d, 3 * sizes.d, bias=False), nn.Linear(sizes.d, sizes.d, bias=False)
        self.mlp = bo.nn.GatedMLP(sizes.d, sizes.h)
        self.activation, self.compute = ACTIVATIONS[activation], MLPS[way]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(F.rms_norm(x, x.shape[-1:])).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        weights = self.mlp.w, self.mlp.v, self.mlp.p
        return x + self.compute(F.rms_norm(x, x.shape[-1:]), *weights, activation=self.activation)


class Run:
    """The training of one model."""

    def __init__(self, sizes: Sizes, activation: str, way: str, device: torch.device) -> None:
        torch.manual_seed(0)
        self.activation, self.way, self.device = activation, way, device
        self.model = Model(sizes, activation, way).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE)
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1 / WARM_UP, 1.0, WARM_UP)
        self.times: list[float] = []
        self.losses: list[float] = []

    def step(self, passages: Tensor) -> None:
        self.wait()
        start = time.perf_counter()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.model(passages[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), passages[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.wait()
        self.times.append(1e3 * (time.perf_counter() - start))
        self.losses.append(loss.item())

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def row(self) -> Row:
        return Row(self.activation, self.way, median(self.times), self.losses)


def measure(sizes: Sizes, device: torch.device) -> list[Row]:
    """Train every activation in both ways, a step of each in turn."""
    words = text_corpus.load(sizes.vocabulary, sizes.documents).train
    runs = [Run(sizes, activation, way, device) for activation in ACTIVATIONS for way in MLPS]
    generator, window = torch.Generator().manual_seed(0), torch.arange(sizes.context + 1)
    for _ in range(sizes.steps):
        starts = torch.randint(len(words) - sizes.context, (sizes.batch, 1), generator=generator)
        passages = words[starts + window].to(device)
        for run in runs:
            run.step(passages)
    return [run.row() for run in runs]


def final_loss(losses: Sequence[float], steps: int) -> float:
    """After so many steps: the mean of the last tenth of them."""
    return mean(losses[steps - max(1, steps // 10) : steps])


def compared(rows: Sequence[Row], way: str) -> list[tuple[str, float, float, int, float]]:
    """(activation, step time and loss relative to SwiGLU's, steps in the fastest's time, loss then), in one way."""
    chosen = [row for row in rows if row.way == way]
    base = next(row for row in chosen if row.activation == "SwiGLU")
    steps = len(base.losses)
    budget = steps * min(row.milliseconds for row in chosen)
    table = []
    for row in chosen:
        affordable = max(1, min(steps, round(budget / row.milliseconds)))
        loss = final_loss(row.losses, steps) / final_loss(base.losses, steps)
        table.append(
            (row.activation, row.milliseconds / base.milliseconds, loss, affordable, final_loss(row.losses, affordable))
        )
    return table


def report(rows: Sequence[Row], device: torch.device) -> str:
    """The tables, and what they say if they were measured on a GPU."""
    lines = []
    for way in MLPS:
        table = compared(rows, way)
        lines += [
            f"{way}:",
            "  activation  time of a step  loss after all steps  product  steps in equal time  loss then",
        ]
        lines += [
            f"  {name:10}  {t:14.3f}  {loss:20.4f}  {t * loss:7.3f}  {steps:19}  {then:9.4f}"
            for name, t, loss, steps, then in table
        ]
        if device.type == "cuda":
            best = min(table, key=lambda row: row[4])
            lines.append(f"  Least loss in equal time: {best[0]}.")
    lines.append("Times and losses relative to SwiGLU's; the loss then in nats a word, the mean over the last tenth.")
    if device.type != "cuda":
        lines.append("Not an answer: these times are a CPU's, of a small model. Run it on a GPU, without --quick.")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small model on any machine: no answer")
    quick = parser.parse_args(arguments).quick
    device = torch.device("cuda" if torch.cuda.is_available() and not quick else "cpu")
    if device.type == "cpu" and not quick:
        parser.error("the question is about GPUs, and none is here: --quick only tries the program")
    text = report(measure(QUICK if quick else Sizes(), device), device)
    print(text)
    return text


if __name__ == "__main__":
    main()
