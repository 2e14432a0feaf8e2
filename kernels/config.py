"""Which tile a kernel runs: frozen values picked from (architecture, dtype, shape) at call time.

The only file that names architectures. Every number says what it was compiled or measured to show: "compiled" means
read from the machine code (registers, spills, shared memory), "model" an estimate that no GPU has confirmed yet.
"""

from dataclasses import dataclass
from functools import cache

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


@dataclass(frozen=True)
class Tile:
    """A GEMM tile: `block_m` tokens by `block_n` columns, `block_k` of the contraction at a time."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group_m: int = 8
    blocks_per_sm: int = 1

    def launch(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}

    def shared_memory(self, rows: int, itemsize: int) -> int:
        """Bytes of the pipelined operands, of which every stage holds `rows` rows of block_k."""
        return self.stages * rows * self.block_k * itemsize


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

# The gate alone, around library GEMMs: one pass over memory.
GATE = Tile(64, 64, 1, 8, 1)
GATE_INTERPRETED = Tile(64, 64, 1, 4, 1)


def gated_forward(arch: str, dtype: torch.dtype, m: int, d: int, descriptors: bool) -> tuple[Tile, ...]:
    """Tiles of the fused forward, best first; none where library GEMMs and the gate kernel are the faster path."""
    return _fused(GATED_FORWARD, arch, dtype, m, d, descriptors, operands=2)


def gated_backward(arch: str, dtype: torch.dtype, m: int, o: int, descriptors: bool) -> tuple[Tile, ...]:
    """Tiles of the fused dhid GEMM and gate backward, best first; none where the library GEMM is faster."""
    return _fused(GATED_BACKWARD, arch, dtype, m, o, descriptors, operands=1)


def gate(arch: str) -> Tile:
    """The tile of the gate kernels, which run alone around library GEMMs."""
    return GATE_INTERPRETED if arch == "interpreter" else GATE


def _fused(
    table: dict[str, tuple[Tile, ...]], arch: str, dtype: torch.dtype, m: int, k: int, descriptors: bool, operands: int
) -> tuple[Tile, ...]:
    if arch == "interpreter":
        return table[arch]
    if dtype == torch.float32 and not tf32_allowed():
        return ()  # fp32-accurate products come from the library
    if m <= 64 or k >= 4096:
        return ()  # model: too few tiles to fill the device; the library's main loop is ahead and the gate is hidden
    tiles = table["pointers" if has_descriptors(arch) and not descriptors else arch]
    limit = SHARED_MEMORY[arch]
    return tuple(t for t in tiles if t.shared_memory(t.block_m + operands * t.block_n, dtype.itemsize) <= limit)


def tf32_allowed() -> bool:
    """PyTorch's own switch, readable whichever of its two spellings set it."""
    precision = torch.backends.cuda.matmul.fp32_precision
    return (torch.backends.fp32_precision if precision == "none" else precision) == "tf32"


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


@dataclass(frozen=True)
class PairTile:
    """A tile of Q[k, ij] = C S: `block_i` x `block_j` pairs by `block_k` directions, `block_h` neurons at a time."""

    block_i: int
    block_j: int
    block_k: int
    block_h: int
    warps: int
    stages: int

    def launch(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


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

# One direction at a time: block_k is not used.
INTERACTION_DIRECTION = {
    "sm_80": PairTile(64, 64, 1, 32, 4, 3),
    "sm_86": PairTile(64, 64, 1, 32, 4, 2),
    "sm_90": PairTile(128, 128, 1, 64, 8, 3),
    "sm_100": PairTile(64, 64, 1, 64, 4, 3),
    "sm_120": PairTile(64, 64, 1, 32, 4, 2),
    "gfx942": PairTile(64, 64, 1, 32, 4, 2),
    "interpreter": PairTile(32, 32, 1, 32, 4, 1),
}


def interaction(arch: str, dtype: torch.dtype, directions: int, h: int) -> tuple[str, PairTile | None]:
    """The order of contraction, "direction", "pairs" or "library" (the composite), with its tile."""
    if directions <= 16:
        # three products of fp32 operands leave no registers for a 128 x 128 tile: 32 spills (compiled, sm_90)
        wide = dtype == torch.float32 and arch == "sm_90"
        return "direction", INTERACTION_DIRECTION["sm_80" if wide else arch]
    if h >= 8192 and directions >= 512:
        return "library", None  # model: generating S takes longer than reading it back
    return "pairs", INTERACTION_PAIRS[arch]


@dataclass(frozen=True)
class MaskTile:
    """A tile of the rank-1 mask kernels: `rows` tokens by an even number of `columns`."""

    rows: int
    columns: int
    warps: int

    def launch(self) -> dict[str, int]:
        # no fused multiply-adds: they would change the masks' last bits
        return {"num_warps": self.warps, "num_stages": 1, "enable_fp_fusion": False}


# One pass over memory. 8 elements a thread: the backward needs 120 registers, with 16 up to 232 (compiled, sm_90).
RANK1_MASK = MaskTile(16, 64, 4)
RANK1_MASK_INTERPRETED = MaskTile(64, 64, 4)


def rank1_mask(arch: str) -> MaskTile:
    """The tile of the kernels that draw masks."""
    return RANK1_MASK_INTERPRETED if arch == "interpreter" else RANK1_MASK


# Dot products with gathered rows: `rows` active ones at a time, `columns` of their elements.
RANK1_SPARSE = MaskTile(8, 128, 4)
RANK1_SPARSE_INTERPRETED = MaskTile(4, 16, 4)


def rank1_sparse(arch: str) -> MaskTile:
    """The tile of the sparse kernels."""
    return RANK1_SPARSE_INTERPRETED if arch == "interpreter" else RANK1_SPARSE


# Products whose three-term form keeps two split operands in registers: 64 x 64 does not spill (compiled).
FAITHFULNESS = Tile(64, 64, 32, 4, 3)
FAITHFULNESS_INTERPRETED = Tile(32, 32, 32, 4, 1)


def faithfulness(arch: str) -> Tile:
    """The tile of the faithfulness reduction."""
    return FAITHFULNESS_INTERPRETED if arch == "interpreter" else FAITHFULNESS


def accurate_precision(arch: str) -> str:
    """fp32-accurate products whatever the TF32 switch says: on NVIDIA's tensor cores as three TF32 terms."""
    return "tf32x3" if arch.startswith("sm_") else "ieee"
