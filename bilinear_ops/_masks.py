"""What the ops under masks share: their checks, tokens flattened, what passes the subcomponents, the formula."""

from __future__ import annotations

import torch
from torch import Tensor

from bilinear_ops import reference
from bilinear_ops._check import check_beside, check_integers, check_place, check_sampling, check_seed
from bilinear_ops.rank1.masks import check_numbers, flat, stochastic_delta
from bilinear_ops.reference.rank1.masked import apply
from bilinear_ops.results import Masks


def stochastic_masks(
    x: Tensor,
    gates: Tensor,
    full: tuple[int, ...],
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
    impl: str,
) -> Masks:
    """The checked masks of an op whose subcomponents have activations of shape `full`, deltas drawn if asked for."""
    check_sampling(samples, sampling)
    check_integers(stream=stream)
    lead = full[:-1]
    check_beside(x, gates=(gates, full), source=(source, (samples, *full)))
    if gates is None:
        raise TypeError("gates must be a torch.Tensor, got NoneType")
    if isinstance(delta, str):
        if delta != "uniform":
            raise ValueError(f'delta must be a tensor or "uniform", got {delta!r}')
        seed = check_seed(seed, x.device)
        delta = stochastic_delta(
            lead, samples=samples, seed=seed, device=x.device, stream=stream, row_numbers=row_numbers, impl=impl
        )
    else:
        check_beside(x, delta=(delta, (samples, *lead)))
    seed = check_seed(seed, x.device) if source is None else None
    delta = None if delta is None else delta.expand(samples, *lead)
    check_numbers(lead, full[-1], row_numbers, column_numbers, x.device)
    numbers, kind = (flat(row_numbers), flat(column_numbers)), sampling if source is None else "source"
    return Masks(gates, source, delta, routing, seed, *numbers, stream, samples, kind)


def check_remainder(x: Tensor, delta: object, routing: object, **original: Tensor | None) -> None:
    """Check routing, and that what it and delta refer to, given by its name, is there."""
    if routing is not None:
        if not isinstance(routing, Tensor) or routing.dtype != torch.bool:
            got = routing.dtype if isinstance(routing, Tensor) else type(routing).__name__
            raise TypeError(f"routing must be a bool tensor, got {got}")
        check_place("routing", routing, x, x.shape[:-1])
    ((needed, t),) = original.items()
    for name, argument in (("delta", delta), ("routing", routing)):
        if argument is not None and t is None:
            raise ValueError(f"{name} needs {needed}, got None")


def flat_masks(masks: Masks, lead: torch.Size, c: int) -> Masks:
    """`masks` with the tokens flattened, as the op takes them. Where routing is False, delta is 1."""
    gates, source, delta, routing, samples = masks.gates, masks.source, masks.delta, masks.routing, masks.samples
    tokens = lead.numel()
    if routing is not None:
        routing = routing.expand(lead)
        # where routing is False, the token uses the original weight alone
        delta = torch.where(routing, 0.0 if delta is None else delta, 1.0).expand(samples, *lead)
        routing = routing.reshape(tokens)
    return masks._replace(
        gates=_periodic(gates, lead, c),
        source=None if source is None else _source(source, samples, lead, c),
        delta=None if delta is None else delta.reshape(samples, tokens),
        routing=routing,
    )


def _periodic(t: Tensor, lead: torch.Size, c: int) -> Tensor:
    """As `[period, c]` rows that repeat over the tokens: a view unless a broadcast lies inside the tokens."""
    while t.dim() > 1 and t.shape[0] == 1:
        t = t[0]
    if lead.numel() == 0:
        return t.expand(*lead, c).reshape(0, c)
    outer = max(t.dim() - 1, 0)
    shape = (*t.shape[:-1], c) if t.shape[:-1] == lead[len(lead) - outer :] else (*lead, c)
    return _broadcast(t, shape).reshape(torch.Size(shape[:-1]).numel(), c)


def _source(t: Tensor, samples: int, lead: torch.Size, c: int) -> Tensor:
    """As `[1 or samples, 1 or tokens, c]`."""
    t = t[(None,) * (len(lead) + 2 - t.dim())]
    tokens = lead if t.shape[1:-1].numel() != 1 else torch.Size([1] * len(lead))
    return _broadcast(t, (t.shape[0], *tokens, c)).reshape(t.shape[0], tokens.numel(), c)


def _broadcast(t: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Expanded in fp32 or better, so that the gradient is summed there."""
    if t.shape == shape:
        return t
    return t.to(torch.promote_types(t.dtype, torch.float32)).expand(shape)


def write_remainder(y: Tensor, original: Tensor | None, bias: Tensor | None, masks: Masks) -> float:
    """y [S, M, d_out] becomes delta * original + bias; returns 1, or 0 where there is neither and y is left alone."""
    if original is not None and masks.delta is not None:
        torch.mul(masks.delta[..., None], original, out=y)
        if masks.routing is not None:  # 0 * inf: tokens that do not use the original weight must not see its overflow
            y.masked_fill_(((masks.delta == 0) & masks.routing)[..., None], 0.0)
        if bias is not None:
            y += bias
    elif bias is not None:
        y.copy_(bias)
    return float(bias is not None or original is not None)


def narrowed(masks: Masks, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of gates, source and delta, summed in fp32 or better, in the dtypes of their tensors."""
    tensors = (masks.gates, masks.source, masks.delta)
    return tuple(g if g is None or t is None else g.to(t.dtype) for g, t in zip(gradients, tensors, strict=True))


def weighted_sum(delta: Tensor, dy: Tensor) -> Tensor:
    """sum_s delta_s dy_s: [S, M], [S, M, o] -> [M, o], summed in fp32 or better."""
    total = torch.zeros(dy.shape[1:], dtype=torch.promote_types(dy.dtype, torch.float32), device=dy.device)
    for delta_s, dy_s in zip(delta, dy, strict=True):
        total.addcmul_(dy_s, delta_s[:, None].to(total.dtype))
    return total.to(dy.dtype)


def masked_formula(
    acts: Tensor,
    write: Tensor,
    bias: Tensor | None,
    original: Tensor | None,
    masks: Masks,
    inner: Tensor | None = None,
) -> Tensor:
    """The result from the activations and from what passes the subcomponents: differentiable to any order.

    `inner` are the activations through which what delta takes away is differentiated; without it these too.
    """
    gates = masks.gates.repeat(acts.shape[0] // max(masks.gates.shape[0], 1), 1)
    mask, samples = gates, masks.samples
    if masks.seed is not None:
        mask = reference.stochastic_mask(
            gates, samples=samples, seed=masks.seed, sampling=masks.sampling, stream=masks.stream,
            row_numbers=masks.row_numbers, column_numbers=masks.column_numbers,
        )  # fmt: skip
    elif masks.source is not None:
        mask = gates + (1 - gates) * masks.source
    return apply(acts, write, mask, bias, original, masks.delta, masks.routing, inner).expand(samples, -1, -1)
