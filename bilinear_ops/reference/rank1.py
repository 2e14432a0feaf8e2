"""Masked rank-1 subcomponents as the papers write them: plain, differentiable PyTorch (docs/math.md 3; [SPD])."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bilinear_ops.reference.uniform import uniform

SAMPLINGS = ("continuous", "binomial")


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
) -> Tensor:
    """((x R) * m) L + delta * x (W - (R L)^T)^T + bias, and x W^T + bias where `routing` is False: -> [..., d_out]."""
    return apply(x, x @ read, write, mask, bias, weight, delta, routing)


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
) -> Tensor:
    """`rank1_linear` under `samples` masks g + (1 - g) r: -> [samples, ..., d_out]."""
    acts = x @ read if acts is None else acts
    gates = gates.expand(acts.shape)
    if source is not None:
        masks = masked(gates, source)
    else:
        masks = stochastic_mask(gates, samples=samples, seed=seed, sampling=sampling, stream=stream)
    if isinstance(delta, str):
        delta = stochastic_delta(acts.shape[:-1], samples=samples, seed=seed, device=x.device, stream=stream)
    y = apply(x, acts, write, masks, bias, weight, delta, routing)
    return y.expand(samples, *y.shape[-acts.dim() :])


def apply(
    x: Tensor,
    acts: Tensor,
    write: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    weight: Tensor | None,
    delta: Tensor | None,
    routing: Tensor | None,
) -> Tensor:
    """`rank1_linear` from acts = x R, with the difference matrix applied as x W^T - acts L."""
    y = (acts if mask is None else (acts * mask).to(acts.dtype)) @ write
    if delta is not None:
        assert weight is not None
        y = y + (delta[..., None] * (x @ weight.mT - acts @ write)).to(y.dtype)
    if routing is not None:
        assert weight is not None
        y = torch.where(routing[..., None], y, x @ weight.mT)
    return y if bias is None else y + bias


def stochastic_mask(
    gates: Tensor, *, samples: int = 1, seed: int | Tensor | None, sampling: str = "continuous", stream: int = 0
) -> Tensor:
    """g + (1 - g) r with r ~ U(0, 1), or Bernoulli(1/2) for "binomial": -> [samples, ..., C], fp32 or better."""
    gates = gates.to(torch.promote_types(gates.dtype, torch.float32))
    rows = gates.shape[:-1].numel()
    r = uniform(seed_tensor(seed, gates.device), mask_site(stream), samples, rows, gates.shape[-1])
    r = r.view(samples, *gates.shape)
    return torch.where(r >= 0.5, 1, gates) if sampling == "binomial" else masked(gates, r)


def masked(gates: Tensor, r: Tensor) -> Tensor:
    """g + (1 - g) r, each operation rounded."""
    return gates + (1 - gates) * r


def stochastic_delta(
    shape: Any, *, samples: int = 1, seed: int | Tensor | None, device: Any = None, stream: int = 0
) -> Tensor:
    """U(0, 1) for each sample and token, from a site of their own: -> fp32 [samples, *shape]."""
    rows = torch.Size(shape).numel()
    return uniform(seed_tensor(seed, device), delta_site(stream), samples, rows, 1).view(samples, *shape)


def seed_tensor(seed: int | Tensor | None, device: Any) -> Tensor:
    """A seed as an int64 0-dim tensor; the sum, unlike `torch.full`, keeps an int symbolic under torch.compile."""
    if seed is None:
        raise TypeError("seed must be an int or an int64 tensor where masks or deltas are drawn, got None")
    if isinstance(seed, Tensor):
        return seed
    return torch.zeros((), dtype=torch.int64, device=device) + seed


def mask_site(stream: int) -> int:
    return 2 * stream


def delta_site(stream: int) -> int:
    return 2 * stream + 1


def rank1_accumulate(gates: Tensor, read: Tensor, write: Tensor, *, base: Tensor | None = None) -> Tensor:
    """base + sum_c g_c l_c r_c^T: gates [..., C] -> [..., d_out, d_in]."""
    pieces = (gates[..., None, :] * write.mT).to(write.dtype) @ read.mT
    return pieces if base is None else base + pieces


def rank1_sparse(
    x: Tensor, read: Tensor, write: Tensor, indices: Tensor, gates: Tensor, bias: Tensor | None = None
) -> Tensor:
    """sum_j g_j (x . r_i(j)) l_i(j) + bias over each token's k active subcomponents: -> [..., d_out]."""
    acts = (x[..., None, :] @ read.mT[indices].mT).squeeze(-2)  # [..., k]
    acts = (acts * gates).to(x.dtype)
    y = (acts[..., None, :] @ write[indices]).squeeze(-2)
    return y if bias is None else y + bias


def faithfulness_loss(weight: Tensor, read: Tensor, write: Tensor) -> Tensor:
    """mean (W - (R L)^T)^2 in fp32 or better: -> []."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(dtype) - (read.to(dtype) @ write.to(dtype)).mT).square().mean()


def importance_minimality(gates: Tensor, *, pnorm: float | Tensor, eps: float = 1e-12) -> Tensor:
    """Mean over tokens of (g + eps)^p, in fp32 or better: gates [..., C] -> [C]."""
    gates = gates.to(torch.promote_types(gates.dtype, torch.float32))
    return torch.atleast_2d((gates + eps).pow(pnorm)).flatten(0, -2).mean(0)


class _LowerLeakyHardSigmoid(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, alpha: float) -> Tensor:
        return x.clamp(0, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        x, ctx.alpha = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        leak = ctx.alpha * dy.clamp(max=0)
        return torch.where(x <= 0, leak, torch.where(x <= 1, dy, 0)), None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, _: None) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.where((x > 0) & (x <= 1), dx, 0)


def lower_leaky_hard_sigmoid(x: Tensor, alpha: float = 0.01) -> Tensor:
    """clamp(x, 0, 1), whose gradient at x <= 0 is `alpha` of a negative one, so that only growth leaks ([SPD])."""
    return _LowerLeakyHardSigmoid.apply(x, alpha)


def upper_leaky_hard_sigmoid(x: Tensor, alpha: float = 0.01) -> Tensor:
    """clamp(x, 0, 1), going on as 1 + alpha (x - 1) above 1 ([SPD])."""
    return torch.where(x > 1, 1 + alpha * (x - 1), x.clamp(0, 1))
