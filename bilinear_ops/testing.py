"""How correctness is judged, for our tests and for anyone adding an op: errors, layouts, poisoned memory.

An implementation is right when its distance to the reference in float64 is no worse than eager PyTorch's own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SIZES = (1, 17, 64, 65, 130)
PAD = 64  # elements of NaN on each side of a guarded tensor


def shapes(names: str, base: int = 17, mixed: int = 10, sizes: Sequence[int] = SIZES) -> Iterator[dict[str, int]]:
    """Sizes for the named dimensions: one at a time over `sizes`, the others at `base`, then `mixed` drawn ones."""
    dims = names.split()
    for dim, n in itertools.product(dims, sizes):
        yield {**dict.fromkeys(dims, base), dim: n}
    draw = torch.Generator().manual_seed(0)
    for _ in range(mixed):
        picks = torch.randint(len(sizes), (len(dims),), generator=draw).tolist()
        yield {dim: sizes[i] for dim, i in zip(dims, picks, strict=True)}


def randn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, **options: Any) -> Tensor:
    """A normal tensor, drawn in fp32 and then rounded, so that every dtype sees the same numbers up to rounding."""
    requires_grad = options.pop("requires_grad", False)
    return (scale * torch.randn(shape, dtype=torch.float32, **options)).to(dtype).requires_grad_(requires_grad)


def assert_no_worse(out: Tensor, eager: Tensor, gold: Tensor, what: str = "result") -> None:
    """`out` is at most twice as far from `gold` (float64) as `eager`, the same formula at the same dtype, plus one
    rounding unit: in the largest error and in the root mean square, both relative to the scale of `gold`."""
    assert out.shape == gold.shape, f"{what}: shape {list(out.shape)}, expected {list(gold.shape)}"
    assert out.dtype == eager.dtype, f"{what}: dtype {out.dtype}, expected {eager.dtype}"
    if not gold.numel():
        return
    assert out.isfinite().all() or not gold.isfinite().all(), f"{what}: not finite"
    unit = torch.finfo(out.dtype).eps
    ours, theirs = out.double() - gold, eager.double() - gold
    for name, norm in (("largest error", _largest), ("rms error", _rms)):
        bound = 2 * norm(theirs) + unit * norm(gold)
        assert norm(ours) <= bound, f"{what}: {name} {norm(ours):.3g}, bound {bound:.3g} (eager {norm(theirs):.3g})"


def _largest(t: Tensor) -> float:
    return t.abs().max().item()


def _rms(t: Tensor) -> float:
    return t.square().mean().sqrt().item()


def gradients(fn: Callable[..., Tensor], tensors: Sequence[Tensor | None], dy: Tensor) -> list[Tensor]:
    """[fn(*tensors), the gradients of every tensor given], from fresh leaves with the layouts of `tensors`."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y = fn(*leaves)
    return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], dy)]


def layout(t: Tensor, kind: str) -> Tensor:
    """The values of a matrix in another layout: "transposed", "sliced" (rows of a wider buffer), "strided" (every
    other element), "offset" (a base that is not 16-byte aligned) or "expanded" (one row, repeated)."""
    rows, columns = t.shape
    if kind == "transposed":
        return t.t().contiguous().t()
    if kind == "sliced":
        return torch.cat([t, torch.full_like(t, math.nan)], 1)[:, :columns]
    if kind == "strided":
        return torch.stack([t, torch.full_like(t, math.nan)], 2)[:, :, 0]
    if kind == "offset":
        return torch.cat([t.new_full((1,), math.nan), t.flatten()])[1:].view(rows, columns)
    if kind == "expanded":
        return t[:1].expand(rows, columns)
    raise ValueError(f"unknown layout {kind!r}")


LAYOUTS = ("transposed", "sliced", "strided", "offset", "expanded")


def guarded(t: Tensor) -> Tensor:
    """A contiguous copy of `t` between pads of NaN, so that a read outside of it shows in the result."""
    return _between_pads(t.shape, t.dtype, t.device).copy_(t)


def _between_pads(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    raw = torch.full((math.prod(shape) + 2 * PAD,), math.nan, dtype=dtype, device=device)
    return raw[PAD : raw.numel() - PAD].view(tuple(shape))


class GuardedAllocations(TorchDispatchMode):
    """Within, every floating-point allocation is NaN between pads of NaN; `check` finds what was written outside."""

    ALLOCATIONS = ("aten::empty.memory_format", "aten::new_empty", "aten::empty_like")

    def __init__(self) -> None:
        super().__init__()
        self.allocated: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.name() not in self.ALLOCATIONS or not out.is_floating_point() or not out.numel():
            return out
        self.allocated.append(_between_pads(out.shape, out.dtype, out.device))
        return self.allocated[-1]

    def check(self) -> None:
        """Raise AssertionError where a pad was written."""
        for t in self.allocated:
            raw = t.as_strided((t.numel() + 2 * PAD,), (1,), 0)
            pads = torch.cat([raw[:PAD], raw[-PAD:]])
            assert pads.isnan().all(), f"{int((~pads.isnan()).sum())} elements written outside a {list(t.shape)} output"
