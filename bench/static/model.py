"""A performance model of the compiled kernels: a range of times for each kernel, tile, target and workload.

One tile takes its main loop, bounded by tensor cores, issue slots, shared memory or L2, and what lies outside: issue
slots, special functions, stores and waits. The two overlap only where the code shows it: several blocks on a
multiprocessor, or warps of their own for the epilogue. Tiles come in waves over all multiprocessors; memory's bandwidth
is the floor. Assumed: programs run in the grid's order and at one pace, an operand is read from memory once a wave, or
once at all if all operands fill at most half of L2, and everything else moves once.

Nothing here was timed. Constants and their sources: machine.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from bench.static import machine
from bench.static.machine import MACHINES, Machine
from bench.static.regions import Regions, Work
from bilinear_ops.kernels import config
from bilinear_ops.kernels.interaction import matrices_backward
from bilinear_ops.kernels.records import SplitTile

Sizes: TypeAlias = Mapping[str, int]


@dataclass(frozen=True)
class Product:
    """A tiled product as its launch lays it out.

    Attributes:
        tiles: that are computed; programs that return at once are none.
        length: of the contraction; `block`: what one pass of the main loop takes of it.
        rows: of the operands, loaded for one tile.
        loads, stores: bytes that one tile moves beside its operands.
        distinct: rows of the operands that the given number of tiles load, in the grid's order.
    """

    tiles: int
    length: int
    block: int
    rows: int
    loads: int
    stores: int
    distinct: Callable[[int], int]


def gated_forward_kernel(s: Sizes) -> Product:
    """hid, a and z of both products."""
    tiles_m, tiles_h, bm, bh = _grid(s)
    distinct = _grouped(tiles_m, tiles_h, s["GROUP_M"], bm, 2 * bh)
    return Product(tiles_m * tiles_h, s["D"], s["BLOCK_D"], bm + 2 * bh, 0, 3 * bm * bh * 2, distinct)


def gated_backward_kernel(s: Sizes) -> Product:
    """Reads a and z, and writes da, dz and hid."""
    tiles_m, tiles_h, bm, bh = _grid(s)
    distinct = _grouped(tiles_m, tiles_h, s["GROUP_M"], bm, bh)
    return Product(tiles_m * tiles_h, s["O"], s["BLOCK_O"], bm + bh, 2 * bm * bh * 2, 3 * bm * bh * 2, distinct)


def gated_split_kernel(s: Sizes) -> Product:
    """Parts of a and z in fp32, of as many rows as there are."""
    m, bh, bd = s["M"], s["BLOCK_H"], s["BLOCK_D"]
    tile = SplitTile(s["BLOCK_M"], bh, bd, 4, 3, blocks_per_sm=2)
    span = config.span(tile, m, s["H"], s["D"], MACHINES["sm_90"].processors)
    splits = _cdiv(s["D"], span)

    def distinct(tiles: int) -> int:
        return tiles * 2 * bh + min(tiles, splits) * m

    return Product(_cdiv(s["H"], bh) * splits, span, bd, m + 2 * bh, 0, 2 * m * bh * 4, distinct)


def interaction_pairs_kernel(s: Sizes) -> Product:
    """Directions run fastest, then columns of pairs; both triangles are written."""
    bi, bj, bk = s["BLOCK_I"], s["BLOCK_J"], s["BLOCK_K"]
    tiles_i, tiles_j, tiles_k = (_cdiv(s[n], b) for n, b in (("D", bi), ("D", bj), ("K", bk)))
    above = sum(j * bj + bj > i * bi for i in range(tiles_i) for j in range(tiles_j))

    def distinct(tiles: int) -> int:
        columns = _cdiv(tiles, tiles_k)
        return min(tiles, tiles_k) * bk + 2 * (min(columns, tiles_j) * bj + _cdiv(columns, tiles_j) * bi)

    rows = 2 * (bi + bj) + bk
    return Product(above * tiles_k, s["H"], s["BLOCK_H"], rows, 0, 2 * bi * bj * bk * 2, distinct)


def interaction_direction_kernel(s: Sizes) -> Product:
    """One direction's tiles after the other's; the contraction runs over w and v."""
    block, tiles = s["BLOCK"], _cdiv(s["D"], s["BLOCK"])
    above = tiles * (tiles + 1) // 2

    def distinct(together: int) -> int:
        in_one = min(together, above)
        return (min(in_one, tiles) + min(tiles, _cdiv(in_one, tiles))) * block

    return Product(above * s["GRID_1"], s["H"], s["BLOCK_H"], 2 * block, 0, 2 * block * block * 2, distinct)


def interaction_coefficients_kernel(s: Sizes) -> Product:
    """A tile is one strip of pairs; what a program stores at the end of its strips is left out."""
    strip, strips, length = _strips(s)
    bh, bk = s["BLOCK_H"], s["BLOCK_K"]
    tiles_h, tiles_k = _cdiv(s["H"], bh), _cdiv(s["K"], bk)

    def distinct(tiles: int) -> int:
        return min(tiles, tiles_k) * bk * _cdiv(tiles, tiles_h * tiles_k)

    rows = bk + 2 * bh // strip
    return Product(tiles_h * tiles_k * strips, length, s["BLOCK_P"], rows, 2 * bh * strip * 2, 0, distinct)


def interaction_weights_kernel(s: Sizes) -> Product:
    """A tile is one block of a strip's pairs, after which sums over them are added to fp32 in memory."""
    strip, strips, length = _strips(s)
    bh, bp = s["BLOCK_H"], s["BLOCK_P"]
    tiles_h, columns = _cdiv(s["H"], bh), bp // strip

    def distinct(tiles: int) -> int:
        return min(tiles, tiles_h) * bh + _cdiv(tiles, tiles_h) * bp

    tiles = tiles_h * strips * _cdiv(length, bp)
    return Product(tiles, s["K"], s["BLOCK_K"], bh + bp, 2 * bh * columns * (2 + 4), 2 * bh * columns * 4, distinct)


def _strips(s: Sizes) -> tuple[int, int, int]:
    """Columns of a strip, strips, and the mean pairs of one."""
    strip = matrices_backward.STRIP.value
    strips = _cdiv(s["D"], strip) if "D" in s else s["strips"]
    return strip, strips, strip * strip * (strips + 1) // 2


PRODUCTS: Mapping[str, Callable[[Sizes], Product]] = {
    f.__name__: f
    for f in (
        gated_forward_kernel,
        gated_backward_kernel,
        gated_split_kernel,
        interaction_pairs_kernel,
        interaction_direction_kernel,
        interaction_coefficients_kernel,
        interaction_weights_kernel,
    )
}
GATED = tuple({"M": 16_384, "D": d, "O": d, "H": h} for d, h in ((512, 2048), (768, 3072), (1024, 4096), (2048, 5632)))
PAIRS = tuple(
    {"K": k, "D": d, "H": h} for k, d, h in ((64, 2048, 8192), (512, 784, 2048), (512, 1024, 4096), (1024, 256, 1024))
)
FEW_ROWS = tuple({"D": d, "H": h} for d, h in ((512, 2048), (768, 3072), (1024, 4096), (2048, 2048)))
WORKLOADS: Mapping[str, tuple[Sizes, ...]] = {
    "gated_split_kernel": FEW_ROWS,
    "gated_forward_kernel": GATED,
    "gated_backward_kernel": GATED,
    "interaction_pairs_kernel": PAIRS,
    "interaction_coefficients_kernel": PAIRS,
    "interaction_weights_kernel": PAIRS,
    "interaction_direction_kernel": ({"GRID_1": 10, "D": 784, "H": 2 * 512},),
}


@dataclass(frozen=True)
class Estimate:
    """Of one kernel at one workload: (low, high) ranges.

    Attributes:
        share: of a tile's time in which the tensor cores work, from all other constants worse and better by
            machine.SPREAD; (0, 0) of a kernel without them.
        seconds: of the launch, from all constants better and worse.
        outside: clocks per tile that the main loop does not overlap.
        waves: of `together` blocks on each multiprocessor.
        limit: the largest term beside the tensor cores' own.
    """

    share: tuple[float, float]
    seconds: tuple[float, float]
    outside: tuple[float, float]
    waves: int
    together: int
    limit: str


def estimate(
    kernel: str, regions: Regions, target: str, resident: int, sizes: Sizes, programs: int, blocks_per_sm: int | None
) -> Estimate | None:
    """The model of one launch; None where it does not know the target or the kernel's grid.

    programs: of a kernel without a main loop. blocks_per_sm: of a persistent kernel, None of any other.
    """
    if target not in MACHINES or not resident:
        return None
    if kernel in PRODUCTS:
        product = PRODUCTS[kernel](sizes)
    elif not regions.loop.instructions:  # a pass over memory
        product = Product(programs, 0, 1, 0, regions.outside.bytes, 0, lambda tiles: 0)
    else:
        return None
    gpu = MACHINES[target]
    together = max(1, min(resident, blocks_per_sm or resident, _cdiv(product.tiles, gpu.processors)))
    waves = _cdiv(product.tiles, gpu.processors * together)
    better, middle, worse = (
        _tile(regions, product, gpu, together, factor) for factor in (1 - machine.SPREAD, 1.0, 1 + machine.SPREAD)
    )
    seconds, limit = waves * together * middle.clocks / gpu.clock, middle.limit
    memory = _bytes(product, gpu, together, waves) / gpu.hbm
    if memory > seconds:
        seconds, limit = memory, "memory"
    return Estimate(
        (middle.tensor / worse.clocks, middle.tensor / better.clocks),
        ((1 - machine.SPREAD) * seconds, (1 + machine.SPREAD) * seconds),
        (better.outside, worse.outside),
        waves,
        together,
        limit,
    )


@dataclass(frozen=True)
class _Tile:
    """Clocks of a multiprocessor for one tile."""

    tensor: float
    clocks: float
    outside: float
    limit: str


def _tile(regions: Regions, product: Product, gpu: Machine, together: int, factor: float) -> _Tile:
    """With every constant but the tensor cores' rate worse by `factor`."""
    trips = _cdiv(product.length, product.block)
    tensor = regions.loop.tensor * trips
    l2 = factor * gpu.processors / gpu.l2  # clocks a byte
    loop = {name: factor * clocks * trips for name, clocks in _clocks(regions.loop).items()}
    loop["L2"] = l2 * product.rows * product.length * 2
    rest = {name: factor * clocks for name, clocks in _clocks(regions.outside).items()}
    rest["L2"] = l2 * (product.loads + product.stores)
    waits = factor * (
        (regions.outside.load_waits + regions.fills) * machine.LOAD
        + regions.outside.store_waits * machine.STORE
        + regions.outside.barriers * machine.BARRIER
    )
    inside, outside = max(tensor, *loop.values()), max(rest.values()) + waits
    if regions.roles:
        terms = {**loop, "outside": outside}
        clocks = max(inside, outside)
    elif together > 1:
        terms = {name: loop[name] + rest[name] for name in rest} | {"waits": (inside + outside) / together}
        clocks = max(tensor, *terms.values())
    else:
        terms = loop | {f"{name} outside": term for name, term in rest.items()} | {"waits outside": waits}
        clocks = inside + outside
    return _Tile(tensor, clocks, clocks - inside, max(terms, key=lambda name: terms[name]))


def _clocks(work: Work) -> dict[str, float]:
    """Of one block on a multiprocessor of its own, by resource."""
    return {
        "issue": work.instructions / machine.SCHEDULERS,
        "special": work.special * 32 / machine.SPECIAL_LANES,
        "shared": work.shared,
        "lines": work.lines,
    }


def _bytes(product: Product, gpu: Machine, together: int, waves: int) -> float:
    """To and from memory."""
    all_rows, row = product.distinct(product.tiles), product.length * 2
    operands = all_rows * row
    if operands > gpu.l2_bytes / 2:
        operands = max(operands, waves * product.distinct(min(product.tiles, gpu.processors * together)) * row)
    return operands + product.tiles * (product.loads + product.stores)


def _grid(s: Sizes) -> tuple[int, int, int, int]:
    bm, bh = s["BLOCK_M"], s["BLOCK_H"]
    return _cdiv(s["M"], bm), _cdiv(s["H"], bh), bm, bh


def _grouped(tiles_m: int, tiles_n: int, group_m: int, bm: int, bn: int) -> Callable[[int], int]:
    """Rows in groups of `group_m` tiles, of which each runs over all columns."""
    group = min(group_m, tiles_m)

    def distinct(tiles: int) -> int:
        columns = _cdiv(tiles, group)
        return min(tiles_m, group * _cdiv(columns, tiles_n)) * bm + min(columns, tiles_n) * bn

    return distinct


def _cdiv(a: int, b: int) -> int:
    return math.ceil(a / b)


def row(e: Estimate) -> str:
    """The columns of the printed table."""
    share = f"{100 * e.share[0]:3.0f}-{100 * e.share[1]:.0f} %" if e.share[1] else "-"
    outside = f"{e.outside[0]:.0f}-{e.outside[1]:.0f}"
    micros = f"{1e6 * e.seconds[0]:.4g}-{1e6 * e.seconds[1]:.4g} us"
    return f"{share:>10} {outside:>13} {e.together:3} {e.waves:6} {micros:>18} {e.limit}"


COLUMNS = f"{'tensor':>10} {'outside':>13} {'res':>3} {'waves':>6} {'modelled time':>18} limit"


def named(sizes: Sizes) -> str:
    """A workload in words."""
    return " ".join(f"{name}={size}" for name, size in sizes.items())


def receipt(target: str, kernel: str, case: str, workload: str, e: Estimate) -> dict[str, object]:
    """A receipt of kind "modelled", without versions."""
    return {
        "kind": "modelled",
        "calibration": machine.CALIBRATION.partition(":")[0],
        "device": MACHINES[target].name,
        "op": f"{target} {kernel}",
        "case": f"{case}, {workload}",
        "share": [round(x, 3) for x in e.share],
        "outside": [round(x) for x in e.outside],
        "seconds": [float(f"{x:.3g}") for x in e.seconds],
        "waves": e.waves,
        "together": e.together,
        "limit": e.limit,
    }
