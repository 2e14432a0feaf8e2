"""Masked rank-1 subcomponents as [SPD] writes them."""

from __future__ import annotations

import torch
from torch import Tensor

from bilinear_ops.reference.rank1.masks import stochastic_delta, stochastic_mask


def rank1_linear(
    x: Tensor,
    read: Tensor,
    write: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    delta: Tensor | None = None,
    routing: Tensor | None = None,
    acts: Tensor | None = None,
) -> Tensor:
    """((x R) * m) L + delta * x (W - (R L)^T)^T + bias, and x W^T + bias where `routing` is False: -> [..., d_out]."""
    original = None if weight is None else x @ weight.mT
    inner = x @ read
    return apply(inner if acts is None else acts, write, mask, bias, original, delta, routing, inner)


def stochastic_rank1_linear(
    x: Tensor,
    read: Tensor,
    write: Tensor,
    gates: Tensor,
    bias: Tensor | None = None,
    *,
    samples: int = 1,
    seed: int | Tensor | None = None,
    sampling: str = "continuous",
    weight: Tensor | None = None,
    delta: Tensor | str | None = None,
    routing: Tensor | None = None,
    acts: Tensor | None = None,
    stream: int = 0,
    source: Tensor | None = None,
    row_numbers: Tensor | None = None,
    column_numbers: Tensor | None = None,
) -> Tensor:
    """`rank1_linear` under `samples` masks g + (1 - g) r: -> [samples, ..., d_out]."""
    inner = x @ read
    original = None if weight is None else x @ weight.mT
    acts = inner if acts is None else acts
    return stochastic(
        acts, write, gates, bias, original, samples=samples, seed=seed, sampling=sampling, delta=delta, routing=routing,
        stream=stream, source=source, row_numbers=row_numbers, column_numbers=column_numbers, inner=inner,
    )  # fmt: skip


def stochastic(
    acts: Tensor,
    write: Tensor,
    gates: Tensor,
    bias: Tensor | None,
    original: Tensor | None,
    *,
    samples: int,
    seed: int | Tensor | None,
    sampling: str,
    delta: Tensor | str | None,
    routing: Tensor | None,
    stream: int,
    source: Tensor | None,
    row_numbers: Tensor | None,
    column_numbers: Tensor | None,
    inner: Tensor | None = None,
) -> Tensor:
    """`stochastic_rank1_linear` from acts = x R and original = x W^T; `inner` as for `apply`."""
    gates = gates.expand(acts.shape)
    if source is not None:
        masks = gates + (1 - gates) * source
    else:
        masks = stochastic_mask(
            gates, samples=samples, seed=seed, sampling=sampling, stream=stream, row_numbers=row_numbers,
            column_numbers=column_numbers,
        )  # fmt: skip
    if isinstance(delta, str):
        delta = stochastic_delta(
            acts.shape[:-1], samples=samples, seed=seed, device=acts.device, stream=stream, row_numbers=row_numbers
        )
    y = apply(acts, write, masks, bias, original, delta, routing, inner)
    return y.expand(samples, *y.shape[-acts.dim() :])


def apply(
    acts: Tensor,
    write: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    original: Tensor | None,
    delta: Tensor | None,
    routing: Tensor | None,
    inner: Tensor | None = None,
) -> Tensor:
    """`rank1_linear` from acts and original = x W^T, with the difference matrix applied as x W^T - (x R) L.

    `inner` is x R where the caller gave acts, which then have a gradient of their own; acts without it.
    """
    y = (acts if mask is None else (acts * mask).to(acts.dtype)) @ write
    if delta is not None:
        assert original is not None
        y = y + (delta[..., None] * (original - (acts if inner is None else inner) @ write)).to(y.dtype)
    if routing is not None:
        assert original is not None
        y = torch.where(routing[..., None], y, original)
    return y if bias is None else y + bias
