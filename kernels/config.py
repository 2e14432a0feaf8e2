"""Which tile a kernel runs: frozen values picked from (architecture, dtype, shape) at call time.

The only file that names architectures. Every number says what it was compiled or measured to show: "compiled" means
read from the machine code (registers, spills, shared memory), "model" an estimate that no GPU has confirmed yet.
"""

from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import torch

from bilinear_ops.kernels.tile import INTERPRET

# Bytes of shared memory one block may ask for.
SHARED_MEMORY = {
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx942": 65_536,
    "interpreter": 1 << 30,
}


class _Launched:
    """What a tile of any shape tells the compiler."""

    warps: int
    stages: int

    def launch(self, fp_fusion: bool = True) -> dict[str, int]:
        """Whether multiply-adds are fused is said always: Triton's default depends on its version."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": fp_fusion}


@dataclass(frozen=True)
class Tile(_Launched):
    """A GEMM tile: `block_m` tokens by `block_n` columns, `block_k` of the contraction at a time."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group_m: int = 8
    blocks_per_sm: int = 1

    def shared_memory(self, rows: int, itemsize: int) -> int:
        """Bytes of the pipelined operands, of which every stage holds `rows` rows of block_k."""
        return self.stages * rows * self.block_k * itemsize


@dataclass(frozen=True)
class PairTile(_Launched):
    """A tile of Q[k, ij] = C S: `block_i` x `block_j` pairs by `block_k` directions, `block_h` neurons at a time."""

    block_i: int
    block_j: int
    block_k: int
    block_h: int
    warps: int
    stages: int


@dataclass(frozen=True)
class RowTile(_Launched):
    """A tile of a pass over memory: `rows` by an even number of `columns`."""

    rows: int
    columns: int
    warps: int
    stages: int = 1


# What a launcher can be told to run: None is the library's GEMMs, with the same epilogue around them.
Choice: TypeAlias = Tile | PairTile | RowTile | None
LIBRARY = None


# Tables: tiles in falling preference, the first that fits the device runs. "sm_90" and "sm_100" hold the tiles of the
# descriptor path; "pointers" those for what descriptors cannot take there. Fewer elements a thread than elsewhere: with
# unaligned rows every element has an address of its own, and 128 x 64 tiles spill 290 instructions (compiled, sm_90).

# Forward: two accumulators of block_m x block_n.
GATED_FORWARD = {
    "sm_80": (Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 4, 3)),  # with 4 warps, 128 x 64 spills (compiled)
    "sm_86": (Tile(128, 64, 32, 8, 2), Tile(64, 64, 32, 4, 2)),
    "sm_90": (Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 4, 3, blocks_per_sm=2)),
    "sm_100": (Tile(128, 64, 64, 8, 3),),
    "sm_120": (Tile(128, 64, 32, 8, 2), Tile(64, 64, 32, 4, 2)),
    "gfx942": (Tile(128, 64, 32, 4, 2),),
    "pointers": (Tile(64, 64, 32, 4, 3),),
    "interpreter": (Tile(64, 64, 64, 4, 1),),
}

# Backward: one accumulator, written out in four column subtiles (a whole-tile epilogue spills).
GATED_BACKWARD = {
    "sm_80": (Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 4, 3)),
    "sm_86": (Tile(64, 64, 32, 4, 3),),
    "sm_90": (Tile(128, 128, 64, 8, 3),),
    "sm_100": (Tile(128, 128, 64, 8, 3),),
    "sm_120": (Tile(64, 64, 32, 4, 3),),
    "gfx942": (Tile(128, 64, 32, 4, 2),),
    "pointers": (Tile(64, 64, 32, 4, 3),),
    "interpreter": (Tile(64, 64, 64, 4, 1),),
}

# Khatri-Rao contraction: S is generated in registers, spill-free at these sizes (compiled).
INTERACTION_PAIRS = {
    "sm_80": PairTile(8, 16, 64, 32, 8, 3),
    "sm_86": PairTile(8, 16, 64, 32, 8, 2),
    "sm_90": PairTile(8, 16, 128, 64, 8, 3),
    "sm_100": PairTile(8, 16, 128, 64, 8, 3),  # with 64 directions, 2 spills (compiled)
    "sm_120": PairTile(8, 16, 64, 32, 8, 2),
    "gfx942": PairTile(8, 16, 64, 32, 4, 2),
    "interpreter": PairTile(16, 16, 32, 32, 4, 1),
}

# One direction at a time: a square tile of its matrix.
INTERACTION_DIRECTION = {
    "sm_80": Tile(64, 64, 32, 4, 3),
    "sm_86": Tile(64, 64, 32, 4, 2),
    "sm_90": Tile(128, 128, 64, 8, 3),
    "sm_100": Tile(64, 64, 64, 4, 3),
    "sm_120": Tile(64, 64, 32, 4, 2),
    "gfx942": Tile(64, 64, 32, 4, 2),
    "interpreter": Tile(32, 32, 32, 4, 1),
}

# Kernels with one tile for all devices, and one for the interpreter, which likes few programs.
EVERYWHERE: dict[str, tuple[Choice, Choice]] = {
    "gate": (RowTile(64, 64, 8), RowTile(64, 64, 4)),  # around library GEMMs
    "gate_backward_alone": (RowTile(64, 64, 8), RowTile(64, 64, 4)),
    # 8 elements a thread: the backward needs 120 registers, with 16 up to 232 (compiled, sm_90)
    "mask": (RowTile(16, 64, 4), RowTile(64, 64, 4)),
    "mask_backward": (RowTile(16, 64, 4), RowTile(64, 64, 4)),
    "uniform": (RowTile(16, 64, 4), RowTile(64, 64, 4)),
    # `rows` active ones at a time, `columns` of their elements
    "sparse_dots": (RowTile(8, 128, 4, 3), RowTile(4, 16, 4)),
    "sparse_sums": (RowTile(8, 128, 4, 3), RowTile(4, 16, 4)),
    # products whose three-term form keeps two split operands in registers: 64 x 64 does not spill (compiled)
    "squared_difference": (Tile(64, 64, 32, 4, 3), Tile(32, 32, 32, 4, 1)),
}

# What tuning and `python -m bench --gpu` measure beside the table's choice. Spills are no reason to leave one out: it
# would lose.
GEMM_TILES = (
    Tile(128, 128, 64, 8, 3),
    Tile(128, 128, 64, 8, 3, group_m=16),
    Tile(128, 128, 64, 8, 4),
    Tile(128, 128, 32, 8, 3),
    Tile(128, 64, 64, 4, 3, blocks_per_sm=2),
    Tile(128, 64, 64, 8, 4),
    Tile(128, 64, 32, 8, 3),
    Tile(64, 128, 64, 4, 3),
    Tile(64, 64, 32, 4, 3, blocks_per_sm=2),
)
ROW_TILES = tuple(RowTile(rows, columns, 4) for rows, columns in ((8, 128), (16, 64), (16, 128), (32, 64), (64, 64)))
GATHER_TILES = tuple(RowTile(rows, columns, 4, 3) for rows, columns in ((4, 128), (8, 64), (8, 256), (16, 128)))
CANDIDATES: dict[str, tuple[Choice, ...]] = {
    "gate_forward": (*GEMM_TILES, LIBRARY),
    "gate_backward": (*GEMM_TILES, Tile(256, 128, 64, 8, 3), Tile(128, 256, 64, 8, 3), LIBRARY),
    "interaction": (
        PairTile(8, 16, 128, 64, 8, 3),
        PairTile(8, 16, 128, 32, 8, 3),
        PairTile(8, 16, 64, 64, 8, 3),
        PairTile(8, 16, 64, 32, 4, 3),
        Tile(128, 128, 64, 8, 3),
        Tile(64, 64, 64, 4, 3),
        Tile(64, 64, 32, 4, 3),
        LIBRARY,
    ),
    "gate": ROW_TILES,
    "gate_backward_alone": ROW_TILES,
    "mask": ROW_TILES,
    "mask_backward": ROW_TILES,
    "uniform": ROW_TILES,
    "sparse_dots": GATHER_TILES,
    "sparse_sums": GATHER_TILES,
    "squared_difference": (
        Tile(128, 64, 32, 8, 3),
        Tile(64, 128, 32, 8, 3),
        Tile(64, 64, 64, 4, 2),
        Tile(64, 64, 32, 8, 3),
    ),
}
OPERANDS = {"gate_forward": 2, "gate_backward": 1, "squared_difference": 1}  # of block_n rows, beside one of block_m

# Left to the library (compiled): spills in unaligned rows, 28 at 128 x 64; 278,576 bytes of shared memory.
NOT_IN_TF32 = {("gate_forward", "sm_120"), ("gate_backward", "sm_100")}


def gated_forward(arch: str, dtype: torch.dtype, m: int, d: int, descriptors: bool) -> tuple[Choice, ...]:
    """Tiles of the fused forward, best first; the library where its GEMMs and the gate kernel are the faster path."""
    return _fused("gate_forward", GATED_FORWARD, arch, dtype, m, d, descriptors)


def gated_backward(arch: str, dtype: torch.dtype, m: int, o: int, descriptors: bool) -> tuple[Choice, ...]:
    """Tiles of the fused dhid GEMM and gate backward, best first; the library where its GEMM is faster."""
    return _fused("gate_backward", GATED_BACKWARD, arch, dtype, m, o, descriptors)


def _fused(
    kernel: str, table: dict[str, tuple[Tile, ...]], arch: str, dtype: torch.dtype, m: int, k: int, descriptors: bool
) -> tuple[Choice, ...]:
    if arch == "interpreter":
        return table[arch]
    if not tensor_cores(dtype):
        return (LIBRARY,)  # fp32-accurate products come from there
    if m <= 64 or k >= 4096:
        return (LIBRARY,)  # model: too few tiles to fill the device; its main loop is ahead and the gate is hidden
    tiles = table["pointers" if has_descriptors(arch) and not descriptors else arch]
    return tuple(t for t in tiles if fits(kernel, arch, dtype, t)) or (LIBRARY,)


def interaction(arch: str, dtype: torch.dtype, directions: int, h: int) -> tuple[Choice, ...]:
    """The order of contraction: a Tile for one direction at a time, a PairTile for all at once, or the composite."""
    if directions <= 16:
        # three products of fp32 operands leave no registers for a 128 x 128 tile: 32 spills (compiled, sm_90)
        wide = dtype == torch.float32 and arch == "sm_90"
        return (INTERACTION_DIRECTION["sm_80" if wide else arch],)
    if h >= 8192 and directions >= 512:
        return (LIBRARY,)  # model: generating S takes longer than reading it back
    return (INTERACTION_PAIRS[arch],)


def everywhere(kernel: str, arch: str) -> tuple[Choice, ...]:
    """The tile of a kernel that has one for all devices."""
    return (EVERYWHERE[kernel][arch == "interpreter"],)


def candidates(kernel: str, arch: str, dtype: torch.dtype, tiles: tuple[Choice, ...]) -> tuple[Choice, ...]:
    """What is worth measuring: the table's choice first, then all else that fits the device."""
    if kernel in ("gate_forward", "gate_backward") and not tensor_cores(dtype):
        return tiles
    others = (t for t in CANDIDATES[kernel] if fits(kernel, arch, dtype, t))
    return tuple(dict.fromkeys((*tiles, *others)))


def fits(kernel: str, arch: str, dtype: torch.dtype, tile: Choice) -> bool:
    """Whether the pipelined operands fit in shared memory; what they are is known of some kernels only."""
    if not isinstance(tile, Tile) or kernel not in OPERANDS:
        return True
    if dtype == torch.float32 and (kernel, arch) in NOT_IN_TF32:
        return False
    rows = tile.block_m + OPERANDS[kernel] * tile.block_n
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
        return "sm_80" if properties.minor == 0 else "sm_86"
    return {9: "sm_90", 10: "sm_100"}.get(properties.major, "sm_120")


def has_descriptors(arch: str) -> bool:
    """Whether tiles travel through hardware tensor descriptors there."""
    return arch in ("sm_90", "sm_100", "interpreter")


@cache
def processors(device: torch.device) -> int:
    """Programs a persistent kernel runs at once, one per multiprocessor."""
    return 3 if INTERPRET else torch.cuda.get_device_properties(device).multi_processor_count
