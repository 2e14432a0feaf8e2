"""Gradients of a gated layer, a block of rows at a time: the backward of `gated` and of `nn.routed`."""

from __future__ import annotations

import torch
from torch import Tensor

from bilinear_ops.composite import gated as composite
from bilinear_ops.results import Gate


def launchers():
    """The kernels of this family, imported at the first launch."""
    from bilinear_ops.kernels import gated

    return gated


def backward(
    dy: Tensor,
    az: Tensor,
    x: Tensor,
    w: Tensor,
    v: Tensor,
    p: Tensor | None,
    b_w: Tensor | None,
    b_v: Tensor | None,
    b_p: Tensor | None,
    beta: Tensor | None,
    limit: Tensor | None,
    offset: Tensor | None,
    activation: str,
    need: list[bool],
    impl: str,
    *,
    route: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """(dx, [dw, dv], dp, [db_w, db_v], db_p, dbeta), each None unless needed; `need` is in the order of the tensors.

    dw and dv are one product and so one tensor [2, h, d], of which an unneeded half is left out; likewise [2, h].
    `route` [M, h] multiplies the units' gradients on their way to the weights, not to x: see `nn.routed_gated_mlp`.
    """
    need_x, need_w, need_v, need_p, need_bw, need_bv, need_bp, need_beta = need
    path = composite if impl == "torch" else launchers()
    gate_of = Gate(activation, beta, limit, offset)
    h, d = w.shape
    dx = dwv = dp = db = dbeta = None
    blocks = path.row_blocks(x, h)
    if need_x and len(blocks) > 1:
        dx = x.new_empty(x.shape)
    for rows in blocks:
        b_x, b_dy = _block(x, rows), _block(dy, rows)
        b_az = _block(az, rows) if az.numel() else composite.preactivations(b_x, w, v, b_w, b_v)
        if need_x or need_w or need_v or need_bw or need_bv or need_beta:
            dadz, hid, b_dbeta = path.gate_backward(b_dy, p, b_az, gate_of, need_p, need_beta)
            if hid is not None:
                hid = hid if route is None else hid.mul_(_block(route, rows))
                dp = _plus_product(dp, b_dy, hid)
                hid = None  # before the other gradients are allocated
            if dx is not None:
                input_gradient(dadz, w, v, dx[rows])
            elif need_x:
                dx = input_gradient(dadz, w, v)
            if route is not None:
                dadz.view(-1, 2, h).mul_(_block(route, rows)[:, None])
            if need_w or need_v:
                dwv = _plus_product(dwv, _needed_halves(dadz, need_w, need_v), b_x)
            if need_bw or need_bv:
                db = _plus(db, _needed_halves(dadz, need_bw, need_bv).sum(0))
            if b_dbeta is not None:
                dbeta = _plus(dbeta, b_dbeta)
        elif need_p:
            hid = path.gate(b_az[:, :h], b_az[:, h:], gate_of)
            dp = _plus_product(dp, b_dy, hid if route is None else hid.mul_(_block(route, rows)))
    if dbeta is not None and beta is not None:
        dbeta = dbeta.to(beta.dtype)
    return (
        dx,
        None if dwv is None else dwv.view(need_w + need_v, h, d),
        dp,
        None if db is None else db.view(need_bw + need_bv, h),
        dy.sum(0) if need_bp else None,
        dbeta,
    )


def input_gradient(dadz: Tensor, w: Tensor, v: Tensor, out: Tensor | None = None) -> Tensor:
    """da w + dz v, as one product of packed weights."""
    packed = composite.stacked(w, v)
    if packed is not None:
        return torch.mm(dadz, packed, out=out)
    da, dz = dadz.chunk(2, 1)
    return torch.mm(da, w, out=out).addmm_(dz, v)


def _block(t: Tensor, rows: slice | None) -> Tensor:
    return t if rows is None else t[rows]


def _plus(total: Tensor | None, t: Tensor) -> Tensor:
    return t if total is None else total.add_(t)


def _plus_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a^T b, without a matrix between."""
    return torch.mm(a.t(), b) if total is None else total.addmm_(a.t(), b)


def _needed_halves(pair: Tensor, first: bool, second: bool) -> Tensor:
    """The needed columns of [first | second]."""
    if first and second:
        return pair
    h = pair.shape[1] // 2
    return pair[:, 0 if first else h : 2 * h if second else h]


def backward_fake(dy, az, x, w, v, p, b_w, b_v, b_p, beta, limit, offset, activation, need, impl):
    need_x, need_w, need_v, need_p, need_bw, need_bv, need_bp, need_beta = need
    h, d = w.shape
    return (
        x.new_empty(x.shape if need_x else 0),
        x.new_empty((need_w + need_v, h, d) if need_w or need_v else 0),
        x.new_empty(p.shape if need_p else 0),
        x.new_empty((need_bw + need_bv, h) if need_bw or need_bv else 0),
        x.new_empty(dy.shape[1] if need_bp else 0),
        x.new_empty((), dtype=beta.dtype) if need_beta else x.new_empty(0),
    )


def unpack(
    dx: Tensor, dwv: Tensor, dp: Tensor, db: Tensor, db_p: Tensor, dbeta: Tensor, need: list[bool]
) -> tuple[Tensor | None, ...]:
    """One gradient for each tensor; what is not needed is ignored."""
    dw, dv = _halves(dwv, need[1], need[2])
    db_w, db_v = _halves(db, need[4], need[5])
    return dx, dw, dv, dp, db_w, db_v, db_p, dbeta


def _halves(pair: Tensor, first: bool, second: bool) -> tuple[Tensor | None, Tensor | None]:
    if first and second:
        one, other = pair.unbind()
        return one, other
    return pair[0] if first else None, pair[0] if second else None
