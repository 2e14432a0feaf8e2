"""The gate's activation and run-time numbers: their record, their checks, and the tensors that enter the ops."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilinear_ops._check import DTYPES, check
from bilinear_ops.results import ACTIVATIONS

NUMBERS = (float, int, torch.SymFloat)


class Numbers(NamedTuple):
    """The run-time numbers of a gate, as callers give them."""

    beta: float | Tensor = 1.0
    limit: float | Tensor | None = None
    offset: float | Tensor | None = None


def check_mlp(
    x: Tensor,
    w: Tensor,
    v: Tensor,
    p: Tensor,
    b_w: Tensor | None,
    b_v: Tensor | None,
    b_p: Tensor | None,
    activation: str,
    beta: float | Tensor,
    **others: Any,
) -> None:
    """The checks of a gated MLP without limit and offset; `others` are further arguments of `check`."""
    check(
        x=(x, "... d"),
        w=(w, "h d"),
        v=(v, "h d"),
        p=(p, "o h"),
        b_w=(b_w, "? h"),
        b_v=(b_v, "? h"),
        b_p=(b_p, "? o"),
        **others,
    )
    check_gate(activation, beta, None, None, x)


def check_gate(
    activation: str,
    beta: float | Tensor,
    limit: float | Tensor | None,
    offset: float | Tensor | None,
    like: Tensor,
) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if activation != "swish" and limit is None and offset is None and type(beta) is float and beta == 1.0:
        return  # as most calls are
    _check_number("beta", beta, like)
    if activation != "swish" and (isinstance(beta, Tensor) or beta != 1.0):
        got = "a tensor" if isinstance(beta, Tensor) else beta
        raise ValueError(f"beta belongs to activation='swish', got {got} with {activation!r}")
    for name, number in (("limit", limit), ("offset", offset)):
        if number is not None:
            _check_number(name, number, like)
        if isinstance(number, Tensor) and number.requires_grad:
            raise ValueError(f"{name} has no gradient, got a tensor that requires one")
    if limit is not None and activation == "silu_bounded":
        raise ValueError("limit does not belong to activation='silu_bounded', which has bounds of its own")
    if limit is not None and not isinstance(limit, Tensor) and not limit > 0:
        raise ValueError(f"limit must be positive, got {limit}")


def _check_number(name: str, number: object, like: Tensor) -> None:
    if isinstance(number, Tensor):
        if number.dtype not in DTYPES:
            raise TypeError(f"{name} must be a floating-point tensor, got {number.dtype}")
        if number.dim() != 0:
            raise RuntimeError(f"{name} must be a float or have shape [], got {list(number.shape)}")
        if number.device != like.device:
            raise RuntimeError(f"{name} must be on the device of x, {like.device}, got {number.device}")
    elif not isinstance(number, NUMBERS):
        raise TypeError(f"{name} must be a float or a 0-dim tensor, got {type(number).__name__}")


def number_tensors(activation: str, numbers: Numbers, like: Tensor) -> tuple[Tensor | None, ...]:
    """A run-time number enters the op as a tensor: as a float it would recompile a compiled caller for every value.

    The product, unlike `torch.full`, is a form in which torch.compile keeps a float symbolic.
    """
    if activation != "swish" and numbers.limit is None and numbers.offset is None:
        return None, None, None
    dtype = torch.promote_types(like.dtype, torch.float32)
    given = (numbers.beta if activation == "swish" else None, numbers.limit, numbers.offset)
    return tuple(
        n if n is None or isinstance(n, Tensor) else torch.ones((), dtype=dtype, device=like.device) * n for n in given
    )
