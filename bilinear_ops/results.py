"""What ops take and return beside tensors: named tuples, and the names of options.

Everything may import this module; it imports nothing of the package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Self, TypeAlias

import torch
from torch import Tensor

Layer: TypeAlias = tuple[Tensor, Tensor, Tensor]  # (w, v, p) of a bilinear layer

ACTIVATIONS = (
    *("identity", "silu", "swish", "sigmoid", "relu", "gelu", "gelu_tanh"),
    *("relu2", "relu6", "tanh", "mish", "hardswish", "silu_clamped", "silu_bounded"),
)
LAYOUTS = ("full", "packed")
SCORES = ("cross", "self", "pair", "entry")
SCOPES = ("output", "global")
REDUCTIONS = ("sum", "cumsum", "none")
SAMPLINGS = ("continuous", "binomial")


class Result:
    """What named tuples of tensors have in common: `to` and `detach`; `torch.load` takes them by default.

    Their fields are tensors, None, and tuples of those.
    """

    __slots__ = ()

    def __init_subclass__(cls) -> None:
        torch.serialization.add_safe_globals([cls])

    def to(self, *args: Any, **options: Any) -> Self:
        """All tensors moved to a device, and floating-point ones cast to a dtype; as `torch.nn.Module.to`."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **options)

        def moved(t: Tensor) -> Tensor:
            return t.to(device, dtype if t.is_floating_point() else None, non_blocking)

        return _map(moved, self)

    def detach(self) -> Self:
        """All tensors without their graphs."""
        return _map(Tensor.detach, self)


def _map(f: Callable[[Tensor], Tensor], found: Any) -> Any:
    if isinstance(found, Tensor):
        return f(found)
    if not isinstance(found, tuple):
        return found
    parts = (_map(f, part) for part in found)
    return type(found)(*parts) if hasattr(found, "_fields") else tuple(parts)


class Activations(
    Result,
    NamedTuple(
        "Activations",
        [
            ("a", Tensor),
            ("z", Tensor),
            ("hid", Tensor),
        ],
    ),
):
    """What a gated layer computes on its way: the pre-activations a and z, and hid = a * act(z), `[..., h]` each."""

    __slots__ = ()


class Directions(
    Result,
    NamedTuple(
        "Directions",
        [
            ("u", Tensor),
            ("p", Tensor),
        ],
    ),
):
    """Stands for the coefficients c = u p `[K, h]` wherever an op takes c, with the low-rank factors kept apart.

    Both factors get gradients.

    Args:
        u: `[K, o]` output directions, a row each.
        p: `[o, h]` down-projection.
    """

    __slots__ = ()


def coefficients(c: Tensor | Directions) -> Tensor:
    """c as one tensor [K, h]."""
    return c.u @ c.p if isinstance(c, Directions) else c


class TopInteractions(
    Result,
    NamedTuple(
        "TopInteractions",
        [
            ("values", Tensor),
            ("k", Tensor),
            ("i", Tensor),
            ("j", Tensor),
        ],
    ),
):
    """The strongest interactions: their scores and where they are, i <= j; all `[K, n]`, or `[n]` for global scope."""

    __slots__ = ()


class ActiveInteractions(
    Result,
    NamedTuple(
        "ActiveInteractions",
        [
            ("values", Tensor),
            ("token", Tensor),
            ("k", Tensor),
            ("i", Tensor),
            ("j", Tensor),
        ],
    ),
):
    """Contributions `[T, b, a(a+1)/2]` of each token's active feature pairs i <= j to its active outputs k."""

    __slots__ = ()


class InteractionMoments(
    Result,
    NamedTuple(
        "InteractionMoments",
        [
            ("sum", Tensor),
            ("squares", Tensor),
            ("cubes", Tensor),
            ("fourths", Tensor),
            ("max_abs", Tensor),
        ],
    ),
):
    """Power sums and the largest magnitude, `[K]` each, over the entries i <= j of every interaction matrix."""

    __slots__ = ()


class Gate(NamedTuple):
    """The function (clamp(a) + offset) * act(clamp(z)) of both pre-activations; its numbers are 0-dim tensors."""

    activation: str
    beta: Tensor | None = None
    limit: Tensor | None = None
    offset: Tensor | None = None


class Masks(NamedTuple):
    """How the masks of all samples follow from the gates; M tokens, S samples, C subcomponents.

    A mask is the gates themselves ("given"), g + (1 - g) source ("source"), or drawn ("continuous", "binomial").
    """

    gates: Tensor  # [G, C]: rows repeat with period G, a divisor of M
    source: Tensor | None  # [1 or S, 1 or M, C]
    delta: Tensor | None  # [S, M]
    routing: Tensor | None  # bool [M]: where False, mask - delta is 0
    seed: Tensor | None  # int64 []
    row_numbers: Tensor | None  # int64 [M], without them 0, 1, ...: which draws are made
    column_numbers: Tensor | None  # int64 [C], likewise
    stream: int
    samples: int
    sampling: str
