"""Gated layers as modules, initialised like `torch.nn.Linear`."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn

from bilinear_ops import gates
from bilinear_ops.gated import gated_bilinear, gated_mlp
from bilinear_ops.results import ACTIVATIONS

NAMES: dict[str, dict[str, Any]] = {  # activations as the transformers library names them, where we do not
    "gelu_pytorch_tanh": {"activation": "gelu_tanh"},
    "gelu_new": {"activation": "gelu_tanh"},
    "gelu_fast": {"activation": "gelu_tanh"},
    "linear": {"activation": "identity"},
    "quick_gelu": gates.QUICK_GELU,
}


class _Gated(nn.Module):
    """What the two gated layers share: up-projections w, v `[h, d]`, their biases, the activation and beta."""

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
        self._keep_beta(beta, self.w.device)

    def _keep_beta(self, beta: float | Tensor, device: torch.device) -> None:
        """Keep beta as a tensor: annealing it (`layer.beta.fill_(0.5)`) never recompiles. A Parameter is trained."""
        if self.activation != "swish":
            self.register_buffer("beta", None)
        elif isinstance(beta, nn.Parameter):
            self.beta = beta
        else:
            self.register_buffer("beta", torch.as_tensor(beta, dtype=torch.float32).detach().to(device, copy=True))

    def reset_parameters(self) -> None:
        """Draw weights and biases uniformly from +-1 / sqrt(fan in), as `torch.nn.Linear` does."""
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
        """Convert a layer annealed to swish at beta 0, which is z / 2, to the equal bilinear layer ([P] App. H).

        In place; a bilinear layer stays as it is. Raises ValueError for other activations and for beta other than 0.
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
        beta = "" if self.beta is None or self.beta.is_meta else f", beta={self.beta.item():g}"
        return f"d_in={d}, d_hidden={h}, activation={self.activation!r}{beta}, bias={self.b_w is not None}"


class GatedBilinear(_Gated):
    """(x w^T + b_w) * act(x v^T + b_v): x `[..., d_in]` -> `[..., d_hidden]`; see `bilinear_ops.gated_bilinear`.

    Args:
        d_in, d_hidden: sizes of inputs and outputs.
        activation: as in `bilinear_ops.gated_bilinear`.
        beta: slope of swish, kept as the buffer `beta`, or trained if it is a Parameter.
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
        cls,
        *,
        gate: nn.Linear,
        up: nn.Linear,
        down: nn.Linear,
        activation: str,
        beta: float | Tensor = 1.0,
        recompute: bool = False,
    ) -> Self:
        """Replace the three Linears of a Llama-style MLP by one layer that shares their parameters.

        Each Linear may have a bias or none. `activation` may also be a name of the transformers library:
        gelu_pytorch_tanh, gelu_new, gelu_fast, linear or quick_gelu. Raises ValueError if sizes or dtypes of the
        weights do not match.
        """
        (h, d), o = up.weight.shape, down.weight.shape[0]
        dtypes = [m.weight.dtype for m in (gate, up, down)]
        if len(set(dtypes)) > 1:
            raise ValueError(f"gate, up, down must have weights of one dtype, got {', '.join(map(str, dtypes))}")
        if gate.weight.shape != (h, d) or down.weight.shape[1] != h:
            shapes = ", ".join(f"{list(m.weight.shape)}" for m in (gate, up, down))
            raise ValueError(f"gate, up, down must have weights [h, d], [h, d], [o, h], got {shapes}")
        named = NAMES.get(activation, {"activation": activation})
        if "beta" in named and not (isinstance(beta, float | int) and beta == 1.0):
            raise ValueError(f"{activation} has a beta of its own, got {beta}")
        options: dict[str, Any] = {"beta": beta, **named, "recompute": recompute}
        layer = cls(d, h, o, **options, device="meta", dtype=up.weight.dtype)
        layer._keep_beta(options["beta"], up.weight.device)
        for name, linear in (("w", up), ("v", gate), ("p", down)):
            setattr(layer, name, linear.weight)
            setattr(layer, f"b_{name}", linear.bias)
        return layer

    @classmethod
    def from_packed(
        cls,
        *,
        gate_up: nn.Linear,
        down: nn.Linear,
        activation: str,
        beta: float | Tensor = 1.0,
        recompute: bool = False,
    ) -> Self:
        """The layer of an MLP that packs its up-projections, gate first (Phi-3, GLM-4), sharing their memory.

        The halves are parameters of their own. Arguments and errors as for `from_linear`.
        """
        halves = []
        for half in (0, 1):
            linear = nn.Linear(1, 1, bias=False, device="meta")
            for name, t in (("weight", gate_up.weight), ("bias", gate_up.bias)):
                if t is not None:
                    setattr(linear, name, nn.Parameter(t.detach().chunk(2)[half], requires_grad=t.requires_grad))
            halves.append(linear)
        gate, up = halves
        return cls.from_linear(gate=gate, up=up, down=down, activation=activation, beta=beta, recompute=recompute)

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
