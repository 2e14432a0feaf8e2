"""`torch.nn` modules over the ops. Gated layers are initialised like `torch.nn.Linear`."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn

from bilinear_ops.gated import gated_bilinear, gated_mlp
from bilinear_ops.rank1.masked import rank1_linear, stochastic_rank1_linear
from bilinear_ops.results import ACTIVATIONS

__all__ = ["GatedBilinear", "GatedMLP", "Rank1Embedding", "Rank1Linear"]


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

        Each Linear may have a bias or none. Raises ValueError if sizes or dtypes of the weights do not match.
        """
        (h, d), o = up.weight.shape, down.weight.shape[0]
        dtypes = [m.weight.dtype for m in (gate, up, down)]
        if len(set(dtypes)) > 1:
            raise ValueError(f"gate, up, down must have weights of one dtype, got {', '.join(map(str, dtypes))}")
        if gate.weight.shape != (h, d) or down.weight.shape[1] != h:
            shapes = ", ".join(f"{list(m.weight.shape)}" for m in (gate, up, down))
            raise ValueError(f"gate, up, down must have weights [h, d], [h, d], [o, h], got {shapes}")
        options: dict[str, Any] = {"activation": activation, "beta": beta, "recompute": recompute}
        layer = cls(d, h, o, **options, device="meta", dtype=up.weight.dtype)
        layer._keep_beta(beta, up.weight.device)
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


def _check_frozen(**given: tuple[Tensor | None, tuple[int, ...]]) -> None:
    for name, (t, shape) in given.items():
        if t is not None and t.shape != shape:
            raise RuntimeError(f"{name} must have shape {list(shape)}, got {list(t.shape)}")


class _Rank1(nn.Module):
    """C rank-1 subcomponents read `[d_in, C]`, write `[C, d_out]`, with a frozen target weight and bias."""

    target: Tensor | None
    bias: Tensor | None

    def __init__(self, d_in: int, d_out: int, c: int, target: Tensor | None, bias: Tensor | None):
        super().__init__()
        factory: dict[str, Any] = {} if target is None else {"device": target.device, "dtype": target.dtype}
        self.read = nn.Parameter(torch.empty(d_in, c, **factory))
        self.write = nn.Parameter(torch.empty(c, d_out, **factory))
        for name, t in (("target", target), ("bias", bias)):
            self.register_buffer(name, None if t is None else t.detach())
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw normal entries, of deviation 1 / sqrt(d_in) in read and 1 / sqrt(C) in write, as [SPD]'s code."""
        for t in (self.read, self.write):
            nn.init.normal_(t, std=1 / math.sqrt(t.shape[0]) if t.shape[0] else 0.0)

    @property
    def weight(self) -> Tensor:
        """The sum of the subcomponents, (R L)^T `[d_out, d_in]`."""
        return (self.read @ self.write).t()

    def extra_repr(self) -> str:
        (d_in, c), d_out = self.read.shape, self.write.shape[1]
        return f"d_in={d_in}, d_out={d_out}, c={c}, target={self.target is not None}, bias={self.bias is not None}"


class Rank1Linear(_Rank1):
    """A linear layer as C rank-1 subcomponents, masked or stochastic; see `bilinear_ops.rank1_linear`.

    Args:
        d_in, d_out: sizes of inputs and outputs.
        c: number of subcomponents.
        weight: `[d_out, d_in]` original weight, kept frozen as `target` for delta and routing.
        bias: `[d_out]`, kept frozen.
    """

    def __init__(self, d_in: int, d_out: int, c: int, *, weight: Tensor | None = None, bias: Tensor | None = None):
        _check_frozen(weight=(weight, (d_out, d_in)), bias=(bias, (d_out,)))
        super().__init__(d_in, d_out, c, weight, bias)

    def forward(self, x: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        """The output `[..., d_out]` under a given mask; options as for `bilinear_ops.rank1_linear`."""
        return rank1_linear(x, self.read, self.write, mask, self.bias, weight=self.target, **options)

    def stochastic(self, x: Tensor, gates: Tensor, **options: Any) -> Tensor:
        """Outputs `[samples, ..., d_out]` under drawn masks; options as for `bilinear_ops.stochastic_rank1_linear`."""
        return stochastic_rank1_linear(x, self.read, self.write, gates, self.bias, weight=self.target, **options)


class Rank1Embedding(_Rank1):
    """An embedding as C rank-1 subcomponents: rows of `read` take the place of x R in `Rank1Linear`.

    Args:
        vocab: number of tokens.
        d: size of an embedding.
        c: number of subcomponents.
        weight: `[vocab, d]` original embedding, kept frozen for delta and routing.
    """

    def __init__(self, vocab: int, d: int, c: int, *, weight: Tensor | None = None):
        _check_frozen(weight=(weight, (vocab, d)))
        super().__init__(vocab, d, c, None if weight is None else weight.t(), None)

    @property
    def weight(self) -> Tensor:
        """The sum of the subcomponents, R L `[vocab, d]`."""
        return self.read @ self.write

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        *,
        delta: Tensor | None = None,
        routing: Tensor | None = None,
    ) -> Tensor:
        """Embed integer tokens `[...]` as `[..., d]`; mask, delta and routing as for `bilinear_ops.rank1_linear`.

        Raises ValueError for delta or routing without an original weight.
        """
        acts = nn.functional.embedding(tokens, self.read)  # [..., C]
        mask = acts.new_ones(()) if mask is None else mask
        if delta is None and routing is None:
            return (acts * mask).to(acts.dtype) @ self.write
        if self.target is None:
            raise ValueError(f"{'routing' if delta is None else 'delta'} needs weight, got None")
        original = nn.functional.embedding(tokens, self.target.t())  # [..., d]
        delta = acts.new_zeros(()) if delta is None else delta[..., None]
        y = (acts * (mask - delta)).to(acts.dtype) @ self.write + (delta * original).to(acts.dtype)
        return y if routing is None else torch.where(routing[..., None], y, original)
