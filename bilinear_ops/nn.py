"""Modules over the ops, initialised as `torch.nn.Linear` is."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn

from bilinear_ops.gated import gated_bilinear, gated_mlp
from bilinear_ops.reference.gated import ACTIVATIONS


class _Gated(nn.Module):
    """Up-projections w, v `[h, d]`, their biases, the activation and beta, shared by the two layers."""

    beta: Tensor | None
    b_w: Tensor | None
    b_v: Tensor | None

    def __init__(
        self,
        d_in: int,
        d_hidden: int,
        activation: str,
        beta: float | Tensor,
        bias: bool,
        factory: dict[str, Any],
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if activation != "swish" and not (isinstance(beta, float | int) and beta == 1.0):
            raise ValueError(f"beta belongs to activation='swish', got {beta} with {activation!r}")
        self.activation = activation
        self.w = nn.Parameter(torch.empty(d_hidden, d_in, **factory))
        self.v = nn.Parameter(torch.empty(d_hidden, d_in, **factory))
        self.b_w = nn.Parameter(torch.empty(d_hidden, **factory)) if bias else None
        self.b_v = nn.Parameter(torch.empty(d_hidden, **factory)) if bias else None
        # A tensor, so that annealing it (`layer.beta.fill_(0.5)`) recompiles nothing; a Parameter is trained.
        if activation != "swish":
            self.register_buffer("beta", None)
        elif isinstance(beta, nn.Parameter):
            self.beta = beta
        else:
            self.register_buffer("beta", torch.as_tensor(beta, dtype=torch.float32, device=factory["device"]))

    def reset_parameters(self) -> None:
        """Weights and biases uniform in +-1 / sqrt(fan in), as in `torch.nn.Linear`."""
        for weight, bias in self._linears():
            bound = 1 / math.sqrt(weight.shape[1]) if weight.shape[1] else 0.0
            for t in (weight, bias):
                if t is not None:
                    nn.init.uniform_(t, -bound, bound)

    def _linears(self) -> list[tuple[Tensor, Tensor | None]]:
        return [(self.w, self.b_w), (self.v, self.b_v)]

    def _options(self) -> dict[str, Any]:
        return {"activation": self.activation, "beta": 1.0 if self.beta is None else self.beta}

    def _halve(self) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def bilinearise_(self) -> Self:
        """Turn a layer annealed to swish with beta 0, which is z / 2, into the bilinear layer it equals ([P] App. H).

        Raises ValueError unless the activation is identity (nothing to do) or swish at beta 0.
        """
        if self.activation == "identity":
            return self
        if self.activation != "swish" or self.beta is None or self.beta.item() != 0:
            slope = "" if self.beta is None else f" at beta {self.beta.item():g}"
            raise ValueError(f"only identity and swish at beta 0 are bilinear, got {self.activation}{slope}")
        self._halve()
        self.activation = "identity"
        self.beta = None
        return self

    def extra_repr(self) -> str:
        h, d = self.w.shape
        beta = "" if self.beta is None else f", beta={self.beta.item():g}"
        return f"d_in={d}, d_hidden={h}, activation={self.activation!r}{beta}, bias={self.b_w is not None}"


class GatedBilinear(_Gated):
    """(x w^T + b_w) * act(x v^T + b_v): x `[..., d_in]` -> `[..., d_hidden]`; see `bilinear_ops.gated_bilinear`.

    Args:
        d_in, d_hidden: sizes of inputs and outputs.
        activation: as in `bilinear_ops.gated_bilinear`.
        beta: slope of swish, kept in the buffer `beta`; a Parameter is trained.
        bias: whether to learn b_w and b_v.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        d_in: int,
        d_hidden: int,
        *,
        activation: str = "identity",
        beta: float | Tensor = 1.0,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(d_in, d_hidden, activation, beta, bias, {"device": device, "dtype": dtype})
        self.reset_parameters()

    def _halve(self) -> None:
        for t in (self.w, self.b_w):
            if t is not None:
                t.mul_(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return gated_bilinear(x, self.w, self.v, self.b_w, self.b_v, **self._options())


class GatedMLP(_Gated):
    """The gated layer with its down-projection p: x `[..., d_in]` -> `[..., d_out]`; see `bilinear_ops.gated_mlp`.

    Args:
        d_in, d_hidden, d_out: sizes of inputs, hidden units and outputs; d_out is d_in unless given.
        activation, beta, bias, device, dtype: as for `GatedBilinear`; bias adds b_p too.
        recompute: keep only the input for backward.
    """

    b_p: Tensor | None

    def __init__(
        self,
        d_in: int,
        d_hidden: int,
        d_out: int | None = None,
        *,
        activation: str = "identity",
        beta: float | Tensor = 1.0,
        bias: bool = False,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        factory = {"device": device, "dtype": dtype}
        super().__init__(d_in, d_hidden, activation, beta, bias, factory)
        d_out = d_in if d_out is None else d_out
        self.p = nn.Parameter(torch.empty(d_out, d_hidden, **factory))  # type: ignore[arg-type]
        self.b_p = nn.Parameter(torch.empty(d_out, **factory)) if bias else None  # type: ignore[arg-type]
        self.recompute = recompute
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls, *, gate: nn.Linear, up: nn.Linear, down: nn.Linear, activation: str, beta: float | Tensor = 1.0
    ) -> Self:
        """The layer of three Linears, sharing their parameters: a Llama-style MLP, dropped in.

        Raises ValueError where only some of the Linears have biases' shapes or sizes that do not fit together.
        """
        (h, d), o = up.weight.shape, down.weight.shape[0]
        if gate.weight.shape != (h, d) or down.weight.shape[1] != h:
            shapes = ", ".join(f"{list(m.weight.shape)}" for m in (gate, up, down))
            raise ValueError(f"gate, up, down must have weights [h, d], [h, d], [o, h], got {shapes}")
        layer = cls(d, h, o, activation=activation, beta=beta, device="meta", dtype=up.weight.dtype)
        if layer.beta is not None and layer.beta.is_meta:
            layer.register_buffer("beta", torch.as_tensor(beta, dtype=torch.float32, device=up.weight.device))
        for name, linear in (("w", up), ("v", gate), ("p", down)):
            setattr(layer, name, linear.weight)
            setattr(layer, f"b_{name}", linear.bias)
        return layer

    def _linears(self) -> list[tuple[Tensor, Tensor | None]]:
        return [*super()._linears(), (self.p, self.b_p)]

    def _halve(self) -> None:
        self.p.mul_(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return gated_mlp(
            x, self.w, self.v, self.p, self.b_w, self.b_v, self.b_p, recompute=self.recompute, **self._options()
        )

    def extra_repr(self) -> str:
        recompute = ", recompute=True" if self.recompute else ""
        return f"{super().extra_repr()}, d_out={self.p.shape[0]}{recompute}"
