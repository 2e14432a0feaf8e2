"""How much of a trained SwiGLU is quadratic? A digit classifier whose layer has a gate, read by its bilinear part.

    python examples/swiglu.py [--quick] [--out DIRECTORY]    # train, measure, print the table
    python examples/swiglu.py --check                        # is docs/findings.md what its receipt says?

A SwiGLU keeps at least half of the strength that the bilinear layer of the same weights has along a direction, at x or
at -x ([A], `analysis.even_odd_split`). Here: how much it keeps in the strongest directions of trained layers, at
lengths 1 to 100; what part of its outputs' variance the best quadratic explains, for normal inputs with the mean and
the covariance of real ones; and how well that quadratic classifies. Images and split are those of digits.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import findings_page
import torch
import torch.nn.functional as F
from findings_page import spread, table, written
from torch import Tensor, nn

import bilinear_ops as bo
from bilinear_ops.demo import Digits, accuracy, load_digits

RECEIPT = Path(__file__).parents[1] / "docs" / "receipts" / "swiglu.json"
RADII = (1.0, 3.0, 10.0, 30.0, 100.0)
DIRECTIONS = 10  # at most; a trained layer may have fewer maxima
BATCH, RATE, NOISE = 128, 1e-3, 0.4  # as the regularised networks of digits.py


class Scale(NamedTuple):
    """How large a study is."""

    size: int
    seeds: tuple[int, ...]
    steps: int


FULL, QUICK = Scale(64, (0, 1, 2, 3, 4), 500), Scale(24, (0,), 150)


class Network(nn.Module):
    """An embedding and a SwiGLU layer: images `[N, 784]` to logits `[N, 10]`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.embedding = nn.Linear(784, size, bias=False)
        self.layer = bo.nn.GatedMLP(size, 2 * size, 10, activation="silu")

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.embedding(x))


def train(data: Digits, scale: Scale, seed: int) -> Network:
    """From random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = Network(scale.size)
        fit(network, data, scale.steps)
    return network.requires_grad_(False)


def fit(network: Network, data: Digits, steps: int, before_step: Callable[[int], object] = lambda done: None) -> None:
    """By AdamW with cosine annealing, with noise on the images; `before_step` gets the number of steps done."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        before_step(step)
        rows = torch.randint(len(data.train_x), (BATCH,))
        images = data.train_x[rows] + NOISE * torch.randn(BATCH, 784)
        loss = F.cross_entropy(network(images), data.train_y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def measure(network: Network, data: Digits) -> dict[str, Any]:
    """Of one network."""
    w, v, p = network.layer.w, network.layer.v, network.layer.p
    inputs, held_out = network.embedding(data.train_x), network.embedding(data.test_x)
    length = inputs.norm(dim=1).median().item()
    strongest = bo.analysis.strongest_directions(w, v, p, DIRECTIONS)
    kept = bo.analysis.kept_strength(strongest.vectors, w, v, p, "silu", torch.tensor(RADII))
    gated = bo.analysis.strongest_directions(w, v, p, 1, activation="silu", radius=length)
    best = bo.analysis.best_quadratic(w, v, p, "silu", mean=inputs.mean(0), cov=inputs.t().cov())
    fitted = bo.quadratic_form(held_out, best.q) + held_out @ best.linear.t() + best.constant
    whole = network.layer(held_out)
    left = (fitted - whole).var(0) / whole.var(0)

    def right(logits: Tensor) -> float:
        return (logits.argmax(1) == data.test_y).double().mean().item()

    return {
        "length": length,
        "kept": kept.tolist(),
        "gated over bilinear": (gated.strengths[0] / strongest.strengths[0]).item(),
        "explained": best.explained.mean().item(),
        "explained on images": (1 - left).mean().item(),
        "accuracy": accuracy(network, data.test_x, data.test_y),
        "accuracy of the quadratic": right(fitted),
        "accuracy of the bilinear part": right(bo.gated_mlp(held_out, w, v, p)),
    }


def text(receipt: dict[str, Any]) -> str:
    """The table, as Markdown; figures are means over seeds, and over directions, with their range."""
    runs = receipt["runs"]
    rows = [("maxima of the bilinear layer's strength", spread([len(run["kept"]) for run in runs], ".1f"))]
    rows += [
        (f"strength kept at length {radius:g}", spread([row[i] for run in runs for row in run["kept"]]))
        for i, radius in enumerate(RADII)
    ]
    for name, form in (
        ("length of an image's embedding, the median", "length:.1f"),
        ("the strongest response at that length, over the bilinear layer's", "gated over bilinear:.2f"),
        ("variance that the best quadratic explains, of normal inputs", "explained:.3f"),
        ("variance that it explains of held-out images", "explained on images:.3f"),
        ("accuracy of the network", "accuracy:.1%"),
        ("accuracy of the best quadratic", "accuracy of the quadratic:.1%"),
        ("accuracy of the bilinear layer with the same weights", "accuracy of the bilinear part:.1%"),
    ):
        key, _, shape = form.partition(":")
        rows.append((name, spread([run[key] for run in runs], shape)))
    scale = receipt["scale"]
    seeds = ", ".join(map(str, scale["seeds"]))
    head = (
        f"Embedding of size {scale['size']}, {2 * scale['size']} hidden units, {scale['steps']} steps; seeds {seeds}."
    )
    return f"{head}\n\n{table(('measured', 'found'), rows)}\n"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="How much of a trained SwiGLU is quadratic?")
    parser.add_argument("--quick", action="store_true", help="a small network, one seed: rough figures")
    parser.add_argument("--out", type=Path, default=Path("figures"), help="for the receipt; default: figures")
    parser.add_argument("--check", action="store_true", help="train nothing; compare docs/findings.md with its receipt")
    options = parser.parse_args(arguments)
    if options.check:
        return findings_page.check("swiglu", RECEIPT, text)
    data, scale = load_digits(), QUICK if options.quick else FULL
    receipt = {"scale": scale._asdict(), "runs": [measure(train(data, scale, seed), data) for seed in scale.seeds]}
    print(text(receipt))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "swiglu.json").write_text(written(receipt), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
