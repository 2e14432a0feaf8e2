"""The uniforms of `reference.uniform`, a block at a time: the words stay in cache and nothing else is held."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bilinear_ops.reference.uniform import GOLDEN, MIX_1, MIX_2, PAIR_BITS, sample_states

# words a block: 256 KiB and as much scratch stay in a core's second-level cache; other devices want few launches
BLOCK = 1 << 15
DEVICE_BLOCK = 1 << 24


def uniform(seed: Tensor, site: int, samples: int, rows: int, columns: int) -> Tensor:
    """float32 [samples, rows, columns], uniform on the multiples of 2^-24 in [0, 1)."""
    out = torch.empty(samples, rows, columns, device=seed.device)
    for sample, state in zip(out, sample_states(seed, site, samples), strict=True):
        for block, u in uniform_blocks(state, 0, rows, columns):
            sample[block] = u
    return out


def uniform_blocks(state: Tensor, start: int, stop: int, columns: int) -> Iterator[tuple[slice, Tensor]]:
    """Rows start to stop of one sample, a few at a time: (their slice, float32 [rows, columns]).

    Every block lies in the same memory, which the caller may write until it asks for the next one.
    """
    pairs = (columns + 1) // 2
    if pairs == 0:
        return
    block = BLOCK if state.device.type == "cpu" else DEVICE_BLOCK
    height = min(max(block // pairs, 1), max(stop - start, 1))
    offsets = torch.arange(1, pairs + 1, device=state.device) * GOLDEN + state  # [pairs]
    words, scratch = torch.empty(2, height, pairs, dtype=torch.int64, device=state.device)
    u = torch.empty(height, 2 * pairs, device=state.device)
    for first in range(start, stop, height):
        n = min(height, stop - first)
        row = (torch.arange(first, first + n, device=state.device) << PAIR_BITS) * GOLDEN
        torch.add(row[:, None], offsets, out=words[:n])
        _mix_(words[:n], scratch[:n])
        torch.bitwise_right_shift(words[:n].view(torch.int32), 8, out=scratch[:n].view(torch.int32))
        yield slice(first, first + n), u[:n].copy_(scratch[:n].view(torch.int32)).mul_(2.0**-24).add_(0.5)[:, :columns]


def _mix_(words: Tensor, scratch: Tensor) -> None:
    for bits, factor in ((30, MIX_1), (27, MIX_2), (31, None)):
        torch.bitwise_right_shift(words, bits, out=scratch)
        words.bitwise_xor_(scratch.bitwise_and_((1 << (64 - bits)) - 1))
        if factor is not None:
            words.mul_(factor)
