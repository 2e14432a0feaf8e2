"""One line for a model of the transformers library: its gated MLPs run through our ops, wherever that is proved safe.

    report = bilinear_ops.integrations.transformers.apply(model)

Nothing here imports transformers: modules are known by what they compute, activations by their class's name.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from types import MethodType
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from bilinear_ops.gated import gate, gated_mlp
from bilinear_ops.integrations import gate_forms
from bilinear_ops.integrations.gate_forms import (
    MLPS,
    Form,
    NotAGate,
    has_experts,
    is_untouched,
    linear_names,
    own_class,
)
from bilinear_ops.integrations.weights import GatedWeights, gated_weights

__all__ = ["Entry", "GatedWeights", "Report", "apply", "gated_weights", "revert"]

IMPLS = ("auto", "triton", "torch")
STATE = "_bilinear_ops"  # of a patched module: how it runs


class Entry(NamedTuple):
    """What happened to one module: "patched", "left alone", "already patched" or "reverted", and why."""

    name: str
    kind: str
    status: str
    reason: str


class Report(tuple[Entry, ...]):
    """An entry for each gated MLP and each experts module of a model, in the model's order."""

    def of(self, status: str) -> Report:
        """The entries of one status."""
        return Report(e for e in self if e.status == status)

    def __str__(self) -> str:
        return "\n".join(f"{e.status}: {e.name or '(the model)'} ({e.kind}): {e.reason}" for e in self)


class _How(NamedTuple):
    """How a patched module runs."""

    form: Form
    act: Any  # the class of its activation, or None
    constants: tuple[tuple[str, Any], ...]  # its plain attributes, from which a forward may read limits and slopes
    impl: str
    recompute: bool


def apply(model: nn.Module, *, impl: str = "auto", recompute: bool = False) -> Report:
    """Run the gated MLPs of a model of the transformers library through `gated_mlp`, in place, and its experts' gates
    through `gate`.

    A module is patched where its forward is proved, by tracing it, to be down(act(gate(x)) * up(x)) over plain
    `torch.nn.Linear`s, or over one that packs both halves, with an activation that the ops have. Everything else, such
    as modules with hooks, adapters, parametrisations, quantised or tensor-parallel weights, keeps its forward, and so
    does a patched module from the moment one of these is added to it. Of experts (transformers 5 and newer) the
    library's grouped products stay; the gate between them is read from the module and replaced. Class names,
    `isinstance`, parameters, state_dict keys, pickling and copying stay as they are.

    Args:
        model: any module; its submodules are searched.
        impl: as for `gated_mlp`.
        recompute: keep only an MLP's input for backward, as for `gated_mlp`.

    Returns:
        a report with an entry for each candidate: what happened, and why.

    Raises:
        TypeError: a model that is not a module.
        ValueError: an unknown impl, or a model without a gated MLP.

    Warns:
        where nothing was patched, though there are candidates.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    entries = []
    for name, module in _candidates(model):
        kind = type(module).__name__
        if STATE in vars(module):
            entries.append(Entry(name, kind, "already patched", "revert first to change how it runs"))
            continue
        try:
            how = _prove(module, impl, recompute)
        except NotAGate as reason:
            entries.append(Entry(name, kind, "left alone", str(reason)))
            continue
        vars(module)[STATE] = how
        module.__class__ = _patched_class(type(module))
        gate = ", ".join(f"{k}={v!r}" for k, v in how.form.options.items())
        entries.append(Entry(name, kind, "patched", gate))
    report = Report(entries)
    if not report:
        raise ValueError(f"{type(model).__name__} has no gated MLP: no module with {' or '.join(map(str, MLPS))}")
    if not report.of("patched"):
        warnings.warn(f"nothing was patched:\n{report}", stacklevel=2)
    return report


def revert(model: nn.Module) -> Report:
    """Give every module that `apply` patched its own class and forward back; returns a report of these modules.

    Raises TypeError for a model that is not a module.
    """
    entries = []
    for name, module in _named_modules(model):
        if STATE in vars(module):
            del vars(module)[STATE]
            module.__class__ = own_class(module)
            entries.append(Entry(name, type(module).__name__, "reverted", "its own class and forward"))
    return Report(entries)


def _named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return model.named_modules()


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in _named_modules(model):
        if linear_names(module) or has_experts(module):
            yield name, module


def _prove(module: nn.Module, impl: str, recompute: bool) -> _How:
    """How to run a module, or NotAGate with why not."""
    if not isinstance(module.forward, MethodType):
        raise NotAGate("its forward was replaced")
    form = gate_forms.experts(module) if has_experts(module) else gate_forms.mlp(module)
    act = getattr(module, form.act) if form.act else None
    constants = tuple((k, v) for k, v in vars(module).items() if k[0] != "_" and k != "training" and _is_constant(v))
    how = _How(form, None if act is None else type(act), constants, impl, recompute)
    if not _holds(module, how):
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


def _holds(module: nn.Module, how: _How) -> bool:
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


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _patched_class(original: type[nn.Module]) -> type[nn.Module]:
    """The class of a patched module, of the same name and signature: other code looks modules up by their class's name
    and binds arguments by the signature."""
    if original not in _classes:

        @functools.wraps(original.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            how = vars(self)[STATE]
            if len(args) != 1 or kwargs or not _holds(self, how):
                return original.forward(self, *args, **kwargs)
            (w, v, p), biases = how.form.weights(self)
            return gated_mlp(args[0], w, v, p, *biases, recompute=how.recompute, impl=how.impl, **how.form.options)

        def _apply_gate(self: Any, gate_up: Tensor) -> Tensor:
            how = vars(self)[STATE]
            if is_traceable_wrapper_subclass(gate_up) or not _holds(self, how):
                return original._apply_gate(self, gate_up)  # type: ignore[attr-defined]
            first, second = how.form.split(gate_up)
            a, z = (second, first) if how.form.gate_first else (first, second)
            return gate(a, z, impl=how.impl, **how.form.options)

        replaced = {"_apply_gate": _apply_gate} if hasattr(original, "_apply_gate") else {"forward": forward}
        names = {
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "__reduce_ex__": lambda self, protocol: (_restore, (original,), vars(self)),
            "_bilinear_ops_original": original,
        }
        _classes[original] = type(original.__name__, (original,), names | replaced)
    return _classes[original]


def _restore(original: type[nn.Module]) -> nn.Module:
    """An empty patched module, for pickle and copy."""
    return nn.Module.__new__(_patched_class(original))
