"""Masked rank-1 subcomponents: the public functions, the registered op and its backward (docs/math.md 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bilinear_ops import _impl, _op, reference
from bilinear_ops._check import check, check_beside
from bilinear_ops._masks import (
    check_remainder,
    flat_masks,
    masked_formula,
    narrowed,
    stochastic_masks,
    weighted_sum,
    write_remainder,
)
from bilinear_ops._sharding import sharded
from bilinear_ops._small import small_drawn_layer, small_masks
from bilinear_ops.composite.limits import limits
from bilinear_ops.composite.rank1 import masked as composite
from bilinear_ops.results import Masks

# A branch without a kernel.
NO_MASK = "rank1_linear without mask, delta and routing is two library GEMMs and has no kernel"


@sharded(
    "... o", over="... c o", once=("bias", "weight"),
    x="... i", read="i c", write="c o", mask="... c", bias="o", weight="o i", delta="...", routing="...",
    acts="... c",
)  # fmt: skip
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
    impl: str = "auto",
) -> Tensor:
    """((x R) * m) L + bias: a linear map as C rank-1 subcomponents, masked for each token ([SPD]).

    Args:
        x: `[..., d_in]` inputs.
        read, write: `[d_in, C]` and `[C, d_out]` subcomponents.
        mask: broadcasts to `[..., C]`; without it all subcomponents are on.
        bias: `[d_out]`.
        weight: `[d_out, d_in]` original weight, which delta and routing refer to.
        delta: broadcasts to `[...]`: how much of the remainder weight - (R L)^T to add, never forming it.
        routing: bool, broadcasts to `[...]`: where False the token goes through weight instead.
        acts: `[..., C]`, x R where the caller has it already; the gradient of ((x R) * m) L then goes through it, and
            that of delta's remainder to x, read and write.
        impl: "auto", "triton" or "torch".

    mask and delta may have any floating dtype; they are used in float32 or better. Under autocast the remainder is
    formed, once a call and in float32.

    Returns:
        `[..., d_out]`, contiguous, in x's dtype.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices, or impl="triton" where it cannot run: without mask, delta
            and routing there is nothing for a kernel to do.
        TypeError: an argument that is not a floating-point tensor, routing that is not a bool tensor.
        ValueError: delta or routing without weight, unknown impl.
    """
    uncast = weight, read, write
    x, read, write, bias, weight, acts = _op.autocast(x, read, write, bias, weight, acts)
    sizes = _check(x, read, write, bias, weight, delta, routing, acts)
    lead = x.shape[:-1]
    check_beside(x, mask=(mask, (*lead, sizes["c"])), delta=(delta, lead))
    impl = _impl.resolve(impl, x)
    plain = mask is None and delta is None and routing is None
    if _impl.needs_reference() or plain and _impl.refuse(impl, NO_MASK):
        y = reference.rank1_linear(x, read, write, mask, bias, weight=weight, delta=delta, routing=routing, acts=acts)
        return y.contiguous()
    mask = x.new_ones(1, sizes["c"]) if mask is None else mask
    delta = None if delta is None else delta.expand(lead)[None]
    masks = Masks(mask, None, delta, routing, None, None, None, stream=0, samples=1, sampling="given")
    return _masked(x, read, write, acts, weight, bias, masks, uncast, impl)[0]


@sharded(
    "s ... o", over="... c o", once=("bias", "weight"), numbers={"row_numbers": "...", "column_numbers": "c"},
    x="... i", read="i c", write="c o", gates="... c", bias="o", seed="", weight="o i", delta="s ...", routing="...",
    acts="... c", source="s ... c", row_numbers="...", column_numbers="c",
)  # fmt: skip
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
    impl: str = "auto",
) -> Tensor:
    """`rank1_linear` under stochastic masks g + (1 - g) r, drawn where they are used ([SPD]).

    Backward draws the masks again: one `[..., C]` array, x R, is kept beside the inputs for any number of samples. Only
    a step on CPU of at most 2^17 mask entries keeps its masks, as calls cost more there.
    `stochastic_mask` and `stochastic_delta` return the same numbers as tensors.

    Args:
        x, read, write, bias, weight, routing, acts, impl: as for `rank1_linear`.
        gates: broadcasts to `[..., C]`: causal importances in [0, 1]; other values are not refused.
        samples: number of masks.
        seed: int or int64 0-dim tensor, needed wherever something is drawn; no value of it recompiles.
        sampling: "continuous", r ~ U(0, 1), or "binomial", r ~ Bernoulli(1/2).
        delta: broadcasts to `[samples, ...]`, or "uniform", drawn for each sample and token.
        stream: int that keeps two sites with one seed apart.
        source: broadcasts to `[samples, ..., C]`: used for r instead of drawing.
        row_numbers, column_numbers: as for `stochastic_mask`.

    Returns:
        `[samples, ..., d_out]`, contiguous, in x's dtype.

    Raises:
        as `rank1_linear`, and
        TypeError: no seed where something is drawn.
        ValueError: samples below 1, unknown sampling or delta.
    """
    if impl in ("auto", "torch") and all(
        t is None for t in (weight, delta, routing, acts, source, row_numbers, column_numbers)
    ):
        small = small_masks(x, read, write, gates, bias, samples, seed, sampling, stream)
        if small is not None and isinstance(seed, int):
            y = small_drawn_layer(x, read, write, None, None, bias, small, seed)
            return y.unsqueeze(0) if samples == 1 and x.dim() == 2 else y.view(samples, *x.shape[:-1], write.shape[1])
    uncast = weight, read, write
    x, read, write, bias, weight, acts = _op.autocast(x, read, write, bias, weight, acts)
    sizes = _check(x, read, write, bias, weight, delta, routing, acts)
    lead = x.shape[:-1]
    masks = stochastic_masks(
        x, gates, (*lead, sizes["c"]), samples=samples, seed=seed, sampling=sampling, delta=delta, routing=routing,
        stream=stream, source=source, row_numbers=row_numbers, column_numbers=column_numbers, impl=impl,
    )  # fmt: skip
    impl = _impl.resolve(impl, x)
    if _impl.needs_reference():
        return reference.stochastic_rank1_linear(
            x, read, write, gates, bias, samples=samples, seed=masks.seed, sampling=sampling, weight=weight,
            delta=masks.delta, routing=routing, acts=acts, stream=stream, source=source,
            row_numbers=row_numbers, column_numbers=column_numbers,
        ).contiguous()  # fmt: skip
    return _masked(x, read, write, acts, weight, bias, masks, uncast, impl)


def _check(
    x: Tensor,
    read: Tensor,
    write: Tensor,
    bias: Tensor | None,
    weight: Tensor | None,
    delta: object,
    routing: object,
    acts: Tensor | None,
) -> dict[str, int]:
    sizes = check(
        x=(x, "... i"),
        read=(read, "i c"),
        write=(write, "c o"),
        bias=(bias, "? o"),
        weight=(weight, "? o i"),
        acts=(acts, "? ... c"),
    )
    if acts is not None and acts.shape[:-1] != x.shape[:-1]:
        raise RuntimeError(f"acts must have shape {[*x.shape[:-1], sizes['c']]}, got {list(acts.shape)}")
    check_remainder(x, delta, routing, weight=weight)
    return sizes


def _masked(
    x: Tensor,
    read: Tensor,
    write: Tensor,
    acts: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    masks: Masks,
    uncast: tuple[Tensor | None, Tensor, Tensor],
    impl: str,
) -> Tensor:
    """Flatten the tokens and call the op. `masks` is as the caller gives it: sizes broadcast, tokens not flattened.

    `uncast` is (weight, read, write) before autocast, under which the remainder is formed from them.
    """
    if masks.delta is not None and weight is not None and uncast[0] is not None and uncast[0].dtype != weight.dtype:
        remainder = _remainder(uncast[0], *uncast[1:]).to(x.dtype)
        y = _masked(x, read, write, acts, weight, bias, masks._replace(delta=None), uncast, impl)
        return (y + _own(masks)[..., None] * (x @ remainder.mT)).to(y.dtype)
    lead, tokens, c = x.shape[:-1], x.shape[:-1].numel(), read.shape[1]
    remains = masks.delta is not None
    masks = flat_masks(masks, lead, c)
    if masks.delta is None:
        weight = None
    if acts is not None:  # what the result does not depend on gets no gradient
        read = read if remains else read.detach()
        x = x if weight is not None else x.detach()
    small = impl == "torch" and x.is_cpu and masks.samples * tokens * c <= limits.kept_masks
    if small and masks.seed is not None and _impl.is_unwatched():
        y = small_drawn_layer(x, read, write, acts, weight, bias, masks, masks.seed)
        return y.view(masks.samples, *lead, write.shape[1])
    x, acts = x.reshape(tokens, x.shape[-1]), None if acts is None else acts.reshape(tokens, c)
    tensors = (x, read, write, weight, bias, masks.gates, masks.source, masks.delta)
    save = torch.is_grad_enabled() and acts is None and any(t is not None and t.requires_grad for t in tensors)
    y, _ = rank1_op(x, read, write, acts, weight, bias, *masks, save, impl)
    return y.view(masks.samples, *lead, write.shape[1])


@_op.without_autocast
def _remainder(weight: Tensor, read: Tensor, write: Tensor) -> Tensor:
    """weight - (R L)^T in fp32 or better: as a difference of two half-precision products most of it is rounding."""
    weight, read, write = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (weight, read, write))
    return weight - (read @ write).mT


def launchers():
    """The kernels of this family, imported at the first launch."""
    from bilinear_ops.kernels.rank1 import masked

    return masked


def _forward(
    x: Tensor,
    read: Tensor,
    write: Tensor,
    acts: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """y [samples, tokens, d_out], and acts = x R [tokens, C] if `save`, else empty."""
    *fields, save, impl = options
    masks = Masks(*fields)
    inner = x @ read if acts is None else acts
    y = x.new_empty(masks.samples, x.shape[0], write.shape[1])
    # one product with the original weight for all samples
    original = None if masks.delta is None or weight is None else x @ weight.t()
    beta = write_remainder(y, original, bias, masks)
    (composite if impl == "torch" else launchers()).masked_apply(y, inner, write, masks, beta)
    if masks.routing is not None and original is not None:  # 0 * nan: what passes the subcomponents must not see theirs
        passed = original if bias is None else original + bias
        torch.where(masks.routing[:, None], y, passed, out=y)
    return y, _op.or_empty(inner if save else None, x)


def _forward_fake(x, read, write, acts, weight, bias, *options):
    *fields, save, impl = options
    y = x.new_empty(Masks(*fields).samples, x.shape[0], write.shape[1])
    return y, x.new_empty(x.shape[0], read.shape[1]) if save else x.new_empty(0)


def _backward(
    dy: Tensor,
    kept: Tensor,
    x: Tensor,
    read: Tensor,
    write: Tensor,
    acts: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *options: Any,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, read, write, acts, weight, bias, gates, source and delta, each None unless needed.

    `kept` is x R, or empty where the caller gave acts or nothing was saved. Through acts of the caller goes what the
    masks pass; what delta takes away goes through x, read and write.
    """
    *fields, need, impl = options
    need_x, need_read, need_write, need_acts, need_weight, need_bias, need_gates, need_source, need_delta = need
    masks = Masks(*fields)
    given = acts is not None
    through_acts = not given and (need_x or need_read)
    if acts is None:
        acts = kept if kept.numel() else x @ read
    dacts, dwrite, dgates, dsource, ddelta = (composite if impl == "torch" else launchers()).masked_apply_backward(
        dy, acts, write, masks, [need_acts or through_acts, need_write, need_gates, need_source, need_delta]
    )
    dx = dread = dweight = None
    if given and masks.delta is not None and (need_acts or need_x or need_read):
        taken = weighted_sum(_own(masks), dy) @ write.t()
        if need_acts:
            dacts += taken
        dx = (taken @ read.t()).neg_() if need_x else None
        dread = (x.t() @ taken).neg_() if need_read else None
    if through_acts and need_x:
        dx = dacts @ read.t()
        if masks.routing is not None:
            dx.masked_fill_(~masks.routing[:, None], 0.0)
    if through_acts and need_read:
        dread = x.t() @ dacts
    if masks.delta is not None and weight is not None:
        if need_x or need_weight:
            doriginal = weighted_sum(masks.delta, dy)
            if need_x:
                dx = doriginal @ weight if dx is None else dx.addmm_(doriginal, weight)
            if need_weight:
                dweight = doriginal.t() @ x
        if ddelta is not None:
            ddelta += (dy * (x @ weight.t())).sum(-1, dtype=ddelta.dtype)
    grads = (dx, dread, dwrite, dacts if need_acts else None, dweight, dy.sum((0, 1)) if need_bias else None)
    return *grads, *narrowed(masks, dgates, dsource, ddelta)


def _formula(
    x: Tensor,
    read: Tensor,
    write: Tensor,
    acts: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    gates: Tensor,
    source: Tensor | None,
    delta: Tensor | None,
    *,
    routing: Tensor | None,
    seed: Tensor | None,
    row_numbers: Tensor | None,
    column_numbers: Tensor | None,
    stream: int,
    samples: int,
    sampling: str,
) -> Tensor:
    """The result of the op by the reference's pieces: differentiable to any order."""
    inner = x @ read
    acts = inner if acts is None else acts
    original = None if weight is None else x @ weight.mT
    masks = Masks(gates, source, delta, routing, seed, row_numbers, column_numbers, stream, samples, sampling)
    return masked_formula(acts, write, bias, original, masks, inner)


def _own(masks: Masks) -> Tensor:
    """The deltas of the tokens that use the subcomponents, 0 for those routed past them."""
    assert masks.delta is not None
    return masks.delta if masks.routing is None else torch.where(masks.routing, masks.delta, 0.0)


# from gates on in the order of Masks
rank1_op, rank1_backward_op = _op.differentiable(
    "rank1(Tensor x, Tensor read, Tensor write, Tensor? acts, Tensor? weight, Tensor? bias, Tensor gates, "
    "Tensor? source, Tensor? delta, Tensor? routing, Tensor? seed, Tensor? row_numbers, Tensor? column_numbers, "
    "int stream, int samples, str sampling, bool save, str impl) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    _backward,
    _formula,
)
