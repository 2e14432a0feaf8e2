"""One line for a model of the transformers library: its gated MLPs run through our ops, wherever that is proved safe.

    report = bilinear_ops.integrations.transformers.apply(model)

Nothing here imports transformers: modules are known by what they compute, activations by their class's name.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from bilinear_ops.gated import gate
from bilinear_ops.integrations.bilinearising import Bilinearisation, bilinearise
from bilinear_ops.integrations.gate_expressions import NotAGate
from bilinear_ops.integrations.gate_forms import MLPS, has_experts, linear_names, own_class
from bilinear_ops.integrations.patches import READ, STATE, check_own_forward, holds, prove, run
from bilinear_ops.integrations.reading import read
from bilinear_ops.integrations.weights import GatedWeights, gated_weights

__all__ = [
    "Bilinearisation",
    "Entry",
    "GatedWeights",
    "Report",
    "apply",
    "bilinearise",
    "gated_weights",
    "read",
    "revert",
]

IMPLS = ("auto", "triton", "torch")


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
            check_own_forward(module)
            how = prove(module, impl, recompute)
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


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _patched_class(original: type[nn.Module]) -> type[nn.Module]:
    """The class of a patched module, of the same name and signature: other code looks modules up by their class's name
    and binds arguments by the signature."""
    if original not in _classes:

        @functools.wraps(original.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            how = vars(self)[STATE]
            if len(args) != 1 or kwargs or not holds(self, how):
                if READ in vars(self):
                    raise RuntimeError(f"{vars(self)[READ][0]} is read, but runs its own forward: hook its Linears")
                return original.forward(self, *args, **kwargs)
            return run(self, how, args[0])

        def _apply_gate(self: Any, gate_up: Tensor) -> Tensor:
            how = vars(self)[STATE]
            if is_traceable_wrapper_subclass(gate_up) or not holds(self, how):
                return original._apply_gate(self, gate_up)  # type: ignore[attr-defined]
            first, second = how.form.split(gate_up)
            a, z = (second, first) if how.form.gate_first else (first, second)
            return gate(a, z, impl=how.impl, **how.form.keywords(self))

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
