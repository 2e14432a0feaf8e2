"""The gated layer as a sum of rank-1 terms under masks: public function, op and backward (docs/math.md 3; [B])."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from bilinear_ops import _impl, _op, gated, reference
from bilinear_ops._check import check_beside
from bilinear_ops._gate import Numbers, check_mlp, number_tensors
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
from bilinear_ops.composite import gated as composite
from bilinear_ops.composite.rank1 import masked as masked_composite
from bilinear_ops.rank1 import masked
from bilinear_ops.results import Gate, Masks


@sharded(
    "s ... o", over="... h o", once=("b_p", "target"), numbers={"row_numbers": "...", "column_numbers": "h"},
    x="... d", w="h d", v="h d", p="o h", gates="... h", b_w="h", b_v="h", b_p="o", beta="", seed="",
    source="s ... h", target="... o", delta="s ...", routing="...", row_numbers="...", column_numbers="h",
)  # fmt: skip
def stochastic_gated_mlp(
    x: Tensor,
    w: Tensor,
    v: Tensor,
    p: Tensor,
    gates: Tensor,
    b_w: Tensor | None = None,
    b_v: Tensor | None = None,
    b_p: Tensor | None = None,
    *,
    activation: str = "identity",
    beta: float | Tensor = 1.0,
    samples: int = 1,
    seed: int | Tensor | None = None,
    sampling: str = "continuous",
    stream: int = 0,
    source: Tensor | None = None,
    target: Tensor | None = None,
    delta: Tensor | str | None = None,
    routing: Tensor | None = None,
    row_numbers: Tensor | None = None,
    column_numbers: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """sum_i m_i (w_i.x + b) act(v_i.x + b) p_i + b_p: a gated layer whose terms are masked, m = g + (1 - g) r ([B]).

    With gates sigmoid(V x) and masks equal to them, a bilinear layer is the SwiGLU layer of the same weights. With
    `target`, what the terms do not explain: sum_i (m_i - delta) hid_i p_i + delta * target + b_p. Keeps the inputs and
    the pre-activations, `d + 2h` elements a token, for backward, whatever the number of samples: masks are drawn again.

    Args:
        x, w, v, p, b_w, b_v, b_p, activation, beta: as for `gated_mlp`.
        gates: broadcasts to `[..., h]`: causal importances in [0, 1]; other values are not refused.
        samples, seed, sampling, stream: as for `stochastic_mask`, whose masks these are.
        source: broadcasts to `[samples, ..., h]`: used for r instead of drawing.
        target: `[..., o]`, the original layer's output before its output bias, which delta and routing refer to.
        delta: broadcasts to `[samples, ...]`, or "uniform", drawn for each sample and token.
        routing: bool, broadcasts to `[...]`: where False the token gets target + b_p.
        row_numbers, column_numbers: as for `stochastic_mask`.
        impl: "auto", "triton" or "torch".

    Returns:
        `[samples, ..., o]`, contiguous, in x's dtype.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices, or impl="triton" where it cannot run.
        TypeError: an argument that is not a floating-point tensor, routing that is not a bool tensor, no seed where
            something is drawn.
        ValueError: delta or routing without target, samples below 1, unknown activation, sampling, delta or impl, or
            a beta without swish.
    """
    x, w, v, p, b_w, b_v, b_p, target = _op.autocast(x, w, v, p, b_w, b_v, b_p, target)
    check_mlp(x, w, v, p, b_w, b_v, b_p, activation, beta, target=(target, "? ... o"))
    if target is not None and target.shape[:-1] != x.shape[:-1]:
        raise RuntimeError(f"target must have shape {[*x.shape[:-1], p.shape[0]]}, got {list(target.shape)}")
    check_remainder(x, delta, routing, target=target)
    masks = stochastic_masks(
        x, gates, (*x.shape[:-1], w.shape[0]), samples=samples, seed=seed, sampling=sampling, delta=delta,
        routing=routing, stream=stream, source=source, row_numbers=row_numbers, column_numbers=column_numbers,
        impl=impl,
    )  # fmt: skip
    impl = _impl.resolve(impl, x)
    if _impl.needs_reference():
        return reference.stochastic_gated_mlp(
            x, w, v, p, gates, b_w, b_v, b_p, activation=activation, beta=beta, samples=samples, seed=masks.seed,
            sampling=sampling, stream=stream, source=source, target=target, delta=masks.delta, routing=routing,
            row_numbers=row_numbers, column_numbers=column_numbers,
        ).contiguous()  # fmt: skip
    return _masked(x, w, v, p, b_w, b_v, b_p, target, activation, beta, masks, False, impl)


def masked_gated_mlp(
    x: Tensor,
    w: Tensor,
    v: Tensor,
    p: Tensor,
    mask: Tensor,
    b_w: Tensor | None,
    b_v: Tensor | None,
    b_p: Tensor | None,
    activation: str,
    beta: float | Tensor,
    recompute: bool,
    impl: str,
) -> Tensor:
    """`gated_mlp` under a given mask."""
    check_mlp(x, w, v, p, b_w, b_v, b_p, activation, beta)
    check_beside(x, mask=(mask, (*x.shape[:-1], w.shape[0])))
    impl = _impl.resolve(impl, x)
    if _impl.needs_reference():
        return reference.gated_mlp(x, w, v, p, b_w, b_v, b_p, activation=activation, beta=beta, mask=mask)
    masks = Masks(mask, None, None, None, None, None, None, stream=0, samples=1, sampling="given")
    return _masked(x, w, v, p, b_w, b_v, b_p, None, activation, beta, masks, recompute, impl)[0]


def _masked(
    x: Tensor,
    w: Tensor,
    v: Tensor,
    p: Tensor,
    b_w: Tensor | None,
    b_v: Tensor | None,
    b_p: Tensor | None,
    target: Tensor | None,
    activation: str,
    beta: float | Tensor,
    masks: Masks,
    recompute: bool,
    impl: str,
) -> Tensor:
    """Flatten the tokens and call the op."""
    lead, o = x.shape[:-1], p.shape[0]
    masks = flat_masks(masks, lead, w.shape[0])
    target = None if target is None or masks.delta is None else target.reshape(lead.numel(), o)
    tensors = (
        x.reshape(lead.numel(), x.shape[-1]),
        w,
        v,
        p,
        b_w,
        b_v,
        b_p,
        number_tensors(activation, Numbers(beta), x)[0],
    )
    trained = (*tensors, target, masks.gates, masks.source, masks.delta)
    save = not recompute and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in trained)
    y, _ = stochastic_gated_op(*tensors, target, *masks, activation, save, impl)
    return y.view(masks.samples, *lead, o)


def _paths(impl: str) -> tuple[ModuleType, ModuleType]:
    """The gate's functions and those of the masks."""
    return (composite, masked_composite) if impl == "torch" else (gated.launchers(), masked.launchers())


def _forward(x, w, v, p, b_w, b_v, b_p, beta, target, *options):
    """y [samples, tokens, o], and the pre-activations [tokens, 2h] if `save`, else empty."""
    *fields, activation, save, impl = options
    masks = Masks(*fields)
    gate_path, mask_path = _paths(impl)
    hid, az = gate_path.gate_forward(x, w, v, b_w, b_v, Gate(activation, beta), save)
    y = x.new_empty(masks.samples, x.shape[0], p.shape[0])
    mask_path.masked_apply(y, hid, p.t(), masks, write_remainder(y, target, b_p, masks))
    return y, _op.or_empty(az, x)


def _forward_fake(x, w, v, p, b_w, b_v, b_p, beta, target, *options):
    *fields, _, save, _ = options
    az = x.new_empty(x.shape[0], 2 * w.shape[0]) if save else x.new_empty(0)
    return x.new_empty(Masks(*fields).samples, x.shape[0], p.shape[0]), az


def _backward(dy, az, x, w, v, p, b_w, b_v, b_p, beta, target, *options):
    """Gradients of the tensors, gates, source and delta, each None unless needed."""
    *fields, activation, need, impl = options
    need_x, need_w, need_v, need_p, need_bw, need_bv, need_bp, need_beta, need_target, *need_masks = need
    masks, h = Masks(*fields), w.shape[0]
    gate_path, mask_path = _paths(impl)
    through = need_x or need_w or need_v or need_bw or need_bv or need_beta
    az = az if az.numel() else composite.preactivations(x, w, v, b_w, b_v)
    hid = gate_path.gate(az[:, :h], az[:, h:], Gate(activation, beta))
    dhid, dwrite, dgates, dsource, ddelta = mask_path.masked_apply_backward(
        dy, hid, p.t(), masks, [through, need_p, *need_masks]
    )
    dx = dw = dv = db_w = db_v = dbeta = None
    if through:
        dadz, _, dbeta = gate_path.gate_backward(dhid, None, az, Gate(activation, beta), False, need_beta)
        da, dz = dadz[:, :h], dadz[:, h:]
        dx = (da @ w).addmm_(dz, v) if need_x else None
        dw, dv = (d.t() @ x if needed else None for d, needed in ((da, need_w), (dz, need_v)))
        db_w, db_v = (d.sum(0) if needed else None for d, needed in ((da, need_bw), (dz, need_bv)))
    dtarget = weighted_sum(masks.delta, dy) if need_target and masks.delta is not None else None
    if ddelta is not None:
        ddelta += (dy * target).sum(-1, dtype=ddelta.dtype)
    return (
        dx,
        dw,
        dv,
        None if dwrite is None else dwrite.t().contiguous(),
        db_w,
        db_v,
        dy.sum((0, 1)) if need_bp else None,
        None if dbeta is None else dbeta.to(beta.dtype),
        dtarget,
        *narrowed(masks, dgates, dsource, ddelta),
    )


def _formula(
    x: Tensor,
    w: Tensor,
    v: Tensor,
    p: Tensor,
    b_w: Tensor | None,
    b_v: Tensor | None,
    b_p: Tensor | None,
    beta: Tensor | None,
    target: Tensor | None,
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
    activation: str,
) -> Tensor:
    hid = reference.gated_bilinear(x, w, v, b_w, b_v, activation=activation, beta=1.0 if beta is None else beta)
    masks = Masks(gates, source, delta, routing, seed, row_numbers, column_numbers, stream, samples, sampling)
    return masked_formula(hid, p.mT, b_p, target, masks)


# from gates on in the order of Masks
stochastic_gated_op, stochastic_gated_backward_op = _op.differentiable(
    "stochastic_gated(Tensor x, Tensor w, Tensor v, Tensor p, Tensor? b_w, Tensor? b_v, Tensor? b_p, Tensor? beta, "
    "Tensor? target, Tensor gates, Tensor? source, Tensor? delta, Tensor? routing, Tensor? seed, Tensor? row_numbers, "
    "Tensor? column_numbers, int stream, int samples, str sampling, str activation, bool save, str impl) "
    "-> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    _backward,
    _formula,
)
