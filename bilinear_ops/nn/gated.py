"""Gated layers as modules, initialised like `torch.nn.Linear`."""

from __future__ import annotations

import copy
import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bilinear_ops import gates
from bilinear_ops._check import check_sizes
from bilinear_ops._gate import check_gate
from bilinear_ops.gated import gate, gated_bilinear, gated_mlp
from bilinear_ops.nn.halving import halve_
from bilinear_ops.results import Activations

NAMES: dict[str, dict[str, Any]] = {  # activations as the transformers library names them, where we do not
    "gelu_pytorch_tanh": {"activation": "gelu_tanh"},
    "gelu_new": {"activation": "gelu_tanh"},
    "gelu_fast": {"activation": "gelu_tanh"},
    "linear": {"activation": "identity"},
    "quick_gelu": gates.QUICK_GELU,
}
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class _Gated(nn.Module):
    """What the two gated layers share: up-projections w, v `[h, d]`, their biases, the activation and beta."""

    beta: Tensor | None
    b_w: Tensor | None
    b_v: Tensor | None
    limit: float | None = None
    offset: float | None = None
    HALVED: tuple[str, ...]  # the parameters that are halved together to halve the layer's hidden units
    _initial_beta = 1.0

    def __init__(
        self,
        d_in: int,
        d_hidden: int,
        activation: str,
        beta: float | Tensor,
        limit: float | None,
        offset: float | None,
        bias: bool,
        factory: dict[str, Any],
    ):
        super().__init__()
        check_gate(activation, 1.0, limit, offset, torch.empty(0))
        if activation != "swish" and not (isinstance(beta, float | int) and beta == 1.0):
            raise ValueError(f"beta belongs to activation='swish', got {beta} with {activation!r}")
        for name, number in (("limit", limit), ("offset", offset)):
            if not isinstance(number, float | int | None):
                raise TypeError(f"{name} must be a float, got {type(number).__name__}")
        check_sizes(d_in=d_in, d_hidden=d_hidden)
        self.activation, self.limit, self.offset = activation, limit, offset
        self.w = nn.Parameter(torch.empty(d_hidden, d_in, **factory))
        self.v = nn.Parameter(torch.empty(d_hidden, d_in, **factory))
        self.b_w = nn.Parameter(torch.empty(d_hidden, **factory)) if bias else None
        self.b_v = nn.Parameter(torch.empty(d_hidden, **factory)) if bias else None
        self._keep_beta(beta, self.w.device)

    def _keep_beta(self, beta: float | Tensor, device: torch.device) -> None:
        """Keep beta as a tensor: annealing it (`layer.beta.fill_(0.5)`) never recompiles. A Parameter is trained."""
        if self.activation != "swish":
            self.register_buffer("beta", None)
            return
        if not isinstance(beta, float | int | Tensor):
            raise TypeError(f"beta must be a float or a tensor, got {type(beta).__name__}")
        if isinstance(beta, Tensor) and beta.shape not in ((), (1,)):
            raise RuntimeError(f"beta must be a float or have shape [] or [1], got {list(beta.shape)}")
        if not (isinstance(beta, Tensor) and beta.is_meta):
            self._initial_beta = beta.item() if isinstance(beta, Tensor) else float(beta)
        if isinstance(beta, nn.Parameter):
            beta.data = beta.data.reshape(1)  # FSDP2 refuses shape []; in place, as layers may share one slope
            self.beta = beta
        else:
            slope = torch.as_tensor(beta, dtype=torch.float32).detach().reshape(())
            self.register_buffer("beta", slope.to(device, copy=True))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load a slope of shape [] or [1], whichever the layer has: earlier versions saved [] only."""
        found = state_dict.get(f"{prefix}beta")
        if self.beta is not None and isinstance(found, Tensor) and found.numel() == 1:
            state_dict[f"{prefix}beta"] = found.reshape(self.beta.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def reset_parameters(self) -> None:
        """Draw weights and biases uniformly from +-1 / sqrt(fan in), as `torch.nn.Linear` does.

        A slope of swish returns to its value at construction, 1 if that was on the meta device.
        """
        for weight, bias in self._linears():
            bound = 1 / math.sqrt(weight.shape[1]) if weight.shape[1] else 0.0
            for t in (weight, bias):
                if t is not None:
                    nn.init.uniform_(t, -bound, bound)
        if self.beta is not None:
            nn.init.constant_(self.beta, self._initial_beta)

    def _linears(self) -> list[tuple[Tensor, Tensor | None]]:
        return [(self.w, self.b_w), (self.v, self.b_v)]

    def _options(self) -> dict[str, Any]:
        beta = 1.0 if self.beta is None else self.beta.reshape(())
        return {"activation": self.activation, "beta": beta, "limit": self.limit, "offset": self.offset}

    def activations(self, x: Tensor) -> Activations:
        """The pre-activations and the hidden units, `Activations(a, z, hid)` of `[..., h]`, for x `[..., d_in]`.

        a = x w^T + b_w and z = x v^T + b_v as the gate gets them, before a limit and an offset; hid is the gate's
        output, and that of the whole layer is hid p^T + b_p. Differentiable; compiles without a graph break.
        """
        a, z = F.linear(x, self.w, self.b_w), F.linear(x, self.v, self.b_v)
        return Activations(a, z, gate(a, z, **self._options()))

    def _check_bilinear(self) -> None:
        if self.limit is not None or self.offset is not None:
            raise ValueError(f"a gate with a limit or an offset is not bilinear, got {self.limit} and {self.offset}")
        if self.activation == "identity":
            return
        if self.activation != "swish" or self.beta is None or self.beta.item() != 0:
            slope = "" if self.beta is None else f" at beta {self.beta.item():g}"
            raise ValueError(f"only identity and swish at beta 0 are bilinear, got {self.activation}{slope}")
        for name in self.HALVED:
            if name not in self._parameters and getattr(self, name) is not None:
                raise ValueError(f"{name} is no parameter to be halved in place: remove its parametrisation first")

    def _drop_activation(self) -> None:
        self.activation = "identity"
        self.beta = None

    @torch.no_grad()
    def bilinearise_(self) -> Self:
        """Convert a layer annealed to swish at beta 0, which is z / 2, to the equal bilinear layer ([P] App. H).

        In place: of a layer made by `from_linear` or `from_packed` this halves the weight of the caller's own Linear,
        and so everything that shares it; `bilinearise` converts a copy. A bilinear layer stays as it is. A whole model
        is converted by `nn.bilinearise_`.

        Raises:
            ValueError: another activation, beta other than 0, a limit or an offset; a parametrised weight, or one that
                another parameter of the layer shares.
        """
        self._check_bilinear()
        if self.activation == "swish":
            halve_(self, [(self, name) for name in self.HALVED])
            self._drop_activation()
        return self

    def bilinearise(self) -> Self:
        """`bilinearise_` on a copy, which shares no parameter with this layer."""
        return copy.deepcopy(self).bilinearise_()

    def extra_repr(self) -> str:
        h, d = self.w.shape
        beta = "" if self.beta is None or self.beta.is_meta else f", beta={self.beta.item():g}"
        bounds = "".join(f", {n}={getattr(self, n):g}" for n in ("limit", "offset") if getattr(self, n) is not None)
        return f"d_in={d}, d_hidden={h}, activation={self.activation!r}{beta}{bounds}, bias={self.b_w is not None}"


class GatedBilinear(_Gated):
    """(x w^T + b_w) * act(x v^T + b_v): x `[..., d_in]` -> `[..., d_hidden]`; see `bilinear_ops.gated_bilinear`.

    Args:
        d_in, d_hidden: sizes of inputs and outputs.
        activation: as in `bilinear_ops.gated_bilinear`.
        beta: slope of swish, a float or a tensor of shape [] or [1]. Kept as the buffer `beta`, or trained if it is a
            Parameter. A Parameter of shape [] becomes one of shape [1].
        limit, offset: as in `bilinear_ops.gated_bilinear`: floats, which a checkpoint does not hold.
        bias: whether to learn b_w and b_v.
        device, dtype: of the parameters.
    """

    HALVED = ("w", "b_w")

    def __init__(
        self,
        d_in: int,
        d_hidden: int,
        *,
        activation: str = "identity",
        beta: float | Tensor = 1.0,
        limit: float | None = None,
        offset: float | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        factory = {"device": device, "dtype": dtype}
        super().__init__(d_in, d_hidden, activation, beta, limit, offset, bias, factory)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return gated_bilinear(x, self.w, self.v, self.b_w, self.b_v, **self._options())


class GatedMLP(_Gated):
    """The gated layer with its down-projection p: x `[..., d_in]` -> `[..., d_out]`; see `bilinear_ops.gated_mlp`.

    Args:
        d_in, d_hidden, d_out: sizes of inputs, hidden units and outputs; d_out is d_in unless given.
        activation, beta, limit, offset, bias, device, dtype: as for `GatedBilinear`; bias adds b_p too.
        recompute: keep only the input for backward.
    """

    b_p: Tensor | None
    HALVED = ("p",)

    def __init__(
        self,
        d_in: int,
        d_hidden: int,
        d_out: int | None = None,
        *,
        activation: str = "identity",
        beta: float | Tensor = 1.0,
        limit: float | None = None,
        offset: float | None = None,
        bias: bool = False,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        factory = {"device": device, "dtype": dtype}
        super().__init__(d_in, d_hidden, activation, beta, limit, offset, bias, factory)
        d_out = d_in if d_out is None else d_out
        check_sizes(d_out=d_out)
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
        limit: float | None = None,
        offset: float | None = None,
        recompute: bool = False,
    ) -> Self:
        """Replace the three Linears of a Llama-style MLP by one layer that shares their parameters.

        Each Linear may have a bias or none. `activation` may also be a name of the transformers library:
        gelu_pytorch_tanh, gelu_new, gelu_fast, linear or quick_gelu. `to_linear` is the way back.

        The layer takes over parameters, and nothing that was attached to a Linear. So

        - merge an adapter (LoRA) into its Linear before the swap, and attach new ones to `to_linear()`;
        - quantise w, v and p themselves, or the Linears of `to_linear()`;
        - tensor parallel: `integrations.distributed.parallel_plan` shards the layer, once it is in place;
        - the layer is saved as w, v, p: load a checkpoint of the Linears before the swap;
        - an optimizer made before the swap still trains the layer, as parameters are the same objects.

        Raises:
            TypeError: an argument that is not a plain `torch.nn.Linear`: a subclass or wrapper (LoRA, quantised,
                parametrised), or one with hooks or with a forward of its own, all of which the layer would drop.
            ValueError: sizes or dtypes of the weights that do not match, an unknown activation, a beta without swish.
        """
        _check_plain(gate=gate, up=up, down=down)
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
        options: dict[str, Any] = {"beta": beta, "limit": limit, "offset": offset, **named, "recompute": recompute}
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
        limit: float | None = None,
        offset: float | None = None,
        recompute: bool = False,
    ) -> Self:
        """The layer of an MLP that packs its up-projections, gate first (Phi-3, GLM-4), sharing their memory.

        The halves are parameters of their own. Arguments and errors as for `from_linear`.
        """
        _check_plain(gate_up=gate_up)
        halves = []
        for half in (0, 1):
            linear = nn.Linear(1, 1, bias=False, device="meta")
            for name, t in (("weight", gate_up.weight), ("bias", gate_up.bias)):
                if t is not None:
                    setattr(linear, name, nn.Parameter(t.detach().chunk(2)[half], requires_grad=t.requires_grad))
            halves.append(linear)
        gate, up = halves
        options: dict[str, Any] = {"beta": beta, "limit": limit, "offset": offset, "recompute": recompute}
        return cls.from_linear(gate=gate, up=up, down=down, activation=activation, **options)

    def to_linear(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        """The Linears (gate, up, down) that share this layer's parameters: `from_linear` undone.

        The activation and the slope are not theirs: the layer's output is `down(up(x) * act(gate(x)))`.
        """
        return _as_linear(self.v, self.b_v), _as_linear(self.w, self.b_w), _as_linear(self.p, self.b_p)

    def _linears(self) -> list[tuple[Tensor, Tensor | None]]:
        return [*super()._linears(), (self.p, self.b_p)]

    def forward(self, x: Tensor) -> Tensor:
        return gated_mlp(
            x, self.w, self.v, self.p, self.b_w, self.b_v, self.b_p, recompute=self.recompute, **self._options()
        )

    def extra_repr(self) -> str:
        recompute = ", recompute=True" if self.recompute else ""
        return f"{super().extra_repr()}, d_out={self.p.shape[0]}{recompute}"


def _check_plain(**linears: object) -> None:
    """Raise TypeError for what is more than the weight and the bias of a Linear."""
    for name, linear in linears.items():
        if type(linear) is not nn.Linear:
            kind = type(linear)
            raise TypeError(
                f"{name} must be a plain torch.nn.Linear, got {kind.__module__}.{kind.__qualname__}: merge adapters "
                "and remove parametrisations first"
            )
        if "forward" in vars(linear):
            raise TypeError(f"{name} must be a plain torch.nn.Linear, got one whose forward is replaced")
        if any(getattr(linear, hooks) for hooks in HOOKS):
            raise TypeError(f"{name} must be a plain torch.nn.Linear, got one with hooks: remove them first")


def _as_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = weight, bias  # type: ignore[assignment]
    return linear
