"""How a patched module runs: what was proved of it, and whether that still holds at a call."""

from __future__ import annotations

from types import MethodType
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from bilinear_ops.gated import gated_mlp
from bilinear_ops.integrations import gate_forms
from bilinear_ops.integrations.gate_forms import Form, NotAGate, has_experts, is_untouched

STATE = "_bilinear_ops"  # of a patched module: its How


class How(NamedTuple):
    """How a patched module runs."""

    form: Form
    act: Any  # the class of its activation, or None
    constants: tuple[tuple[str, Any], ...]  # its plain attributes, from which a forward may read limits and slopes
    impl: str
    recompute: bool


def prove(module: nn.Module, impl: str, recompute: bool) -> How:
    """How to run a module, or NotAGate with why not."""
    if not isinstance(module.forward, MethodType):
        raise NotAGate("its forward was replaced")
    form = gate_forms.experts(module) if has_experts(module) else gate_forms.mlp(module)
    act = getattr(module, form.act) if form.act else None
    constants = tuple((k, v) for k, v in vars(module).items() if k[0] != "_" and k != "training" and _is_constant(v))
    how = How(form, None if act is None else type(act), constants, impl, recompute)
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
    for name, value in how.constants:
        if getattr(module, name, NotAGate) != value:
            return False
    if form.act:
        act = getattr(module, form.act)
        if act.__class__ is not how.act or not is_untouched(act):
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
    """A gated MLP through the op."""
    (w, v, p), biases = how.form.weights(module)
    return gated_mlp(x, w, v, p, *biases, recompute=how.recompute, impl=how.impl, **how.form.keywords(module))


def prove_again(module: nn.Module) -> None:
    """After a change of ours to a module, such as of its activation: patched it stays patched."""
    how = vars(module).get(STATE)
    if how is not None:
        vars(module)[STATE] = prove(module, how.impl, how.recompute)
