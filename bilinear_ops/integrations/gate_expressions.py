"""The forward of another library's module, traced and read as an expression of the few steps that gates are made of."""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bilinear_ops import gates
from bilinear_ops.nn.annealing import Swish

# Modules that are one of our activations, by full name, so that nothing has to be imported to know them.
MODULES: dict[str, dict[str, Any]] = {
    "torch.nn.modules.activation.SiLU": {"activation": "silu"},
    "torch.nn.modules.activation.ReLU": {"activation": "relu"},
    "torch.nn.modules.activation.Sigmoid": {"activation": "sigmoid"},
    "torch.nn.modules.linear.Identity": {"activation": "identity"},
    "transformers.activations.SiLUActivation": {"activation": "silu"},
    "transformers.activations.GELUActivation": {"activation": "gelu"},
    "transformers.activations.GELUTanh": {"activation": "gelu_tanh"},
    "transformers.activations.PytorchGELUTanh": {"activation": "gelu_tanh"},
    "transformers.activations.NewGELUActivation": {"activation": "gelu_tanh"},
    "transformers.activations.FastGELUActivation": {"activation": "gelu_tanh"},
    "transformers.activations.AccurateGELUActivation": {"activation": "gelu_tanh"},
    "transformers.activations.LinearActivation": {"activation": "identity"},
    "transformers.activations.QuickGELUActivation": gates.QUICK_GELU,
    "transformers.activations.ReLUSquaredActivation": {"activation": "relu2"},
    "transformers.activations.MishActivation": {"activation": "mish"},
    "torch.nn.modules.activation.ReLU6": {"activation": "relu6"},
    "torch.nn.modules.activation.Tanh": {"activation": "tanh"},
    "torch.nn.modules.activation.Mish": {"activation": "mish"},
    "torch.nn.modules.activation.Hardswish": {"activation": "hardswish"},
}
FUNCTIONS: dict[Any, dict[str, Any]] = {
    F.silu: {"activation": "silu"},
    F.relu: {"activation": "relu"},
    torch.relu: {"activation": "relu"},
    torch.sigmoid: {"activation": "sigmoid"},
    F.sigmoid: {"activation": "sigmoid"},
    torch.tanh: {"activation": "tanh"},
    F.tanh: {"activation": "tanh"},
    F.gelu: {"activation": "gelu"},
}
METHODS: dict[str, Any] = {
    name: getattr(torch, name) for name in ("sigmoid", "relu", "tanh", "chunk", "clamp", "mul", "add", "div")
}
ARITHMETIC: dict[Any, str] = {
    **dict.fromkeys((operator.mul, torch.mul), "mul"),
    **dict.fromkeys((operator.add, torch.add), "add"),
    **dict.fromkeys((operator.truediv, torch.div), "div"),
}
ANNEALED = "annealed"  # stands for a slope that is read from the module at every call
Expression = tuple[Any, ...]


class NotAGate(Exception):
    """Why a module is left alone."""


def is_untouched(module: nn.Module) -> bool:
    """Whether calling the module runs the forward of its class and nothing else.

    Written for torch.compile too, which guards the length of these dictionaries only where it is asked for through
    `__dict__`, and an instance's own forward only as an attribute.
    """
    own = module.__dict__
    return (
        len(own["_forward_hooks"]) == 0
        and len(own["_forward_pre_hooks"]) == 0
        and len(own["_backward_hooks"]) == 0
        and len(own["_backward_pre_hooks"]) == 0
        and isinstance(module.forward, MethodType)
        and module.forward.__func__ is type(module).forward
    )


class _Tracer(fx.Tracer):
    """Children are steps, but for a gate of both sides that is a child of its own: it is followed."""

    def __init__(self) -> None:
        super().__init__()
        self.followed: set[str] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        if len(args) == 2 and not kwargs and not (m._parameters or m._buffers or m._modules) and is_untouched(m):
            self.followed.add(self.path_of_module(m))
            return forward(*args)
        return super().call_module(m, forward, args, kwargs)


def trace(module: nn.Module, forward: Callable[..., Any]) -> tuple[fx.Graph, tuple[str, ...]]:
    tracer = _Tracer()
    tracer.traced_func_name = "forward"

    class Root(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return forward(module, x)

    root = Root()
    root._modules = dict(module._modules)  # children keep their names
    try:
        return tracer.trace(root), tuple(sorted(tracer.followed))
    except Exception as error:  # whatever a forward does that a trace cannot follow
        raise NotAGate(f"its forward cannot be traced: {str(error).splitlines()[0]}") from error


class Reader:
    """Turns a graph into an expression of the few steps that gates are made of; raises NotAGate at any other."""

    def __init__(self, module: nn.Module, linears: tuple[str, ...]):
        self.module = module
        self.linears = linears
        self.act = ""

    def read(self, graph: fx.Graph) -> tuple[Expression, str]:
        values: dict[fx.Node, Expression] = {}
        for node in graph.nodes:
            args = fx.map_arg(node.args, values.__getitem__)
            kwargs = fx.map_arg(node.kwargs, values.__getitem__)
            if node.op == "output":
                return args[0], self.act
            values[node] = self._step(node, args, kwargs)
        raise NotAGate("its forward returns nothing")

    def _step(self, node: fx.Node, args: Any, kwargs: Any) -> Expression:
        target = node.target
        if node.op == "placeholder":
            return ("input",)
        if node.op == "call_module":
            return self._child(str(target), args, kwargs)
        if node.op == "call_method":
            target = METHODS.get(str(target), target)
        if target in ARITHMETIC and len(args) == 2 and not kwargs:
            return _arithmetic(ARITHMETIC[target], *args)
        if target is torch.clamp:
            low, high = _arguments(("min", "max"), args[1:], kwargs, (None, None))
            return ("clamp", args[0], low, high)
        if target is torch.chunk and _arguments(("chunks", "dim"), args[1:], kwargs, (None, 0)) == (2, -1):
            return ("chunk", args[0])
        if target is operator.getitem:
            return _half(*args)
        if target is F.gelu:
            (approximate,) = _arguments(("approximate",), args[1:], kwargs, ("none",))
            return ("act", "gelu_tanh" if approximate == "tanh" else "gelu", 1.0, args[0])
        if target in FUNCTIONS and len(args) == 1 and not {k for k in kwargs if k != "inplace"}:
            return ("act", FUNCTIONS[target]["activation"], 1.0, args[0])
        raise NotAGate(f"its forward has a step that no gate has: {getattr(target, '__name__', target)}")

    def _child(self, name: str, args: Any, kwargs: Any) -> Expression:
        if len(args) != 1 or kwargs:
            raise NotAGate(f"its forward calls {name} with options")
        if name in self.linears:
            return ("linear", name, args[0])
        options = activation_of(self.module.get_submodule(name))
        if options is None or self.act not in ("", name):
            kind = type(self.module.get_submodule(name))
            raise NotAGate(f"{name} is a {kind.__module__}.{kind.__qualname__}, not one activation of the table")
        self.act = name
        return ("act", options["activation"], options.get("beta", 1.0), args[0])


def activation_of(module: nn.Module) -> dict[str, Any] | None:
    """The op's keywords for a module that is an activation of ours, else None."""
    kind = type(module)
    if kind is Swish:
        return {"activation": "swish", "beta": ANNEALED}
    name = f"{kind.__module__}.{kind.__qualname__}"
    if name == "torch.nn.modules.activation.GELU":
        return {"activation": "gelu_tanh" if module.approximate == "tanh" else "gelu"}
    return MODULES.get(name)


def _arguments(names: tuple[str, ...], args: Any, kwargs: Any, defaults: tuple[Any, ...]) -> tuple[Any, ...]:
    given = {**dict(zip(names, defaults, strict=True)), **dict(zip(names, args, strict=False)), **kwargs}
    return tuple(given.pop(n) for n in names) if set(given) == set(names) else (given,)


def _arithmetic(kind: str, a: Any, b: Any) -> Expression:
    """A product or sum of expressions, or of one and a number; products with numbers come out as one scale."""
    if kind == "div" and isinstance(b, int | float):
        kind, b = "mul", 1 / b
    if isinstance(a, int | float):
        a, b = b, a
    if isinstance(b, int | float):
        scale = kind == "mul" and a[0] == "scale"
        return ({"mul": "scale", "add": "shift"}.get(kind, kind), a[1] if scale else a, a[2] * b if scale else float(b))
    if kind == "mul" and "scale" in (a[0], b[0]):
        (a, by), (b, more) = ((e[1], e[2]) if e[0] == "scale" else (e, 1.0) for e in (a, b))
        return ("scale", ("mul", a, b), by * more)
    return (kind, a, b)


def _half(e: Any, index: Any) -> Expression:
    if isinstance(e, tuple) and e[0] == "chunk" and index in (0, 1):
        return ("half", index, "packed", e[1])
    if index in ((Ellipsis, slice(None, None, 2)), (Ellipsis, slice(0, None, 2))):
        return ("half", 0, "interleaved", e)
    if index == (Ellipsis, slice(1, None, 2)):
        return ("half", 1, "interleaved", e)
    raise NotAGate("its forward takes another part than a half")
