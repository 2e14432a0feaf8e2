"""Which gate a module of another library computes, proved from a trace of its forward rather than from its name."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from bilinear_ops._check import DTYPES
from bilinear_ops.integrations.gate_expressions import ANNEALED, Expression, NotAGate, Reader, is_untouched, trace

MLPS = (("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj"), ("w1", "w3", "w2"))


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
            graph, followed = trace(module, forward)
            found.append((*Reader(module, linears).read(graph), followed))
    finally:
        for m, mode in modes.items():
            m.training = mode
    if found[0] != found[1]:
        raise NotAGate("its forward differs between training and evaluation")
    return found[0]


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
