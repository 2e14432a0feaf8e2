"""Compiling and tuning ahead of use. What tuning is: `kernels/tuning.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from bilinear_ops import _impl


def warmup(
    op: Callable[..., Any],
    *arguments: Any,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cuda",
    backward: bool = True,
    tune: bool = False,
    **options: Any,
) -> None:
    """Call `op` once on random tensors, so that later calls at these shapes find their kernels compiled.

    `bo.warmup(bo.gated_mlp, (4096, 512), (2048, 512), (2048, 512), (512, 2048), dtype=torch.bfloat16)`

    Args:
        op: a function of this package.
        arguments, options: its arguments, with a shape, a tuple of ints, in place of each floating-point tensor;
            everything else, tensors among it, is passed on as it is.
        dtype, device: of the random tensors.
        backward: run the backward as well, where the op has one.
        tune: measure the candidate tiles of every kernel on the way, as BILINEAR_OPS_TUNE=1 would at first use, and
            use the fastest from then on in this process.

    Raises:
        RuntimeError: a device that is not there; tune=True where the kernels cannot run; and what `op` raises.
    """
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"warmup needs the device that later calls run on, got {device}, and PyTorch finds no GPU")
    generator = torch.Generator(device).manual_seed(0)

    def drawn(argument: Any) -> Any:
        if not isinstance(argument, tuple):
            return argument
        if not all(isinstance(n, int) for n in argument):
            parts = tuple(map(drawn, argument))
            return type(argument)(*parts) if hasattr(argument, "_fields") else parts  # Directions, or a plain tuple
        t = torch.randn(argument, generator=generator, device=device).to(dtype)
        return t.requires_grad_(backward)

    tensors = [drawn(argument) for argument in arguments]
    named = {name: drawn(option) for name, option in options.items()}
    with _measuring(torch.empty(0, dtype=dtype, device=device)) if tune else nullcontext():
        outputs = [t for t in _tensors(op(*tensors, **named)) if t.requires_grad]
        leaves = [t for t in _tensors((*tensors, *named.values())) if t.requires_grad]
        if backward and outputs:
            torch.autograd.grad(outputs, leaves, [torch.ones_like(t) for t in outputs], allow_unused=True)


def cache_folder() -> str | None:
    """Where tuned choices are kept; None without triton, which tunes nothing."""
    if not _impl.HAS_TRITON:
        return None
    from bilinear_ops.kernels import tuning

    return str(tuning.folder())


def _measuring(t: Tensor) -> AbstractContextManager[None]:
    reason = _impl.why_not_triton(t)
    if reason is not None:
        raise RuntimeError(f"tune=True cannot run: {reason}")
    from bilinear_ops.kernels import tuning

    return tuning.measuring()


def _tensors(found: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples and lists."""
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, tuple | list):
        for part in found:
            yield from _tensors(part)
