"""Which tile a kernel runs: one record per kernel, read at call time by architecture, dtype and shape.

The only file that names architectures. Every tile and every threshold carries its reason; tests/test_config.py looks
the cited figures up.
"""

import os
from dataclasses import replace
from functools import cache

import torch
import triton
from torch import Tensor

from bilinear_ops.kernels.records import (
    LIBRARY,
    Choice,
    Compiled,
    Kernel,
    Modelled,
    PairTile,
    Rejected,
    RowTile,
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

# Same shared memory and matrix instruction, so that one row serves all.
TWINS = {"sm_86": "sm_120", "sm_89": "sm_120"}

# Records by the name of the jit function.
KERNELS = {
    # two accumulators of block_m x block_n
    "gated_forward_kernel": Kernel(
        tiles={
            "sm_80": {
                Tile(128, 64, 32, 8, 3, blocks_per_sm=0): Compiled(
                    "sm_80 gated_forward_kernel [bfloat16 128x2x64x32 unaligned, 4 warps: rejected]", "spills", 156
                ),
                Tile(64, 64, 32, 4, 3, blocks_per_sm=0): Compiled(
                    "sm_80 gated_forward_kernel [bfloat16 64x2x64x32 aligned]", "shared", 24576
                ),
            },
            "sm_90": {
                Tile(128, 128, 64, 8, 3): Modelled(
                    "sm_90 gated_forward_kernel, bfloat16 128x2x128x64 aligned, M=16384 D=1024 O=1024 H=4096",
                    0.000321,
                    0.000535,
                ),
                Tile(128, 64, 64, 4, 3, blocks_per_sm=2): Compiled(  # two blocks fit
                    "sm_90 gated_forward_kernel [bfloat16 128x2x64x64 aligned]", "shared", 114712
                ),
            },
            "sm_100": {
                Tile(128, 128, 64, 8, 3): Compiled(  # products of 64 columns are bound by shared memory
                    "sm_100 gated_forward_kernel [bfloat16 128x2x128x64 aligned]", "registers", 168
                )
            },
            "sm_120": {
                Tile(128, 64, 32, 8, 2, blocks_per_sm=0): Compiled(
                    "sm_120 gated_forward_kernel [bfloat16 128x2x128x32 aligned, 8 warps: rejected]", "spills", 50
                ),
                Tile(64, 64, 32, 4, 2, blocks_per_sm=0): Compiled(
                    "sm_120 gated_forward_kernel [bfloat16 64x2x64x32 aligned]", "shared", 12288
                ),
            },
            "gfx942": {
                Tile(128, 64, 32, 4, 2, blocks_per_sm=0): Compiled(
                    "gfx942 gated_forward_kernel [float32 128x2x64x32 unaligned]", "registers", 248
                )
            },
        },
        interpreted=Tile(64, 64, 64, 4, 1),
        pointers={LIBRARY: "below half of the tensor cores' rate in the model, for loads of two bytes; no receipt yet"},
        fp32={
            "sm_120": {
                LIBRARY: Compiled(
                    "sm_120 gated_forward_kernel [float32 128x2x64x32 unaligned, 8 warps: rejected]", "spills", 28
                )
            }
        },
        accurate=False,
        roles=True,
        operands=2,
        candidates=(*GEMM_TILES, LIBRARY),
        rejected=(
            Rejected("sm_80", torch.bfloat16, Tile(128, 64, 32, 4, 3), aligned=False),
            Rejected("sm_120", torch.bfloat16, Tile(128, 128, 32, 8, 2)),
            Rejected("sm_120", torch.float32, Tile(128, 64, 32, 8, 2), aligned=False),
        ),
    ),
    # all rows, at most 64, of a part of the contraction, which is then one of `gated_sum_kernel`'s terms: two launches,
    # where a library that splits has two products with a sum each, and the gate; both are bound by the weights' bytes
    "gated_split_kernel": Kernel(
        tiles={
            "sm_80": {
                SplitTile(16, 64, 64, 4, 3, blocks_per_sm=2): Compiled(
                    "sm_80 gated_split_kernel [bfloat16 16x2x64x64 aligned]", "resident", 4
                ),
                SplitTile(64, 64, 64, 4, 3, blocks_per_sm=2): Compiled(
                    "sm_80 gated_split_kernel [bfloat16 32x2x64x64 aligned, 4 warps: rejected]", "spills", 2
                ),
            },
            "gfx942": {
                SplitTile(rows, 64, 64, 4, 2, blocks_per_sm=2): Compiled(
                    f"gfx942 gated_split_kernel [bfloat16 {rows}x2x64x64 aligned]", "resident", resident
                )
                for rows, resident in ((16, 3), (32, 3), (64, 2))
            },
            "any": {
                SplitTile(rows, 64, 64, 4, 3, blocks_per_sm=2): Compiled(  # so many fit
                    f"sm_90 gated_split_kernel [bfloat16 {rows}x2x64x64 aligned]", "resident", resident
                )
                for rows, resident in ((16, 4), (32, 3), (64, 3))
            },
        },
        interpreted=SplitTile(16, 16, 16, 4, 1),
        operands=2,
        candidates=tuple(SplitTile(rows, 64, 64, 4, 3, blocks_per_sm=2) for rows in (16, 32, 64)),
        rejected=(Rejected("sm_80", torch.bfloat16, SplitTile(32, 64, 64, 4, 3, blocks_per_sm=2)),),
    ),
    # small, so that the loads of all parts are under way at once
    "gated_sum_kernel": Kernel(
        tiles={
            "any": {
                RowTile(4, 128, 4): Compiled("sm_90 gated_sum_kernel [bfloat16 16x2x64x64 aligned]", "registers", 80)
            }
        },
        interpreted=RowTile(8, 16, 4),
        candidates=ROW_TILES,
    ),
    # one accumulator, its epilogue in eight column subtiles
    "gated_backward_kernel": Kernel(
        tiles={
            "sm_80": {
                Tile(128, 128, 32, 8, 3, blocks_per_sm=0): Compiled(
                    "sm_80 gated_backward_kernel [bfloat16 128x128x32 aligned, 4 warps: rejected]", "spills", 111
                ),
                Tile(64, 64, 32, 4, 3, blocks_per_sm=0): Compiled(
                    "sm_80 gated_backward_kernel [bfloat16 64x64x32 aligned]", "shared", 16384
                ),
            },
            "sm_90": {
                Tile(128, 128, 64, 8, 3, blocks_per_sm=2, registers=128): Compiled(  # one hides the other's epilogue
                    "sm_90 gated_backward_kernel [bfloat16 128x128x64 aligned]", "resident", 2
                )
            },
            "sm_100": {
                Tile(128, 128, 64, 8, 3, blocks_per_sm=2, registers=128): Compiled(
                    "sm_100 gated_backward_kernel [bfloat16 128x128x64 aligned]", "registers", 168
                )
            },
            "sm_120": {
                Tile(64, 64, 32, 4, 3, blocks_per_sm=0): Compiled(
                    "sm_120 gated_backward_kernel [bfloat16 64x64x32 aligned]", "registers", 137
                )
            },
            "gfx942": {
                Tile(128, 64, 32, 4, 2, blocks_per_sm=0): Compiled(
                    "gfx942 gated_backward_kernel [float32 128x64x32 unaligned]", "registers", 256
                )
            },
        },
        interpreted=Tile(64, 64, 64, 4, 1),
        pointers={LIBRARY: "as the forward"},
        fp32={
            "sm_90": {
                Tile(128, 128, 32, 8, 3): Compiled(
                    "sm_90 gated_backward_kernel [float32 128x128x32 aligned]", "resident", 1
                )
            },
            "sm_100": {
                LIBRARY: Compiled(
                    "sm_100 gated_backward_kernel [float32 128x128x64 aligned, 8 warps: rejected]", "shared", 271036
                )
            },
        },
        accurate=False,
        roles=True,
        operands=1,
        candidates=(*GEMM_TILES, Tile(256, 128, 64, 8, 3), Tile(128, 256, 64, 8, 3), LIBRARY),
        rejected=(
            Rejected("sm_80", torch.bfloat16, Tile(128, 128, 32, 4, 3)),
            Rejected("sm_100", torch.float32, Tile(128, 128, 64, 8, 3)),
        ),
    ),
    "gate_kernel": Kernel(
        tiles={"any": {RowTile(64, 64, 8): Compiled("sm_90 gate_kernel [float32 alone]", "registers", 32)}},
        interpreted=RowTile(64, 64, 4),
        candidates=ROW_TILES,
    ),
    "gate_backward_kernel": Kernel(
        tiles={"any": {RowTile(64, 64, 8): Compiled("sm_100 gate_backward_kernel [float32 alone]", "registers", 128)}},
        interpreted=RowTile(64, 64, 4),
        candidates=ROW_TILES,
    ),
    # all directions at once
    "interaction_pairs_kernel": Kernel(
        tiles={
            "sm_80": {
                PairTile(8, 16, 64, 32, 8, 3): Compiled(
                    "sm_80 interaction_pairs_kernel [float32 K=512, 8x16x128x32, 8 warps: rejected]", "spills", 232
                )
            },
            "sm_90": {
                PairTile(8, 16, 256, 64, 8, 3): Modelled(
                    "sm_90 interaction_pairs_kernel, bfloat16 K=512 full, K=512 D=784 H=2048", 0.000714, 0.00119
                ),
                PairTile(8, 16, 128, 64, 8, 3): Modelled(
                    "sm_90 interaction_pairs_kernel, bfloat16 K=128 full, K=64 D=2048 H=8192", 0.00613, 0.0102
                ),
            },
            "sm_100": {
                PairTile(8, 16, 128, 64, 8, 3): Compiled(
                    "sm_100 interaction_pairs_kernel [float32 K=512 full]", "registers", 209
                )
            },
            "sm_120": {
                PairTile(8, 16, 64, 32, 8, 2): Compiled(
                    "sm_120 interaction_pairs_kernel [float32 K=512, 8x16x128x32, 8 warps: rejected]", "spills", 247
                )
            },
            "gfx942": {
                PairTile(8, 16, 64, 32, 4, 2): Compiled(
                    "gfx942 interaction_pairs_kernel [float32 K=512 full]", "registers", 178
                )
            },
        },
        interpreted=PairTile(16, 16, 32, 32, 4, 1),
        fp32={
            "sm_90": {
                PairTile(8, 16, 128, 64, 8, 3): Compiled(
                    "sm_90 interaction_pairs_kernel [float32 K=512, 8x16x256x64, 8 warps: rejected]", "spills", 413
                )
            }
        },
        candidates=(
            PairTile(8, 16, 256, 64, 8, 3),
            PairTile(8, 16, 128, 64, 8, 3),
            PairTile(8, 16, 128, 32, 8, 3),
            PairTile(8, 16, 64, 64, 8, 3),
            PairTile(8, 16, 64, 32, 4, 3),
        ),
        rejected=(
            Rejected("sm_80", torch.float32, PairTile(8, 16, 128, 32, 8, 3)),
            Rejected("sm_90", torch.float32, PairTile(8, 16, 256, 64, 8, 3)),
            Rejected("sm_120", torch.float32, PairTile(8, 16, 128, 32, 8, 2)),
        ),
    ),
    # one direction at a time: a square tile of its matrix
    "interaction_direction_kernel": Kernel(
        tiles={
            "sm_80": {
                Tile(64, 64, 32, 4, 3): Compiled(
                    "sm_80 interaction_direction_kernel [float32 K=8, 128x128x32, 8 warps: rejected]", "spills", 190
                )
            },
            "sm_90": {
                Tile(128, 128, 64, 8, 3): Modelled(
                    "sm_90 interaction_direction_kernel, bfloat16 K=8 full, GRID_1=10 D=784 H=1024", 2.49e-05, 4.15e-05
                )
            },
            "sm_100": {
                Tile(64, 64, 64, 4, 3): Compiled(
                    "sm_100 interaction_direction_kernel [float32 K=8 full]", "registers", 214
                )
            },
            "sm_120": {
                Tile(64, 64, 32, 4, 2): Compiled(
                    "sm_120 interaction_direction_kernel [float32 K=8, 128x128x32, 8 warps: rejected]", "spills", 276
                )
            },
            "gfx942": {
                Tile(64, 64, 32, 4, 2): Compiled(
                    "gfx942 interaction_direction_kernel [float32 K=8 full]", "registers", 98
                )
            },
        },
        interpreted=Tile(32, 32, 32, 4, 1),
        fp32={
            "sm_90": {
                Tile(64, 64, 32, 4, 3): Compiled(
                    "sm_90 interaction_direction_kernel [float32 K=8, 128x128x64, 8 warps: rejected]", "spills", 32
                )
            }
        },
        candidates=(Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 3), Tile(64, 64, 32, 4, 3), LIBRARY),
        rejected=(
            Rejected("sm_80", torch.float32, Tile(128, 128, 32, 8, 3)),
            Rejected("sm_90", torch.float32, Tile(128, 128, 64, 8, 3)),
            Rejected("sm_120", torch.float32, Tile(128, 128, 32, 8, 2)),
        ),
    ),
    # fp32 alone: half precision is widened
    "interaction_moments_kernel": Kernel(
        tiles={
            arch: {tile: Compiled(f"{arch} interaction_moments_kernel [float32 K=512]", "registers", registers)}
            for arch, tile, registers in (
                ("sm_80", PairTile(8, 16, 64, 32, 8, 3), 168),
                ("sm_90", PairTile(8, 16, 128, 64, 8, 3), 240),
                ("sm_100", PairTile(8, 16, 128, 64, 8, 3), 213),
                ("sm_120", PairTile(8, 16, 64, 32, 8, 2), 239),
                ("gfx942", PairTile(8, 16, 64, 32, 4, 2), 176),
            )
        },
        interpreted=PairTile(16, 16, 32, 32, 4, 1),
        candidates=(PairTile(8, 16, 128, 64, 8, 3), PairTile(8, 16, 64, 64, 8, 3), PairTile(8, 16, 64, 32, 4, 3)),
    ),
    # a tile of a direction's gradient and its mirror image
    "interaction_strips_kernel": Kernel(
        tiles={
            "any": {
                RowTile(64, 64, 8): Compiled("sm_90 interaction_strips_kernel [bfloat16 K=512 full]", "registers", 48)
            }
        },
        interpreted=RowTile(64, 64, 4),
        candidates=(RowTile(64, 64, 8), RowTile(64, 64, 4), RowTile(32, 32, 4)),
    ),
    # neurons by directions; the pairs' factor is made in registers
    "interaction_coefficients_kernel": Kernel(
        tiles={
            "sm_90": {
                Tile(128, 256, 64, 8, 3): Modelled(
                    "sm_90 interaction_coefficients_kernel, bfloat16 K=512 full, K=512 D=784 H=2048", 0.000512, 0.000853
                )
            },
            **{
                arch: {
                    tile: Compiled(
                        f"{arch} interaction_coefficients_kernel [bfloat16 K=512 full]", "registers", registers
                    )
                }
                for arch, tile, registers in (
                    ("sm_80", Tile(128, 128, 32, 8, 3), 209),
                    ("sm_100", Tile(128, 256, 64, 8, 3), 255),
                    ("sm_120", Tile(128, 128, 32, 8, 2), 215),
                    ("gfx942", Tile(128, 128, 32, 8, 2), 115),
                )
            },
        },
        interpreted=Tile(32, 32, 256, 4, 1),
        fp32={
            arch: {
                tile: Compiled(f"{arch} interaction_coefficients_kernel [float32 K=512 full]", "registers", registers)
            }
            for arch, tile, registers in (
                ("sm_80", Tile(64, 32, 32, 4, 3), 165),
                ("sm_90", Tile(64, 64, 32, 4, 3), 168),
                ("sm_100", Tile(64, 64, 32, 4, 3), 164),
                ("sm_120", Tile(64, 32, 32, 4, 2), 187),
                ("gfx942", Tile(64, 64, 32, 4, 2), 92),
            )
        },
        candidates=(
            Tile(128, 256, 64, 8, 3),
            Tile(128, 128, 64, 8, 3),
            Tile(128, 128, 32, 8, 3),
            Tile(64, 64, 32, 4, 3),
            LIBRARY,
        ),
    ),
    # neurons by pairs, of which one block at a time meets all directions
    "interaction_weights_kernel": Kernel(
        tiles={
            "sm_90": {
                Tile(128, 128, 64, 8, 3): Modelled(
                    "sm_90 interaction_weights_kernel, bfloat16 K=512 full, K=512 D=784 H=2048", 0.00113, 0.00188
                )
            },
            **{
                arch: {
                    tile: Compiled(f"{arch} interaction_weights_kernel [bfloat16 K=512 full]", "registers", registers)
                }
                for arch, tile, registers in (
                    ("sm_80", Tile(64, 64, 32, 4, 3), 247),
                    ("sm_100", Tile(128, 64, 64, 8, 3), 228),
                    ("sm_120", Tile(64, 64, 32, 4, 3), 246),
                    ("gfx942", Tile(128, 128, 32, 8, 2), 180),
                )
            },
        },
        interpreted=Tile(32, 256, 32, 4, 1),
        fp32={
            arch: {tile: Compiled(f"{arch} interaction_weights_kernel [float32 K=512 full]", "registers", registers)}
            for arch, tile, registers in (
                ("sm_80", Tile(64, 32, 32, 4, 3), 224),
                ("sm_90", Tile(64, 64, 32, 4, 3), 229),
                ("sm_100", Tile(64, 64, 32, 4, 3), 234),
                ("sm_120", Tile(64, 32, 32, 4, 2), 206),
                ("gfx942", Tile(64, 64, 32, 4, 2), 174),
            )
        },
        candidates=(
            Tile(128, 128, 64, 8, 3),
            Tile(128, 64, 64, 8, 3),
            Tile(64, 128, 64, 4, 3),
            Tile(64, 64, 32, 4, 3),
            LIBRARY,
        ),
    ),
    "mask_kernel": Kernel(
        tiles={"any": {RowTile(16, 64, 4): Compiled("sm_90 mask_kernel [bfloat16 continuous full]", "registers", 56)}},
        interpreted=RowTile(64, 64, 4),
        candidates=ROW_TILES,
    ),
    "mask_backward_kernel": Kernel(
        tiles={
            "any": {RowTile(16, 64, 4): Compiled("sm_90 mask_backward_kernel [bfloat16 source full]", "registers", 126)}
        },
        interpreted=RowTile(64, 64, 4),
        candidates=ROW_TILES,
    ),
    "uniform_kernel": Kernel(
        tiles={"any": {RowTile(16, 64, 4): Compiled("sm_90 uniform_kernel [alone]", "registers", 30)}},
        interpreted=RowTile(64, 64, 4),
        candidates=ROW_TILES,
    ),
    # `rows` active subcomponents at a time, `columns` of their elements
    "sparse_dots_kernel": Kernel(
        tiles={"any": {RowTile(8, 128, 4, 3): Compiled("sm_90 sparse_dots_kernel [float32]", "registers", 40)}},
        interpreted=RowTile(4, 16, 4),
        candidates=GATHER_TILES,
    ),
    "sparse_sums_kernel": Kernel(
        tiles={"any": {RowTile(8, 128, 4, 3): Compiled("sm_90 sparse_sums_kernel [float32]", "registers", 34)}},
        interpreted=RowTile(4, 16, 4),
        candidates=GATHER_TILES,
    ),
    # a token is a row, a subcomponent a column
    "component_gates_kernel": Kernel(
        tiles={"any": {RowTile(64, 64, 8): Compiled("sm_90 component_gates_kernel [bfloat16]", "registers", 72)}},
        interpreted=RowTile(32, 64, 4),
        candidates=ROW_TILES,
    ),
    # tall: each tile of tokens stores partial sums
    "component_gates_backward_kernel": Kernel(
        tiles={
            "sm_120": {RowTile(128, 32, 16): Compiled("sm_120 component_gates_backward_kernel [float16]", "spills", 0)},
            "any": {
                RowTile(128, 32, 8): Compiled("sm_90 component_gates_backward_kernel [bfloat16]", "registers", 128)
            },
        },
        interpreted=RowTile(32, 64, 4),
        candidates=(RowTile(64, 64, 8), RowTile(128, 32, 4), RowTile(256, 32, 8), RowTile(128, 64, 8)),
    ),
    # one weight at a time: a tile of it, the gated operand made in registers
    "accumulate_kernel": Kernel(
        tiles={
            "sm_90": {Tile(128, 128, 64, 8, 3): Compiled("sm_90 accumulate_kernel [bfloat16]", "tensor", 0.952)},
            "sm_100": {Tile(128, 128, 64, 8, 3): Compiled("sm_100 accumulate_kernel [bfloat16]", "registers", 150)},
            "any": {Tile(128, 128, 32, 8, 2): Compiled("sm_80 accumulate_kernel [bfloat16]", "resident", 2)},
        },
        interpreted=Tile(32, 32, 32, 4, 1),
        fp32={
            **{
                arch: {Tile(64, 64, 32, 4, 3): Compiled(f"{arch} accumulate_kernel [float32]", "registers", registers)}
                for arch, registers in (("sm_80", 128), ("sm_90", 146), ("sm_100", 128), ("sm_120", 237))
            },
            "gfx942": {Tile(64, 64, 32, 4, 2): Compiled("gfx942 accumulate_kernel [float32]", "resident", 3)},
        },
        operands=1,
        candidates=(*GEMM_TILES, LIBRARY),
    ),
    # two accumulators of block_m x block_n: a weight's product, and the sum over weights
    "accumulate_backward_kernel": Kernel(
        tiles={
            "gfx942": {
                Tile(64, 64, 64, 4, 3): Compiled(
                    "gfx942 accumulate_backward_kernel [bfloat16 gates and write]", "resident", 2
                )
            },
            "any": {
                Tile(128, 64, 64, 8, 3): Compiled(
                    "sm_90 accumulate_backward_kernel [bfloat16 gates and write]", "tensor", 1.0
                )
            },
        },
        interpreted=Tile(32, 32, 32, 4, 1),
        fp32={
            arch: {tile: Compiled(f"{arch} accumulate_backward_kernel [float32 gates and write]", figure, value)}
            for arch, tile, figure, value in (
                ("sm_80", Tile(64, 32, 32, 4, 3), "registers", 181),
                ("sm_90", Tile(64, 64, 32, 4, 3), "registers", 240),
                ("sm_100", Tile(64, 64, 32, 4, 3), "registers", 252),
                ("sm_120", Tile(64, 32, 32, 4, 3), "registers", 213),
                ("gfx942", Tile(64, 64, 32, 4, 2), "resident", 3),
            )
        },
        operands=1,
        candidates=(Tile(128, 64, 64, 8, 3), Tile(64, 64, 64, 4, 3), Tile(64, 64, 32, 4, 3), LIBRARY),
    ),
    # the three-term form of fp32 products keeps two split operands in registers
    "squared_difference_kernel": Kernel(
        tiles={
            "any": {Tile(64, 64, 32, 4, 3): Compiled("sm_120 squared_difference_kernel [float32]", "registers", 235)}
        },
        interpreted=Tile(32, 32, 32, 4, 1),
        operands=1,
        candidates=(
            Tile(128, 64, 32, 8, 3),
            Tile(64, 128, 32, 8, 3),
            Tile(64, 64, 64, 4, 2),
            Tile(64, 64, 32, 8, 3),
        ),
    ),
}

# A choice among several kernels is known by the name of their launcher.
LAUNCHERS = {"interaction_matrices": ("interaction_pairs_kernel", "interaction_direction_kernel")}

IDLE = Threshold(2, "with fewer tiles than one for every two multiprocessors a library GEMM splits its contraction")
PARTIAL_SUMS = Threshold(8, "of a shorter part for each row, sums in fp32 would move over half of the weights' bytes")
LONG_CONTRACTION = Threshold(4096, "the library's main loop is faster, and the gate is a small part; no receipt yet")

# Both ways take 2 rows C d_out d_in FLOPs. The library writes a workspace of C d_out min(rows, d_in) elements first. At
# 295 FLOPs a byte (H100, bf16) that costs more than products at 0.8 of the library's speed up to a size of 1,180.
WIDE_WEIGHTS = Threshold(1024, "a model of the workspace's bytes against the products' FLOPs; no receipt yet")


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


def streams_moments(arch: str, dtype: torch.dtype, directions: int, h: int, d: int, features: int) -> bool:
    """Whether moments are summed tile by tile of pairs: where the matrices too are formed by pairs, and few features.

    A pair of features takes h products for each direction, while the matrix of the inputs takes h for a pair of these
    and D^T Q_k D another 2 d^2 F + d F^2 for a basis D [d, F].
    """
    by_pairs = isinstance(interaction_matrices(arch, dtype, directions)[0], PairTile)
    return by_pairs and (features == d or h * features**2 <= h * d**2 + 2 * d**2 * features + d * features**2)


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
