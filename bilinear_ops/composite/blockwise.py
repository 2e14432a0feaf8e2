"""Large intermediates one block at a time, differentiable to any order without keeping them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bilinear_ops.composite.limits import limits


def blocks(total: int, per_item: int, budget: int | None = None) -> Iterator[tuple[int, int]]:
    """Ranges that cover 0:total, of `items_per_block` items each but the last."""
    step = items_per_block(per_item, budget)
    for start in range(0, total, step):
        yield start, min(start + step, total)


def items_per_block(per_item: int, budget: int | None = None) -> int:
    """As many items as fit the budget at `per_item` elements each, but at least one; without it `limits.block`."""
    return max(1, (limits.block if budget is None else budget) // max(1, per_item))


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
