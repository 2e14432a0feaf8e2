"""A bar over what is done."""

from __future__ import annotations

from typing import Any

import torch


def bar(total: int, unit: str) -> Any:
    """A tqdm bar, shown by the first of many ranks; raises ModuleNotFoundError without tqdm."""
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("progress=True needs tqdm: pip install tqdm") from error
    return tqdm(total=total, unit=unit, disable=rank() > 0)


def rank() -> int:
    """This process's number among all, 0 where it is alone."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if together else 0
