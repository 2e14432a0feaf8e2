"""A one-layer transformer whose MLP is bilinear ([P] section 5) or otherwise gated, and its training."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bilinear_ops as bo

HEADS = 4
INIT = 0.02
RATE, WARM_UP, DECAY, BETAS = 3e-3, 40, 1.0, (0.9, 0.99)  # AdamW's settings; the warm-up in steps


class Transformer(nn.Module):
    """Words `[B, T]` -> logits `[B, T, V]` of the next words; embedding and unembedding share a weight."""

    def __init__(self, vocabulary: int, d: int, h: int, activation: str = "identity"):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, d)
        self.attention = Attention(d)
        self.mlp = bo.nn.GatedMLP(d, h, activation=activation)
        for weight in self.parameters():
            nn.init.normal_(weight, std=INIT)

    def forward(self, words: Tensor) -> Tensor:
        x = self.residual(words)
        return norm(x + self.mlp(norm(x))) @ self.embed.weight.t()

    def residual(self, words: Tensor) -> Tensor:
        """The residual stream before the MLP, `[B, T, d]`; the MLP reads its norm."""
        x = self.embed(words)
        return x + self.attention(norm(x))


class Attention(nn.Module):
    """Causal self-attention: `[B, T, d]` -> `[B, T, d]`."""

    def __init__(self, d: int):
        super().__init__()
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.out = nn.Linear(d, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # [B, HEADS, T, d / HEADS] each
        mixed = F.scaled_dot_product_attention(rotary(q), rotary(k), v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


def rotary(x: Tensor) -> Tensor:
    """Rotate pairs of channels of x `[..., T, c]` by angles proportional to position (Su et al. 2021)."""
    length, channels = x.shape[-2:]
    frequencies = 1e4 ** -torch.linspace(0, 1, channels // 2)
    angles = torch.outer(torch.arange(length), frequencies)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])


def train(
    model: Transformer,
    words: Tensor,
    *,
    context: int,
    batch: int,
    steps: int,
    before_step: Callable[[int], object] = lambda done: None,
) -> None:
    """Train next-word prediction; a step takes `batch` random passages of `context` words.

    `before_step` is called with the number of steps done.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY, betas=BETAS, fused=True)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARM_UP, 1.0, WARM_UP)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - WARM_UP))
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], [WARM_UP])
    window = torch.arange(context + 1)
    for step in range(1, steps + 1):
        before_step(step - 1)
        passages = words[torch.randint(len(words) - context, (batch, 1)) + window]
        loss = F.cross_entropy(model(passages[:, :-1]).flatten(0, 1), passages[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"  step {step:>3}/{steps}  loss {loss.item():.3f}", file=sys.stderr, flush=True)


@torch.no_grad()
def mean_loss(model: Transformer, words: Tensor, context: int) -> float:
    """Mean negative log likelihood of words `[N]` in nats, over passages of `context` words."""
    end = (len(words) - 1) // context * context
    inputs, targets = (words[i : i + end].view(-1, context).split(16) for i in (0, 1))
    pairs = zip(inputs, targets, strict=True)
    return sum(F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum").item() for x, y in pairs) / end
