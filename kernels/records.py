"""What is recorded of a kernel: its tiles, and the reason for each."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch


class _Launched:
    """What a tile of any kind tells the compiler."""

    warps: int
    stages: int

    def launch(self, fp_fusion: bool = True) -> dict[str, int]:
        """Compiler options. `enable_fp_fusion` is always passed: Triton's default depends on its version."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": fp_fusion}


@dataclass(frozen=True)
class Tile(_Launched):
    """A GEMM tile: `block_m` rows by `block_n` columns of the output, `block_k` of the contraction at a time.

    Attributes:
        blocks_per_sm: programs of a persistent kernel on each multiprocessor; 0: a program for each tile, of which the
            device then runs as many at once as fit.
        registers: that a thread may use at most, for blocks_per_sm programs to fit; 0: as many as the compiler wants.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group_m: int = 8
    blocks_per_sm: int = 1
    registers: int = 0

    def launch(self, fp_fusion: bool = True) -> dict[str, int]:
        """Compiler options, of which a bound on registers is given only where there is one."""
        return super().launch(fp_fusion) | ({"maxnreg": self.registers} if self.registers else {})

    def shared_memory(self, rows: int, itemsize: int) -> int:
        """Bytes of the pipelined operands: `rows` rows of block_k elements in every stage."""
        return self.stages * rows * self.block_k * itemsize


@dataclass(frozen=True)
class SplitTile(Tile):
    """A tile of all rows, whose contraction is split into parts that several programs sum.

    Parts are as many as give each multiprocessor `blocks_per_sm` programs: see `config.span`.
    """


@dataclass(frozen=True)
class RingTile(Tile):
    """A tile whose operands one warp copies into a ring of `stages`, while other warps multiply.

    `warps`: of each group that multiplies.
    """

    def shared_memory(self, rows: int, itemsize: int) -> int:
        """Bytes of the ring, and of a tile of the output, which no stage can hold while the next tile is copied."""
        return super().shared_memory(rows, itemsize) + self.block_m * self.block_n * itemsize


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


# What a launcher runs. LIBRARY is no tile of ours: gated launchers then run a library GEMM and our epilogue, and
# others run the composite, which impl="triton" refuses.
Choice: TypeAlias = Tile | PairTile | RowTile | None
LIBRARY = None


@dataclass(frozen=True)
class Compiled:
    """A figure of the machine code: `figure` under `key` in the baseline of bench/static for the pinned versions."""

    key: str
    figure: str
    value: float


@dataclass(frozen=True)
class Modelled:
    """A modelled time, `low` to `high` seconds: `receipt` is "OP, CASE", a line of bench/results/modelled for the same
    versions."""

    receipt: str
    low: float
    high: float


@dataclass(frozen=True)
class Measured:
    """A time on a device: `receipt` is "FILE OP, CASE", a line of a file in bench/results."""

    receipt: str


# Of the tile, or of a larger tile that was rejected. Free text is for what no receipt shows yet.
Reason: TypeAlias = Compiled | Modelled | Measured | str
Row: TypeAlias = Mapping[Choice, Reason]  # in descending preference


@dataclass(frozen=True)
class Threshold:
    """A size at which the choice changes."""

    size: int
    reason: Reason


@dataclass(frozen=True)
class Rejected:
    """A tile that `python -m bench.static` compiles only to show why no row holds it."""

    arch: str
    dtype: torch.dtype
    tile: Tile | PairTile
    aligned: bool = True


@dataclass(frozen=True)
class Kernel:
    """The tiles of one kernel. LIBRARY in a row leaves the case to the library.

    Attributes:
        tiles: a row per architecture; the row "any" serves all others.
        interpreted: the tile in Triton's interpreter, where time is the number of programs.
        fp32: replaces `tiles` for fp32 operands, by architecture.
        pointers: replaces both on architectures with descriptors, for layouts that descriptors cannot take.
        accurate: whether fp32 operands are ours when TF32 is off; else they are left to the library.
        roles: whether its loop over tiles can have warps of their own for loads, products and the epilogue.
        operands: the [block_n, block_k] operands of a pipeline stage, beside one [block_m, block_k]; None if every
            tile is known to fit.
        candidates: what tuning and `python -m bench --gpu` measure beside the row. Spills do not exclude a candidate:
            it would lose.
        unproven: candidates by architecture that no device has run yet, for operands of two bytes that descriptors can
            take: tuning compares their results first, and no row may hold one.
        rejected: the evidence of reasons.
    """

    tiles: Mapping[str, Row]
    interpreted: Choice
    pointers: Row = field(default_factory=dict)
    fp32: Mapping[str, Row] = field(default_factory=dict)
    accurate: bool = True
    roles: bool = False
    operands: int | None = None
    candidates: tuple[Choice, ...] = ()
    unproven: Mapping[str, tuple[Tile, ...]] = field(default_factory=dict)
    rejected: tuple[Rejected, ...] = ()


# What the tuner tries.
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
