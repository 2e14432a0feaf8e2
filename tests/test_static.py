"""Every kernel, at every tile of its table, compiles for its targets without a GPU and spills nowhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.slow  # as the step of its own that it is in CI, for all targets
@pytest.mark.parametrize("arch", ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942"))
def test_compiles_without_spills(arch):
    done = _run("-m", "bench.static", "--target", arch)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gated_forward_kernel" in done.stdout and "gated_backward_kernel" in done.stdout


TOO_LARGE = """
config.KERNELS["gated_forward_kernel"].tiles["sm_90"] = {config.Tile(128, 128, 64, 4, 3): "as a test"}
"""
NOTHING_WRONG = """
import dataclasses, torch
record = config.KERNELS["gated_forward_kernel"]
spill_free = config.Rejected("sm_90", torch.bfloat16, config.Tile(128, 64, 32, 8, 3), aligned=False)
config.KERNELS["gated_forward_kernel"] = dataclasses.replace(record, rejected=(spill_free,))
"""
RUN_TIME_EXTENT = """
from bilinear_ops.kernels.interaction import matrices
source = open(matrices.__file__).read()
h = "H: tl.constexpr, PACKED"
assert source.count(h) == 2
with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
    file.write(source.replace(h, "H, PACKED"))
    file.flush()
    broken = runpy.run_path(file.name)
    matrices.interaction_pairs_kernel = broken["interaction_pairs_kernel"]
    sys.exit(gate.main())
"""


@pytest.mark.slow  # CI runs it all the same
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
            RUN_TIME_EXTENT,
            "sm_90",
            "interaction_pairs_kernel",
            r"\[bfloat16 K=512 full\]: \d+ wgmmas of the main loop waited for",
        ),
        (
            NOTHING_WRONG,
            "sm_90",
            "gated_forward_kernel",
            r"\[bfloat16 128x2x64x32 unaligned, 8 warps: rejected\]: nothing is wrong with this rejected tile",
        ),
    ),
    ids=("spills", "run-time extent", "no evidence"),
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
    from bench.static import sass

    for left in ("0x1", "0x0"):  # one wait a loop is none too many
        lines = sass._sass_lines(LOOPS.format(left=left))
        loop = sass.main_loop(lines, r"BRA\S*\s.*`\((\.L\w+)\)")
        code = sass.of_loop(loop, "sm_90", warps=4)
        assert code.histogram == {"HGMMA": 2, "WARPGROUP": 1, "STL": 1, "BRA": 1}
        assert (code.matrix, code.loop_spills, code.waits) == ({"HGMMA.64x128x16": 2}, 1, 0)
        assert code.tensor == 1.0
    assert sass._serial_wgmmas([loop[1], loop[2]] * 3) == 3  # a wait after each


def test_changes_against_the_baseline_are_named():
    from bench.static.gate import changes

    assert changes("kernel", None, {"spills": 0}) == "NEW kernel"
    assert changes("kernel", {"spills": 0}, {"spills": 0}) == ""
    assert changes("kernel", {"spills": 0}, {"spills": 8}) == "CHANGED kernel: spills 0 -> 8"
