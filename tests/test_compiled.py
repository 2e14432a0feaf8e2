"""Promises about precision and sizes that interpreted kernels cannot break: read from compiled kernels and launches."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("triton")

from compiled_worker import narrow_offsets

from bench.static import baseline

ROOT = Path(__file__).parents[1]
TENSOR_CORES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")


QUICK = ("precisions", "cases", "multiplications")  # in one process


def found(what):
    return facts(*(QUICK if what in QUICK else (what,)))[what]


@cache
def facts(*names):
    """From a process of its own: in this one kernels are interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "compiled_worker.py"), *names]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_baseline_holds_what_the_gate_compiles():
    """Every case once, without compiling any, under each pair of versions."""
    names = [name for name, _ in found("cases")]
    files = list(baseline.FOLDER.glob("baseline-*.json"))
    assert baseline.path() in files and len(files) > 1
    for file in files:
        assert sorted(names) == sorted(json.loads(file.read_text())) and len(set(names)) == len(names), file.name


def test_cases_of_masks_take_what_their_names_say():
    masked = [(name, absent) for name, absent in found("cases") if " mask_" in name]
    for name, absent in masked:
        assert ("source_ptr" in absent) == ("source" not in name), name
        assert ("seed_ptr" in absent) == ("continuous" not in name and "binomial" not in name), name
    assert len(masked) >= 6 * 2 * 8


@pytest.mark.parametrize("call", ("gated forward", "gated backward", "interaction, few", "interaction, many"))
def test_fp32_products_are_in_tf32_only_where_that_was_asked_for(call):
    """Of gated layers no launch multiplies unasked: their products are the library's, which follows the switch too."""
    off, on = (found("precisions")[switch][call] for switch in ("off", "on"))
    accurate = [] if call.startswith("gated") else ["tf32x3"]
    assert {arch: off[arch] for arch in TENSOR_CORES} == dict.fromkeys(TENSOR_CORES, accurate)
    assert off["gfx942"] == (["ieee"] if accurate else [])
    assert on["sm_80"] == on["sm_90"] == ["tf32"]


@pytest.mark.parametrize("switch", ("off", "on"))
def test_faithfulness_is_never_in_plain_tf32(switch):
    launched = found("precisions")[switch]["faithfulness"]
    assert launched == {**dict.fromkeys(TENSOR_CORES, ["tf32x3"]), "gfx942": ["ieee"]}


@pytest.mark.ci
@pytest.mark.parametrize("kernel", ("uniform_kernel", "mask_kernel", "mask_backward_kernel"))
def test_masks_are_drawn_without_fused_multiply_adds(kernel):
    """A fused product and sum rounds once and gives other masks than the specification's. Allowed, they are there."""
    fused = found("fusions")[kernel]
    assert fused["launched"] == 0 < fused["allowed"]


def test_offsets_are_products_of_64_bits():
    """A stride or a size times a run-time number, on its way to an address."""
    narrow = found("multiplications")
    assert len(narrow) == 15 and {name: lines for name, lines in narrow.items() if lines} == {}


TWICE = "the row is widened before it reaches the address, and once more there"
WORDS = "a word of the generator: tests/test_rank1_masks.py draws in far rows"
FEW = "not seen: the kernels of few rows are not compiled here; 64 rows in 132 parts need it from h = 127,000 on"
CONSTANT = "not seen: a product with a tile's size, too wide from 16 million candidate tiles on"
NARROW_BY_THEMSELVES = {
    "load_rows: rows = row + tl.arange(0, ROWS).to(tl.int64)": TWICE,
    "load_gates: rows = row + tl.arange(0, ROWS).to(tl.int64)": TWICE,
    "mask_kernel: row = tl.program_id(0).to(tl.int64) // tiles_c * ROWS": TWICE,
    "uniform_kernel: row = tl.program_id(0).to(tl.int64) // tiles_c * ROWS": TWICE,
    "draw_uniforms: rows = tl.cast(row, tl.int64) + tl.arange(0, ROWS)": TWICE,
    "draw_uniforms: columns = tl.cast(column, tl.int64) + tl.arange(0, COLUMNS)": WORDS,
    "next_state: return mix(state + (index.to(tl.int64) + 1).to(tl.uint64) * GOLDEN)": WORDS,
    "uniform_tile: rows = (tl.cast(row, tl.int64) + tl.arange(0, ROWS)).to(tl.uint64) << PAIR_BITS": WORDS,
    "interaction_candidates_kernel: program = tl.program_id(0).to(tl.int64)": CONSTANT,
    "gated_split_kernel: parts_ptr += split.to(tl.int64) * 2 * M * H": FEW,
    "gated_sum_kernel: size = tl.cast(M, tl.int64) * H": FEW,
}


@pytest.mark.ci
def test_a_dropped_cast_to_64_bits_is_noticed():
    """Each cast of the kernels, dropped alone, leaves a narrow product, but for those named here."""
    noticed = found("casts")
    assert len(noticed) == 32 and {cast for cast, kernels in noticed.items() if not kernels} == set(
        NARROW_BY_THEMSELVES
    )


REPRESENTATION = """
    %block = arith.constant 16 : i32
    %pid = tt.get_program_id x : i32
    %row = arith.muli %pid, %block : i32
    %start = arith.muli %row, %stride : i32
    %wide = arith.extsi %start : i32 to i64
    %other = arith.muli %pid, %stride : i32
    %tile = arith.divsi %other, %block : i32
    %far = arith.extsi %row : i32 to i64
    %offset = arith.muli %far, %stride64 : i64
    %sum = arith.addi %{into}, %offset : i64
    %p = tt.addptr %ptr, %sum : !tt.ptr<f32>, i64
"""


@pytest.mark.parametrize(
    ("into", "lines"), (("wide", ["%start = arith.muli %row, %stride : i32"]), ("far", []), ("tile", []))
)
def test_what_counts_as_a_narrow_offset(into, lines):
    assert narrow_offsets(REPRESENTATION.replace("{into}", into)) == lines
