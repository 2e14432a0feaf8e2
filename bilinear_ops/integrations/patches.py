"""How a patched module runs: what was proved of it, and whether that still holds at a call."""

from __future__ import annotations

from types import MethodType
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from bilinear_ops.gated import gate, gated_mlp
from bilinear_ops.integrations import gate_forms
from bilinear_ops.integrations.gate_expressions import NotAGate, is_untouched
from bilinear_ops.integrations.gate_forms import Form, has_experts
from bilinear_ops.results import Activations

STATE = "_bilinear_ops"  # of a patched module: its How
READ = "_bilinear_ops_read"  # of one that is read: its name, and the dictionary of what is read


class How(NamedTuple):
    """How a patched module runs."""

    form: Form
    children: tuple[tuple[str, Any], ...]  # what computes its gate: the activation and others, with their classes
    constants: tuple[tuple[str, str, Any], ...]  # plain attributes of it and of these children: limits and slopes
    impl: str
    recompute: bool


def check_own_forward(module: nn.Module) -> None:
    """Raise NotAGate where calling a module does not run the forward of its class."""
    if "forward" in vars(module) or not isinstance(module.forward, MethodType):
        raise NotAGate("its forward was replaced")


def prove(module: nn.Module, impl: str, recompute: bool) -> How:
    """How to run a module, or NotAGate with why not."""
    form = gate_forms.experts(module) if has_experts(module) else gate_forms.mlp(module)
    children = tuple((name, type(module.get_submodule(name))) for name in (form.act, *form.followed) if name)
    constants = tuple(
        (name, k, v)
        for name in ("", *form.followed)
        for k, v in vars(module.get_submodule(name)).items()
        if k[0] != "_" and k != "training" and _is_constant(v)
    )
    how = How(form, children, constants, impl, recompute)
    if not holds(module, how):
        raise NotAGate("its activation has hooks, or its Linears differ in dtype or device")
    return how


def _is_constant(value: Any) -> bool:
    return value is None or type(value) in (bool, int, float, str) or callable(value)


def _no_global_hooks() -> bool:
    return (
        len(torch_module._global_forward_hooks) == 0
        and len(torch_module._global_forward_pre_hooks) == 0
        and len(torch_module._global_backward_hooks) == 0
        and len(torch_module._global_backward_pre_hooks) == 0
    )


def holds(module: nn.Module, how: How) -> bool:
    """Whether what was proved of a module is still so; asked at every call."""
    form = how.form
    for child, kind in how.children:
        part = getattr(module, child)
        if part.__class__ is not kind or not is_untouched(part):
            return False
    for child, name, value in how.constants:
        if getattr(getattr(module, child) if child else module, name, NotAGate) != value:
            return False
    return _no_global_hooks() and (has_experts(module) or _plain_linears(module, form))


def _plain_linears(module: nn.Module, form: Form) -> bool:
    linears: list[Any] = [getattr(module, n) for n in (form.gate, form.up, form.down)]
    if not all(type(m) is nn.Linear and is_untouched(m) for m in linears):
        return False
    first, *others = (m.weight for m in linears)
    alike = all(t.dtype == first.dtype and t.device == first.device for t in others)
    return alike and not any(is_traceable_wrapper_subclass(t) for t in (first, *others))


def run(module: nn.Module, how: How, x: Tensor) -> Tensor:
    """A gated MLP through the op, or through its parts where these are read."""
    (w, v, p), (b_w, b_v, b_p) = how.form.weights(module)
    options = how.form.keywords(module)
    if READ not in vars(module):
        return gated_mlp(x, w, v, p, b_w, b_v, b_p, recompute=how.recompute, impl=how.impl, **options)
    a, z = F.linear(x, w, b_w), F.linear(x, v, b_v)
    hid = gate(a, z, impl=how.impl, **options)
    name, seen = vars(module)[READ]
    seen[name] = Activations(a, z, hid)
    return F.linear(hid, p, b_p)


def prove_again(module: nn.Module) -> None:
    """After a change of ours to a module, such as of its activation: patched it stays patched."""
    how = vars(module).get(STATE)
    if how is not None:
        vars(module)[STATE] = prove(module, how.impl, how.recompute)
