"""Registered ops: their schema, implementation, fake and derivatives; autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

LIBRARY = torch.library.Library("bilinear_ops", "DEF")
T = TypeVar("T")


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
