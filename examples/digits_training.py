"""Bilinear classifiers of 28x28 images: the network of [P] section 4, its training, and what keeps it from overfitting.

The augmentations take and return images `[N, 784]` and draw from torch's global generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bilinear_ops as bo

SIDE = 28
BATCH, RATE = 128, 1e-3


class Network(nn.Module):
    """An embedding, a bilinear layer and a head, which is the layer's down-projection: pixels to classes."""

    def __init__(self, size: int, classes: int, bias: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Linear(SIDE * SIDE, size, bias=bias)
        self.layer = bo.nn.GatedMLP(size, size, classes, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, classes]` of images `[N, 784]`."""
        return self.layer(self.embedding(x))


def fold(network: Network) -> tuple[Tensor | None, ...]:
    """w, v, p, b_w, b_v and b_p of the bilinear layer on pixels that equals the network.

    An embedding E x + e folds into the up-projections, its bias into theirs: W (E x + e) + b = (W E) x + (W e + b).
    """
    layer, (weight, shift) = network.layer, (network.embedding.weight, network.embedding.bias)
    folded = [layer.w @ weight, layer.v @ weight, layer.p]
    if shift is None:
        return *folded, None, None, None
    return *folded, layer.w @ shift + layer.b_w, layer.v @ shift + layer.b_v, layer.b_p


class Regulariser(NamedTuple):
    """What a training does against overfitting; by default nothing."""

    noise: float = 0.0  # standard deviation, on the pixels
    decay: float = 0.0  # AdamW's
    latent: float = 0.0  # standard deviation of noise on the embedded image, in units of its root mean square
    dropout: float = 0.0  # of the embedded image
    l1: float = 0.0  # times the sum of |weights|
    augment: Callable[[Tensor], Tensor] | None = None


def train(
    x: Tensor,
    y: Tensor,
    classes: int,
    *,
    size: int,
    seed: int,
    regulariser: Regulariser,
    steps: int,
    bias: bool = False,
) -> Network:
    """A network trained on images `[N, 784]` with labels `[N]`: AdamW with cosine annealing, as [P] trains."""
    r = regulariser
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = Network(size, classes, bias)
        optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=r.decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            rows = torch.randint(len(x), (BATCH,))
            images = r.augment(x[rows]) if r.augment else x[rows]
            if r.noise:
                images = images + r.noise * torch.randn_like(images)
            embedded = network.embedding(images)
            if r.latent:
                scale = embedded.detach().square().mean().sqrt()
                embedded = embedded + r.latent * scale * torch.randn_like(embedded)
            loss = F.cross_entropy(network.layer(F.dropout(embedded, r.dropout)), y[rows])
            if r.l1:
                loss = loss + r.l1 * sum(weight.abs().sum() for weight in network.parameters())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.requires_grad_(False)


def salt_and_pepper(x: Tensor, share: float = 0.2) -> Tensor:
    """That share of the pixels black or white, either as often."""
    drawn = torch.rand_like(x)
    return torch.where(drawn < share, (drawn < share / 2).to(x.dtype), x)


def perlin(x: Tensor, std: float = 0.4, cells: int = 4) -> Tensor:
    """Smooth noise added: at the corners of cells x cells squares random gradients, between them faded."""
    at = (torch.arange(SIDE) + 0.5) * cells / SIDE
    cell = at.long()
    inside = at - cell
    fade = inside**3 * (inside * (6 * inside - 15) + 10)
    angles = 2 * math.pi * torch.rand(len(x), cells + 1, cells + 1)

    def corner(down: int, right: int) -> Tensor:
        angle = angles[:, (cell + down)[:, None], cell + right]  # [N, 28, 28]
        return angle.sin() * (inside - down)[:, None] + angle.cos() * (inside - right)

    upper, lower = (torch.lerp(corner(down, 0), corner(down, 1), fade) for down in (0, 1))
    noise = torch.lerp(upper, lower, fade[:, None])
    return x + (std / noise.std() * noise).flatten(1)


def translate(x: Tensor, pixels: float = 7.0) -> Tensor:
    """Each image shifted by up to that many pixels in each direction."""
    shift = (2 * torch.rand(len(x), 2, 1) - 1) * 2 * pixels / SIDE  # an image is 2 wide
    return _warp(x, torch.cat([torch.eye(2).expand(len(x), 2, 2), shift], 2))


def rotate(x: Tensor, degrees: float = 45.0) -> Tensor:
    """Each image turned about its centre by up to that angle either way."""
    angle = (2 * torch.rand(len(x)) - 1) * math.radians(degrees)
    zero = torch.zeros_like(angle)
    rows = [torch.stack(row, 1) for row in ((angle.cos(), -angle.sin(), zero), (angle.sin(), angle.cos(), zero))]
    return _warp(x, torch.stack(rows, 1))


def _warp(x: Tensor, theta: Tensor) -> Tensor:
    images = x.view(-1, 1, SIDE, SIDE)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False).flatten(1)


def blur(x: Tensor, sigma: float = 1.5) -> Tensor:
    """Each image mixed with itself under a Gaussian blur, by a share drawn from 0 to 1."""
    kernel = torch.exp(-0.5 * (torch.arange(-4.0, 5.0) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    images = x.view(-1, 1, SIDE, SIDE)
    blurred = F.conv2d(
        F.conv2d(images, kernel.view(1, 1, -1, 1), padding=(4, 0)), kernel.view(1, 1, 1, -1), padding=(0, 4)
    )
    return torch.lerp(x, blurred.flatten(1), torch.rand(len(x), 1))
