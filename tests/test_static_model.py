"""The performance model: the regions of machine code, and times from them, against counts made by hand."""

import itertools
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from bench.static import gate, machine, model, regions, sass
from bench.static.model import Product
from bench.static.regions import Regions, Work

# A persistent kernel: a tile's first copy, the main loop, an epilogue with one copy that it waits for and a store that
# it waits for; a case of its own, of two instructions, lies beside the shortest way.
PERSISTENT = """
.L_x_0:
    /*0010*/  @UP3 UTMALDG.2D [UR8], [UR4] ;
.L_x_1:
    /*0020*/  SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR8], R5 ;
    /*0030*/  HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24 ;
    /*0040*/  HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR16], R24 ;
    /*0050*/  LDSM.16.M88.4 R4, [R2] ;
    /*0060*/  @!P0 BRA `(.L_x_1) ;
    /*0070*/  @UP1 UTMALDG.2D [UR8], [UR4] ;
    /*0080*/  SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR8], R5 ;
    /*0090*/  MUFU.EX2 R8, R8 ;
    /*00a0*/  LDG.E.128 R12, desc[UR4][R2.64] ;
    /*00b0*/  @P3 BRA `(.L_x_2) ;
    /*00c0*/  MUFU.EX2 R8, R8 ;
    /*00d0*/  MUFU.RCP R8, R8 ;
.L_x_2:
    /*00e0*/  FADD R9, R15, R9 ;
    /*00f0*/  STG.E.128 desc[UR4][R2.64], R4 ;
    /*0100*/  @UP0 UTMASTG.2D [UR12], [UR4] ;
    /*0110*/  DEPBAR.LE SB0, 0x0 ;
    /*0120*/  BAR.SYNC.DEFER_BLOCKING 0x0 ;
    /*0130*/  @!P1 BRA `(.L_x_0) ;
    /*0140*/  EXIT ;
.L_x_3:
    /*0150*/  BRA `(.L_x_3) ;
"""
WARPS = 8


def test_the_main_loop_and_the_shortest_way_around_it():
    found = regions.read(PERSISTENT, "", "sm_90", WARPS)
    loop, outside = found.loop, found.outside
    assert loop.instructions == 5 * WARPS and outside.instructions == 12 * WARPS
    # 2 x 64 x 128 x 16 FLOP at 4096 a clock, by two groups of four warps; the register operand is not read from shared
    assert loop.tensor == 2 * 2 * 64
    assert loop.shared == (4 * WARPS) + 2 * ((64 + 128) + 128) * 16 * 2 / 128
    assert outside.special == WARPS and (outside.loads, outside.stores) == ({"16": 1}, {"16": 1})
    assert (outside.load_waits, outside.store_waits, outside.barriers) == (2, 1, 1)
    assert outside.bytes == 2 * 32 * 16 * WARPS and outside.lines == 2 * 4 * WARPS
    assert found.fills and not found.roles


def test_a_load_above_the_main_loop_is_not_waited_for():
    load = "    /*00a0*/  LDG.E.128 R12, desc[UR4][R2.64] ;\n"
    above = PERSISTENT.replace(load, "").replace(".L_x_1:\n", load + ".L_x_1:\n", 1)
    assert regions.read(above, "", "sm_90", WARPS).outside.load_waits == 1


def test_a_kernel_without_products_is_a_pass_unless_it_loops():
    lines = PERSISTENT.replace("HGMMA", "FFMA")
    assert regions.read(lines, "", "sm_90", WARPS) is None
    straight = (
        "    /*0010*/  STG.E.64 desc[UR4][R2.64], R4 ;\n    /*0020*/  EXIT ;\n.L_x_0:\n    /*0030*/  BRA `(.L_x_0) ;\n"
    )
    found = regions.read(straight, "", "sm_90", 4)
    assert found.loop == Work() and (found.outside.bytes, found.outside.instructions) == (4 * 32 * 8, 8)


@pytest.mark.parametrize(
    ("n", "a", "tensor", "shared"),
    ((64, "#smem", 128, 192), (128, "#smem", 256, 256), (128, "#ttng.tensor_memory", 256, 128)),
)
def test_products_of_tcgen05_by_their_shapes(n, a, tensor, shared):
    line = (
        f"ttng.tc_gen5_mma %a, %b, %c, %t, %t : !ttg.memdesc<128x64xbf16, #shared, {a}, mutable>, "
        f"!ttg.memdesc<64x{n}xbf16, #shared2, #smem>, !ttg.memdesc<128x{n}xf32, #tmem, #ttng.tensor_memory>\n"
    )
    assert regions._tensor_of_shapes("    " + line + "        " + line, 8192) == (tensor, shared)


def test_sectors_of_a_store_by_its_layout():
    text = """
#blocked = #ttg.blocked<{sizePerThread = [1, 8], threadsPerWarp = [4, 8], warpsPerCTA = [8, 1], order = [1, 0]}>
#blocked1 = #ttg.blocked<{sizePerThread = [8, 1], threadsPerWarp = [1, 32], warpsPerCTA = [8, 1], order = [0, 1]}>
#blocked2 = #ttg.blocked<{sizePerThread = [1, 1], threadsPerWarp = [1, 32], warpsPerCTA = [8, 1], order = [1, 0]}>
    tt.store %1, %2, %3 : tensor<128x32x!tt.ptr<bf16>, #blocked>
    tt.store %1, %2, %3 : tensor<128x32x!tt.ptr<bf16>, #blocked1>
    tt.store %1, %2, %3 : tensor<128x32x!tt.ptr<bf16>, #blocked2>
"""
    assert regions._sectors(text) == {"16": (16 + 32) / 2, "2": 32}


GPU = machine.MACHINES["sm_90"]
PLAIN = dict(loop=Work(instructions=100, tensor=1000.0), fills=False, roles=False, sectors={})


def tile(outside, together=1, factor=1.0, product=None, **changed):
    product = product or Product(1000, 640, 64, 0, 0, 0, lambda tiles: 0)
    return model._tile(Regions(**PLAIN | {"outside": outside} | changed), product, GPU, together, factor)


def test_what_lies_outside_adds_up_unless_the_code_overlaps_it():
    issue = Work(instructions=16_000)  # 4,000 clocks of four schedulers
    assert tile(issue).clocks == 10 * 1000 + 4000 and tile(issue).limit == "issue outside"
    assert tile(issue, together=2).clocks == 10_000  # the tensor cores never wait
    assert tile(issue, roles=True).clocks == 10_000 and tile(Work(instructions=80_000), roles=True).clocks == 20_000
    waits = Work(load_waits=2, store_waits=3, barriers=4)
    assert tile(waits).outside == 2 * machine.LOAD + 3 * machine.STORE + 4 * machine.BARRIER
    assert tile(waits, fills=True).outside - tile(waits).outside == machine.LOAD
    assert tile(Work(special=1000)).outside == 1000 * 32 / 16
    assert tile(issue, factor=1.25).clocks == 10_000 + 5_000  # the tensor cores' rate is given


def test_l2_bounds_the_main_loop():
    product = Product(1000, 640, 64, 384, 0, 0, lambda tiles: 0)
    found = tile(Work(), product=product)
    assert found.clocks == pytest.approx(384 * 640 * 2 * GPU.processors / GPU.l2) and found.limit == "L2"
    assert found.clocks > found.tensor


def test_times_are_waves_of_tiles_above_the_floor_of_memory():
    sizes = {"M": 16_384, "D": 1024, "H": 4096, "BLOCK_M": 128, "BLOCK_H": 128, "BLOCK_D": 64, "GROUP_M": 8}
    of = Regions(**PLAIN | {"outside": Work()})
    found = model.estimate("gated_forward_kernel", of, "sm_90", 1, sizes, 132, 1)
    assert found.waves == 32 and found.together == 1  # 4,096 tiles on 132
    assert found.seconds[1] / found.seconds[0] == pytest.approx(1.25 / 0.75)
    product = model.gated_forward_kernel(sizes)
    moved = product.rows * 1024 * 2 + 3 * 128 * 128 * 2
    by_hand = 32 * moved * GPU.processors / GPU.l2 / GPU.clock
    assert sum(found.seconds) / 2 == pytest.approx(by_hand)
    short = model.estimate("gated_forward_kernel", of, "sm_90", 1, {**sizes, "D": 64}, 132, 1)
    moved = 4096 * 3 * 128 * 128 * 2 + (16_384 + 2 * 4096) * 64 * 2
    assert short.limit == "memory" and sum(short.seconds) / 2 == pytest.approx(moved / GPU.hbm)
    assert model.estimate("gated_forward_kernel", of, "gfx942", 1, sizes, 132, 1) is None
    assert model.estimate("another_kernel", of, "sm_90", 1, sizes, 132, 1) is None


@pytest.mark.parametrize("tiles_m", (3, 8, 20))
def test_distinct_operand_rows_in_the_grids_order(tiles_m):
    tiles_n, group = 5, 8

    def at(tile):  # kernels/tile.py: grouped
        first = tile // (group * tiles_n) * group
        rows = min(tiles_m - first, group)
        within = tile % (group * tiles_n)
        return first + within % rows, within // rows

    distinct = model._grouped(tiles_m, tiles_n, group, 16, 32)
    for tiles in (group * n for n in range(1, tiles_m * tiles_n // group)):
        found = [at(t) for t in range(tiles)]
        rows, columns = ({t[axis] for t in found} for axis in (0, 1))
        assert distinct(tiles) >= 16 * len(rows) + 32 * len(columns)
        if tiles % (group * tiles_n) in (0, group) and tiles_m >= group:
            assert distinct(tiles) == 16 * min(tiles_m, len(rows)) + 32 * len(columns)
    assert distinct(tiles_m * tiles_n) >= 16 * tiles_m + 32 * tiles_n


def test_pairs_below_the_diagonal_are_no_tiles():
    sizes = {"D": 70, "K": 33, "H": 64, "BLOCK_I": 8, "BLOCK_J": 16, "BLOCK_K": 32, "BLOCK_H": 64}
    pairs = itertools.product(range(0, 70, 8), range(0, 70, 16))
    assert model.interaction_pairs_kernel(sizes).tiles == 2 * sum(j + 16 > i for i, j in pairs)
    sizes = {"D": 70, "GRID_1": 3, "H": 64, "BLOCK": 32, "BLOCK_H": 64}
    assert model.interaction_direction_kernel(sizes).tiles == 3 * (3 + 2 + 1)


def test_strips_of_pairs():
    """The tiles of both kernels of gradients hold the pairs that the strips do."""
    sizes = {"D": 70, "K": 33, "H": 64, "BLOCK_H": 32, "BLOCK_K": 16, "BLOCK_P": 64}
    pairs = sum(16 * 16 * (s + 1) for s in range(5))
    found = model.interaction_coefficients_kernel(sizes)
    assert found.tiles == 2 * 3 * 5 and found.length * 5 == pairs
    assert model.interaction_coefficients_kernel({**sizes, "D": 17, "strips": 9}).length * 2 == 16 * 16 * 3
    found = model.interaction_weights_kernel(sizes)
    assert found.tiles * 64 == 2 * pairs and found.length == 33
    assert found.distinct(found.tiles) >= 64 + pairs


def test_a_share_below_the_committed_one_fails_the_gate():
    code = sass.of_lines(sass._sass_lines(PERSISTENT), "sm_90", WARPS)
    sizes = {"M": 4096, "D": 1024, "H": 4096, "BLOCK_M": 128, "BLOCK_H": 128, "BLOCK_D": 64, "GROUP_M": 8}
    read = regions.read(PERSISTENT, "", "sm_90", WARPS)
    report = gate.Report(
        "gated_forward_kernel", "bfloat16", "sm_90", 0, code, 132, 1024, 1, ragged=False, regions=read, sizes=sizes
    )
    share = report.figures()["share"]
    assert 0 < share < 1 and gate.judged(report, report.figures(), ()) == ([], [])
    better = {**report.figures(), "share": share + 0.01}
    (failure,) = gate.judged(report, better, ())[0]
    assert f"a modelled tensor share of {share}, {better['share']} committed" in failure


def test_a_kernel_of_fewer_programs_than_tiles_is_persistent(monkeypatch):
    """Only then do its programs a multiprocessor bound what is resident there."""
    found = []
    monkeypatch.setattr(model, "estimate", lambda *arguments: found.append(arguments[-1]))
    code, read = sass.of_lines([], "sm_90", WARPS), regions.read(PERSISTENT, "", "sm_90", WARPS)
    for tiles in (263, 264, 265):
        gate.Report("kernel", "case", "sm_90", 0, code, 264, tiles, 3, regions=read).estimate({})
    assert found == [None, None, 264 // 132]


def test_regions_of_a_compiled_kernel():
    """The machine code and the compiler's text for it, each in its place."""
    ttgir = "#layout = #ttg.warp_specialize"
    kernel = SimpleNamespace(asm={"ttgir": ttgir}, metadata=SimpleNamespace(num_warps=WARPS))
    assert regions.of_kernel(kernel, PERSISTENT, "sm_90") == regions.read(PERSISTENT, ttgir, "sm_90", WARPS)
    assert regions.of_kernel(kernel, PERSISTENT, "gfx90a") is None


def test_receipts_are_modelled_and_kept_apart(monkeypatch, tmp_path):
    baseline = gate.baseline
    monkeypatch.setattr(baseline, "MODELLED", tmp_path / "modelled")
    found = model.Estimate((0.5, 0.8), (1e-3, 2e-3), (10.0, 20.0), 3, 1, "L2")
    old = [model.receipt(t, "gate_kernel", "bfloat16", "as launched", found) for t in ("sm_80", "sm_90")]
    baseline.save_modelled(old, ("sm_80", "sm_90"), "")
    baseline.save_modelled([{**old[1], "limit": "memory"}], ("sm_90",), "")
    kept = list(baseline.receipts.load(baseline.modelled_path()))
    assert [(r["op"], r["kind"], r["limit"]) for r in kept] == [
        ("sm_80 gate_kernel", "modelled", "L2"),
        ("sm_90 gate_kernel", "modelled", "memory"),
    ]
    assert {r["calibration"] for r in kept} == {"uncalibrated"}
