"""Our gated MLP as layers of the `kernels` library, under the names by which transformers knows them.

A repository of that library is a folder with a variant, whose module has `layers`: this module. A layer's forward is
bound to the model's own MLP, so a layer has no state, and asks the MLP itself what it computes.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bilinear_ops.integrations.gate_expressions import NotAGate
from bilinear_ops.integrations.gate_forms import linear_names, own_class
from bilinear_ops.integrations.patches import STATE, How, check_own_forward, holds, prove, run
from bilinear_ops.integrations.transformers import Entry, Report

ACTIVATIONS = {"SwiGLUMLP": ("silu",), "GeGLUMLP": ("gelu", "gelu_tanh")}  # layers by the gates that are theirs
PROVED = "_bilinear_ops_hub"  # of a marked module: its layer's name, and its How
VARIANT = "torch-universal"  # of the library's names for builds: any device, nothing compiled


class SwiGLUMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) for a module that computes this; another one raises ValueError."""

    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        return _forward(self, "SwiGLUMLP", x)


class GeGLUMLP(nn.Module):
    """down(gelu(gate(x)) * up(x)), by erf or by tanh as the module has it; another one raises ValueError."""

    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        return _forward(self, "GeGLUMLP", x)


def mark(model: nn.Module) -> Report:
    """Name the layer of every gated MLP of a model for `kernels.kernelize`, by the activation that the MLP has.

    The library keeps the name on the MLP's class, for all models of that class, and this asks each module at
    `kernelize` whether the name is its own: other modules keep their forward.

    Returns:
        a report: "marked" with the layer's name, or "left alone" with the reason.

    Raises:
        TypeError: a model that is not a module.
        ModuleNotFoundError: no `kernels` library.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    try:
        library: Any = importlib.import_module("kernels.layer")  # which our own folder `kernels` has not
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("hub.mark needs the library kernels: pip install kernels") from error
    entries = []
    for name, module in model.named_modules():
        if not linear_names(module):
            continue
        try:
            check_own_forward(module)
            layer, _ = vars(module)[PROVED] = _prove(module)
        except NotAGate as reason:
            entries.append(Entry(name, type(module).__name__, "left alone", str(reason)))
            continue
        library.replace_kernel_forward_from_hub(type(module), layer, _is_marked)
        entries.append(Entry(name, type(module).__name__, "marked", layer))
    return Report(entries)


def write_repository(folder: Path) -> Path:
    """Write a repository for `kernels.LocalLayerRepository(folder, layer_name=...)`, with the layers of `ACTIVATIONS`.

    It imports this package, which must be installed where the repository is used. Returns the folder.
    """
    variant = Path(folder) / "build" / VARIANT
    variant.mkdir(parents=True, exist_ok=True)
    metadata = {"id": "bilinear_ops_universal", "name": "bilinear-ops", "version": 1, "license": "MIT"}
    more = {"python-depends": [], "backend": {"type": "cpu"}}
    (variant / "metadata.json").write_text(json.dumps(metadata | more, indent=1), encoding="utf-8")
    (variant / "__init__.py").write_text("from bilinear_ops.integrations import hub as layers\n", encoding="utf-8")
    return Path(folder)


def _prove(module: nn.Module) -> tuple[str, How]:
    """The name of a module's layer, and how to run it. Raises NotAGate."""
    if STATE in vars(module):
        raise NotAGate("it is patched already: revert it first")
    how = prove(module, "auto", False)
    for layer, activations in ACTIVATIONS.items():
        if how.form.options in [{"activation": activation} for activation in activations]:
            return layer, how
    raise NotAGate(f"no layer has its gate: {how.form.options}")


def _is_marked(module: nn.Module) -> bool:
    """Whether the name that a module's class has now is that of the module's own layer."""
    return vars(module).get(PROVED, (None,))[0] == getattr(type(module), "kernel_layer_name", "")


def _forward(module: nn.Module, layer: str, x: Tensor) -> Tensor:
    if PROVED not in vars(module):
        if torch.compiler.is_compiling():
            raise RuntimeError("bilinear_ops.integrations.hub.mark(model) must be called before the model is compiled")
        try:
            vars(module)[PROVED] = _prove(module)
        except NotAGate as reason:
            raise ValueError(f"{layer} cannot replace this {type(module).__name__}: {reason}") from reason
    proved, how = vars(module)[PROVED]
    if proved != layer:
        raise ValueError(f"{layer} cannot replace this {type(module).__name__}, which is a {proved}")
    if not holds(module, how):
        return own_class(module).forward(module, x)
    return run(module, how, x)
