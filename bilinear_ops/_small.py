"""Small layers on CPU, where calls cost more than arithmetic, by eager PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from bilinear_ops import _impl, reference
from bilinear_ops._check import DTYPES, is_plain_like
from bilinear_ops._gate import check_gate
from bilinear_ops._impl import PLAIN
from bilinear_ops.composite.limits import limits
from bilinear_ops.composite.rank1.masks import blend, mask_site, uniform
from bilinear_ops.reference.gated import activate
from bilinear_ops.reference.rank1.masked import apply
from bilinear_ops.results import ACTIVATIONS, SAMPLINGS, Masks

PRODUCTS = frozenset(ACTIVATIONS) - {"swish", "silu_bounded"}  # a * act(z) without numbers is all of the gate


def is_small_layer(x: Tensor, w: Tensor) -> bool:
    """Whether eager PyTorch is faster for a layer."""
    return x.is_cpu and x.numel() * w.shape[0] <= limits.small_on_cpu


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
) -> Tensor:
    """A small layer that nothing watches, for which `is_plain_layer` holds, by eager PyTorch.

    Eager PyTorch keeps more, computes less again, and costs less to call.
    """
    if limit is None and offset is None and activation in PRODUCTS and type(beta) is float and beta == 1.0:
        hid = linear(x, w, b_w) * activate(linear(x, v, b_v), activation)
    else:
        check_gate(activation, beta, limit, offset, x)
        a, z = linear(x, w, b_w), linear(x, v, b_v)
        hid = reference.gate(a, z, activation=activation, beta=beta, limit=limit, offset=offset)
    return hid if p is None else linear(hid, p, b_p)


def small_masks(
    x: Tensor,
    read: Tensor,
    write: Tensor,
    gates: Tensor,
    bias: Tensor | None,
    samples: int,
    seed: int | Tensor | None,
    sampling: str,
    stream: int,
) -> Masks | None:
    """The masks, but for their seed, of a small layer of plain tensors that nothing sees: else None.

    None too for what the ops' checks refuse: these comparisons are their own.
    """
    if not (
        type(x) in PLAIN and type(gates) in PLAIN
        and type(seed) is int and type(stream) is int and type(samples) is int
        and sampling in SAMPLINGS
        and _impl.is_unwatched()
        and not _impl.needs_reference()
    ):  # fmt: skip
        return None
    if not (
        x.is_cpu and is_plain_like(x, x) and is_plain_like(read, x) and is_plain_like(write, x)
        and gates.is_cpu and is_plain_like(gates, gates)
        and x.dtype in DTYPES and gates.dtype in DTYPES
        and (bias is None or is_plain_like(bias, x) and bias.shape == write.shape[1:])
    ):  # fmt: skip
        return None
    rows, c, masked = x.shape, read.shape, gates.shape
    if not (
        len(c) == 2 and write.dim() == 2 and write.shape[0] == c[1]
        and rows and rows[-1] == c[0] and masked == (*rows[:-1], c[1])
        and samples >= 1 and samples * gates.numel() <= limits.kept_masks
        and -(1 << 63) <= seed < 1 << 63
    ):  # fmt: skip
        return None
    gates = gates if len(masked) == 2 else gates.reshape(rows[:-1].numel(), c[1])
    return Masks(gates, None, None, None, None, None, None, stream, samples, sampling)


def small_drawn_layer(
    x: Tensor,
    read: Tensor,
    write: Tensor,
    acts: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    masks: Masks,
    seed: int | Tensor,
) -> Tensor:
    """A small layer under masks that are kept for backward, by eager PyTorch: calls cost more than arithmetic there.

    The seed stands beside the masks, where an int need not be a tensor.
    """
    x, c = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1]), read.shape[1]
    numbers = masks.row_numbers, masks.column_numbers
    draws = uniform(seed, mask_site(masks.stream), masks.samples, x.shape[0], c, *numbers)
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
