"""Stochastic masks and the counter-based uniforms behind them: splitmix64 with random access (docs/math.md 3; [SPD]).

splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014) started at a state gives
mix(state + (n + 1) GOLDEN) as its n-th word, so any word can be drawn alone. Three of them are nested: the seed's words
are the states of sites, a site's words those of samples, and a sample's words the draws. Word row * 2^24 + pair serves
columns 2 pair (its low half) and 2 pair + 1 (its high half) of that row, so a draw depends on seed, site, sample, row
and column alone, and no two draws of a sample share a bit, for up to 2^40 rows and 2^25 columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def stochastic_mask(
    gates: Tensor,
    *,
    samples: int = 1,
    seed: int | Tensor | None,
    sampling: str = "continuous",
    stream: int = 0,
    row_numbers: Tensor | None = None,
    column_numbers: Tensor | None = None,
) -> Tensor:
    """g + (1 - g) r with r ~ U(0, 1), or Bernoulli(1/2) for "binomial": -> [samples, ..., C], fp32 or better."""
    gates = gates.to(torch.promote_types(gates.dtype, torch.float32))
    rows = gates.shape[:-1].numel()
    numbers = row_numbers, column_numbers
    r = uniform(seed_tensor(seed, gates.device), 2 * stream, samples, rows, gates.shape[-1], *numbers)
    r = r.view(samples, *gates.shape)
    return torch.where(r >= 0.5, 1, gates) if sampling == "binomial" else gates + (1 - gates) * r


def stochastic_delta(
    shape: Any,
    *,
    samples: int = 1,
    seed: int | Tensor | None,
    device: Any = None,
    stream: int = 0,
    row_numbers: Tensor | None = None,
) -> Tensor:
    """U(0, 1) for each sample and token, from a site of their own: -> fp32 [samples, *shape]."""
    rows = torch.Size(shape).numel()
    return uniform(seed_tensor(seed, device), 2 * stream + 1, samples, rows, 1, row_numbers).view(samples, *shape)


def subset_routing(sites: int, shape: Any, *, seed: int | Tensor | None, device: Any = None, stream: int = 0) -> Tensor:
    """For each token a random subset of the sites, of 1 to `sites` of them alike likely: -> bool [sites, *shape]."""
    rows = torch.Size(shape).numel()
    u = uniform(seed_tensor(seed, device), (1 << 40) + stream, 1, rows, sites + 1)[0]
    count = (u[:, sites] * sites).long()  # less one
    ranks = u[:, :sites].argsort(stable=True, dim=1).argsort(1)
    return (ranks <= count[:, None]).t().reshape(sites, *shape)


def seed_tensor(seed: int | Tensor | None, device: Any) -> Tensor:
    """A seed as an int64 0-dim tensor; the sum, unlike `torch.full`, keeps an int symbolic under torch.compile."""
    if seed is None:
        raise TypeError("seed must be an int or an int64 tensor where masks or deltas are drawn, got None")
    if isinstance(seed, Tensor):
        return seed
    return torch.zeros((), dtype=torch.int64, device=device) + seed


def _signed(word: int) -> int:
    return word - (word >> 63 << 64)


GOLDEN = _signed(0x9E3779B97F4A7C15)
MIX_1 = _signed(0xBF58476D1CE4E5B9)
MIX_2 = _signed(0x94D049BB133111EB)
PAIR_BITS = 24


def uniform(
    seed: Tensor,
    site: int,
    samples: int,
    rows: int,
    columns: int,
    row_numbers: Tensor | None = None,
    column_numbers: Tensor | None = None,
) -> Tensor:
    """float32 [samples, rows, columns], uniform on the multiples of 2^-24 in [0, 1)."""
    row = torch.arange(rows, device=seed.device) if row_numbers is None else row_numbers.reshape(rows)
    column = torch.arange(columns, device=seed.device) if column_numbers is None else column_numbers
    states = sample_states(seed, site, samples)
    words = mix(states[:, None, None] + ((row << PAIR_BITS)[:, None] + column // 2 + 1) * GOLDEN)
    low, high = words << 32 >> 32, words >> 32
    return unit(torch.where(column % 2 == 1, high, low).to(torch.int32))


def sample_states(seed: Tensor, site: int, samples: int) -> Tensor:
    """The states [samples] of the samples of one site: seed int64 []."""
    state = mix(seed + torch.full_like(seed, site + 1) * GOLDEN)  # a tensor, whose product wraps
    return mix(state + torch.arange(1, samples + 1, device=seed.device) * GOLDEN)


def mix(word: Tensor) -> Tensor:
    """splitmix64's finaliser on int64 tensors, whose products wrap like those of unsigned words."""
    word = (word ^ _shift(word, 30)) * MIX_1
    word = (word ^ _shift(word, 27)) * MIX_2
    return word ^ _shift(word, 31)


def _shift(word: Tensor, bits: int) -> Tensor:
    """Logical shift right; `>>` repeats the sign."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)


def unit(half_words: Tensor) -> Tensor:
    """int32 -> float32 in [0, 1): the top 24 bits as a signed number, scaled and moved up; every step is exact."""
    return (half_words >> 8).to(torch.float32) * 2.0**-24 + 0.5
