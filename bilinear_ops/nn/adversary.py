"""State that outlives a step of a decomposition: adversarial sources, and how often subcomponents are active."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from bilinear_ops._check import check_reals, check_shape, check_sizes
from bilinear_ops.rank1.losses import frequency_penalty

RULES = ("sign", "adam")


class AdversarialSource(nn.Module):
    """Sources r of masks g + (1 - g) r that climb a loss over many steps: persistent adversarial training.

    `masks` goes to `source=` of the stochastic ops and `delta` to their `delta=`; both broadcast over the tokens, and
    the ops sum their gradients over the tokens in backward. Not among the parameters: a loss goes down along those.

    Args:
        c: number of subcomponents.
        shape: of the tokens that have sources of their own, such as (batch, positions); () shares one source.
        rule: "sign" for r + lr sign(gradient), "adam" for Adam's step upwards; both are clamped to [0, 1].
        betas, eps: of Adam.
        generator: draws the first sources, uniform in [0, 1).
        device: of the sources.

    Raises ValueError for another rule.
    """

    source: Tensor
    mean: Tensor
    square: Tensor
    steps: Tensor

    def __init__(
        self,
        c: int,
        shape: tuple[int, ...] = (),
        *,
        rule: str = "sign",
        betas: tuple[float, float] = (0.5, 0.99),
        eps: float = 1e-8,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
        check_sizes(c=c)
        shape = check_shape(shape)
        self.rule, self.betas, self.eps = rule, betas, eps
        source = torch.rand(*shape, c + 1, generator=generator, device=device)
        self.register_buffer("source", source.requires_grad_())
        if rule == "adam":
            self.register_buffer("mean", torch.zeros_like(source))
            self.register_buffer("square", torch.zeros_like(source))
            self.register_buffer("steps", torch.zeros((), device=device))

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.source = self.source.detach().requires_grad_()  # moved or cast, it would be no leaf
        return self

    @property
    def masks(self) -> Tensor:
        """`[*shape, C]`, those of the subcomponents."""
        return self.source[..., :-1]

    @property
    def delta(self) -> Tensor:
        """`[*shape]`, that of the remainder."""
        return self.source[..., -1]

    @torch.no_grad()
    def ascend(self, gradient: Tensor, lr: float) -> None:
        """One step up along the gradient `[*shape, C + 1]` of a loss in `source`, clamped to [0, 1]."""
        if self.rule == "sign":
            step = gradient.sign()
        else:
            fast, slow = self.betas
            self.steps += 1
            self.mean.lerp_(gradient, 1 - fast)
            self.square.lerp_(gradient.square(), 1 - slow)
            step = self.mean / (1 - fast**self.steps) / ((self.square / (1 - slow**self.steps)).sqrt() + self.eps)
        self.source.add_(step, alpha=lr).clamp_(0, 1)

    def extra_repr(self) -> str:
        return f"shape={list(self.source.shape)}, rule={self.rule!r}"


class FrequencyPenalty(nn.Module):
    """sum_c f_c log2(1 + scale f'_c), f' being the running mean of f: `frequency_penalty` with its state.

    Args:
        c: number of subcomponents.
        scale: what f' is multiplied by.
        decay: of the running mean, which is f itself at the first call.
        device: of the running mean.
    """

    running: Tensor
    seen: Tensor

    def __init__(self, c: int, *, scale: float, decay: float, device: torch.device | str | None = None):
        super().__init__()
        check_sizes(c=c)
        check_reals(scale=scale, decay=decay)
        self.scale, self.decay = scale, decay
        self.register_buffer("running", torch.zeros(c, device=device))
        self.register_buffer("seen", torch.zeros((), dtype=torch.bool, device=device))

    def forward(self, frequencies: Tensor) -> Tensor:
        """0-dim, from frequencies `[C]`; in training the running mean takes them in first."""
        if self.training:
            with torch.no_grad():
                self.running.copy_(torch.where(self.seen, self.running.lerp(frequencies, 1 - self.decay), frequencies))
                self.seen.fill_(True)
        return frequency_penalty(frequencies, scale=self.scale, running=self.running)

    def extra_repr(self) -> str:
        return f"c={self.running.shape[0]}, scale={self.scale:g}, decay={self.decay:g}"
