"""From a transformer to the analysis: the weights of one gated MLP as the ops take them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bilinear_ops.integrations import gate_forms
from bilinear_ops.integrations.gate_expressions import NotAGate
from bilinear_ops.integrations.gate_forms import linear_names


class GatedWeights(NamedTuple):
    """A gated MLP's weights and biases, `gated_mlp(x, *weights[:6], activation=...)`, with beta, limit and offset."""

    w: Tensor
    v: Tensor
    p: Tensor
    b_w: Tensor | None
    b_v: Tensor | None
    b_p: Tensor | None
    activation: str
    beta: float = 1.0
    limit: float | None = None
    offset: float | None = None


def gated_weights(model: nn.Module, layer: int | str, fold_norm: bool = True) -> GatedWeights:
    """The weights of one gated MLP of a transformers model, patched or not, with the norm before it folded in ([P] 5).

    Args:
        model: a model of the transformers library, loaded on one device.
        layer: the index of a layer, or the name of an MLP module within `model`.
        fold_norm: scale the columns of w and v by the RMSNorm before the MLP. The weights then act on
            x / sqrt(mean(x^2) + eps) of the residual stream x. The norm is found by running the model on two tokens.

    Returns:
        `GatedWeights(w, v, p, b_w, b_v, b_p, activation, beta, limit, offset)`: w, v `[h, d]`, p `[o, h]`, halves of
            packed weights in their right order, detached; they share the model's memory unless a norm is folded in.

    Raises:
        TypeError: a model that is not a module.
        ValueError: a layer without exactly one gated MLP; one whose forward is not that of the ops; with `fold_norm`
            one whose input is not the output of an RMSNorm.
    """
    name, module = _find(model, layer)
    try:
        form = gate_forms.mlp(module)
    except NotAGate as reason:
        raise ValueError(f"{name} is not a gated MLP of the ops: {reason}") from reason
    (w, v, p), biases = form.weights(module)
    if fold_norm:
        scale = _norm_scale(*_norm_before(model, module, name), w)
        w, v = w * scale, v * scale
    detached = (None if t is None else t.detach() for t in (w, v, p, *biases))
    keywords = {k: v.item() if isinstance(v, Tensor) else v for k, v in form.keywords(module).items()}
    return GatedWeights(*detached, **keywords)  # type: ignore[arg-type]


def _find(model: nn.Module, layer: int | str) -> tuple[str, nn.Module]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    names = [n for n, m in model.named_modules() if linear_names(m)]
    if isinstance(layer, str):
        found = [n for n in names if n == layer]
    else:
        found = [n for n in names if str(layer) in n.split(".")[:-1]]
    if len(found) != 1:
        raise ValueError(f"layer must be that of one gated MLP, got {layer!r} for {found or names}")
    return found[0], model.get_submodule(found[0])


class _Reached(Exception):
    """The MLP's input is there: the rest of the model need not run."""


def _norm_before(model: nn.Module, mlp: nn.Module, name: str) -> tuple[str, nn.Module]:
    """The module whose output is the MLP's input."""
    outputs: dict[str, Tensor] = {}
    inputs: list[Tensor] = []

    def reached(module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(args[0])
        raise _Reached

    def record(at: str) -> Any:
        return lambda module, args, out: outputs.update({at: out}) if isinstance(out, Tensor) else None

    leaves = [(n, m) for n, m in model.named_modules() if not m._modules and not n.startswith(f"{name}.")]
    handles = [m.register_forward_hook(record(n)) for n, m in leaves]
    handles.append(mlp.register_forward_pre_hook(reached))
    device = next(mlp.parameters()).device
    try:
        with torch.no_grad():
            model(input_ids=torch.ones(1, 2, dtype=torch.int64, device=device))
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    for at in reversed(outputs):
        if inputs and outputs[at] is inputs[0]:
            return at, model.get_submodule(at)
    raise ValueError(f"the input of {name} is not the output of a norm: use fold_norm=False")


def _norm_scale(name: str, norm: nn.Module, like: Tensor) -> Tensor:
    """s `[d]` where norm(x) = s x / rms(x), which is tried: some models keep s - 1."""
    weight = getattr(norm, "weight", None)
    d = like.shape[1]
    if isinstance(weight, Tensor) and weight.shape == (d,):
        generator = torch.Generator().manual_seed(0)
        x = 1e2 + 1e2 * torch.randn(8, d, generator=generator)  # so large that eps is nothing, and not of mean 0
        x = x.to(like.device, like.dtype)
        with torch.no_grad():
            y, unit = norm(x).float(), x.float() * x.float().square().mean(1, keepdim=True).rsqrt()
            for scale in (weight.detach().float(), 1 + weight.detach().float()):
                if torch.allclose(y, unit * scale, rtol=4 * torch.finfo(like.dtype).eps, atol=1e-5):
                    return scale.to(like.dtype)
    raise ValueError(f"{name}, a {type(norm).__name__}, is not an RMSNorm: use fold_norm=False")
