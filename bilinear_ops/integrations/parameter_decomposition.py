"""Drop-ins for the component modules and losses of parameter-decomposition code, over the rank-1 ops ([SPD]).

Same constructor and call arguments, attributes and state_dict keys as `goodfire-ai/param-decomp`: `LinearComponents`,
`EmbeddingComponents`, and for its one-file runner `ComponentLinear` and both weight losses. What differs between its
conventions and those of `bilinear_ops`:

| there | here |
| --- | --- |
| V `[d_in, C]`, U `[C, d_out]` | `read`, `write`: the same orientation |
| weight (V U)^T of a linear layer, V U of an embedding | `Rank1Linear.weight`, `Rank1Embedding.weight` |
| delta = weight - (V U)^T, a matrix that the caller forms and passes with its mask | `weight=` and `delta=`: never formed |
| masks of any dtype, bool and int among them | any floating dtype |
| minimality: a sum over subcomponents of means over tokens, plus beta mean log2(1 + sum world_size) | `importance_minimality` `[C]`; `frequency_penalty(scale=tokens world_size)` |
| faithfulness over the elements of all layers | `pooled_faithfulness_loss` |
| sources `[n, ...]` repeated along the batch, n dividing it | the batch viewed as `[batch / n, n, ...]`, over which a source broadcasts |
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bilinear_ops.rank1.losses import frequency_penalty, importance_minimality, pooled_faithfulness_loss
from bilinear_ops.rank1.masked import rank1_linear, stochastic_rank1_linear

WeightDeltaAndMask = tuple[Tensor, Tensor]


class _Components(nn.Module):
    """V `[v_dim, C]` and U `[C, u_dim]`, normal with deviations 1 / sqrt(v_dim) and 1 / sqrt(C)."""

    def __init__(self, C: int, v_dim: int, u_dim: int):
        super().__init__()
        self.C = C
        self.V = nn.Parameter(torch.empty(v_dim, C).normal_(std=1 / math.sqrt(v_dim)))
        self.U = nn.Parameter(torch.empty(C, u_dim).normal_(std=1 / math.sqrt(C)))

    def get_component_acts(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _masked(self, x: Tensor, mask: Tensor | None, cache: dict[str, Tensor] | None, bias: Tensor | None) -> Tensor:
        """((acts) * mask) U + bias, the activations cut off from the graph where they are cached."""
        acts = self.get_component_acts(x)
        if cache is not None:
            cache["pre_detach"] = acts
            cache["post_detach"] = acts = acts.detach().requires_grad_(True)
        nothing, read = acts.new_empty(*acts.shape[:-1], 0), acts.new_empty(0, self.C)  # acts stand for x V
        if mask is not None and not mask.is_floating_point():
            mask = mask.to(acts.dtype)
        if mask is None or mask.dim() <= acts.dim():
            return rank1_linear(nothing, read, self.U, mask, bias, acts=acts)
        # several masks over one x: 0 + (1 - 0) mask, whose activations are computed once
        samples = mask.expand(*mask.shape[: -acts.dim()], *acts.shape).flatten(0, -acts.dim() - 1)
        none = acts.new_zeros(())
        y = stochastic_rank1_linear(nothing, read, self.U, none, bias, samples=len(samples), source=samples, acts=acts)
        return y.view(*mask.shape[: -acts.dim()], *y.shape[1:])


class LinearComponents(_Components):
    """C rank-1 components of a linear layer, with its frozen bias: `LinearComponents` of that code."""

    bias: Tensor | None

    def __init__(self, C: int, d_in: int, d_out: int, bias: Tensor | None = None):
        super().__init__(C, d_in, d_out)
        self.d_in, self.d_out = d_in, d_out
        self.register_buffer("bias", bias)

    @property
    def weight(self) -> Tensor:
        """(V U)^T `[d_out, d_in]`."""
        return (self.V @ self.U).t()

    def get_component_acts(self, x: Tensor) -> Tensor:
        """x V `[..., C]`, in the components' dtype."""
        return x.to(self.V.dtype) @ self.V

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        weight_delta_and_mask: WeightDeltaAndMask | None = None,
        component_acts_cache: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """`[..., d_out]`; mask broadcasts to `[..., C]`, or has samples before the tokens' dimensions."""
        y = self._masked(x, mask, component_acts_cache, self.bias)
        if weight_delta_and_mask is None:
            return y
        delta, share = weight_delta_and_mask
        return y + share[..., None].to(y.dtype) * F.linear(x.to(delta.dtype), delta)


class EmbeddingComponents(_Components):
    """C rank-1 components of an embedding: `EmbeddingComponents` of that code."""

    def __init__(self, C: int, vocab_size: int, embedding_dim: int):
        super().__init__(C, vocab_size, embedding_dim)
        self.vocab_size, self.embedding_dim = vocab_size, embedding_dim

    @property
    def weight(self) -> Tensor:
        """V U `[vocab_size, embedding_dim]`."""
        return self.V @ self.U

    def get_component_acts(self, x: Tensor) -> Tensor:
        """Rows of V `[..., C]` for integer tokens."""
        return F.embedding(x, self.V)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        weight_delta_and_mask: WeightDeltaAndMask | None = None,
        component_acts_cache: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """`[..., embedding_dim]` for integer tokens `[...]`; mask as for `LinearComponents`."""
        y = self._masked(x, mask, component_acts_cache, None)
        if weight_delta_and_mask is None:
            return y
        delta, share = weight_delta_and_mask
        return y + share[..., None].to(y.dtype) * F.embedding(x, delta)


class ComponentLinear(nn.Module):
    """Stands for an `nn.Linear` in a model: `ComponentLinear` of the one-file runner.

    In mode "target" it is the original layer and keeps its input as `last_input`; in mode "component" the caller sets
    `mask` `[..., C]`, `delta_mask` `[...]` and, or None, `routing_mask` bool `[...]` before the forward.
    """

    W_target: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, C: int) -> None:
        super().__init__()
        d_out, d_in = linear.weight.shape
        self.C = C
        self.register_buffer("W_target", linear.weight.detach().clone())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())
        self.V = nn.Parameter(torch.empty(d_in, C).normal_(std=1 / math.sqrt(d_in)))
        self.U = nn.Parameter(torch.empty(C, d_out).normal_(std=1 / math.sqrt(C)))
        self.mode = "target"
        self.mask: Tensor | None = None
        self.delta_mask: Tensor | None = None
        self.routing_mask: Tensor | None = None
        self.last_input: Tensor | None = None
        self.cache_output = False
        self.last_output: Tensor | None = None

    def weight_delta(self) -> Tensor:
        """W_target - (V U)^T; the forward does without it."""
        return self.W_target - (self.V @ self.U).t()

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "target":
            self.last_input = x.detach()
            y = F.linear(x, self.W_target, self.bias)
        else:
            if self.mask is None or self.delta_mask is None:
                raise RuntimeError("mode 'component' needs mask and delta_mask")
            y = rank1_linear(
                x, self.V, self.U, self.mask, self.bias, weight=self.W_target, delta=self.delta_mask,
                routing=self.routing_mask,
            )  # fmt: skip
        if self.cache_output:
            self.last_output = y.detach()
        return y


def faithfulness_loss(wrappers: Mapping[str, ComponentLinear]) -> Tensor:
    """Squared differences of all layers over their elements, without the difference matrices."""
    return pooled_faithfulness_loss([(w.W_target, w.V, w.U) for w in wrappers.values()])


def importance_minimality_loss(
    ci_upper: Mapping[str, Tensor], p: float, eps: float, beta: float, world_size: int
) -> Tensor:
    """Over all layers and components c, mean_c + beta mean_c log2(1 + sum_c world_size) of (ci + eps)^p."""
    losses = []
    for ci in ci_upper.values():
        means = importance_minimality(ci, pnorm=p, eps=eps)
        scale = ci.shape[:-1].numel() * world_size
        losses.append(means.sum() + beta * frequency_penalty(means, scale=scale))
    return torch.stack(losses).sum()
