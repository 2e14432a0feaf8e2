"""Which tile a kernel runs: one record per kernel, read at call time by architecture, dtype and shape.

This file and those of the records alone name architectures. Every tile and every threshold carries its reason;
tests/test_config.py looks the cited figures up.
"""

import os
from dataclasses import replace
from functools import cache

import torch
import triton
from torch import Tensor

from bilinear_ops.kernels import gated_tiles, interaction_tiles, rank1_tiles
from bilinear_ops.kernels.records import (
    LIBRARY,
    Choice,
    Compiled,
    PairTile,
    SplitTile,
    Threshold,
    Tile,
)
from bilinear_ops.kernels.tile import INTERPRET

# Bytes of shared memory one block may ask for.
SHARED_MEMORY = {
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx942": 65_536,
    "interpreter": 1 << 30,
}

# Same shared memory and matrix instruction, so that one row serves all.
TWINS = {"sm_86": "sm_120", "sm_89": "sm_120"}

GLUON = ("3.6", "3.9")  # the versions of Triton with which the Gluon kernel was compiled

# Records by the name of the jit function.
KERNELS = {**gated_tiles.KERNELS, **interaction_tiles.KERNELS, **rank1_tiles.KERNELS}

# A choice among several kernels is known by the name of their launcher.
LAUNCHERS = {"interaction_matrices": ("interaction_pairs_kernel", "interaction_direction_kernel")}

IDLE = Threshold(2, "with fewer tiles than one for every two multiprocessors a library GEMM splits its contraction")
PARTIAL_SUMS = Threshold(8, "of a shorter part for each row, sums in fp32 would move over half of the weights' bytes")
LONG_CONTRACTION = Threshold(4096, "the library's main loop is faster, and the gate is a small part; no receipt yet")

# Both ways take 2 rows C d_out d_in FLOPs. The library writes a workspace of C d_out min(rows, d_in) elements first. At
# 295 FLOPs a byte (H100, bf16) that costs more than products at 0.8 of the library's speed up to a size of 1,180.
WIDE_WEIGHTS = Threshold(1024, "a model of the workspace's bytes against the products' FLOPs; no receipt yet")

# Modelled, not measured. The second kernel ranks a tile of 128 pairs of one direction in a warp: 374 instructions for
# 32 neurons, or 94 clocks of a multiprocessor's four schedulers. The first kernel takes 12 clocks for the same pairs:
# three TF32 terms at 2048 FLOPs a clock. If 1 tile of 16 is ranked again, that adds half of the first kernel's time.
FEW_TILES = Threshold(16, Compiled("sm_90 interaction_candidates_kernel [float32 K=512]", "loop", 374))


def tiles(kernel: str, arch: str, dtype: torch.dtype, descriptors: bool = True) -> tuple[Choice, ...]:
    """The tiles of a kernel that fit the device, best first; LIBRARY if none fits."""
    record = KERNELS[kernel]
    if arch == "interpreter":
        return (record.interpreted,)
    arch = TWINS.get(arch, arch)
    row = record.tiles.get(arch) or record.tiles["any"]
    if dtype == torch.float32:
        row = record.fp32.get(arch, row)
    if record.pointers and has_descriptors(arch) and not descriptors:
        row = record.pointers
    if record.roles and descriptors and warp_specialized(arch):  # one block hides its own epilogue
        row = {t and replace(t, blocks_per_sm=1, registers=0): reason for t, reason in row.items()}
    return tuple(t for t in row if fits(kernel, arch, dtype, t)) or (LIBRARY,)


def gated(
    kernel: str, arch: str, dtype: torch.dtype, m: int, n: int, k: int, descriptors: bool, multiprocessors: int
) -> tuple[Choice, ...]:
    """Tiles of a fused gated kernel, best first; LIBRARY where a library GEMM and our epilogue are faster.

    The kernel has an output [m, n] and a contraction of length `k`.
    """
    if arch == "interpreter":
        return tiles(kernel, arch, dtype)
    if not tensor_cores(dtype) or k >= LONG_CONTRACTION.size:
        return (LIBRARY,)
    row = tiles(kernel, arch, dtype, descriptors)
    busy = tuple(t for t in row if not isinstance(t, Tile) or IDLE.size * _count(t, m, n) >= multiprocessors)
    if busy or kernel != "gated_forward_kernel":
        return busy or (LIBRARY,)
    rows = [t for t in tiles("gated_split_kernel", arch, dtype) if isinstance(t, SplitTile) and m <= t.block_m]
    return (*rows[:1], LIBRARY)


def span(tile: SplitTile, m: int, n: int, k: int, multiprocessors: int) -> int:
    """How much of a contraction of length `k` each program of a split product takes: a multiple of the tile's."""
    parts = min(multiprocessors * tile.blocks_per_sm // _count(tile, m, n), k // (PARTIAL_SUMS.size * m))
    return _cdiv(_cdiv(k, tile.block_k), max(parts, 1)) * tile.block_k


def _count(tile: Tile, m: int, n: int) -> int:
    return _cdiv(m, tile.block_m) * _cdiv(n, tile.block_n)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def interaction_matrices(arch: str, dtype: torch.dtype, directions: int) -> tuple[Choice, ...]:
    """The order of contraction with the fewest products: a Tile for each direction alone, a PairTile for all at once.

    A pair of features takes one product for each of the directions that a PairTile computes, whether they exist or
    not, and two for a direction of its own. Of tiles that take as many, the larger is the better.
    """
    pairs = [t for t in tiles("interaction_pairs_kernel", arch, dtype) if isinstance(t, PairTile)]
    computed = {t: _cdiv(directions, t.block_k) * t.block_k for t in pairs}
    best = min(pairs, key=lambda t: (computed[t], -t.block_k))
    return tiles("interaction_direction_kernel", arch, dtype) if 2 * directions < computed[best] else (best,)


def streams(arch: str, dtype: torch.dtype, directions: int, h: int, d: int, features: int) -> bool:
    """Whether entries are used tile by tile of pairs: where the matrices too are formed by pairs, and few features.

    A pair of features takes h products for each direction, while the matrix of the inputs takes h for a pair of these
    and D^T Q_k D another 2 d^2 F + d F^2 for a basis D [d, F].
    """
    by_pairs = isinstance(interaction_matrices(arch, dtype, directions)[0], PairTile)
    return by_pairs and (features == d or h * features**2 <= h * d**2 + 2 * d**2 * features + d * features**2)


def few_tiles(arch: str, n: int, features: int, directions: int) -> bool:
    """Whether the tiles that hold the n strongest pairs of `directions` matrices are few of all."""
    tile = next(t for t in tiles("interaction_topk_kernel", arch, torch.float32) if isinstance(t, PairTile))
    return FEW_TILES.size * n * tile.block_i * tile.block_j <= directions * (features * (features + 1) // 2)


def interaction_pairs(arch: str, dtype: torch.dtype, directions: int) -> bool:
    """Whether the gradients of the matrices take fewer products by pairs than for one direction after the other.

    A pair of features takes four products for each direction of its own; by pairs, one for each direction that a tile
    of either kernel computes, whether it exists or not.
    """
    coefficients, weights = (
        next(t for t in tiles(f"interaction_{name}_kernel", arch, dtype) if isinstance(t, Tile))
        for name in ("coefficients", "weights")
    )
    return sum(_cdiv(directions, b) * b for b in (coefficients.block_n, weights.block_k)) < 4 * directions


def accumulate(kernel: str, arch: str, dtype: torch.dtype, rows: int, d_in: int) -> tuple[Choice, ...]:
    """Tiles of a kernel of weights summed from subcomponents; LIBRARY where it is faster.

    The products are `rows` [d_out, C] by [C, d_in]. Where fp32 has three TF32 terms of ours beside the library's
    scalar products, the kernels stay.
    """
    slower = tensor_cores(dtype) or accurate_precision(arch) == "ieee"  # the kernels' products, beside the library's
    if arch != "interpreter" and slower and max(rows, d_in) > WIDE_WEIGHTS.size:
        return (LIBRARY,)
    return tiles(kernel, arch, dtype)


def candidates(choice: str, arch: str, dtype: torch.dtype, tiles: tuple[Choice, ...]) -> tuple[Choice, ...]:
    """What is worth measuring: the table's tiles first, then every other candidate that fits the device."""
    kernels = LAUNCHERS.get(choice, (choice,))
    if not (tensor_cores(dtype) or all(KERNELS[kernel].accurate for kernel in kernels)):
        return tiles
    others = (t for kernel in kernels for t in KERNELS[kernel].candidates if fits(kernel, arch, dtype, t))
    return tuple(dict.fromkeys((*tiles, *others)))


def unproven(kernel: str, arch: str, dtype: torch.dtype) -> tuple[Tile, ...]:
    """Candidates through descriptors that tuning must compare before it measures them; none where they do not compile.

    They are written in Gluon, which is experimental: its names differ between the versions that compiled them.
    """
    if dtype.itemsize != 2 or triton.__version__.rpartition(".")[0] not in GLUON:
        return ()
    return tuple(t for t in KERNELS[kernel].unproven.get(arch, ()) if fits(kernel, arch, dtype, t))


def fits(kernel: str, arch: str, dtype: torch.dtype, tile: Choice) -> bool:
    """Whether the pipelined operands fit in shared memory; true if the record does not say what they are."""
    operands = KERNELS[kernel].operands
    if not isinstance(tile, Tile) or operands is None:
        return True
    rows = tile.block_m + operands * tile.block_n
    return tile.shared_memory(rows, dtype.itemsize) <= SHARED_MEMORY[arch]


def tensor_cores(dtype: torch.dtype) -> bool:
    """Whether products of this dtype may go through tensor cores: fp32 only where TF32 was opted in to."""
    return dtype != torch.float32 or tf32_allowed()


def tf32_allowed() -> bool:
    """PyTorch's own switch, readable whichever of its two spellings set it."""
    precision = torch.backends.cuda.matmul.fp32_precision
    return (torch.backends.fp32_precision if precision == "none" else precision) == "tf32"


def accurate_precision(arch: str) -> str:
    """fp32-accurate products whatever the TF32 switch says: on NVIDIA's tensor cores as three TF32 terms."""
    return "tf32x3" if arch.startswith("sm_") else "ieee"


def architecture(device: torch.device) -> str:
    """The row of the tables that `device` uses."""
    return "interpreter" if INTERPRET else _architecture(device)


@cache
def _architecture(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return "gfx942"
    if properties.major == 8:
        return {0: "sm_80", 9: "sm_89"}.get(properties.minor, "sm_86")
    return {9: "sm_90", 10: "sm_100"}.get(properties.major, "sm_120")


def has_descriptors(arch: str) -> bool:
    """Whether tiles travel through hardware tensor descriptors there."""
    return arch in ("sm_90", "sm_100", "interpreter")


def warp_specialized(arch: str) -> bool:
    """Whether warps of their own load, multiply and store; BILINEAR_OPS_WARP_SPECIALIZE=0 turns that off.

    By the compiler's flag, which compiles these kernels for sm_100 alone, and from Triton 3.9 on: 3.6 crashes.
    """
    if arch != "sm_100":
        return False
    recent = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
    return recent and os.environ.get("BILINEAR_OPS_WARP_SPECIALIZE", "1") != "0"


def switches(t: Tensor) -> tuple[bool, bool]:
    """The user's switches on which a launch on `t` depends."""
    return t.dtype == torch.float32 and tf32_allowed(), warp_specialized(architecture(t.device))


@cache
def processors(device: torch.device) -> int:
    """Programs a persistent kernel runs at once, one per multiprocessor."""
    return 3 if INTERPRET else torch.cuda.get_device_properties(device).multi_processor_count
