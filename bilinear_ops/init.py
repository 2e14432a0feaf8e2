"""New layers from the weights of an original one: copies of its units that compute the same function ([B])."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from bilinear_ops._check import check_integers, check_reals
from bilinear_ops.nn.gated import GatedMLP
from bilinear_ops.nn.rank1 import Rank1Linear

__all__ = ["expand_gated_mlp", "expand_mlp", "expand_rank1"]


@torch.no_grad()
def expand_gated_mlp(
    layer: GatedMLP, factor: int, noise: float = 0.0, generator: torch.Generator | None = None
) -> tuple[GatedMLP, Tensor]:
    """A gated layer with `factor` copies of every hidden unit, whose output is that of `layer` ([B]).

    Columns of p are divided by the factor, which is exact for every activation; rows of v are not scaled.

    Args:
        layer: `[h]` hidden units; it is left alone.
        factor: number of copies, at least 1.
        noise: standard deviation of what is added to the copies of w, v, b_w and b_v, relative to the root mean square
            of each; copies without noise get equal gradients for ever.
        generator: draws the noise.

    Returns:
        the new layer, and `origin [factor h]`: the unit of `layer` that each of its units is a copy of.

    Raises:
        TypeError: another kind of layer, or a factor that is not an int.
        ValueError: a factor below 1.
    """
    _check(GatedMLP, factor, noise, generator, layer=layer)
    origin = _origin(layer.w.shape[0], factor, layer.w.device)
    new = copy.deepcopy(layer)
    for name in ("w", "v", "b_w", "b_v"):
        t = getattr(new, name)
        if t is not None:
            setattr(new, name, nn.Parameter(_copies(t, origin, noise, generator)))
    new.p = nn.Parameter(new.p[:, origin] / factor)
    return new, origin


@torch.no_grad()
def expand_mlp(
    up: nn.Linear, down: nn.Linear, factor: int, noise: float = 0.0, generator: torch.Generator | None = None
) -> tuple[nn.Linear, nn.Linear, Tensor]:
    """`expand_gated_mlp` for down(act(up(x))), whatever the activation: the new up and down, and origin."""
    _check(nn.Linear, factor, noise, generator, up=up, down=down)
    origin = _origin(up.weight.shape[0], factor, up.weight.device)
    new_up, new_down = copy.deepcopy(up), copy.deepcopy(down)
    new_up.weight = nn.Parameter(_copies(up.weight, origin, noise, generator))
    new_up.out_features = new_down.in_features = len(origin)
    if up.bias is not None:
        new_up.bias = nn.Parameter(_copies(up.bias, origin, noise, generator))
    new_down.weight = nn.Parameter(down.weight[:, origin] / factor)
    return new_up, new_down, origin


@torch.no_grad()
def expand_rank1(
    layer: Rank1Linear, factor: int, noise: float = 0.0, generator: torch.Generator | None = None
) -> tuple[Rank1Linear, Tensor]:
    """`expand_gated_mlp` for the subcomponents of a linear layer: reads are copied, writes divided by the factor."""
    _check(Rank1Linear, factor, noise, generator, layer=layer)
    origin = _origin(layer.read.shape[1], factor, layer.read.device)
    new = copy.deepcopy(layer)
    new.read = nn.Parameter(_copies(layer.read.t(), origin, noise, generator).t().contiguous())
    new.write = nn.Parameter(layer.write[origin] / factor)
    return new, origin


def _check(kind: type[nn.Module], factor: int, noise: float, generator: object, **layers: nn.Module) -> None:
    for name, layer in layers.items():
        if not isinstance(layer, kind):
            raise TypeError(f"{name} must be a {kind.__name__}, got {type(layer).__name__}")
    check_integers(factor=factor)
    check_reals(noise=noise)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")


def _origin(h: int, factor: int, device: torch.device) -> Tensor:
    if factor < 1:
        raise ValueError(f"factor must be at least 1, got {factor}")
    return torch.arange(h, device=device).repeat(factor)


def _copies(t: Tensor, origin: Tensor, noise: float, generator: torch.Generator | None) -> Tensor:
    copies = t[origin]
    if noise:
        drawn = torch.empty_like(copies).normal_(generator=generator)
        copies += noise * t.square().mean().sqrt() * drawn
    return copies
