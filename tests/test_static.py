"""Every kernel, at every tile of its table, compiles for its targets without a GPU, and what is wrong is named."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from bench.static import baseline, gate, sass
from bench.static.known import Known
from bench.static.residency import resident_blocks


@pytest.mark.slow  # as the step of its own that it is in CI, for all targets
@pytest.mark.parametrize("arch", ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"))
def test_compiles_without_spills(arch):
    done = _run("-m", "bench.static", "--target", arch)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gated_forward_kernel" in done.stdout and "gated_backward_kernel" in done.stdout


TOO_LARGE = """
config.KERNELS["gated_forward_kernel"].tiles["sm_90"] = {config.Tile(128, 128, 64, 4, 3): "as a test"}
"""
NOTHING_WRONG = """
import dataclasses, torch
from bilinear_ops.kernels.records import Rejected
record = config.KERNELS["gated_forward_kernel"]
spill_free = Rejected("sm_90", torch.bfloat16, config.Tile(128, 64, 32, 8, 3), aligned=False)
config.KERNELS["gated_forward_kernel"] = dataclasses.replace(record, rejected=(spill_free,))
"""
BROKEN_SOURCE = """
from bilinear_ops.kernels import gated
source = open(gated.__file__).read()
with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
    assert source.count({right!r}) == 1
    file.write(source.replace({right!r}, {broken!r}))
    file.flush()
    gated.gate_kernel = runpy.run_path(file.name)["gate_kernel"]
    sys.exit(gate.main())
"""
SIGNATURE = "@triton.jit\ndef gate_kernel("
NARROW = BROKEN_SOURCE.format(right=SIGNATURE, broken=SIGNATURE.replace("jit", "jit(do_not_specialize=['stride_hm'])"))
STORED = "gate_of_tile(b_a, b_z, beta, limit, offset, ACTIVATION), False"
TWO_EXPONENTIALS = BROKEN_SOURCE.format(right=STORED, broken=STORED.replace(", False", " * tl.exp(b_a), False"))
ONE_BLOCK = """
config.KERNELS["gated_backward_kernel"].tiles["sm_90"] = {config.Tile(64, 64, 64, 4, 4): "as a test"}
"""


@pytest.mark.ci
@pytest.mark.parametrize(
    ("breaking", "arch", "kernel", "message"),
    (
        (
            TOO_LARGE,
            "sm_90",
            "gated_forward_kernel",
            r"\[bfloat16 128x2x128x64 aligned\]: \d+ spill instructions, \d+ of them",
        ),
        (
            NOTHING_WRONG,
            "sm_90",
            "gated_forward_kernel",
            r"\[bfloat16 128x2x64x32 unaligned, 8 warps: rejected\]: nothing is wrong with this rejected tile",
        ),
        (
            NARROW,
            "sm_90",
            "gate_kernel",
            r"\[bfloat16 alone\]: stores narrower than 4 bytes to an aligned output: 2:\d+",
        ),
        (
            TWO_EXPONENTIALS,
            "sm_90",
            "gate_kernel",
            r"\[bfloat16 alone, relu\]: \d+ special-function operations, \d+ committed",
        ),
        (
            ONE_BLOCK,
            "sm_90",
            "gated_backward_kernel",
            r"\[bfloat16 64x64x64 aligned\]: 132 programs on 132 multiprocessors for 2048 tiles, where each holds 3",
        ),
    ),
    ids=("spills", "no evidence", "narrow stores", "two exponentials", "one block"),
)
def test_a_broken_kernel_fails_the_gate(breaking, arch, kernel, message):
    """Named with its target and the figure that is wrong. In one process: others would not have the breakage."""
    code = "import runpy, sys, tempfile; from bench.static import gate; from bilinear_ops.kernels import config\n"
    code += f"sys.argv = ['', '--target', '{arch}', '--kernel', '{kernel}', '--jobs', '1']\n"
    done = _run("-c", code + breaking + "sys.exit(gate.main())")
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(rf"FAIL {arch} {kernel} {message}", done.stdout), done.stdout


def _run(*words):
    # in a process of its own: in this one the kernels are interpreted
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).parent.parent
    return subprocess.run([sys.executable, *words], cwd=root, env=environment, capture_output=True, text=True)


LOOPS = """
.L_x_0:
    /*0010*/  HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
    /*0020*/  WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
    /*0030*/  HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
.L_x_1:
    /*0040*/  HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
    /*0050*/  HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12], R24, gsb0 ;
    /*0060*/  WARPGROUP.DEPBAR.LE gsb0, {left} ;
    /*0070*/  @P0 STL [R1], R3 ;
    /*0080*/  @!P1 BRA `(.L_x_1) ;
.L_x_2:
    /*0090*/  @!P1 BRA `(.L_x_2) ;
    /*00a0*/  @!P2 BRA `(.L_x_0) ;
"""


def test_the_main_loop_is_the_innermost_that_multiplies():
    for left in ("0x1", "0x0"):  # one wait a loop is none too many
        lines = sass._sass_lines(LOOPS.format(left=left))
        code = sass.of_lines(lines, "sm_90", warps=4)
        assert code.histogram == {"HGMMA": 2, "WARPGROUP": 1, "STL": 1, "BRA": 1}
        assert (code.matrix, code.loop_spills, code.waits) == ({"HGMMA.64x128x16": 2}, 1, 0)
        assert code.tensor == 1.0
    loop = [lines[i] for i in sass.main_loop(lines, sass.branches(lines))]
    assert sass._serial_wgmmas([loop[1], loop[2]] * 3) == 3  # a wait after each


# The store in the loop is none of the epilogue's, and the wait that is repeated out of line is one wait.
KERNEL = """
.L_x_0:
    /*0010*/  HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
    /*0020*/  MUFU.EX2 R1, R1 ;
    /*0030*/  @P0 STG.E.U16 desc[UR4][R2.64], R3 ;
    /*0040*/  SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR8+0x8], R150 ;
    /*0050*/  @!P1 BRA `(.L_x_0) ;
    /*0060*/  SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR8], R150 ;
    /*0070*/  @!P2 BRA `(.L_x_1) ;
.L_x_2:
    /*0080*/  BAR.SYNC.DEFER_BLOCKING 0x0 ;
    /*0090*/  WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
    /*00a0*/  DEPBAR.LE SB0, 0x0 ;
    /*00b0*/  MUFU.RCP R1, R1 ;
    /*00c0*/  @!P0 STG.E.128 desc[UR4][R2.64], R4 ;
    /*00d0*/  @!P0 STG.E.128 desc[UR4][R2.64+0x10], R8 ;
    /*00e0*/  STG.E.64 desc[UR4][R2.64], R8 ;
    /*00f0*/  STG.E desc[UR4][R2.64], R8 ;
    /*0100*/  @UP0 UTMASTG.2D [UR12], [UR4] ;
    /*0110*/  STS.U16 [R2], R8 ;
    /*0120*/  EXIT ;
.L_x_1:
    /*0130*/  SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR8], R150 ;
    /*0140*/  @P2 BRA `(.L_x_2) ;
    /*0150*/  BRA `(.L_x_1) ;
"""


def test_what_lies_outside_the_main_loop():
    code = sass.of_lines(sass._sass_lines(KERNEL), "sm_90", warps=4)
    assert code.stores == {"4": 1, "8": 1, "16": 2, "tma": 1}
    assert (code.special, code.loop_special) == (1, 1)
    assert code.syncs == {"barrier": 1, "group": 2, "mbarrier": 1}
    alone = sass.of_lines(sass._sass_lines(KERNEL.replace("HGMMA.64x128x16.F32.BF16", "FFMA")), "sm_90", warps=4)
    assert alone.stores == {"2": 1, **code.stores} and (alone.special, alone.loop_special) == (2, 0)


def test_stores_and_special_functions_of_amd():
    lines = sass._amd_lines(AMD)
    code = sass.of_lines(lines, "gfx942", warps=4)
    assert lines[0] == ".LBB0_1:" and code.matrix == {"v_mfma_f32_32x32x8_bf16": 1}
    assert code.stores == {"2": 2, "4": 1, "16": 1}
    assert (code.special, code.loop_special, code.syncs) == (2, 1, {"barrier": 1})


AMD = """
.LBB0_1:
\tv_mfma_f32_32x32x8_bf16 v[0:15], v[0:1], v[2:3], v[0:15]
\tv_exp_f32_e32 v0, v0
\ts_cbranch_vccnz .LBB0_1
\ts_barrier
\tv_rcp_f32_e32 v0, v0
\tv_exp_f32_e32 v0, v0
\tglobal_store_dwordx4 v0, v[2:5], s[0:1]
\tbuffer_store_dword v0, v2, s[0:3], 0 offen
\tbuffer_store_short v0, v2, s[0:3], 0 offen
\tglobal_store_short_d16_hi v0, v2, s[0:1]
\ts_endpgm
"""


def test_registers_and_spills_of_amd_are_read():
    sizes = "\n.vgpr_count:     97\n.vgpr_spill_count: 3\n"
    compiled = SimpleNamespace(metadata=SimpleNamespace(num_warps=4), asm={"amdgcn": AMD + sizes})
    code, text = sass.read(compiled, "gfx942")
    assert text == AMD + sizes
    assert (code.registers, code.spills, code.matrix) == (97, 3, {"v_mfma_f32_32x32x8_bf16": 1})


def judge(text=KERNEL, committed=2, known=(), **changed):
    """(failures, known faults) of a hand-written kernel whose launch asks for two blocks where two fit."""
    fields = dict(kernel="a_kernel", case="float16", target="sm_90", shared=0, programs=264, tiles=512, resident=2)
    report = gate.Report(code=sass.of_lines(sass._sass_lines(text), "sm_90", warps=4), **fields | changed)
    figures = None if committed is None else {"special": committed - 1, "loop_special": 1}
    failures, excused = gate.judged(report, figures, known)
    prefix = f"{report}: "
    return [what.removeprefix(prefix) for what in failures], [what.removeprefix(prefix) for what in excused]


HALF = KERNEL.replace("STG.E.64", "STG.E.U16")
BYTE = KERNEL.replace("STG.E desc", "STG.E.U8 desc")
EXPONENTIAL = KERNEL.replace("STS.U16 [R2], R8", "MUFU.EX2 R1, R1")


@pytest.mark.parametrize(
    ("changed", "message"),
    (
        ({}, None),
        ({"text": HALF}, "stores narrower than 4 bytes to an aligned output: 2:1"),
        ({"text": BYTE}, "stores narrower than 4 bytes to an aligned output: 1:1"),
        ({"text": HALF, "ragged": True}, None),
        ({"text": EXPONENTIAL}, "3 special-function operations, 2 committed"),
        ({"text": EXPONENTIAL, "committed": 3}, None),
        ({"committed": None}, "no committed figures; --update writes them"),
        ({"programs": 132}, "132 programs on 132 multiprocessors for 512 tiles, where each holds 2"),
        ({"programs": 132, "resident": 1}, None),
        ({"programs": 200, "tiles": 200}, None),
        ({"text": HALF, "programs": 132, "rejected": True}, "nothing is wrong with this rejected tile"),
        ({"shared": 1 << 20}, "1048576 bytes of shared memory, limit 232448"),
        ({"shared": 1 << 20, "rejected": True}, None),
    ),
)  # fmt: skip
def test_each_fault_fails_the_gate(changed, message):
    assert judge(**changed) == ([] if message is None else [message], [])


def test_a_known_fault_is_reported_and_a_mended_one_fails():
    known = (Known("stores", r"sm_90 a_kernel \[float16\]", "as a test"),)
    assert judge(HALF, known=known) == ([], ["stores narrower than 4 bytes to an aligned output: 2:1 (as a test)"])
    assert judge(known=known) == (["no fault of its stores any more: take it off the known ones"], [])
    others = (
        Known("blocks", ".*", "another kind"),
        Known("stores", "sm_90 a_kernel", "not the whole name"),
        Known("stores", ".*", "of another version", "3.5.0"),
    )
    assert len(judge(HALF, known=others, programs=132)[0]) == 1  # the stores'


def test_without_a_baseline_of_these_versions_the_gate_fails(monkeypatch, tmp_path, capsys):
    code = sass.of_lines(sass._sass_lines(KERNEL), "sm_90", warps=4)
    report = gate.Report("a_kernel", "float16", "sm_90", 0, code, programs=264, tiles=512, resident=2)
    monkeypatch.setattr(gate, "all_reports", lambda *arguments: [report])
    monkeypatch.setattr(baseline, "FOLDER", tmp_path)
    monkeypatch.setattr(baseline, "MODELLED", tmp_path)
    for words, status in (([], 1), (["--update"], 0), ([], 0)):
        monkeypatch.setattr("sys.argv", ["", *words])
        assert gate.main() == status
    out = capsys.readouterr().out
    assert f"FAIL no {baseline.path().name}: nothing to compare with" in out and "NEW sm_90 a_kernel" in out
    assert baseline.load(baseline.path()) == {str(report): report.figures()}
    assert baseline.path("2.11.0+cu130", "3.6.0").name == "baseline-torch2.11.0-triton3.6.0.json"


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "blocks"),
    (
        ("sm_90", 255, 0, 8, 1),  # 2 warps of 8,192 registers for each scheduler
        ("sm_90", 128, 0, 8, 2),
        ("sm_90", 129, 0, 8, 1),  # 136 registers are given: 3 warps for each scheduler
        ("sm_90", 168, 0, 4, 3),
        ("sm_90", 32, 114_712, 4, 2),
        ("sm_90", 32, 116_000, 4, 1),  # 2 x 1,024 bytes are CUDA's
        ("sm_90", 32, 0, 32, 2),
        ("sm_90", 16, 0, 1, 32),
        ("sm_90", 32, 240_000, 4, 0),
        ("sm_89", 32, 0, 16, 3),
        ("gfx942", 128, 0, 4, 4),
        ("gfx942", 129, 0, 4, 3),
        ("gfx942", 64, 32_768, 4, 2),
        ("gfx942", 24, 0, 8, 4),
    ),
)
def test_resident_blocks(arch, registers, shared, warps, blocks):
    assert resident_blocks(arch, registers, shared, warps) == blocks


def test_tensor_memory_limits_the_resident_blocks():
    assert [resident_blocks("sm_100", 32, 0, 4, columns) for columns in (0, 128, 256, 512)] == [16, 4, 2, 1]


def test_changes_against_the_baseline_are_named():
    assert baseline.changes("kernel", None, {"spills": 0}) == "NEW kernel"
    assert baseline.changes("kernel", {"spills": 0}, {"spills": 0}) == ""
    assert baseline.changes("kernel", {"spills": 0}, {"spills": 8}) == "CHANGED kernel: spills 0 -> 8"
