"""Tiles of the gated kernels, by the name of the jit function; `config` reads them."""

import torch

from bilinear_ops.kernels.records import (
    GEMM_TILES,
    LIBRARY,
    ROW_TILES,
    Compiled,
    Kernel,
    Modelled,
    Rejected,
    RingTile,
    RowTile,
    SplitTile,
    Tile,
)

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
        unproven={"sm_90": (RingTile(128, 128, 64, 4, 4),)},
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
}
