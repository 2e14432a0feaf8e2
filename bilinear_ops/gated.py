"""Gated bilinear layers: the public functions and the registered ops behind them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from bilinear_ops import _impl, _op, reference
from bilinear_ops._check import OR_JAGGED, check, is_plain_layer
from bilinear_ops._gate import Numbers, check_gate, number_tensors
from bilinear_ops._gated_backward import backward, backward_fake, launchers, unpack
from bilinear_ops._sharding import sharded
from bilinear_ops._small import is_small_layer, small_layer
from bilinear_ops.composite import gated as composite
from bilinear_ops.results import Gate


def gated_bilinear(
    x: Tensor,
    w: Tensor,
    v: Tensor,
    b_w: Tensor | None = None,
    b_v: Tensor | None = None,
    *,
    activation: str = "identity",
    beta: float | Tensor = 1.0,
    limit: float | Tensor | None = None,
    offset: float | Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """(x w^T + b_w) * act(x v^T + b_v), the gated bilinear layer without its down-projection ([P] eq. 1, [S]).

    Args:
        x: `[..., d]` inputs.
        w, v: `[h, d]` linear and gated up-projections, in any layout; packed halves are used in place.
        b_w, b_v: `[h]` biases.
        activation: identity, silu, swish, sigmoid, relu, gelu (erf), gelu_tanh, relu2 (relu(z)^2), relu6, tanh, mish,
            hardswish, silu_clamped (silu, with `limit` applied after it) or silu_bounded, which bounds both sides
            smoothly: 25 tanh(a / 25) * 4 tanh(z / 4) sigmoid(z). `bilinear_ops.gates` names the gates of models.
        beta: slope of swish, z sigmoid(beta z): a float or a 0-dim tensor on x's device, which gets a gradient.
            swish at beta 0 is z / 2, not z.
        limit: clamps z = x v^T + b_v from above and a = x w^T + b_w on both sides, [-limit, limit], before all else;
            gradients are 0 outside. A float or a 0-dim tensor without a gradient.
        offset: added to a after its clamp, as limit. No value of beta, limit or offset recompiles a compiled caller.
        impl: "auto", "triton" or "torch"; on CPU "auto" leaves small layers to eager PyTorch, which is faster there:
            up to 2^28 products of tokens, d and h. A call that a mode, a trace or autocast sees is the op's at every
            size, so FLOP counts and graphs are alike. Jagged and quantised tensors, which know PyTorch's ops and not
            ours, get the formula at every size.

    Returns:
        `[..., h]`, contiguous, in x's dtype.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices, or impl="triton" where it cannot run.
        TypeError: an argument that is not a floating-point tensor.
        ValueError: unknown activation or impl, a beta without swish, a limit with silu_bounded, a limit that is not
            positive, or a limit or offset that asks for a gradient.
    """
    if _impl.is_unwatched() and is_plain_layer(x, w, v, None, b_w, b_v, None, beta, limit, offset):
        if impl == "auto" and is_small_layer(x, w):
            return small_layer(x, w, v, None, b_w, b_v, None, activation, beta, limit, offset)
        return _gated(x, w, v, None, b_w, b_v, None, activation, Numbers(beta, limit, offset), False, impl, plain=True)
    return _gated_bilinear(x, w, v, b_w, b_v, activation=activation, beta=beta, limit=limit, offset=offset, impl=impl)


@sharded(
    "... h", over="... h", public=gated_bilinear,
    x="... d", w="h d", v="h d", b_w="h", b_v="h", beta="", limit="", offset="",
)  # fmt: skip
def _gated_bilinear(
    x: Tensor,
    w: Tensor,
    v: Tensor,
    b_w: Tensor | None,
    b_v: Tensor | None,
    *,
    activation: str,
    beta: float | Tensor,
    limit: float | Tensor | None,
    offset: float | Tensor | None,
    impl: str,
) -> Tensor:
    x, w, v, b_w, b_v = _op.autocast(x, w, v, b_w, b_v)
    return _gated(x, w, v, None, b_w, b_v, None, activation, Numbers(beta, limit, offset), False, impl)


def gated_mlp(
    x: Tensor,
    w: Tensor,
    v: Tensor,
    p: Tensor,
    b_w: Tensor | None = None,
    b_v: Tensor | None = None,
    b_p: Tensor | None = None,
    *,
    activation: str = "identity",
    beta: float | Tensor = 1.0,
    limit: float | Tensor | None = None,
    offset: float | Tensor | None = None,
    recompute: bool = False,
    mask: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """((x w^T + b_w) * act(x v^T + b_v)) p^T + b_p, the gated MLP of Llama-style transformers ([P] 2, [S]).

    Keeps x and the two pre-activations for backward, `d + 2h` elements a token, never the product (but for layers small
    enough that "auto" leaves them to eager PyTorch).

    Args:
        x, w, v, b_w, b_v, activation, beta, limit, offset, impl: as for `gated_bilinear`.
        p: `[o, h]` down-projection.
        b_p: `[o]` its bias.
        recompute: keep only x, `d` elements a token, and compute the pre-activations again in backward.
        mask: broadcasts to `[..., h]`, in any floating dtype: multiplies the hidden units, in float32 or better; not
            with limit or offset (ValueError).

    Returns:
        `[..., o]`, contiguous, in x's dtype.

    Raises:
        as `gated_bilinear`.
    """
    if p is None:
        raise TypeError("p must be a torch.Tensor, got NoneType")
    if mask is None and _impl.is_unwatched() and is_plain_layer(x, w, v, p, b_w, b_v, b_p, beta, limit, offset):
        if impl == "auto" and not recompute and is_small_layer(x, w):
            return small_layer(x, w, v, p, b_w, b_v, b_p, activation, beta, limit, offset)
        return _gated(x, w, v, p, b_w, b_v, b_p, activation, Numbers(beta, limit, offset), recompute, impl, plain=True)
    return _gated_mlp(
        x, w, v, p, b_w, b_v, b_p,
        activation=activation, beta=beta, limit=limit, offset=offset, recompute=recompute, mask=mask, impl=impl,
    )  # fmt: skip


@sharded(
    "... o", over="... h o", once=("b_p",), public=gated_mlp,
    x="... d", w="h d", v="h d", p="o h", b_w="h", b_v="h", b_p="o", beta="", limit="", offset="", mask="... h",
)  # fmt: skip
def _gated_mlp(
    x: Tensor,
    w: Tensor,
    v: Tensor,
    p: Tensor,
    b_w: Tensor | None,
    b_v: Tensor | None,
    b_p: Tensor | None,
    *,
    activation: str,
    beta: float | Tensor,
    limit: float | Tensor | None,
    offset: float | Tensor | None,
    recompute: bool,
    mask: Tensor | None,
    impl: str,
) -> Tensor:
    x, w, v, p, b_w, b_v, b_p = _op.autocast(x, w, v, p, b_w, b_v, b_p)
    if mask is not None:
        if limit is not None or offset is not None:
            raise ValueError("mask does not go with limit or offset")
        from bilinear_ops.rank1.gated import masked_gated_mlp  # which imports this module

        return masked_gated_mlp(x, w, v, p, mask, b_w, b_v, b_p, activation, beta, recompute, impl)
    return _gated(x, w, v, p, b_w, b_v, b_p, activation, Numbers(beta, limit, offset), recompute, impl)


@sharded("... h", over="... h", a="... h", z="... h", beta="", limit="", offset="")
def gate(
    a: Tensor,
    z: Tensor,
    *,
    activation: str = "identity",
    beta: float | Tensor = 1.0,
    limit: float | Tensor | None = None,
    offset: float | Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """(clamp(a) + offset) * act(clamp(z)): the gate of `gated_bilinear` on given pre-activations.

    Args:
        a, z: `[..., h]` linear and gated pre-activations of any strides, such as the halves of one tensor, packed
            (`chunk(2, -1)`) or interleaved (`[..., 1::2]`, `[..., ::2]`).
        activation, beta, limit, offset: as for `gated_bilinear`.
        impl: "auto", "triton" or "torch".

    Returns:
        `[..., h]`, contiguous, in a's dtype.

    Raises:
        as `gated_bilinear`.
    """
    check(OR_JAGGED, a=(a, "... h"), z=(z, "... h"))
    if a.shape != z.shape:
        raise RuntimeError(f"z must have the shape of a, {list(a.shape)}, got {list(z.shape)}")
    numbers = Numbers(beta, limit, offset)
    check_gate(activation, *numbers, a)
    impl = _impl.resolve(impl, a)
    if _impl.needs_formula(a, z, impl=impl):
        return reference.gate(a, z, activation=activation, **numbers._asdict())
    found = number_tensors(activation, numbers, a)
    return gate_op(_rows(a), _rows(z), *found, activation, impl).view(a.shape)


def _gated(
    x: Tensor,
    w: Tensor,
    v: Tensor,
    p: Tensor | None,
    b_w: Tensor | None,
    b_v: Tensor | None,
    b_p: Tensor | None,
    activation: str,
    numbers: Numbers,
    recompute: bool,
    impl: str,
    *,
    plain: bool = False,
) -> Tensor:
    """The op on what autocast has cast; `plain` says that no mode sees it, and that `is_plain_layer` holds."""
    plain = plain and not _impl.needs_reference() and _impl.are_plain(x, w, v, p, b_w, b_v, b_p)
    if not plain:
        check(
            OR_JAGGED,
            x=(x, "... d"),
            w=(w, "h d"),
            v=(v, "h d"),
            p=(p, "? o h"),
            b_w=(b_w, "? h"),
            b_v=(b_v, "? h"),
            b_p=(b_p, "? o"),
        )
    beta, limit, offset = numbers
    check_gate(activation, beta, limit, offset, x)
    impl = _impl.resolve(impl, x)
    if not plain and _impl.needs_formula(x, w, v, p, b_w, b_v, b_p, impl=impl):
        return _reference(x, w, v, p, b_w, b_v, b_p, beta, limit=limit, offset=offset, activation=activation)
    tensors = (w, v, p, b_w, b_v, b_p, beta if isinstance(beta, Tensor) else None)
    save = torch.is_grad_enabled() and not recompute and any(t is not None and t.requires_grad for t in (x, *tensors))
    found = number_tensors(activation, numbers, x)
    op = _op.direct(gated_op) if plain and _impl.are_plain(*found) else gated_op
    y, _ = op(_rows(x), *tensors[:-1], *found, activation, save, impl)
    if x.dim() == 2:
        return y
    # not a view, of which FSDP2 would warn
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[1]))


def _rows(t: Tensor) -> Tensor:
    if t.dim() == 2:
        return t
    return t.flatten(0, -2) if t.dim() > 1 else t.unsqueeze(0)


def _forward(
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
    save: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    path = composite if impl == "torch" else launchers()
    hid, az = path.gate_forward(x, w, v, b_w, b_v, Gate(activation, beta, limit, offset), save)
    y = hid if p is None else linear(hid, p, b_p)
    return y, _op.or_empty(az, x)


def _forward_fake(x, w, v, p, b_w, b_v, b_p, beta, limit, offset, activation, save, impl):
    az = x.new_empty(x.shape[0], 2 * w.shape[0]) if save else x.new_empty(0)
    return x.new_empty(x.shape[0], (w if p is None else p).shape[0]), az


def _reference(
    x: Tensor,
    w: Tensor,
    v: Tensor,
    p: Tensor | None,
    b_w: Tensor | None,
    b_v: Tensor | None,
    b_p: Tensor | None,
    beta: float | Tensor | None,
    *,
    limit: float | Tensor | None,
    offset: float | Tensor | None,
    activation: str,
) -> Tensor:
    """The result of the op by the reference: differentiable to any order and under every transform."""
    beta = 1.0 if beta is None else beta
    if p is None:
        return reference.gated_bilinear(x, w, v, b_w, b_v, activation=activation, beta=beta, limit=limit, offset=offset)
    return reference.gated_mlp(x, w, v, p, b_w, b_v, b_p, activation=activation, beta=beta, limit=limit, offset=offset)


gated_op, gated_backward_op = _op.differentiable(
    "gated(Tensor x, Tensor w, Tensor v, Tensor? p, Tensor? b_w, Tensor? b_v, Tensor? b_p, Tensor? beta, "
    "Tensor? limit, Tensor? offset, str activation, bool save, str impl) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    backward,
    _reference,
    backward_fake=backward_fake,
    backward_outputs=6,
    unpack=unpack,
)


def _gate_forward(
    a: Tensor,
    z: Tensor,
    beta: Tensor | None,
    limit: Tensor | None,
    offset: Tensor | None,
    activation: str,
    impl: str,
) -> Tensor:
    path = composite if impl == "torch" else launchers()
    return path.gate(a, z, Gate(activation, beta, limit, offset))


def _gate_fake(a, z, beta, limit, offset, activation, impl):
    return a.new_empty(a.shape)


def _gate_backward(
    dhid: Tensor,
    a: Tensor,
    z: Tensor,
    beta: Tensor | None,
    limit: Tensor | None,
    offset: Tensor | None,
    activation: str,
    need: list[bool],
    impl: str,
) -> tuple[Tensor | None, ...]:
    path = composite if impl == "torch" else launchers()
    da, dz = a.new_empty(a.shape), a.new_empty(a.shape)
    dbeta = path.gate_gradients(dhid, a, z, Gate(activation, beta, limit, offset), da, dz, None, need[2])
    return (
        da if need[0] else None,
        dz if need[1] else None,
        None if dbeta is None or beta is None else dbeta.to(beta.dtype),
    )


def _gate_reference(
    a: Tensor,
    z: Tensor,
    beta: float | Tensor | None,
    *,
    limit: Tensor | None,
    offset: Tensor | None,
    activation: str,
) -> Tensor:
    beta = 1.0 if beta is None else beta
    return reference.gate(a, z, activation=activation, beta=beta, limit=limit, offset=offset)


gate_op, gate_backward_op = _op.differentiable(
    "gate(Tensor a, Tensor z, Tensor? beta, Tensor? limit, Tensor? offset, str activation, str impl) -> Tensor",
    _gate_forward,
    _gate_fake,
    _gate_backward,
    _gate_reference,
)
