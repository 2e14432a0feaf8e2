"""Weight gradients of a gated layer that reach only the units which a token uses ([A])."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bilinear_ops import _impl, _op, gated
from bilinear_ops._check import check, check_beside, check_integers, check_reals
from bilinear_ops._gate import Numbers, check_mlp, number_tensors
from bilinear_ops._gated_backward import backward, unpack

RULES = ("threshold", "topk", "proportional")


def route(gates: Tensor, rule: str, *, threshold: float = 0.5, k: int = 1) -> Tensor:
    """Which units learn from a token: `route=` of `routed_gated_mlp`, from how active their originals are ([A]).

    Args:
        gates: `[..., h]` activities of the original units, already taken along `origin`.
        rule: "threshold" for gates above `threshold`; "topk" for the k largest; "proportional" for the gates.

    Returns:
        `[..., h]` in the dtype of gates, without gradient.

    Raises:
        TypeError: gates that are not a floating-point tensor.
        ValueError: unknown rule, or k out of range.
    """
    sizes = check(gates=(gates, "... h"))
    check_integers(k=k)
    check_reals(threshold=threshold)
    gates = gates.detach()
    if rule == "threshold":
        return (gates > threshold).to(gates.dtype)
    if rule == "topk":
        if not 0 <= k <= sizes["h"]:
            raise ValueError(f"k must be from 0 to h={sizes['h']}, got {k}")
        return torch.zeros_like(gates).scatter_(-1, gates.topk(k).indices, 1.0)
    if rule == "proportional":
        return gates
    raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")


def routed_gated_mlp(
    x: Tensor,
    w: Tensor,
    v: Tensor,
    p: Tensor,
    b_w: Tensor | None = None,
    b_v: Tensor | None = None,
    b_p: Tensor | None = None,
    *,
    route: Tensor,
    activation: str = "identity",
    beta: float | Tensor = 1.0,
    impl: str = "auto",
) -> Tensor:
    """`gated_mlp`, with each token's gradients of w, v, p's columns, b_w and b_v multiplied by `route` ([A]).

    The gradient of x is the layer's own, and so are those of b_p and beta. Differentiable once.

    Args:
        route: broadcasts to `[..., h]`; gets no gradient. 0 keeps a unit from learning from a token.
        x, w, v, p, b_w, b_v, b_p, activation, beta, impl: as for `gated_mlp`.

    Returns:
        `[..., o]`, contiguous, in x's dtype.

    Raises:
        as `gated_mlp`.
    """
    x, w, v, p, b_w, b_v, b_p = _op.autocast(x, w, v, p, b_w, b_v, b_p)
    check_mlp(x, w, v, p, b_w, b_v, b_p, activation, beta)
    lead, h = x.shape[:-1], w.shape[0]
    if route is None:
        raise TypeError("route must be a torch.Tensor, got NoneType")
    check_beside(x, route=(route, (*lead, h)))
    slope, *_ = number_tensors(activation, Numbers(beta), x)
    rows, of_rows = x.reshape(lead.numel(), x.shape[-1]), route.expand(*lead, h).reshape(lead.numel(), h)
    y = _Routed.apply(rows, w, v, p, b_w, b_v, b_p, slope, of_rows, activation, _impl.resolve(impl, x))
    return y.view(*lead, p.shape[0])


class _Routed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *tensors, route, activation, impl = args
        y, az = gated.gated_op(*tensors, None, None, activation, True, impl)
        ctx.save_for_backward(az, *tensors, route)
        ctx.options = activation, impl
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        az, x, w, v, p, b_w, b_v, b_p, beta, route = ctx.saved_tensors
        activation, impl = ctx.options
        need = list(ctx.needs_input_grad[:8])
        found = backward(dy, az, x, w, v, p, b_w, b_v, b_p, beta, None, None, activation, need, impl, route=route)
        dx, dwv, dp, db, db_p, dbeta = (_op.or_empty(t, dy) for t in found)
        gradients = unpack(dx, dwv, dp, db, db_p, dbeta, need)
        return *(g if n else None for g, n in zip(gradients, need, strict=True)), None, None, None
