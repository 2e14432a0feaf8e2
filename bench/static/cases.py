"""What the gate compiles: the launchers' calls on meta tensors, one for every kernel, tile, dtype and way in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias
from unittest import mock

import torch

from bilinear_ops.kernels import config, few_rows, gated, tuning
from bilinear_ops.kernels.interaction import matrices, matrices_backward, ranking
from bilinear_ops.kernels.rank1 import accumulate, gates, losses, masked, masks, sparse
from bilinear_ops.kernels.records import Choice, PairTile, Rejected, SplitTile, Tile
from bilinear_ops.results import ACTIVATIONS, Gate, Masks


@dataclass(frozen=True)
class Case:
    """One launch: its name, the launcher's call on meta tensors, and whether it is evidence against its tile.

    `ragged`: rows of the output start anywhere, so that its stores cannot be wide.
    """

    name: str
    call: Callable[[], object]
    rejected: bool = False
    ragged: bool = False


Family: TypeAlias = Callable[[str], Iterator[Case]]


def gated_cases(arch: str) -> Iterator[Case]:
    """Every tile both ways in, with the heaviest epilogue: swish and biases, everything kept; fp32 as TF32, for only
    with that opted in to are its products ours."""
    m, d, h, o = 4096, 1024, 2048, 1024
    for dtype in (torch.bfloat16, torch.float16, torch.float32):

        def t(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        def forward(tile: Choice, aligned: bool, t: Callable[..., torch.Tensor] = t) -> object:
            k = d + (not aligned)
            with tuning.using(gated_forward_kernel=tile), _tf32():
                return gated.gate_forward(t(m, k), t(h, k), t(h, k), t(h), t(h), Gate("swish", t()), True)

        def of_few_rows(tile: SplitTile, t: Callable[..., torch.Tensor] = t) -> object:
            with tuning.using(gated_forward_kernel=tile), _tf32():
                return gated.gate_forward(t(tile.block_m, d), t(h, d), t(h, d), t(h), t(h), Gate("swish", t()), True)

        def backward(tile: Choice, aligned: bool, t: Callable[..., torch.Tensor] = t) -> object:
            k = o + (not aligned)
            with tuning.using(gated_backward_kernel=tile), _tf32():
                return gated.gate_backward(t(m, k), t(k, h), t(m, 2 * h), Gate("swish", t()), True, True)

        name = str(dtype).removeprefix("torch.")
        for kernel, by, call in (("gated_forward_kernel", "x2x", forward), ("gated_backward_kernel", "x", backward)):
            for aligned in (True, False):
                way = "aligned" if aligned else "unaligned"
                for tile in config.tiles(kernel, arch, dtype, aligned):
                    if isinstance(tile, Tile):  # not the library
                        yield Case(f"{name} {_shape(tile, by)} {way}", partial(call, tile, aligned))
            for r in _rejected(kernel, arch, dtype):
                way = "aligned" if r.aligned else "unaligned"
                case = f"{name} {_shape(r.tile, by)} {way}, {r.tile.warps} warps: rejected"
                yield Case(case, partial(call, r.tile, r.aligned), rejected=True)
        for tile in config.tiles("gated_split_kernel", arch, dtype) if dtype != torch.float16 else ():
            if isinstance(tile, SplitTile):
                yield Case(f"{name} {_shape(tile, 'x2x')} aligned", partial(of_few_rows, tile))
        for r in _rejected("gated_split_kernel", arch, dtype):
            if isinstance(r.tile, SplitTile):
                case = f"{name} {_shape(r.tile, 'x2x')} aligned, {r.tile.warps} warps: rejected"
                x, w = t(r.tile.block_m, d), t(h, d)
                yield Case(case, partial(few_rows.partial_sums, x, w, w, r.tile, ("rejected", x.device)), rejected=True)
        alone = partial(gated.gate_backward, t(m, h), None, t(m, 2 * h), Gate("swish", t()), True, True)
        yield Case(f"{name} alone", partial(gated.gate, t(m, h), t(m, h), Gate("swish", t())))
        yield Case(f"{name} alone", alone)
        for activation in sorted({*ACTIVATIONS} - {"swish"}) if dtype == torch.bfloat16 else ():
            case = f"{name} alone, {activation}"
            yield Case(case, partial(gated.gate, t(m, h), t(m, h), Gate(activation)))
            yield Case(case, partial(gated.gate_backward, t(m, h), None, t(m, 2 * h), Gate(activation), True, False))


def _shape(tile: Tile | PairTile, by: str = "x") -> str:
    """The blocks of a tile; `by` stands between those of the output."""
    if isinstance(tile, PairTile):
        return f"{tile.block_i}x{tile.block_j}x{tile.block_k}x{tile.block_h}"
    return f"{tile.block_m}{by}{tile.block_n}x{tile.block_k}"


def _rejected(kernel: str, arch: str, dtype: torch.dtype) -> Iterator[Rejected]:
    return (r for r in config.KERNELS[kernel].rejected if r.arch == arch and r.dtype == dtype)


def _tf32() -> AbstractContextManager[object]:
    return mock.patch.object(config, "tf32_allowed", lambda: True)


def interaction_cases(arch: str) -> Iterator[Case]:
    """Both orders of contraction, with the heavier epilogue: both triangles."""
    d, h = 1024, 2048
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        w = torch.empty(h, d, dtype=dtype, device="meta")
        kernels = (
            ("interaction_direction_kernel", 8),
            ("interaction_pairs_kernel", 128),
            ("interaction_pairs_kernel", 512),
        )
        for kernel, directions in kernels:
            c = torch.empty(directions, h, dtype=dtype, device="meta")
            name = f"{str(dtype).removeprefix('torch.')} K={directions}"
            for packed in (False, True) if dtype == torch.bfloat16 else (False,):
                layout = "packed" if packed else "full"
                call = partial(matrices.interaction_matrices, w, w, c, None, packed)
                yield Case(f"{name} {layout}", call, ragged=packed)
            for r in _rejected(kernel, arch, dtype) if directions != 128 else ():

                def with_tile(tile: Choice, w: torch.Tensor = w, c: torch.Tensor = c) -> object:
                    with tuning.using(interaction_matrices=tile):
                        return matrices.interaction_matrices(w, w, c, None, False)

                case = f"{name}, {_shape(r.tile)}, {r.tile.warps} warps: rejected"
                yield Case(case, partial(with_tile, r.tile), rejected=True)
        if dtype == torch.float32:
            yield Case("float32 K=512", partial(ranking.interaction_moments, w, w, c, None, None))
            for name, weight in (("", None), (" weights", torch.empty(512, d, d, device="meta"))):
                strongest = partial(ranking.interaction_topk, w, w, c, None, None, weight, 10, "cross", "output")
                yield Case(f"float32 K=512{name}", strongest)
        name, c = str(dtype).removeprefix("torch."), torch.empty(512, h, dtype=dtype, device="meta")
        dq = torch.empty(512, d, d, dtype=dtype, device="meta")
        backward = matrices_backward.interaction_matrices_backward
        yield Case(f"{name} K=512 full", partial(backward, dq, w, w, c, None, [True, True, True, False]))
        if dtype == torch.bfloat16:
            dq = torch.empty(512, d * (d + 1) // 2, dtype=dtype, device="meta")
            yield Case(f"{name} K=512 packed", partial(matrices_backward.folded, dq, d, dtype))


def rank1_cases(arch: str) -> Iterator[Case]:
    """Everything asked for at once: four samples, delta, routing and every gradient, whatever the kind of mask."""
    s, m, d, o, c, k, b = 4, 4096, 1024, 1024, 3072, 8, 256
    for dtype in (torch.float32, torch.bfloat16, torch.float16):

        def t(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        name, indices = str(dtype).removeprefix("torch."), t(m, k, dtype=torch.int64)
        yield Case(name, partial(losses.squared_difference, t(o, d), t(d, c), t(c, o)))
        yield Case(name, partial(sparse.sparse_dots, t(m, d), t(c, d), indices))
        yield Case(name, partial(sparse.sparse_sums, t(m, k), t(c, d), indices))
        whole = dtype == torch.bfloat16  # the others differ in loads and stores alone
        for sampling in ("given", "source", "continuous", "binomial") if whole else ("continuous",):
            for rows in (m, 1) if whole else (m,):
                wide = partial(t, dtype=torch.float32)
                source = wide(s, rows, c) if sampling == "source" else None
                seed = t(dtype=torch.int64) if sampling in ("continuous", "binomial") else None
                drawn = Masks(
                    wide(rows, c), source, wide(s, m), t(m, dtype=torch.bool), seed, None, None, 0, s, sampling
                )
                case = f"{name} {sampling} {'broadcast' if rows == 1 else 'full'}"
                need = [True, True, True, source is not None, True]
                yield Case(case, partial(masked.masked_apply, t(s, m, o), t(m, c), t(c, o), drawn, 1.0))
                yield Case(case, partial(masked.masked_apply_backward, t(s, m, o), t(m, c), t(c, o), drawn, need))
        yield Case(name, partial(accumulate.rank1_accumulate, t(b, c), t(d, c), t(c, o), t(1, o, d), library=False))
        backward = accumulate.rank1_accumulate_backward
        for part, need in (("gates and write", [True, False, True]), ("read", [False, True, False])):
            call = partial(backward, t(b, o, d), t(b, c), t(d, c), t(c, o), need, library=False)
            yield Case(f"{name} {part}", call)
        w = t(c, 16)
        yield Case(name, partial(gates.component_gates, t(m, c), w, w, w, t(c)))
        yield Case(name, partial(gates.component_gates_backward, t(m, c), t(m, c), w, w, w, [True] * 5))
    yield Case("alone", partial(masks.uniform, t(dtype=torch.int64), 0, s, m, c))


FAMILIES: tuple[Family, ...] = (gated_cases, interaction_cases, rank1_cases)
