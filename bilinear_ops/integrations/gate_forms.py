"""Which gate a module of another library computes, proved from a trace of its forward rather than from its name."""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from bilinear_ops import gates
from bilinear_ops._check import DTYPES
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

MLPS = (("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj"), ("w1", "w3", "w2"))


class NotAGate(Exception):
    """Why a module is left alone."""


class Form(NamedTuple):
    """A gated MLP down(act(gate(x)) * up(x)), or the gate of an experts module alone: its children and its gate."""

    gate: str  # Linears by name; the same one twice where it packs both halves, "" in experts
    up: str
    down: str
    act: str  # "" for a function
    halves: str  # "", "packed" or "interleaved"
    gate_first: bool  # of packed and interleaved halves
    options: dict[str, Any]  # keywords of the op, but for a slope that is annealed
    followed: tuple[str, ...] = ()  # children that compute a part of the gate, and may hold constants of it

    def keywords(self, module: nn.Module) -> dict[str, Any]:
        """The op's keywords for a module of this form."""
        if self.options.get("beta") != ANNEALED:
            return self.options
        return {**self.options, "beta": getattr(module, self.act).beta}

    def split(self, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        """The two halves of what experts project to, as views."""
        if self.halves == "interleaved":
            return gate_up[..., ::2], gate_up[..., 1::2]
        first, second = gate_up.chunk(2, -1)
        return first, second

    def weights(self, module: nn.Module) -> tuple[tuple[Any, Any, Any], tuple[Any, Any, Any]]:
        """(w, v, p) and (b_w, b_v, b_p) of an MLP, packed halves as views."""
        gate, up, down = (getattr(module, n) for n in (self.gate, self.up, self.down))
        if not self.halves:
            return (up.weight, gate.weight, down.weight), (up.bias, gate.bias, down.bias)
        halves = [(None, None) if t is None else t.chunk(2) for t in (gate.weight, gate.bias)]
        (v, w), (b_v, b_w) = halves if self.gate_first else [pair[::-1] for pair in halves]
        return (w, v, down.weight), (b_w, b_v, down.bias)


def has_experts(module: nn.Module) -> bool:
    """Whether a module holds the stacked weights of gated experts."""
    return "gate_up_proj" in module._parameters and "down_proj" in module._parameters


def linear_names(module: nn.Module) -> tuple[str, ...]:
    """The children that make a module a candidate, the down-projection last; else none."""
    return next((names for names in MLPS if all(n in module._modules for n in names)), ())


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, of a patched one the class that it had."""
    return getattr(type(module), "_bilinear_ops_original", type(module))


def mlp(module: nn.Module) -> Form:
    """The form of a dense MLP over plain Linears. Raises NotAGate."""
    linears = linear_names(module)
    for name in linears:
        reason = _why_not_plain(getattr(module, name))
        if reason is not None:
            raise NotAGate(f"{name} {reason}")
    expression, act, followed = _same_in_both_modes(module, own_class(module).forward, linears)
    kind, down, hid = expression if len(expression) == 3 else ("", "", ())
    if kind != "linear" or down != linears[-1]:
        raise NotAGate(f"its forward does not end in {linears[-1]}")
    up, gate, options = _product(hid)
    (gate_name, gate_half, halves), (up_name, up_half, up_halves) = _source(gate), _source(up)
    packed = halves == up_halves == "packed" and gate_name == up_name and {gate_half, up_half} == {0, 1}
    if not packed and (halves or up_halves):
        raise NotAGate("its two sides are not two Linears or the halves of one")
    return Form(gate_name, up_name, down, act, halves, gate_half == 0, options, followed)


def experts(module: nn.Module) -> Form:
    """The form of the gate that an experts module applies between its grouped products. Raises NotAGate."""
    own = own_class(module)
    if not hasattr(own, "_apply_gate"):
        raise NotAGate("its products and its gate are one function: transformers before 5.0")
    if not isinstance(module._apply_gate, MethodType):
        raise NotAGate("its gate was replaced")
    products = getattr(getattr(module, "config", None), "_experts_implementation", None)
    if products not in ("grouped_mm", "batched_mm"):
        raise NotAGate(f"experts implementation {products!r} may compute the gate itself: set grouped_mm or batched_mm")

    def gate(module: nn.Module, gate_up: Tensor) -> Tensor:
        return own._apply_gate(module, gate_up)

    expression, act, followed = _same_in_both_modes(module, gate, ())
    up, gated, options = _product(expression)
    for layout in ("packed", "interleaved"):
        both = [("half", i, layout, ("input",)) for i in (0, 1)]
        if [gated, up] in (both, both[::-1]):
            return Form("", "", "", act, layout, gated == both[0], options, followed)
    raise NotAGate("its gate does not act on the two halves of what the experts project to")


def _why_not_plain(linear: nn.Module) -> str | None:
    kind = type(linear)
    if kind is not nn.Linear:
        return f"is a {kind.__module__}.{kind.__qualname__}, not a torch.nn.Linear"
    if not is_untouched(linear):
        return "has hooks or another forward"
    if is_traceable_wrapper_subclass(linear.weight):
        return f"has a weight of type {type(linear.weight).__name__}"
    if linear.weight.dtype not in DTYPES:
        return f"has a weight of dtype {linear.weight.dtype}"
    return None


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


def _same_in_both_modes(
    module: nn.Module, forward: Callable[..., Any], linears: tuple[str, ...]
) -> tuple[Expression, str, tuple[str, ...]]:
    """What `forward` computes, in training and in evaluation alike, the name of its activation, children followed."""
    found = []
    modes = {m: m.training for m in module.modules()}
    try:
        for training in (True, False):
            for m in modes:
                m.training = training
            graph, followed = _trace(module, forward)
            found.append((*_Reader(module, linears).read(graph), followed))
    finally:
        for m, mode in modes.items():
            m.training = mode
    if found[0] != found[1]:
        raise NotAGate("its forward differs between training and evaluation")
    return found[0]


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


def _trace(module: nn.Module, forward: Callable[..., Any]) -> tuple[fx.Graph, tuple[str, ...]]:
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


class _Reader:
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


def _product(e: Expression) -> tuple[Expression, Expression, dict[str, Any]]:
    """(linear pre-activation, gated pre-activation, keywords) of a gate written as a product."""
    if e[0] == "scale" and (pair := _bounded(e)):
        return *pair, {"activation": "silu_bounded"}
    if e[0] != "mul":
        raise NotAGate("its forward is not a product with an activation")
    for gated, linear in (e[1:], e[:0:-1]):
        found = _gated(gated)
        if found is not None:
            z, options = found
            a, bounds = _linear(linear)
            if bounds.get("limit") != options.get("limit"):
                raise NotAGate("its gate clamps its two sides at unlike limits")
            return a, z, options | bounds
    raise NotAGate("neither factor of its product is an activation")


def _bounded(e: Expression) -> tuple[Expression, Expression] | None:
    """(a, z) of 25 tanh(a / 25) * 4 tanh(z / 4) sigmoid(z), whose scales are one; else None."""
    _, product, scale = e
    if product[0] != "mul" or scale != 25 * 4:
        return None
    for linear, gated in (product[1:], product[:0:-1]):
        for tanh, sigmoid in (gated[1:], gated[:0:-1]) if gated[0] == "mul" else ():
            a, z = _tanh_of(linear, 25), _tanh_of(tanh, 4)
            if a is not None and z is not None and sigmoid == ("act", "sigmoid", 1.0, z):
                return a, z
    return None


def _tanh_of(e: Expression, bound: float) -> Expression | None:
    """t of tanh(t / bound), else None."""
    return e[3][1] if e[:2] == ("act", "tanh") and e[3][:1] == ("scale",) and e[3][2] == 1 / bound else None


def _gated(e: Expression) -> tuple[Expression, dict[str, Any]] | None:
    """(z, keywords) of act(min(z, limit)), or of min(silu(z), limit); else None."""
    limit = None
    if e[0] == "clamp" and e[2] is None and e[1][:2] == ("act", "silu"):
        _, (_, _, beta, z), _, limit = e
        activation = "silu_clamped"
    elif e[0] == "act":
        _, activation, beta, z = e
    elif e[0] == "mul" and (written_out := _swish(e[1], e[2]) or _swish(e[2], e[1])):
        activation, beta, z = written_out
    else:
        return None
    if limit is None and z[0] == "clamp" and z[2] is None:
        _, z, _, limit = z
    options = {"activation": activation}
    return z, options | ({"beta": beta} if beta != 1.0 else {}) | ({} if limit is None else {"limit": limit})


def _swish(z: Expression, s: Expression) -> tuple[str, float, Expression] | None:
    """(activation, beta, z) of z sigmoid(beta z)."""
    if s[:2] != ("act", "sigmoid"):
        return None
    if s[3] == z:
        return "silu", 1.0, z
    return ("swish", s[3][2], z) if s[3][:2] == ("scale", z) else None


def _linear(e: Expression) -> tuple[Expression, dict[str, float]]:
    """(a, keywords) of clamp(a, -limit, limit) + offset."""
    bounds = {}
    if e[0] == "shift":
        _, e, bounds["offset"] = e
    if e[0] == "clamp" and isinstance(e[2], int | float) and e[3] == -e[2]:
        _, e, _, bounds["limit"] = e
    return e, bounds


def _source(e: Expression) -> tuple[str, int | None, str]:
    """(Linear, half, layout) of one side."""
    half, layout = None, ""
    if e[0] == "half":
        _, half, layout, e = e
    if e[0] != "linear" or e[2] != ("input",):
        raise NotAGate("a side of its gate is not a Linear of its input")
    return e[1], half, layout
