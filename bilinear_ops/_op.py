"""Registered ops: their schema, implementation, fake and derivatives; autocast."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from bilinear_ops import _flops, _impl

RELOADED = "{} cannot be reloaded: PyTorch registers an op once in a process; start a new one"

if "OPS" in globals():  # as importlib.reload leaves them
    raise RuntimeError(RELOADED.format(__name__))
OPS = torch.library.Library("bilinear_ops", "DEF")
T = TypeVar("T")
AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality  # of all devices

# What a differentiable op does, by the op, for calls past the dispatcher.
_direct: dict[Any, Callable[..., Any]] = {}


def register(
    schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], flops: _flops.Formula | None = None
) -> Any:
    """Define an opaque op with one implementation for all devices and its fake; returns the callable overload.

    `kernel` runs with autocast off: the wrapper has already cast what autocast casts. `flops` counts the products from
    the op's arguments; without it there are none.
    """
    name = schema.partition("(")[0]
    if hasattr(torch.ops.bilinear_ops, name):
        raise RuntimeError(RELOADED.format(kernel.__module__))
    OPS.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
    OPS.impl(name, without_autocast(kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"bilinear_ops::{name}", fake, lib=OPS)
    op = getattr(torch.ops.bilinear_ops, name).default
    if flops is not None:
        _flops.add(op, flops)
    return op


class Signature(NamedTuple):
    """How the arguments of a differentiable op are divided: differentiable tensors, other tensors, options."""

    names: tuple[str, ...]
    inputs: int  # differentiable tensors
    tensors: int  # these and the other tensors
    options: tuple[int, ...]  # which of the arguments after the tensors the backward takes before `need`
    impl: int  # 1 where the last argument is `impl`
    kept: int  # 1 where the second output is kept for the backward


def differentiable(
    schema: str,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Sequence[Tensor | None]],
    formula: Callable[..., Tensor],
    *,
    backward_fake: Callable[..., Sequence[Tensor]] | None = None,
    backward_outputs: int | None = None,
    unpack: Callable[..., Sequence[Tensor | None]] | None = None,
) -> tuple[Any, Any]:
    """Define an op and its backward op, `name_backward`, and connect them; returns both callable overloads.

    Args:
        schema: differentiable tensors, other tensors, options, `bool save` and `str impl` if there, in this order. One
            output, or two: the second is kept for the backward, has no gradient, and is empty unless `save`.
        forward, fake: of the op.
        backward: called as (dy, what was kept if anything is, *tensors, *options, need, impl if there); returns one
            gradient for each differentiable tensor, in its dtype, contiguous, or None unless needed.
        formula: the result from the differentiable tensors, positional, with the other arguments by keyword: gives the
            gradients that can be differentiated again. Its positional parameters say which tensors are differentiable.
        backward_fake: of the backward op where its outputs are not contiguous tensors of the inputs' shapes.
        backward_outputs, unpack: the number of the backward op's outputs where they are not one gradient for each
            differentiable tensor, and the function of (*outputs, need) that returns these.
    """
    op = register(schema, forward, fake)
    of = _signature(op._schema, formula)
    outputs = backward_outputs or of.inputs
    backward_op = register(
        _backward_schema(op._schema, of, outputs),
        lambda dy, *args: tuple(or_empty(t, dy) for t in backward(dy, *args)),
        backward_fake or partial(_gradients_fake, of),
    )
    _connect(op, forward, backward_op, backward, of, formula, unpack)
    _count(op, backward_op, of, formula)
    return op, backward_op


def direct(op: Any) -> Callable[..., Any]:
    """The op without its two ways through the dispatcher, which cost a small layer more than its arithmetic.

    For plain arguments where nothing watches. The op itself for a profiler, which is to see it, and inside another
    op's implementation, which records no derivatives.
    """
    seen = torch.autograd._profiler_enabled() or torch._C._dispatch_tls_is_dispatch_key_excluded(AUTOGRAD)
    return op if seen else _direct.get(op, op)


def or_empty(t: Tensor | None, like: Tensor) -> Tensor:
    """t, or a fresh empty tensor if the result is not needed: the outputs of an op must be distinct tensors."""
    return like.new_empty(0) if t is None else t


def _signature(schema: Any, formula: Callable[..., Any]) -> Signature:
    arguments = schema.arguments
    names = tuple(argument.name for argument in arguments)
    parameters = inspect.signature(formula).parameters.values()
    inputs = sum(parameter.kind is not parameter.KEYWORD_ONLY for parameter in parameters)
    tensors = sum("Tensor" in str(argument.type) for argument in arguments)
    options = tuple(i for i, name in enumerate(names[tensors:]) if name not in ("save", "impl"))
    return Signature(names, inputs, tensors, options, int(names[-1] == "impl"), len(schema.returns) - 1)


def _backward_schema(schema: Any, of: Signature, outputs: int) -> str:
    declared = str(schema).partition("(")[2].rpartition(") ->")[0].split(", ")
    kept, impl = ["Tensor kept"] * of.kept, ["str impl"] * of.impl
    options = [declared[of.tensors + i] for i in of.options]
    arguments = ["Tensor dy", *kept, *declared[: of.tensors], *options, "bool[] need", *impl]
    name = schema.name.partition("::")[2]
    return f"{name}_backward({', '.join(arguments)}) -> ({', '.join(['Tensor'] * outputs)})"


def _gradients_fake(of: Signature, dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    tensors, need = args[of.kept : of.kept + of.inputs], args[-1 - of.impl]
    return tuple(t.new_empty(t.shape) if n else dy.new_empty(0) for t, n in zip(tensors, need, strict=True))


def _connect(
    op: Any,
    kernel: Callable[..., Any],
    backward_op: Callable[..., Any],
    backward_kernel: Callable[..., Sequence[Tensor | None]],
    of: Signature,
    formula: Callable[..., Tensor],
    unpack: Callable[..., Sequence[Tensor | None]] | None,
) -> None:
    """Give `op` its derivative, as an autograd function that a profiler shows under the op's name.

    `torch.library.register_autograd` would walk the schema at every call, which costs a small layer more than its
    arithmetic.
    """
    no_gradients = (None,) * (len(of.names) - of.inputs)

    def below(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    def backward_direct(dy: Tensor, *args: Any) -> Any:
        unseen = _impl.is_unwatched() and not (_impl.needs_reference() or torch.autograd._profiler_enabled())
        plain = unseen and not _impl.is_batched(dy) and _impl.are_plain(dy, *args[: of.kept + of.tensors])
        return (backward_kernel if plain else backward_op)(dy, *args)

    def forward(run: Callable[..., Any], ctx: Any, *args: Any) -> Any:
        out = run(*args)
        ctx.set_materialize_grads(False)  # else the backward is handed zeros for the kept output, written out
        kept = out[1:] if of.kept else ()
        ctx.mark_non_differentiable(*kept)
        ctx.save_for_backward(*args[: of.tensors], *kept)
        ctx.options = args[of.tensors :]
        return out

    def backward(run: Callable[..., Any], ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dy is None:  # the result was not used
            return (None,) * len(of.names)
        saved = ctx.saved_tensors
        tensors, kept = saved[: of.tensors], saved[of.tensors :]
        options = [ctx.options[i] for i in of.options]
        need = list(ctx.needs_input_grad[: of.inputs])
        if torch.is_grad_enabled():  # create_graph=True: what was kept carries no graph, so start again
            f = partial(formula, **_keywords(of, tensors, options))
            return *differentiable_gradients(f, tensors[: of.inputs], need, dy), *no_gradients
        impl = ctx.options[-1:] if of.impl else ()
        found = run(dy, *kept, *tensors, *options, need, *impl)
        if unpack is not None:
            found = unpack(*found, need)
        return *(g if needed else None for g, needed in zip(found, need, strict=True)), *no_gradients

    name = "".join(part.capitalize() for part in op._schema.name.partition("::")[2].split("_"))

    def by(run: Callable[..., Any], backward_run: Callable[..., Any]) -> Callable[..., Any]:
        """The op with its derivative, its results by `run`, its gradients by `backward_run`."""
        methods = {
            "forward": staticmethod(partial(forward, run)),
            "backward": staticmethod(without_autocast(partial(backward, backward_run))),
        }
        function: Any = types.new_class(name, (torch.autograd.Function,), exec_body=lambda body: body.update(methods))

        def differentiated(*args: Any) -> Any:
            if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
                return function.apply(*args)
            return run(*args)

        return differentiated

    OPS.impl(op._schema.name, by(below, backward_op), "Autograd")
    _direct[op] = by(kernel, backward_direct)


def _keywords(of: Signature, tensors: Sequence[Tensor | None], options: Sequence[Any]) -> dict[str, Any]:
    """What the formula takes by keyword: the tensors without a gradient, and the options of the backward."""
    others = dict(zip(of.names[of.inputs : of.tensors], tensors[of.inputs : of.tensors], strict=True))
    return {**others, **{of.names[of.tensors + i]: option for i, option in zip(of.options, options, strict=True)}}


def _count(op: Any, backward_op: Any, of: Signature, formula: Callable[..., Tensor]) -> None:
    """Give both ops the formula's FLOPs."""

    def forward(*args: Any) -> int:
        options = [args[of.tensors + i] for i in of.options]
        return _flops.of_call(formula, *args[: of.inputs], **_keywords(of, args, options))

    def backward(dy: Tensor, *args: Any) -> int:
        tensors, need = args[of.kept :], args[-1 - of.impl]
        options = tensors[of.tensors : of.tensors + len(of.options)]
        return _flops.of_gradients(formula, tensors[: of.inputs], need, **_keywords(of, tensors, options))

    _flops.add(op, forward)
    _flops.add(backward_op, backward)


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
    """f with autocast off: its sums cancel too much for arguments that were cast."""

    @functools.wraps(f)
    def wrapped(*args: Any, **options: Any) -> T:
        if not torch._C._is_any_autocast_enabled():
            return f(*args, **options)
        first = next((a for a in (*args, *options.values()) if isinstance(a, Tensor)), None)
        kind = "meta" if first is None else first.device.type
        if kind == "meta" or not torch.is_autocast_enabled(kind):
            return f(*args, **options)
        with torch.autocast(kind, enabled=False):
            return f(*args, **options)

    return wrapped
