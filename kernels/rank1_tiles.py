"""Tiles of the rank-1 kernels, by the name of the jit function; `config` reads them."""

from bilinear_ops.kernels.records import (
    GATHER_TILES,
    GEMM_TILES,
    LIBRARY,
    ROW_TILES,
    Compiled,
    Kernel,
    RowTile,
    Tile,
)

KERNELS = {
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
