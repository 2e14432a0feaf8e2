"""From a trained SwiGLU network to a bilinear one: the slope of swish goes from 1 to 0 while training goes on ([P] H).

nn.swish_(model)                           # silu is swish with slope 1: nothing changes
for step in range(steps):
    nn.anneal_beta(model, step, steps)     # before each step
    ...
nn.bilinearise_(model)                     # swish with slope 0 is z / 2: the half goes into p
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bilinear_ops._check import check_integers, check_reals
from bilinear_ops.nn.gated import GatedBilinear, GatedMLP
from bilinear_ops.nn.halving import halve_


class Swish(nn.Module):
    """z sigmoid(beta z), for models of other libraries. The slope is a buffer that no checkpoint holds."""

    beta: Tensor

    def __init__(self, beta: float = 1.0, device: torch.device | str | None = None):
        super().__init__()
        self.register_buffer("beta", torch.tensor(beta, dtype=torch.float32, device=device), persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        return z * torch.sigmoid(self.beta * z)

    def extra_repr(self) -> str:
        return "" if self.beta.is_meta else f"beta={self.beta.item():g}"


def layers(model: nn.Module) -> list[GatedBilinear | GatedMLP]:
    """The gated layers of a model, itself included, each once."""
    _check_module(model)
    return [m for m in model.modules() if isinstance(m, GatedBilinear | GatedMLP)]


def swish_(model: nn.Module) -> nn.Module:
    """Make swish with slope 1 of every silu in a model's gated layers, in place: the same function, with a slope.

    Returns:
        the model.

    Raises:
        TypeError: a model that is no module.
        ValueError: a model without a gated layer of activation silu or swish.
    """
    found = [m for m in layers(model) if m.activation in ("silu", "swish")]
    if not found:
        raise ValueError(f"{type(model).__name__} has no gated layer with activation silu or swish")
    for layer in found:
        if layer.activation == "silu":
            layer.activation = "swish"
            layer._keep_beta(1.0, layer.w.device)
    return model


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")


def slope(step: int, steps: int, fraction: float = 0.3) -> float:
    """max(0, 1 - step / (fraction steps)): beta at a step of a training of `steps` ([P] H: the first 30 %).

    Raises ValueError for a negative step, steps below 1, or a fraction outside (0, 1].
    """
    check_integers(step=step, steps=steps)
    check_reals(fraction=fraction)
    if step < 0 or steps < 1:
        raise ValueError(f"step must be at least 0 and steps at least 1, got {step} and {steps}")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}")
    return max(0.0, 1 - step / (fraction * steps))


@torch.no_grad()
def anneal_beta(model: nn.Module, step: int, steps: int, fraction: float = 0.3) -> float:
    """Set the slope of every swish of a model to max(0, 1 - step / (fraction steps)) ([P] H), in place.

    Call it before each step: from the first step after `fraction` of them on, the slope is 0. It depends on nothing but
    the numbers given, so that a training that is resumed continues where it was. Nothing recompiles.

    Args:
        model: any module; its gated layers and the activations that `integrations.transformers.bilinearise` put in.
        step: steps done.
        steps: of the whole training.
        fraction: of the steps, over which the slope falls.

    Returns:
        the slope.

    Raises:
        TypeError: a model that is no module, or numbers of another type.
        ValueError: a model without a swish, a slope that is a Parameter, or numbers that are no schedule.
    """
    _check_module(model)
    beta = slope(step, steps, fraction)
    found = [m.beta for m in model.modules() if isinstance(m, GatedBilinear | GatedMLP | Swish) and m.beta is not None]
    if not found:
        raise ValueError(f"{type(model).__name__} {_why_no_slope(model)}")
    if any(isinstance(t, nn.Parameter) for t in found):
        raise ValueError("a slope that is trained, a Parameter, is not annealed")
    for t in found:
        t.fill_(beta)
    return beta


def _why_no_slope(model: nn.Module) -> str:
    activations = {m.activation for m in layers(model)}
    if "silu" in activations:
        return "has no swish to anneal: call swish_ first"
    if activations == {"identity"}:
        return "is bilinear already: no slope is left to anneal"
    return "has no gated layer with activation silu or swish"


@torch.no_grad()
def bilinearise_(model: nn.Module) -> nn.Module:
    """Convert every gated layer of a model annealed to swish at slope 0 to the equal bilinear one ([P] H), in place.

    The half of z / 2 goes into p, of a `GatedBilinear` into w and b_w: the parameters themselves are halved, and so is
    whatever shares them outside of the model, such as the Linears given to `from_linear`. To keep the original, convert
    a copy: `bilinearise_(copy.deepcopy(model))`. A weight that several of these layers share is halved once.

    Returns:
        the model.

    Raises:
        TypeError: a model that is no module.
        ValueError: a model without gated layers, a layer that is not bilinear at its slope, or a weight that is
            parametrised or that another module of the model uses too. Nothing has changed then.
    """
    found = layers(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no gated layer")
    for layer in found:
        layer._check_bilinear()
    annealed = [layer for layer in found if layer.activation == "swish"]
    halve_(model, [(layer, name) for layer in annealed for name in layer.HALVED])
    for layer in annealed:
        layer._drop_activation()
    return model
