"""The draws of stochastic masks, a block at a time: the words stay in cache and nothing else is held.

The numbers are those of `bilinear_ops.reference.rank1.masks`, whose docstring says how a word follows from its place.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bilinear_ops.composite.blockwise import blocks, items_per_block
from bilinear_ops.composite.limits import limits

# splitmix64's constants as signed 64-bit words
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
MIX_2 = 0x94D049BB133111EB - (1 << 64)
PAIR_BITS = 24
ROW = ((GOLDEN << PAIR_BITS) + (1 << 63)) % (1 << 64) - (1 << 63)  # what a row adds to a word


def mask_site(stream: int) -> int:
    """The site that draws the masks of a stream."""
    return 2 * stream


def delta_site(stream: int) -> int:
    """The site that draws the deltas of a stream."""
    return 2 * stream + 1


def routing_site(stream: int) -> int:
    """The site that draws the subsets of a stream, past those of any other."""
    return (1 << 40) + stream


def blend(gates: Tensor, r: Tensor) -> Tensor:
    """g + (1 - g) r, each operation rounded."""
    return gates + (1 - gates) * r


def sample_states(seed: Tensor, site: int, samples: int) -> Tensor:
    """The states [samples] of the samples of one site: seed int64 []."""
    if seed.device.type == "cpu":  # a few numbers: Python's arithmetic takes less than the calls
        first = _mixed(int(seed) + (site + 1) * GOLDEN)
        words = [_mixed(first + sample * GOLDEN) for sample in range(1, samples + 1)]
        return torch.tensor([word - (word >> 63 << 64) for word in words], dtype=torch.int64)
    state = seed + torch.full_like(seed, site + 1) * GOLDEN  # a tensor, whose product wraps
    _mix_(state, torch.empty_like(state))
    states = state + torch.arange(1, samples + 1, device=seed.device) * GOLDEN
    _mix_(states, torch.empty_like(states))
    return states


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
    states = sample_states(seed, site, samples)
    out = torch.empty(samples, rows, columns, dtype=torch.float32, device=seed.device)
    for sample in range(samples):
        for block, u in uniform_blocks(states[sample], 0, rows, columns, row_numbers, column_numbers):
            if samples == 1 and u.shape[0] == rows and u.is_contiguous():
                return u.unsqueeze(0)  # all of it, in memory of its own
            out[sample, block] = u
    return out


def uniform_blocks(
    state: Tensor,
    start: int,
    stop: int,
    columns: int,
    row_numbers: Tensor | None = None,
    column_numbers: Tensor | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """Rows start to stop of one sample, a few at a time: (their slice, float32 [rows, columns]).

    Where numbers of all rows or of the columns are given, the draws are those at these numbers. Every block lies in
    the same memory, which the caller may write until it asks for the next one.
    """
    if column_numbers is None:
        words_a_row = (columns + 1) // 2
        pairs = torch.arange(1, words_a_row + 1, device=state.device)
    else:  # in any order, so a word each, of which one half is used
        words_a_row = columns
        pairs = column_numbers // 2 + 1
    if words_a_row == 0:
        return
    budget = limits.draws if state.device.type == "cpu" else limits.device_draws
    height = min(items_per_block(words_a_row, budget), max(stop - start, 1))
    offsets = pairs * GOLDEN + state  # [words]
    words = torch.empty(height, words_a_row, dtype=torch.int64, device=state.device)
    scratch = torch.empty_like(words)
    drawn = 2 * words_a_row if column_numbers is None else columns
    u = torch.empty(height, drawn, dtype=torch.float32, device=state.device)
    for a, b in blocks(stop - start, words_a_row, budget):
        first, n = start + a, b - a
        if n < height:
            words, scratch, u = words[:n], scratch[:n], u[:n]
        if row_numbers is None:
            row = torch.arange(first, first + n, device=state.device)
        else:
            row = row_numbers[first : first + n]
        torch.add((row * ROW)[:, None], offsets, out=words)
        _mix_(words, scratch)
        if column_numbers is not None:  # the half of an odd column moves down
            torch.bitwise_right_shift(words, 32 * (column_numbers % 2), out=words)
        halves = scratch.view(torch.int32)
        torch.bitwise_right_shift(words.view(torch.int32), 8, out=halves)
        if column_numbers is not None:
            halves = halves[:, ::2]
        yield slice(first, first + n), u.copy_(halves).mul_(2.0**-24).add_(0.5)[:, :columns]


def _mixed(word: int) -> int:
    """`_mix_` of one word, as an integer from 0 to 2^64 - 1."""
    word %= 1 << 64
    for bits, factor in ((30, MIX_1), (27, MIX_2), (31, 1)):
        word = (word ^ word >> bits) * factor % (1 << 64)
    return word


def _mix_(words: Tensor, scratch: Tensor) -> None:
    for bits, factor in ((30, MIX_1), (27, MIX_2), (31, None)):
        torch.bitwise_right_shift(words, bits, out=scratch)
        words.bitwise_xor_(scratch.bitwise_and_((1 << (64 - bits)) - 1))
        if factor is not None:
            words.mul_(factor)
