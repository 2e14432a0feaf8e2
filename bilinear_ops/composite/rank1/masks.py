"""The draws of stochastic masks, a block at a time: the words stay in cache and nothing else is held.

The numbers are those of `bilinear_ops.reference.rank1.masks`, whose docstring says how a word follows from its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bilinear_ops.composite.blockwise import blocks, items_per_block
from bilinear_ops.composite.limits import limits

# splitmix64's constants as signed 64-bit words
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
MIX_2 = 0x94D049BB133111EB - (1 << 64)
UPPER = 0xFFFFFF00FFFFFF00 - (1 << 64)  # the upper 24 bits of each half of a word: float32 holds them exactly
CPU = torch.device("cpu")
HALF = torch.tensor(0.5, dtype=torch.float32, device=CPU)
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


def sample_states(seed: int | Tensor, site: int, samples: int) -> Sequence[int | Tensor]:
    """The states of the samples of one site: seed int64 [], or on CPU an int."""
    if isinstance(seed, int) or seed.device.type == "cpu":
        # a few numbers: Python's arithmetic takes less than the calls
        first = _mixed(int(seed) + (site + 1) * GOLDEN)
        words = [_mixed(first + sample * GOLDEN) for sample in range(1, samples + 1)]
        return [word - (word >> 63 << 64) for word in words]
    state = seed + torch.full_like(seed, site + 1) * GOLDEN  # a tensor, whose product wraps
    _mix_(state, torch.empty_like(state))
    states = state + torch.arange(1, samples + 1, device=seed.device) * GOLDEN
    _mix_(states, torch.empty_like(states))
    return states.unbind()


def uniform(
    seed: int | Tensor,
    site: int,
    samples: int,
    rows: int,
    columns: int,
    row_numbers: Tensor | None = None,
    column_numbers: Tensor | None = None,
) -> Tensor:
    """float32 [samples, rows, columns] on the seed's device, uniform on the multiples of 2^-24 in [0, 1)."""
    out, device = None, seed.device if isinstance(seed, Tensor) else CPU
    for sample, state in enumerate(sample_states(seed, site, samples)):
        for block, u in uniform_blocks(state, device, 0, rows, columns, row_numbers, column_numbers):
            if samples == 1 and u.shape[0] == rows and u.is_contiguous():
                return u.unsqueeze(0)  # all of it, in memory of its own
            if out is None:
                out = u.new_empty(samples, rows, columns)
            out[sample, block] = u
    return torch.empty(samples, rows, columns, dtype=torch.float32, device=device) if out is None else out


def uniform_blocks(
    state: int | Tensor,
    device: torch.device,
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
        pairs = torch.arange(1, words_a_row + 1, device=device)
    else:  # in any order, so a word each, of which one half is used
        words_a_row = columns
        pairs = column_numbers // 2 + 1
    if words_a_row == 0:
        return
    budget = limits.draws if device.type == "cpu" else limits.device_draws
    height = min(items_per_block(words_a_row, budget), max(stop - start, 1))
    offsets = pairs * GOLDEN + state  # [words]
    words = torch.empty(height, words_a_row, dtype=torch.int64, device=device)
    drawn = 2 * words_a_row if column_numbers is None else columns
    u = torch.empty(height, drawn, dtype=torch.float32, device=device)
    # in the place of u where both halves of a word are used: fewer bytes stay in cache
    scratch = u.view(torch.int64) if column_numbers is None else torch.empty_like(words)
    for a, b in blocks(stop - start, words_a_row, budget):
        first, n = start + a, b - a
        if n < height:
            words, scratch, u = words[:n], scratch[:n], u[:n]
        if row_numbers is None:
            row = torch.arange(first, first + n, device=device)
        else:
            row = row_numbers[first : first + n]
        torch.add(offsets, row[:, None], alpha=ROW, out=words)
        _mix_(words, scratch)
        if column_numbers is not None:  # the half of an odd column moves down
            torch.bitwise_right_shift(words, 32 * (column_numbers % 2), out=words)
        halves = words.bitwise_and_(UPPER).view(torch.int32)
        if column_numbers is not None:
            halves = halves[:, ::2]
        yield slice(first, first + n), torch.add(HALF, u.copy_(halves), alpha=2.0**-32, out=u)[:, :columns]


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
