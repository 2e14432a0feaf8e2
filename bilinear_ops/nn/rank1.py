"""Linear layers and embeddings as rank-1 subcomponents."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn

from bilinear_ops import _op
from bilinear_ops._check import DTYPES, check_beside, check_index, check_sizes
from bilinear_ops._masks import check_remainder
from bilinear_ops.rank1.masked import rank1_linear, stochastic_rank1_linear
from bilinear_ops.rank1.masks import stochastic_delta

DRAWN = ("samples", "seed", "stream", "row_numbers", "impl")  # options that draws of masks and of deltas share


def _check_frozen(**given: tuple[Tensor | None, tuple[int, ...]]) -> None:
    for name, (t, shape) in given.items():
        for n in shape:
            check_sizes(**{f"a size of {name}": n})
        if t is not None and (not isinstance(t, Tensor) or t.dtype not in DTYPES):
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{name} must be a floating-point tensor, got {got}")
        if t is not None and t.shape != shape:
            raise RuntimeError(f"{name} must have shape {list(shape)}, got {list(t.shape)}")


class _Rank1(nn.Module):
    """C rank-1 subcomponents read `[d_in, C]`, write `[C, d_out]`, with a frozen target weight and bias."""

    target: Tensor | None
    bias: Tensor | None

    def __init__(self, d_in: int, d_out: int, c: int, target: Tensor | None, bias: Tensor | None):
        super().__init__()
        check_sizes(d_in=d_in, d_out=d_out, c=c)
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

    @classmethod
    def from_linear(cls, linear: nn.Linear, c: int) -> Self:
        """C fresh subcomponents for a linear layer, whose weight and bias are kept frozen."""
        d_out, d_in = linear.weight.shape
        return cls(d_in, d_out, c, weight=linear.weight, bias=linear.bias)

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

        Raises:
            IndexError: on CPU, a token outside the vocabulary.
            RuntimeError: mismatched shapes or devices.
            TypeError: tokens that are not int64 or int32, a mask or delta that is not a floating-point tensor, or
                routing that is not a bool tensor.
            ValueError: delta or routing without an original weight.
        """
        acts = self._acts(tokens)  # [..., C]
        check_beside(acts, mask=(mask, acts.shape), delta=(delta, tokens.shape))
        check_remainder(acts, delta, routing, weight=self.target)
        mask = acts.new_ones(()) if mask is None else mask
        if self.target is None or (delta is None and routing is None):
            return (acts * mask).to(acts.dtype) @ self.write
        original = nn.functional.embedding(tokens, self.target.t())  # [..., d]
        delta = acts.new_zeros(()) if delta is None else delta[..., None]
        y = (acts * (mask - delta)).to(acts.dtype) @ self.write + (delta * original).to(acts.dtype)
        return y if routing is None else torch.where(routing[..., None], y, original)

    def _acts(self, tokens: Tensor) -> Tensor:
        """The tokens' rows of `read`, checked."""
        if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32):
            got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
            raise TypeError(f"tokens must be an int64 or int32 tensor, got {got}")
        if tokens.device != self.read.device:
            raise RuntimeError(f"tokens must be on the device of the module, {self.read.device}, got {tokens.device}")
        if tokens.device.type == "cpu":  # on a GPU reading the values would wait for it
            check_index("tokens", tokens.long(), len(self.read), tuple(tokens.shape), self.read)
        return nn.functional.embedding(tokens, self.read)

    def stochastic(
        self, tokens: Tensor, gates: Tensor, *, delta: Any = None, routing: Any = None, **options: Any
    ) -> Tensor:
        """`[samples, ..., d]` under drawn masks; options as for `bilinear_ops.stochastic_rank1_linear`."""
        acts = self._acts(tokens)  # [..., C]
        check_remainder(acts, delta, routing, weight=self.target)
        nothing = acts.new_empty(*tokens.shape, 0)
        y = stochastic_rank1_linear(nothing, self.read[:0], self.write, gates, acts=acts, **options)
        if self.target is None or (delta is None and routing is None):
            return y
        original = nn.functional.embedding(tokens, self.target.t())  # [..., d]
        if isinstance(delta, str):
            if delta != "uniform":
                raise ValueError(f'delta must be a tensor or "uniform", got {delta!r}')
            drawn = {name: options[name] for name in DRAWN if name in options}
            delta = stochastic_delta(tokens.shape, device=acts.device, **drawn)
        if delta is not None:
            check_beside(acts, delta=(delta, y.shape[:-1]))
            y = (y + delta[..., None] * _remainder(acts, self.write, original)).to(y.dtype)
        return y if routing is None else torch.where(routing[..., None], y, original.to(y.dtype))


@_op.without_autocast
def _remainder(acts: Tensor, write: Tensor, original: Tensor) -> Tensor:
    """What the subcomponents of a token leave of its embedding: a small difference of large numbers."""
    return original - acts @ write
