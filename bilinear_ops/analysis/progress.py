"""Progress bars of long computations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def progress_bar(total: int, unit: str, show: bool) -> Iterator[Callable[[int], object]]:
    """A function that advances a bar by some units; it does nothing unless `show`.

    The first of many ranks shows the bar. It is closed at the end, and at an error or an interrupt as well.

    Raises ModuleNotFoundError if the bar is to be shown and tqdm is missing.
    """
    if not show:
        yield lambda n: None
        return
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("progress=True needs tqdm: pip install tqdm") from error
    bar = tqdm(total=total, unit=unit, disable=rank() > 0)
    try:
        yield bar.update
    finally:
        bar.close()


def rank() -> int:
    """This process's number among all, 0 where it is alone."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if together else 0
