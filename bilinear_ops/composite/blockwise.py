"""Large intermediates one block at a time, differentiable to any order without keeping them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

BLOCK = 1 << 21  # elements of the largest intermediate of a block: 8 MB in fp32


def blocks(total: int, per_item: int, budget: int = BLOCK) -> Iterator[tuple[int, int]]:
    """Ranges that cover 0:total, of as many items as fit the budget at `per_item` elements each, but at least one."""
    step = max(1, budget // max(1, per_item))
    for start in range(0, total, step):
        yield start, min(start + step, total)


def recompute(f: Callable[..., Tensor], *args: Any) -> Tensor:
    """f(*args), whose intermediates are computed again in backward instead of being saved."""
    if not torch.is_grad_enabled() or not any(isinstance(a, Tensor) and a.requires_grad for a in args):
        return f(*args)
    from torch.utils.checkpoint import checkpoint

    return checkpoint(f, *args, use_reentrant=False, preserve_rng_state=False)


def widen(*tensors: Any) -> tuple[Any, ...]:
    """Half-precision tensors as float32, everything else as it is."""
    return tuple(
        t.float() if isinstance(t, Tensor) and t.dtype in (torch.bfloat16, torch.float16) else t for t in tensors
    )
