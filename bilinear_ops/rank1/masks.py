"""Stochastic masks and deltas: what `stochastic_rank1_linear` draws, as tensors (docs/math.md 3; [SPD])."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bilinear_ops import _impl, _op
from bilinear_ops._check import DENSE, check, check_integers, check_sampling, check_seed, check_shape
from bilinear_ops._sharding import sharded
from bilinear_ops.composite.rank1 import masks as composite
from bilinear_ops.composite.rank1.masks import blend, delta_site, mask_site, routing_site
from bilinear_ops.results import SAMPLINGS


@sharded(
    "s ... c", over="... c", numbers={"row_numbers": "...", "column_numbers": "c"},
    gates="... c", seed="", row_numbers="...", column_numbers="c",
)  # fmt: skip
def stochastic_mask(
    gates: Tensor,
    *,
    samples: int = 1,
    seed: int | Tensor,
    sampling: str = "continuous",
    stream: int = 0,
    row_numbers: Tensor | None = None,
    column_numbers: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """g + (1 - g) r with r ~ U(0, 1) or Bernoulli(1/2): exactly the masks of `stochastic_rank1_linear` ([SPD]).

    Args:
        gates: `[..., C]` causal importances in [0, 1]; other values are not refused.
        samples: number of independent masks.
        seed: int or int64 0-dim tensor on the device of gates; with stream, sample, row and column it fixes each draw.
        sampling: "continuous" or "binomial".
        stream: int that keeps two sites with one seed apart.
        row_numbers, column_numbers: int64 `[...]` and `[C]`, the numbers of the tokens and subcomponents; 0, 1, ...
            without them. Part of a batch with its numbers gets the masks that it has in the batch, as DTensors do.
        impl: "auto", "triton" or "torch".

    Returns:
        `[samples, ..., C]` in float32, or float64 for float64 gates.

    Raises:
        RuntimeError: a seed on another device, or impl="triton" where it cannot run.
        TypeError: gates that are not a floating-point tensor, or a seed that is neither an int nor an int64 tensor.
        ValueError: samples below 1, unknown sampling or impl.
    """
    check(gates=(gates, "... c"))
    check_sampling(samples, sampling)
    check_integers(stream=stream)
    seed = check_seed(seed, gates.device)
    gates = gates.to(torch.promote_types(gates.dtype, torch.float32))
    check_numbers(gates.shape[:-1], gates.shape[-1], row_numbers, column_numbers, gates.device)
    sizes = gates.shape[:-1].numel(), gates.shape[-1]
    r = draw(seed, mask_site(stream), samples, *sizes, impl, row_numbers, column_numbers)
    r = r.view(samples, *gates.shape)
    return torch.where(r >= 0.5, 1, gates) if sampling == "binomial" else blend(gates, r)


def stochastic_delta(
    shape: Sequence[int],
    *,
    samples: int = 1,
    seed: int | Tensor,
    device: Any = None,
    stream: int = 0,
    row_numbers: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """U(0, 1) for each sample and token: exactly what delta="uniform" draws in `stochastic_rank1_linear`.

    Args:
        shape: of the tokens.
        device: of the result; the default device without it.
        samples, seed, stream, row_numbers, impl: as for `stochastic_mask`, which shares no draw with this function.

    Returns:
        float32 `[samples, *shape]`.

    Raises:
        as `stochastic_mask`.
    """
    check_sampling(samples, SAMPLINGS[0])
    check_integers(stream=stream)
    shape = check_shape(shape)
    seed = check_seed(seed, torch.empty(0, device=device).device)
    check_numbers(shape, 1, row_numbers, None, seed.device)
    tokens = torch.Size(shape).numel()
    return draw(seed, delta_site(stream), samples, tokens, 1, impl, row_numbers).view(samples, *shape)


def subset_routing(
    sites: int,
    shape: Sequence[int],
    *,
    seed: int | Tensor,
    device: Any = None,
    stream: int = 0,
    impl: str = "auto",
) -> Tensor:
    """For each token a random subset of the sites to route through their subcomponents: `routing=` of each site.

    Of 1 to `sites` sites, each number alike likely, and then every subset of that size.

    Args:
        sites: number of decomposed layers, at least 1.
        shape: of the tokens.
        device: of the result; the default device without it.
        seed, stream, impl: as for `stochastic_mask`, which never shares a draw with this function.

    Returns:
        bool `[sites, *shape]`.

    Raises:
        as `stochastic_mask`, and ValueError for sites below 1.
    """
    check_integers(sites=sites, stream=stream)
    shape = check_shape(shape)
    if sites < 1:
        raise ValueError(f"sites must be at least 1, got {sites}")
    seed = check_seed(seed, torch.empty(0, device=device).device)
    u = draw(seed, routing_site(stream), 1, torch.Size(shape).numel(), sites + 1, impl)[0]
    count = (u[:, sites] * sites).long()  # less one
    ranks = u[:, :sites].argsort(stable=True, dim=1).argsort(1)
    return (ranks <= count[:, None]).t().reshape(sites, *shape)


def check_numbers(
    lead: Sequence[int],
    columns: int,
    row_numbers: Tensor | None,
    column_numbers: Tensor | None,
    device: torch.device,
) -> None:
    """Raise TypeError or RuntimeError unless the numbers of rows and columns are int64 tensors of these shapes."""
    for name, t, shape in (("row_numbers", row_numbers, tuple(lead)), ("column_numbers", column_numbers, (columns,))):
        if t is None:
            continue
        if not isinstance(t, Tensor) or t.dtype != torch.int64:
            raise TypeError(f"{name} must be an int64 tensor, got {getattr(t, 'dtype', type(t).__name__)}")
        if t.layout not in DENSE:
            raise TypeError(f"{name} must be a dense tensor, got {t.layout}")
        if tuple(t.shape) != shape or t.device != device:
            raise RuntimeError(f"{name} must have shape {list(shape)} on {device}, got {list(t.shape)} on {t.device}")


def draw(
    seed: Tensor,
    site: int,
    samples: int,
    rows: int,
    columns: int,
    impl: str,
    row_numbers: Tensor | None = None,
    column_numbers: Tensor | None = None,
) -> Tensor:
    """Uniforms [samples, rows, columns] in [0, 1)."""
    numbers = flat(row_numbers), flat(column_numbers)
    return uniform_op(seed, site, samples, rows, columns, *numbers, _impl.resolve(impl, seed))


def flat(numbers: Tensor | None) -> Tensor | None:
    """As the kernels read them."""
    return None if numbers is None else numbers.reshape(-1).contiguous()


def launchers():
    """The kernels of this family, imported at the first launch."""
    from bilinear_ops.kernels.rank1 import masks

    return masks


def _uniform(
    seed: Tensor,
    site: int,
    samples: int,
    rows: int,
    columns: int,
    row_numbers: Tensor | None,
    column_numbers: Tensor | None,
    impl: str,
) -> Tensor:
    path = composite if impl == "torch" else launchers()
    return path.uniform(seed, site, samples, rows, columns, row_numbers, column_numbers)


def _uniform_fake(seed, site, samples, rows, columns, row_numbers, column_numbers, impl):
    return seed.new_empty(samples, rows, columns, dtype=torch.float32)


uniform_op = _op.register(
    "uniform(Tensor seed, int site, int samples, SymInt rows, SymInt columns, Tensor? row_numbers, "
    "Tensor? column_numbers, str impl) -> Tensor",
    _uniform,
    _uniform_fake,
)
