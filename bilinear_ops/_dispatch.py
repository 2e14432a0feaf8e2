"""What every op shares on its way in: argument checks, the choice of an implementation, autocast, registration."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("bilinear_ops", "DEF")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
T = TypeVar("T")

HAS_TRITON = importlib.util.find_spec("triton") is not None


def check(**arguments: tuple[object, str]) -> dict[str, int]:
    """Check types, dtypes, devices and shapes of an op's tensors before any work; returns the named sizes.

    Each argument is given as `(tensor, axes)`. Axes are names, bound to sizes from left to right over all arguments:
    `check(x=(x, "... d"), w=(w, "h d"), b=(b, "? h"))`. A leading `...` stands for any leading dimensions, a leading
    `?` allows None. All tensors share the dtype and the device of the first one.

    Raises TypeError for a non-tensor or an unsupported dtype, RuntimeError for a mismatched dtype, device or shape.
    """
    sizes: dict[str, int] = {}
    owner: dict[str, str] = {}  # which argument a size is that of
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
        if first is None:
            first, first_name = t, name
        if t.dtype != first.dtype:
            raise RuntimeError(f"{name} must have the dtype of {first_name}, {first.dtype}, got {t.dtype}")
        if t.device != first.device:
            raise RuntimeError(f"{name} must be on the device of {first_name}, {first.device}, got {t.device}")
        shape: tuple[int, ...] = tuple(t.shape)
        if axes[0] == "...":
            axes = axes[1:]
            shape = shape[max(len(shape) - len(axes), 0) :]
        bound = dict(sizes)
        if len(shape) != len(axes) or any(sizes.setdefault(axis, n) != n for axis, n in zip(axes, shape, strict=True)):
            named = (f"{axis}={bound[axis]}" if axis in bound else axis for axis in spec.lstrip("? ").split())
            origin = "".join(f"; {axis} is that of {owner[axis]}" for axis in axes if axis in owner)
            raise RuntimeError(f"{name} must have shape [{', '.join(named)}], got {list(t.shape)}{origin}")
        for axis in axes:
            owner.setdefault(axis, name)
    return sizes


def check_integers(**arguments: object) -> None:
    """Raise TypeError unless all of these are integers of some kind, bools not among them."""
    for name, n in arguments.items():
        if not hasattr(n, "__index__") or isinstance(n, bool):
            raise TypeError(f"{name} must be an int, got {type(n).__name__}")


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
    """Raise RuntimeError unless `t` is on the device of `first` and broadcasts to `shape`."""
    if t.device != first.device:
        raise RuntimeError(f"{name} must be on the device of the other tensors, {first.device}, got {t.device}")
    if t.dim() > len(shape) or any(
        n not in (1, expected) for n, expected in zip(t.shape[::-1], shape[::-1], strict=False)
    ):
        raise RuntimeError(f"{name} must broadcast to {list(shape)}, got {list(t.shape)}")


def why_not_triton(t: Tensor) -> str | None:
    """Why the Triton kernels cannot run on `t`, or None where they can."""
    if t.dtype == torch.float64:
        return "float64 has no kernels"
    if not HAS_TRITON:
        return "triton is not installed"
    if t.device.type == "cpu":
        return None if _interpreted() else "CPU tensors need TRITON_INTERPRET=1"
    if t.device.type != "cuda":
        return f"no kernels for device {t.device.type}"
    properties = torch.cuda.get_device_properties(t.device)
    if torch.version.hip is None:
        return None if properties.major >= 8 else "the kernels need compute capability 8.0 or newer"
    if not properties.gcnArchName.startswith("gfx942"):
        return f"the kernels are built for gfx942, not {properties.gcnArchName}"
    return None


def _interpreted() -> bool:
    """Whether Triton would interpret a kernel that is defined now: its reading of the variable, which torch.compile
    cannot trace."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def resolve(impl: str, t: Tensor) -> str:
    """The implementation, "triton" or "torch", that `impl` stands for on `t`.

    "auto" is Triton on CUDA and HIP tensors where it can run, else the composite; an explicit "triton" runs or raises.
    """
    if impl == "torch":
        return impl
    if impl not in ("auto", "triton"):
        raise ValueError(f'impl must be "auto", "triton" or "torch", got {impl!r}')
    if impl == "auto" and t.device.type != "cuda":
        return "torch"
    reason = why_not_triton(t)
    if reason is None:
        return "triton"
    if impl == "triton":
        raise RuntimeError(f'impl="triton" cannot run: {reason}')
    return "torch"


@functools.cache
def backend(family: str, impl: str) -> Any:
    """What implements a family of ops: its launchers, imported at the first call, or its composites."""
    return importlib.import_module(f"bilinear_ops.{'kernels' if impl == 'triton' else 'composite'}.{family}")


def needs_reference() -> bool:
    """True inside torch.func transforms and forward-mode AD, which see a registered op's tangent as zero."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors as `torch.nn.functional.linear` would see them under the caller's autocast."""
    first = tensors[0]
    kind = first.device.type if isinstance(first, Tensor) else "meta"
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def without_autocast(f: Callable[..., T]) -> Callable[..., T]:
    """f in the precision of its arguments, whatever the caller's autocast: its sums cancel too much for a cast."""

    @functools.wraps(f)
    def wrapped(*args: Any, **options: Any) -> T:
        kinds = [a.device.type for a in (*args, *options.values()) if isinstance(a, Tensor)]
        if not kinds or kinds[0] == "meta" or not torch.is_autocast_enabled(kinds[0]):
            return f(*args, **options)
        with torch.autocast(kinds[0], enabled=False):
            return f(*args, **options)

    return wrapped


def register(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define an opaque op with one implementation for all devices and its fake; returns the callable overload.

    `kernel` runs with autocast off: the wrapper has already cast what autocast casts.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
    LIBRARY.impl(name, without_autocast(kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"bilinear_ops::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.bilinear_ops, name).default


def or_empty(t: Tensor | None, like: Tensor) -> Tensor:
    """What an op returns where nobody needs a result: a tensor always, no two of them the same."""
    return like.new_empty(0) if t is None else t


def register_autograd(op: Any, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Give an op its derivative; `backward` and `setup_context` as in `torch.library.register_autograd`.

    That function walks the schema on every call, which costs a small layer more than its arithmetic. `backward` runs
    with autocast off, as the op did.
    """

    class Formula(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                out = op(*args)
            setup_context(ctx, args, out)
            return out

    Formula.backward = staticmethod(without_autocast(backward))  # type: ignore[method-assign]

    def autograd(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return Formula.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    LIBRARY.impl(op._schema.name, autograd, "Autograd")


def differentiable_gradients(
    f: Callable[..., Tensor], tensors: Sequence[Tensor | None], need: Sequence[bool], gradient: Tensor
) -> list[Tensor | None]:
    """The needed gradients of f(*tensors) with a graph of their own: what a backward returns under create_graph."""
    with torch.enable_grad():
        # views, so that a tensor computed from another argument is not differentiated through
        views = [None if t is None else t.view_as(t) for t in tensors]
        wanted = [t for t, needed in zip(views, need, strict=True) if needed and t is not None]
        found = iter(torch.autograd.grad(f(*views), wanted, gradient, create_graph=True))
    return [next(found) if needed else None for needed in need]
