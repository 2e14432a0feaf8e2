"""Tiles of the interaction kernels, by the name of the jit function; `config` reads them."""

import torch

from bilinear_ops.kernels.records import (
    LIBRARY,
    Compiled,
    Kernel,
    Modelled,
    PairTile,
    Rejected,
    RowTile,
    Tile,
)

KERNELS = {
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
    # as those of moments: the strongest pair of each tile
    "interaction_topk_kernel": Kernel(
        tiles={
            arch: {tile: Compiled(f"{arch} interaction_topk_kernel [float32 K=512 weights]", "registers", registers)}
            for arch, tile, registers in (
                ("sm_80", PairTile(8, 16, 64, 32, 8, 3), 166),
                ("sm_90", PairTile(8, 16, 128, 64, 8, 3), 243),
                ("sm_100", PairTile(8, 16, 128, 64, 8, 3), 213),
                ("sm_120", PairTile(8, 16, 64, 32, 8, 2), 239),
                ("gfx942", PairTile(8, 16, 64, 32, 4, 2), 178),
            )
        },
        interpreted=PairTile(16, 16, 32, 32, 4, 1),
        candidates=(PairTile(8, 16, 128, 64, 8, 3), PairTile(8, 16, 64, 64, 8, 3), PairTile(8, 16, 64, 32, 4, 3)),
    ),
    # one direction of a tile above: block_i and block_j are that tile's, and block_h divides its block_h
    "interaction_candidates_kernel": Kernel(
        tiles={
            "any": {
                PairTile(8, 16, 1, 32, 1, 3): Compiled(
                    "sm_90 interaction_candidates_kernel [float32 K=512 weights]", "registers", 126
                )
            }
        },
        interpreted=PairTile(16, 16, 1, 16, 4, 1),
        candidates=(PairTile(8, 16, 1, 32, 1, 3), PairTile(8, 16, 1, 32, 2, 3), PairTile(8, 16, 1, 16, 1, 3)),
    ),
    # a tile of a direction's gradient and its mirror image
    "interaction_strips_kernel": Kernel(
        tiles={
            "any": {
                RowTile(64, 64, 8): Compiled("sm_90 interaction_strips_kernel [bfloat16 K=512 full]", "registers", 48)
            }
        },
        interpreted=RowTile(32, 32, 4),
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
                    ("sm_100", Tile(128, 256, 64, 8, 3), 224),
                    ("sm_120", Tile(128, 128, 32, 8, 2), 215),
                    ("gfx942", Tile(128, 128, 32, 8, 2), 115),
                )
            },
        },
        interpreted=Tile(32, 16, 64, 4, 1),
        fp32={
            arch: {
                tile: Compiled(f"{arch} interaction_coefficients_kernel [float32 K=512 full]", "registers", registers)
            }
            for arch, tile, registers in (
                ("sm_80", Tile(64, 32, 32, 4, 3), 204),
                ("sm_90", Tile(64, 64, 32, 4, 3), 211),
                ("sm_100", Tile(64, 64, 32, 4, 3), 228),
                ("sm_120", Tile(64, 32, 32, 4, 2), 203),
                ("gfx942", Tile(64, 64, 32, 4, 2), 124),
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
        interpreted=Tile(32, 256, 16, 4, 1),
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
}
