"""Kernels of the masked rank-1 subcomponents: masks drawn between two library GEMMs, never stored.

The forward writes acts * (mask - delta) of every sample in one pass over acts and gates. The product with L is then one
library GEMM over all samples. The backward reads the gradient of that array and draws the masks again. It overwrites
the gradient with the array itself, which the product for L's gradient needs.

Masks are not drawn as that product loads its operand: each would be drawn again for every tile of d_out columns, at 20
to 51 instructions an element (today's code for an H100, without and with all that is around a draw), which is modelled
at 2.5 to 6.4 times the tensor cores' time for 128 columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bilinear_ops.composite.rank1.masks import mask_site
from bilinear_ops.kernels import config, tuning
from bilinear_ops.kernels import launching as via
from bilinear_ops.kernels.rank1.masks import draw_uniforms, sample_state
from bilinear_ops.kernels.records import RowTile
from bilinear_ops.kernels.tile import load_tile, store_tile
from bilinear_ops.results import Masks


@triton.jit
def load_gates(ptr, stride_m, stride_c, row, column, M, C, PERIOD, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Gates [ROWS, COLUMNS] in fp32; rows repeat with PERIOD unless it is None."""
    rows = row + tl.arange(0, ROWS).to(tl.int64)
    columns = column + tl.arange(0, COLUMNS).to(tl.int64)
    inside = (rows < M)[:, None] & (columns < C)[None, :]
    if PERIOD is not None:
        rows = rows % PERIOD
    g = tl.load(ptr + rows[:, None] * stride_m + columns[None, :] * stride_c, mask=inside, other=0.0)
    return g.to(tl.float32)


@triton.jit
def draw_tile(
    g, source_ptr, stride_ss, stride_sm, stride_sc, seed_ptr, site, rows_ptr, columns_ptr, sample, row, column, M, C,
    SAMPLING: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """(mask, d mask / d gate) of one sample. The launcher disables fused multiply-adds: they would change the mask."""
    if SAMPLING == "given":
        mask = g
        slope = tl.full((ROWS, COLUMNS), 1.0, tl.float32)
    elif SAMPLING == "source":
        p_source = source_ptr + sample * stride_ss
        r = load_tile(p_source, stride_sm, stride_sc, row, column, M, C, ROWS, COLUMNS, False).to(tl.float32)
        mask = g + (1.0 - g) * r
        slope = 1.0 - r
    else:
        state = sample_state(seed_ptr, site, sample)
        r = draw_uniforms(state, rows_ptr, columns_ptr, row, column, M, C, ROWS, COLUMNS)
        if SAMPLING == "binomial":
            mask = tl.where(r >= 0.5, 1.0, g)
            slope = tl.where(r >= 0.5, 0.0, 1.0)
        else:
            mask = g + (1.0 - g) * r
            slope = 1.0 - r
    return mask, slope


@triton.jit
def load_rows(ptr, stride, row, M, ROWS: tl.constexpr, other: tl.constexpr):
    """One value per token: a column [ROWS, 1]."""
    rows = row + tl.arange(0, ROWS).to(tl.int64)
    return tl.load(ptr + rows * stride, mask=rows < M, other=other)[:, None]


@triton.jit
def coefficient_tile(mask, delta_ptr, stride_ds, stride_dm, routing_ptr, stride_rm, sample, row, M, ROWS: tl.constexpr):
    """mask - delta, and 0 for tokens that are not routed through the subcomponents."""
    if delta_ptr is not None:
        p_delta = delta_ptr + sample * stride_ds
        mask = mask - load_rows(p_delta, stride_dm, row, M, ROWS, 0.0).to(tl.float32)
    return routed(mask, routing_ptr, stride_rm, row, M, ROWS)


@triton.jit
def routed(tile, routing_ptr, stride_rm, row, M, ROWS: tl.constexpr):
    if routing_ptr is not None:
        tile = tl.where(load_rows(routing_ptr, stride_rm, row, M, ROWS, 0) != 0, tile, 0.0)
    return tile


@triton.jit(do_not_specialize=["site"])
def mask_kernel(
    acts_ptr, stride_am, stride_ac,
    gates_ptr, stride_gm, stride_gc,
    source_ptr, stride_ss, stride_sm, stride_sc,
    delta_ptr, stride_ds, stride_dm,
    routing_ptr, stride_rm,
    seed_ptr, site, rows_ptr, columns_ptr,
    out_ptr,
    S, M, C, PERIOD,
    SAMPLING: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program writes acts * (mask - delta) of one tile [ROWS, COLUMNS] for every sample: out [S, M, C]."""
    tiles_c = tl.cdiv(C, COLUMNS)
    row = tl.program_id(0).to(tl.int64) // tiles_c * ROWS
    column = tl.program_id(0) % tiles_c * COLUMNS
    a = load_tile(acts_ptr, stride_am, stride_ac, row, column, M, C, ROWS, COLUMNS, False).to(tl.float32)
    g = load_gates(gates_ptr, stride_gm, stride_gc, row, column, M, C, PERIOD, ROWS, COLUMNS)
    for s in range(S):
        sample = tl.cast(s, tl.int64)  # a plain int in the interpreter
        mask, _ = draw_tile(
            g, source_ptr, stride_ss, stride_sm, stride_sc, seed_ptr, site, rows_ptr, columns_ptr,
            sample, row, column, M, C, SAMPLING, ROWS, COLUMNS,
        )  # fmt: skip
        coefficient = coefficient_tile(
            mask, delta_ptr, stride_ds, stride_dm, routing_ptr, stride_rm, sample, row, M, ROWS
        )  # fmt: skip
        p_out = out_ptr + sample * M * C
        store_tile(p_out, C, row, column, M, C, a * coefficient, False)


@triton.jit(do_not_specialize=["site"])
def mask_backward_kernel(
    dmasked_ptr,
    acts_ptr, stride_am, stride_ac,
    gates_ptr, stride_gm, stride_gc,
    source_ptr, stride_ss, stride_sm, stride_sc,
    delta_ptr, stride_ds, stride_dm,
    routing_ptr, stride_rm,
    seed_ptr, site, rows_ptr, columns_ptr,
    dacts_ptr, dgates_ptr, dsource_ptr, ddelta_ptr,
    S, M, C, PERIOD,
    SAMPLING: tl.constexpr, SUM_GATES: tl.constexpr, SUM_SOURCE: tl.constexpr, KEEP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program reads one tile of every sample of dmasked [S, M, C] and stores the tile's part of the gradients.

    dacts and dgates are [M, C], dsource [S, M, C], ddelta [tiles of C, S, M]. With SUM_GATES or SUM_SOURCE, dgates or
    dsource is summed over the tokens of a tile: one row per tile. With KEEP, dmasked becomes acts * (mask - delta).
    """
    tiles_c = tl.cdiv(C, COLUMNS)
    tile_m = tl.program_id(0).to(tl.int64) // tiles_c
    tile_c = tl.program_id(0) % tiles_c
    row = tile_m * ROWS
    column = tile_c * COLUMNS
    a = load_tile(acts_ptr, stride_am, stride_ac, row, column, M, C, ROWS, COLUMNS, False).to(tl.float32)
    g = load_gates(gates_ptr, stride_gm, stride_gc, row, column, M, C, PERIOD, ROWS, COLUMNS)
    dacts = tl.zeros((ROWS, COLUMNS), tl.float32)
    dgates = tl.zeros((ROWS, COLUMNS), tl.float32)
    for s in range(S):
        sample = tl.cast(s, tl.int64)  # a plain int in the interpreter
        mask, slope = draw_tile(
            g, source_ptr, stride_ss, stride_sm, stride_sc, seed_ptr, site, rows_ptr, columns_ptr,
            sample, row, column, M, C, SAMPLING, ROWS, COLUMNS,
        )  # fmt: skip
        coefficient = coefficient_tile(
            mask, delta_ptr, stride_ds, stride_dm, routing_ptr, stride_rm, sample, row, M, ROWS
        )  # fmt: skip
        p_dmasked = dmasked_ptr + sample * M * C
        d = load_tile(p_dmasked, C, 1, row, column, M, C, ROWS, COLUMNS, False).to(tl.float32)
        dmask = routed(d * a, routing_ptr, stride_rm, row, M, ROWS)
        dacts += d * coefficient
        dgates += dmask * slope
        if dsource_ptr is not None:
            dsource = dmask * (1.0 - g)
            if SUM_SOURCE:
                tiles_m = tl.cdiv(M, ROWS)
                store_sum(dsource_ptr + sample * tiles_m * C, dsource, tile_m, column, C)
            else:
                store_tile(dsource_ptr + sample * M * C, C, row, column, M, C, dsource, False)
        if ddelta_ptr is not None:
            rows = row + tl.arange(0, ROWS)
            p_ddelta = ddelta_ptr + (tile_c.to(tl.int64) * S + sample) * M
            tl.store(p_ddelta + rows, -tl.sum(dmask, 1), mask=rows < M)
        if KEEP:
            store_tile(p_dmasked, C, row, column, M, C, a * coefficient, False)
    if dacts_ptr is not None:
        store_tile(dacts_ptr, C, row, column, M, C, dacts, False)
    if dgates_ptr is not None:
        if SUM_GATES:
            store_sum(dgates_ptr, dgates, tile_m, column, C)
        else:
            store_tile(dgates_ptr, C, row, column, M, C, dgates, False)


@triton.jit
def store_sum(ptr, tile, tile_m, column, C):
    """Store the sum over a tile's tokens to row tile_m of a matrix with C columns."""
    columns = column + tl.arange(0, tile.shape[1])
    tl.store(ptr + tile_m * C + columns, tl.sum(tile, 0), mask=columns < C)


def masked_apply(y: Tensor, acts: Tensor, write: Tensor, masks: Masks, beta: float) -> None:
    """y [S, M, d_out] becomes beta y + (acts * (mask - delta)) L: acts [M, C], write [C, d_out]."""
    (m, c), s = acts.shape, masks.samples
    masked_acts = acts.new_empty(s, m, c)

    def run(tile: RowTile) -> None:
        mask_kernel[(triton.cdiv(m, tile.rows) * triton.cdiv(c, tile.columns),)](
            *_operands(acts, masks), masked_acts, s, m, c, _period(masks, m),
            SAMPLING=masks.sampling, ROWS=tile.rows, COLUMNS=tile.columns, **tile.launch(fp_fusion=False),
        )  # fmt: skip

    if masked_acts.numel():
        tiles = config.tiles("mask_kernel", config.architecture(acts.device), acts.dtype)
        via.launch("mask_kernel", acts, (s, tuning.bucket(m), c), tiles, run)
    y = y.view(s * m, -1) if y.numel() else y.view(s * m, write.shape[1])
    torch.addmm(y, masked_acts.view(s * m, c), write, beta=beta, out=y)


def masked_apply_backward(
    dy: Tensor, acts: Tensor, write: Tensor, masks: Masks, need: list[bool]
) -> tuple[Tensor | None, ...]:
    """From dy [S, M, d_out] the gradients of acts, write, gates, source and delta, each None unless needed."""
    need_acts, need_write, need_gates, need_source, need_delta = need
    (m, c), s, period = acts.shape, masks.samples, masks.gates.shape[0]
    dy = dy.reshape(s * m, write.shape[1])
    sum_gates = period == 1 < m
    sum_source = masks.source is not None and masks.source.shape[1] == 1 < m
    dacts = acts.new_empty(m, c) if need_acts else None

    def partial(needed: bool, *shape: int) -> Tensor | None:
        return acts.new_empty(shape, dtype=torch.float32) if needed else None

    def run(tile: RowTile) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        tiles_m, tiles_c = triton.cdiv(m, tile.rows), triton.cdiv(c, tile.columns)
        dmasked = dy @ write.t()  # [S M, C]; formed at each run: the kernel overwrites it
        dgates = partial(need_gates, tiles_m if sum_gates else m, c)
        dsource = partial(need_source, s, tiles_m if sum_source else m, c)
        ddelta = partial(need_delta, tiles_c, s, m)
        if dmasked.numel():
            mask_backward_kernel[(tiles_m * tiles_c,)](
                dmasked, *_operands(acts, masks), dacts, dgates, dsource, ddelta, s, m, c, _period(masks, m),
                SAMPLING=masks.sampling, SUM_GATES=sum_gates, SUM_SOURCE=sum_source, KEEP=need_write,
                ROWS=tile.rows, COLUMNS=tile.columns, **tile.launch(fp_fusion=False),
            )  # fmt: skip
        return dmasked, dgates, dsource, ddelta

    tiles = config.tiles("mask_backward_kernel", config.architecture(acts.device), acts.dtype)
    dmasked, dgates, dsource, ddelta = via.launch("mask_backward_kernel", acts, (s, tuning.bucket(m), c), tiles, run)
    return (
        dacts,
        dmasked.t() @ dy if need_write else None,
        None if dgates is None else _gates_gradient(dgates, masks.gates),
        None if dsource is None or masks.source is None else _source_gradient(dsource, masks.source),
        None if ddelta is None or masks.delta is None else _at_least_fp32(ddelta.sum(0), masks.delta),
    )


def _operands(acts: Tensor, masks: Masks) -> tuple[object, ...]:
    """The inputs of both kernels: each pointer with its strides."""
    m, c = acts.shape
    source = None if masks.source is None else masks.source.expand(masks.samples, m, c)
    routing = None if masks.routing is None else masks.routing.view(torch.uint8)
    gates = masks.gates.expand(m, c) if masks.gates.shape[0] == 1 else masks.gates
    return (
        acts, *acts.stride(),
        gates, *gates.stride(),
        source, *((0, 0, 0) if source is None else source.stride()),
        masks.delta, *((0, 0) if masks.delta is None else masks.delta.stride()),
        routing, 0 if routing is None else routing.stride(0),
        masks.seed, mask_site(masks.stream), masks.row_numbers, masks.column_numbers,
    )  # fmt: skip


def _period(masks: Masks, m: int) -> int | None:
    """The period of the gates' rows, or None if a stride expresses it: a 64-bit remainder is a function call."""
    period = masks.gates.shape[0]
    return None if period in (1, m) else period


def _gates_gradient(partial: Tensor, gates: Tensor) -> Tensor:
    """Sum the rows [tokens or tiles, C], in order, that belong to one row of the gates."""
    period, c = gates.shape
    repeats = partial.shape[0] // period if period else 0
    return _at_least_fp32(partial.view(repeats, period, c).sum(0), gates)


def _source_gradient(partial: Tensor, source: Tensor) -> Tensor:
    if source.shape[1] == 1:
        partial = partial.sum(1, keepdim=True)
    if source.shape[0] == 1:
        partial = partial.sum(0, keepdim=True)
    return _at_least_fp32(partial, source)


def _at_least_fp32(gradient: Tensor, t: Tensor) -> Tensor:
    """The gradient in fp32, or in fp64 for an fp64 `t`."""
    return gradient.to(torch.promote_types(t.dtype, torch.float32))
