"""Argument checks of the ops: types, dtypes, devices, shapes and ranges, before any work."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, SupportsFloat, SupportsIndex

import torch
from torch import Tensor

from bilinear_ops._impl import PLAIN, needs_reference
from bilinear_ops.results import SAMPLINGS, Directions

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DENSE = (torch.strided,)
OR_JAGGED = (torch.strided, torch.jagged)
STRIDED = torch.strided
PLAIN_NUMBERS = PLAIN | {float, int}


def check(layouts: tuple[torch.layout, ...] = DENSE, /, **arguments: tuple[object, str]) -> dict[str, int]:
    """Check types, dtypes, devices and shapes of an op's tensors before any work; returns the named sizes.

    Each argument is given as `(tensor, axes)`. Axes are names, bound to sizes from left to right over all arguments:
    `check(x=(x, "... d"), w=(w, "h d"), b=(b, "? h"))`. A leading `...` stands for any leading dimensions, a leading
    `?` allows None. All tensors share the dtype and the device of the first one, and have one of the layouts.

    Raises TypeError for a non-tensor or an unsupported dtype or layout, RuntimeError for a mismatched dtype, device or
    shape.
    """
    sizes: dict[str, int] = {}
    first: Tensor | None = None
    first_name = ""
    for name, (t, spec) in arguments.items():
        axes = spec.split()
        if axes[0] == "?":
            if t is None:
                continue
            axes = axes[1:]
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
        if t.dtype not in DTYPES:
            raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {t.dtype}")
        if t.layout not in layouts or t.is_nested and t.layout == torch.strided:
            nested = "nested, " if t.is_nested else ""
            raise TypeError(f"{name} must be a dense tensor, got {nested}{t.layout}")
        if first is None:
            first, first_name = t, name
        if t.dtype != first.dtype:
            raise RuntimeError(f"{name} must have the dtype of {first_name}, {first.dtype}, got {t.dtype}")
        if t.device != first.device:
            raise RuntimeError(f"{name} must be on the device of {first_name}, {first.device}, got {t.device}")
        shape = t.shape
        if axes[0] == "...":
            axes = axes[1:]
            shape = shape[max(len(shape) - len(axes), 0) :]
        fits = len(shape) == len(axes)
        for axis, n in zip(axes, shape, strict=False):
            fits = fits and sizes.setdefault(axis, n) == n
        if not fits:
            raise RuntimeError(_mismatch(name, t, arguments))
    return sizes


def is_plain_layer(
    x: Tensor,
    w: Tensor,
    v: Tensor,
    p: Tensor | None,
    b_w: Tensor | None,
    b_v: Tensor | None,
    b_p: Tensor | None,
    beta: float | Tensor,
    limit: float | Tensor | None,
    offset: float | Tensor | None,
) -> bool:
    """Whether these are dense tensors on a CPU or GPU, no subclasses, that `check` takes.

    By comparisons that cost a small call less.
    """
    if not (type(x) in PLAIN and type(w) in PLAIN and type(v) in PLAIN) or x.is_nested or w.is_nested or v.is_nested:
        return False  # nested tensors have no shape
    dtype, rows, shape = x.dtype, x.shape, w.shape
    if not (
        dtype in DTYPES and w.dtype is dtype and v.dtype is dtype
        and len(shape) == 2 and v.shape == shape and rows and rows[-1] == shape[1]
        and x.layout is STRIDED and w.layout is STRIDED and v.layout is STRIDED
        and (x.is_cpu and w.is_cpu and v.is_cpu or x.is_cuda and x.device == w.device == v.device)
        and (b_w is None or is_plain_like(b_w, x) and b_w.shape == shape[:1])
        and (b_v is None or is_plain_like(b_v, x) and b_v.shape == shape[:1])
    ):  # fmt: skip
        return False
    if p is not None:
        down = p.shape if is_plain_like(p, x) else ()
        if not (
            len(down) == 2 and down[1] == shape[0] and (b_p is None or is_plain_like(b_p, x) and b_p.shape == down[:1])
        ):
            return False
    return (
        (type(beta) is float or type(beta) in PLAIN_NUMBERS)
        and (limit is None or type(limit) in PLAIN_NUMBERS)
        and (offset is None or type(offset) in PLAIN_NUMBERS)
    )


def is_plain_like(t: Tensor, x: Tensor) -> bool:
    """Whether t is dense, no subclass, and of x's dtype and device."""
    return (
        type(t) in PLAIN
        and t.dtype is x.dtype
        and t.layout is STRIDED
        and not t.is_nested
        and (t.is_cpu and x.is_cpu or t.device == x.device)
    )


def _mismatch(name: str, t: Tensor, arguments: dict[str, tuple[object, str]]) -> str:
    """What the shape of an argument should be, and which arguments before it say so."""
    sizes: dict[str, int] = {}
    owner: dict[str, str] = {}
    for other, (before, spec) in arguments.items():
        axes = spec.lstrip("? ").split()
        if other == name:
            break
        if isinstance(before, Tensor):
            named = [axis for axis in axes if axis != "..."]
            for axis, n in zip(named, before.shape[before.dim() - len(named) :], strict=True):
                sizes.setdefault(axis, n)
                owner.setdefault(axis, other)
    expected = ", ".join(f"{axis}={sizes[axis]}" if axis in sizes else axis for axis in axes)
    origin = "".join(f"; {axis} is that of {owner[axis]}" for axis in axes if axis in owner)
    return f"{name} must have shape [{expected}], got {list(t.shape)}{origin}"


def check_integers(**arguments: object) -> None:
    """Raise TypeError unless all of these are integers of some kind, bools not among them."""
    for name, n in arguments.items():
        if not is_integer(n):
            raise TypeError(f"{name} must be an int, got {type(n).__name__}")


def is_integer(n: object) -> bool:
    """Whether n is an int, a symbolic one or numpy's; a tensor is none, for reading it would wait for its device."""
    if isinstance(n, int | torch.SymInt):
        return not isinstance(n, bool)
    if isinstance(n, Tensor) or not hasattr(n, "__index__"):
        return False
    try:  # numpy's bool has an index that raises
        operator.index(n)
    except TypeError:
        return False
    return True


def check_sizes(**arguments: object) -> None:
    """Raise TypeError unless all of these are integers, ValueError for a negative one."""
    check_integers(**arguments)
    for name, n in arguments.items():
        if n < 0:  # type: ignore[operator]
            raise ValueError(f"{name} must not be negative, got {n}")


def check_shape(shape: object) -> tuple[int, ...]:
    """The sizes of a shape; TypeError unless it is a sequence of integers, ValueError for a negative one."""
    if not isinstance(shape, Sequence) or isinstance(shape, str | bytes):
        raise TypeError(f"shape must be a sequence of ints, got {type(shape).__name__}")
    check_sizes(**{f"shape[{i}]": n for i, n in enumerate(shape)})
    return tuple(shape)


def check_reals(*, positive: bool = False, **arguments: object) -> None:
    """Raise TypeError unless all of these are real numbers, bools not among them, or 0-dim floating-point tensors.

    ValueError for NaN and, if `positive`, for a number that is not above 0; the values of tensors are not read.
    """
    for name, n in arguments.items():
        if isinstance(n, Tensor):
            if not n.is_floating_point():
                raise TypeError(f"{name} must be a floating-point tensor, got {n.dtype}")
            if n.dim() != 0:
                raise RuntimeError(f"{name} must be a number or have shape [], got {list(n.shape)}")
            continue
        if isinstance(n, bool) or not isinstance(n, float | int | torch.SymFloat | torch.SymInt | SupportsFloat):
            raise TypeError(f"{name} must be a number, got {type(n).__name__}")
        if n != n:
            raise ValueError(f"{name} must be a number, got nan")
        if positive and not n > 0:  # type: ignore[operator]
            raise ValueError(f"{name} must be above 0, got {n}")


def check_values(**tensors: Tensor) -> None:
    """Raise RuntimeError for tensors on the meta device, which have no values to look at."""
    for name, t in tensors.items():
        if t.is_meta:
            raise RuntimeError(f"{name} must have values, got a meta tensor")


def check_finite(**tensors: Tensor) -> None:
    """Raise ValueError for NaN and infinite entries, where an algorithm would not end or LAPACK would refuse."""
    check_values(**tensors)
    for name, t in tensors.items():
        if not t.isfinite().all():
            raise ValueError(f"{name} must be finite")


def check_beside(first: Tensor, **arguments: tuple[object, tuple[int, ...]]) -> None:
    """Check tensors that act on `first` in a float dtype of their own: masks, gates, deltas.

    Each argument is given as `(tensor, shape)`, and must be None or broadcast to the shape on the device of `first`.

    Raises TypeError for a non-tensor or an unsupported dtype, RuntimeError for a mismatched device or shape.
    """
    for name, (t, shape) in arguments.items():
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
        if t.dtype not in DTYPES:
            raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {t.dtype}")
        check_place(name, t, first, shape)


def check_place(name: str, t: Tensor, first: Tensor, shape: tuple[int, ...]) -> None:
    """Raise RuntimeError unless `t` is on the device of `first` and broadcasts to `shape`, TypeError unless dense."""
    if t.layout not in DENSE:
        raise TypeError(f"{name} must be a dense tensor, got {t.layout}")
    if t.device != first.device:
        raise RuntimeError(f"{name} must be on the device of the other tensors, {first.device}, got {t.device}")
    if t.dim() > len(shape) or any(
        n not in (1, expected) for n, expected in zip(t.shape[::-1], shape[::-1], strict=False)
    ):
        raise RuntimeError(f"{name} must broadcast to {list(shape)}, got {list(t.shape)}")


def check_layer(w: Tensor, v: Tensor, c: Tensor | Directions, basis: Tensor | None = None) -> dict[str, int]:
    """Check what most interaction ops take; returns the sizes h, d, K, with a basis F, with factors o."""
    arguments: dict[str, tuple[object, str]] = {"w": (w, "h d"), "v": (v, "h d")}
    if isinstance(c, Directions):
        arguments.update({"c.u": (c.u, "K o"), "c.p": (c.p, "o h")})
    else:
        arguments["c"] = (c, "K h")
    return check(**arguments, basis=(basis, "? d F"))


def check_index(name: str, index: Tensor, limit: int, shape: tuple[int | None, ...], like: Tensor) -> None:
    """Check an index tensor's dtype, device, shape (None is any size) and, where its values can be read, its range."""
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        got = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"{name} must be an int64 tensor, got {got}")
    if index.layout not in DENSE:
        raise TypeError(f"{name} must be a dense tensor, got {index.layout}")
    if index.device != like.device:
        raise RuntimeError(f"{name} must be on the device of w, {like.device}, got {index.device}")
    if index.dim() != len(shape) or any(n not in (None, got) for n, got in zip(shape, index.shape, strict=True)):
        sizes = ", ".join("any" if n is None else str(n) for n in shape)
        raise RuntimeError(f"{name} must have shape [{sizes}], got {list(index.shape)}")
    if torch.compiler.is_compiling() or needs_reference() or index.device.type == "meta":
        return
    if index.numel() and (index.min() < 0 or index.max() >= limit):
        raise IndexError(f"{name} must be at least 0 and below {limit}, got {index.min()} to {index.max()}")


def check_sampling(samples: int, sampling: str) -> None:
    if sampling not in SAMPLINGS:
        raise ValueError(f"sampling must be one of {', '.join(SAMPLINGS)}, got {sampling!r}")
    check_integers(samples=samples)
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")


def check_seed(seed: object, device: torch.device) -> Tensor:
    """The seed as an int64 0-dim tensor."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed must be an int or an int64 tensor, got {seed.dtype}")
        if seed.dim() != 0:
            raise RuntimeError(f"seed must be an int or have shape [], got {list(seed.shape)}")
        if seed.device != device:
            raise RuntimeError(f"seed must be on the device of the gates, {device}, got {seed.device}")
        return seed
    if not isinstance(seed, int | torch.SymInt | SupportsIndex) or not is_integer(seed):
        raise TypeError(f"seed must be an int or an int64 tensor where numbers are drawn, got {type(seed).__name__}")
    number: Any = seed if isinstance(seed, int | torch.SymInt) else operator.index(seed)
    return (
        torch.zeros((), dtype=torch.int64, device=device) + number
    )  # unlike `torch.full`, symbolic under torch.compile
