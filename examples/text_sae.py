"""A TopK sparse autoencoder (Gao et al. 2024) without biases: an active feature is linear in the input."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RATE, BATCH = 2e-3, 1024


class Codes(NamedTuple):
    """Active features of N rows and their activations, `[N, a]` each."""

    indices: Tensor
    acts: Tensor

    def dense(self, features: int) -> Tensor:
        """`[N, features]`, zero where a feature is not active."""
        return self.acts.new_zeros(len(self.acts), features).scatter(1, self.indices, self.acts)


def encode(y: Tensor, directions: Tensor, active: int) -> Codes:
    """The `active` largest products of y `[N, d]` with the directions `[F, d]`."""
    acts, indices = (y @ directions.t()).topk(active, dim=1)
    return Codes(indices, acts)


class TopKSAE(nn.Module):
    """y `[N, d]` -> sum of active features' activations times decoder directions; parameters `[F, d]`."""

    def __init__(self, d: int, features: int, active: int):
        super().__init__()
        self.active = active
        self.decoder = nn.Parameter(F.normalize(torch.randn(features, d), dim=1))
        self.encoder = nn.Parameter(self.decoder.detach().clone())

    def encode(self, y: Tensor) -> Codes:
        return encode(y, self.encoder, self.active)

    def forward(self, y: Tensor) -> Tensor:
        return self.encode(y).dense(len(self.decoder)) @ self.decoder


def train(data: Tensor, *, features: int, active: int, steps: int) -> TopKSAE:
    """Fit an autoencoder to the rows of data `[N, d]` by least squares; decoder directions have norm 1."""
    sae = TopKSAE(data.shape[1], features, active)
    optimizer = torch.optim.Adam(sae.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        batch = data[torch.randint(len(data), (BATCH,))]
        loss = F.mse_loss(sae(batch), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            sae.decoder.copy_(F.normalize(sae.decoder, dim=1))
    return sae.requires_grad_(False)


def unexplained(sae: TopKSAE, y: Tensor) -> float:
    """The share of the variance of y `[N, d]` that the autoencoder misses."""
    return ((sae(y) - y).square().sum() / (y - y.mean(0)).square().sum()).item()
