"""A model of the transformers library turned into a bilinear one while it is trained ([P] App. H).

The activation modules are replaced by `Swish`, so that the model's own forward stays: adapters, hooks and `apply` work
as before. Nothing here imports transformers before a Trainer's callback or the fold asks for it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from bilinear_ops.integrations import gate_forms
from bilinear_ops.integrations.gate_expressions import NotAGate, activation_of
from bilinear_ops.integrations.gate_forms import Form, has_experts, linear_names
from bilinear_ops.integrations.patches import prove_again
from bilinear_ops.nn.annealing import Swish, anneal_beta, slope
from bilinear_ops.nn.halving import halve_

CONFIG_NAMES = ("hidden_act", "hidden_activation")  # under which configurations name the MLPs' activation
LINEAR = "linear"  # the library's name of no activation
IDENTITY = {"activation": "identity"}  # and ours


class Bilinearisation:
    """A model under way: call it before each training step, and `fold` it at the end. Made by `bilinearise`."""

    def __init__(self, model: nn.Module, forms: dict[str, Form], steps: int | None, fraction: float):
        self.model, self.forms, self.steps, self.fraction = model, forms, steps, fraction

    def __repr__(self) -> str:
        name, form = next(iter(self.forms.items()))
        act = getattr(self.model.get_submodule(name), form.act)
        state = act.extra_repr() if isinstance(act, Swish) else "folded"
        parts = (type(self.model).__name__, f"{len(self.forms)} MLPs", state, f"steps={self.steps}")
        return f"Bilinearisation({', '.join(part for part in parts if part)})"

    @property
    def beta(self) -> float:
        """The slope."""
        name, form = next(iter(self.forms.items()))
        return getattr(self.model.get_submodule(name), form.act).beta.item()

    def __call__(self, step: int) -> float:
        """Set the slope of every MLP for the step after `step` steps done; returns it. See `nn.anneal_beta`.

        Raises ValueError if `bilinearise` was not told the number of steps.
        """
        if self.steps is None:
            raise ValueError("steps was not given to bilinearise")
        return anneal_beta(self.model, step, self.steps, self.fraction)

    def trainer_callback(self) -> Any:
        """The schedule as a callback of the library's Trainer, over the Trainer's own number of steps.

        A training that a Trainer resumes goes on at its step: bilinearise the model anew, then resume.
        """
        from transformers import TrainerCallback

        model, fraction = self.model, self.fraction

        class Annealing(TrainerCallback):  # type: ignore[misc, unused-ignore]
            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                anneal_beta(model, state.global_step, state.max_steps, fraction)

            on_train_end = on_step_begin

        return Annealing()

    @torch.no_grad()
    def fold(self) -> nn.Module:
        """The equal model without activations, once the slope is 0: z / 2 becomes z, every down-projection is halved.

        In place: whatever shares these weights, in this model or in another, is halved with them; fold a copy,
        `bilinearise(copy.deepcopy(model))`, to keep the original. The activations become the library's own
        "linear", in the configuration, too, so that `save_pretrained` writes a model that the library loads as it is.

        Returns:
            the model.

        Raises:
            ValueError: a slope other than 0, an MLP that is no longer what it was, such as one with an unmerged
                adapter, or a down-projection that another module uses, too. Nothing has changed then.
        """
        from transformers.activations import ACT2FN

        modules = {name: self.model.get_submodule(name) for name in self.forms}
        for name, module in modules.items():
            _check_unchanged(name, module, self.forms[name])
            beta = getattr(module, self.forms[name].act).beta.item()
            if beta != 0:
                raise ValueError(f"only a slope of 0 can be folded, got {beta:g} in {name}: anneal to the end first")
        halve_(self.model, [(getattr(m, self.forms[name].down), "weight") for name, m in modules.items()])
        for name, module in modules.items():
            setattr(module, self.forms[name].act, ACT2FN[LINEAR])
            prove_again(module)
        _name_linear(self.model.config)
        return self.model


def bilinearise(model: nn.Module, *, steps: int | None = None, fraction: float = 0.3) -> Bilinearisation:
    """Begin to turn every MLP of a model of the transformers library into a bilinear one, by further training ([P] H).

    In place: the activation of every gated MLP, which must be silu, becomes swish with slope 1, which is the same
    function. The slope then falls from 1 to 0 over the first `fraction` of the training, before whose steps the
    returned object is called; a Trainer takes its `trainer_callback()` instead. `fold()` makes the model bilinear.
    Parameters and state_dict keys stay as they are. A checkpoint from before the fold does not hold the slope.

    Args:
        model: a model of the transformers library with dense gated MLPs.
        steps: of the whole training; not needed with a Trainer.
        fraction: of the steps, over which the slope falls.

    Returns:
        `Bilinearisation`.

    Raises:
        TypeError: a model that is not a module.
        ValueError: an MLP that is not silu's, or not proved to be one (see `apply`), experts, a model whose
            configuration cannot say that there is no activation, or numbers that are no schedule. Nothing has changed
            then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    slope(0, 1 if steps is None else steps, fraction)
    forms = _forms(model)
    _check_loads(model, forms)
    for name, form in forms.items():
        module = model.get_submodule(name)
        setattr(module, form.act, Swish(device=getattr(module, form.down).weight.device))
        prove_again(module)
    return Bilinearisation(model, forms, steps, fraction)


def _forms(model: nn.Module) -> dict[str, Form]:
    """The form of every gated MLP by name, or ValueError."""
    forms = {}
    for name, module in model.named_modules():
        if has_experts(module):
            raise ValueError(f"{name} holds experts, which are not annealed")
        if not linear_names(module):
            continue
        try:
            forms[name] = form = gate_forms.mlp(module)
        except NotAGate as reason:
            raise ValueError(f"{name} is not a gated MLP of the ops: {reason}") from reason
        if form.options != {"activation": "silu"} or not form.act:
            raise ValueError(f"{name} must have a module for silu as its activation, got {form.options}")
    if not forms:
        raise ValueError(f"{type(model).__name__} has no gated MLP")
    return forms


def _check_unchanged(name: str, module: nn.Module, form: Form) -> None:
    try:
        found = gate_forms.mlp(module)
    except NotAGate as reason:
        raise ValueError(f"{name} is no longer a plain MLP: {reason}") from reason
    if found._replace(options=form.options) != form or not isinstance(getattr(module, form.act), Swish):
        raise ValueError(f"{name} is no longer the MLP that was bilinearised")


def _check_loads(model: nn.Module, forms: dict[str, Form]) -> None:
    """Look at the model that the library would build of the bilinear one's configuration, on the meta device."""
    config = copy.deepcopy(getattr(model, "config", None))
    if config is None or not hasattr(type(model), "config_class") or not _name_linear(config):
        raise ValueError(f"{type(model).__name__} has no configuration that names its activation")
    with torch.device("meta"):
        twin = type(model)(config)
    for name in forms:
        options = gate_forms.mlp(twin.get_submodule(name)).options
        if options != IDENTITY:
            raise ValueError(f"the library cannot build {name} without an activation: it would have {options}")
    ours = {f"{name}.{form.act}" for name, form in forms.items()}
    for name, module in twin.named_modules():
        if name not in ours and activation_of(module) == IDENTITY != activation_of(model.get_submodule(name)):
            raise ValueError(f"the configuration that names the activation names that of {name}, too")


def _name_linear(config: Any) -> bool:
    """Name no activation in a model's configuration; whether there was a name to change."""
    text = config.get_text_config()
    found = [name for name in CONFIG_NAMES if isinstance(getattr(text, name, None), str)]
    for name in found:
        setattr(text, name, LINEAR)
    return bool(found)
