"""Small layers on CPU, where calls cost more than arithmetic, by eager PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from bilinear_ops import reference
from bilinear_ops._gate import check_gate
from bilinear_ops.composite.limits import limits
from bilinear_ops.composite.rank1.masks import blend, mask_site, uniform
from bilinear_ops.reference.rank1.masked import apply
from bilinear_ops.results import Masks


def small_layer(
    x: Tensor,
    w: Tensor,
    v: Tensor,
    p: Tensor | None,
    b_w: Tensor | None,
    b_v: Tensor | None,
    b_p: Tensor | None,
    activation: str,
    beta: float | Tensor,
    limit: float | Tensor | None,
    offset: float | Tensor | None,
) -> Tensor | None:
    """A plain layer that nothing watches by eager PyTorch, where that is faster on CPU: else None.

    Eager PyTorch keeps more, computes less again, and costs less to call.
    """
    if not x.is_cpu or x.numel() * w.shape[0] > limits.small_on_cpu:
        return None
    check_gate(activation, beta, limit, offset, x)
    a, z = linear(x, w, b_w), linear(x, v, b_v)
    hid = reference.gate(a, z, activation=activation, beta=beta, limit=limit, offset=offset)
    return hid if p is None else linear(hid, p, b_p)


def small_drawn_layer(
    x: Tensor,
    read: Tensor,
    write: Tensor,
    acts: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    masks: Masks,
) -> Tensor:
    """A small layer under masks that are kept for backward, by eager PyTorch: calls cost more than arithmetic there."""
    assert masks.seed is not None
    x, c = x.reshape(x.shape[:-1].numel(), x.shape[-1]), read.shape[1]
    numbers = masks.row_numbers, masks.column_numbers
    draws = uniform(masks.seed, mask_site(masks.stream), masks.samples, x.shape[0], c, *numbers)
    gates, delta = masks.gates, masks.delta
    if masks.samples == 1:  # without a dimension that every gradient would be summed over
        draws, delta = draws[0], None if delta is None else delta[0]
    if gates.shape[0] not in (1, x.shape[0]):
        gates = gates.repeat(x.shape[0] // gates.shape[0], 1)
    mask = torch.where(draws >= 0.5, 1, gates) if masks.sampling == "binomial" else blend(gates, draws)
    inner = x @ read
    acts = inner if acts is None else acts.reshape(inner.shape)
    original = None if weight is None else x @ weight.mT
    return apply(acts, write, mask, bias, original, delta, masks.routing, inner)
