"""Every reason in the tables of tiles resolves: keys exist, and figures are those of the compiled kernels."""

import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from bench.harness import receipts
from bench.static import baseline
from bilinear_ops.kernels import config, few_rows, gated
from bilinear_ops.kernels.interaction import matrices, matrices_backward, ranking
from bilinear_ops.kernels.rank1 import accumulate, gates, losses, masked, masks, sparse
from bilinear_ops.kernels.records import LIBRARY, Compiled, Measured, Modelled, RingTile, Threshold

ROOT = Path(__file__).parents[1]
PINNED = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
BASELINE = baseline.load(baseline.path(PINNED["torch"], PINNED["triton"]))
RESULTS = ROOT / "bench/results"
MODELLED = {
    f"{r['op']}, {r['case']}": r["seconds"]
    for r in receipts.load(baseline.modelled_path(PINNED["torch"], PINNED["triton"]))
}


def rows(record):
    return [*record.tiles.values(), record.pointers, *record.fp32.values()]


def reasons():
    """(place, reason) of every tile and threshold."""
    for name, record in config.KERNELS.items():
        for row in rows(record):
            yield from ((f"{name} {tile}", reason) for tile, reason in row.items())
    yield from ((name, t.reason) for name, t in vars(config).items() if isinstance(t, Threshold))


def unresolved(reason):
    """What is wrong with a reason, or nothing."""
    match reason:
        case Compiled(key, figure, value):
            found = BASELINE.get(key, {}).get(figure)
            return "" if found == value else f"{figure} of {key} is {found}, not {value}"
        case Modelled(receipt, low, high):
            found = MODELLED.get(receipt)
            return "" if found == [low, high] else f"{receipt} is modelled as {found}, not {[low, high]}"
        case Measured(receipt):
            name, _, workload = receipt.partition(" ")
            lines = (RESULTS / name).read_text().splitlines() if (RESULTS / name).is_file() else ()
            found = [r for r in map(json.loads, lines) if f"{r['op']}, {r['case']}" == workload]
            return "" if found else f"no receipt {receipt}"
        case str(text):
            return "" if text else "an empty reason"


def test_every_reason_resolves():
    found = {place: unresolved(reason) for place, reason in reasons()}
    assert not [f"{place}: {what}" for place, what in found.items() if what]


def test_at_most_a_tenth_of_the_reasons_is_free_text():
    found = [reason for _, reason in reasons()]
    free = [reason for reason in found if isinstance(reason, str)]
    assert 10 * len(free) <= len(found), free


def test_what_does_not_resolve_is_named():
    key, figures = next(iter(BASELINE.items()))
    assert not unresolved(Compiled(key, "registers", figures["registers"]))
    assert unresolved(Compiled(key, "registers", figures["registers"] + 1)).startswith(f"registers of {key} is")
    assert "is None" in unresolved(Compiled(f"{key} ", "registers", figures["registers"]))
    assert "is None" in unresolved(Compiled(key, "register", figures["registers"]))
    receipt, (low, high) = next(iter(MODELLED.items()))
    assert not unresolved(Modelled(receipt, low, high))
    assert f"{receipt} is modelled as" in unresolved(Modelled(receipt, low, 2 * high))
    assert "is modelled as None" in unresolved(Modelled(f"{receipt} ", low, high))
    file = next(RESULTS.glob("*.jsonl"))
    receipt = json.loads(file.read_text().splitlines()[0])
    assert not unresolved(Measured(f"{file.name} {receipt['op']}, {receipt['case']}"))
    for missing in (f"{file.name} {receipt['op']}, another", f"no.jsonl {receipt['op']}, {receipt['case']}"):
        assert unresolved(Measured(missing)) == f"no receipt {missing}"
    assert unresolved("")


def test_a_reason_is_of_the_kernel_whose_tile_it_gives():
    """Its key names the row's kernel and, where a row belongs to one architecture, that architecture."""
    for name, record in config.KERNELS.items():
        for arch, row in [*record.tiles.items(), *record.fp32.items()]:
            for reason in row.values():
                if isinstance(reason, Compiled | Modelled):
                    cited = reason.key if isinstance(reason, Compiled) else reason.receipt.replace(",", "", 1)
                    target, kernel, _ = cited.split(" ", 2)
                    assert kernel == name and (arch == "any" or target == arch)


def test_every_rejected_tile_is_a_reason():
    cited = " ".join(str(reason) for _, reason in reasons())
    rejected = {key for key in BASELINE if key.endswith(": rejected]")}
    assert rejected and not [key for key in rejected if key not in cited]
    assert len(rejected) == sum(len(record.rejected) for record in config.KERNELS.values())


def test_a_record_is_called_like_its_kernel():
    modules = (accumulate, few_rows, gated, gates, losses, masked, masks, matrices, matrices_backward, ranking, sparse)
    assert set(config.KERNELS) == {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert {key.split()[1] for key in BASELINE} == set(config.KERNELS)
    for launcher, kernels in config.LAUNCHERS.items():
        assert hasattr(matrices, launcher) and set(kernels) <= set(config.KERNELS)


def test_rows_hold_one_kind_of_tile():
    for record in config.KERNELS.values():
        kinds = {type(tile) for row in rows(record) for tile in row if tile is not LIBRARY}
        assert kinds == {type(record.interpreted)} == {type(t) for t in record.candidates if t is not LIBRARY}


def test_sizes_are_powers_of_two():
    """As Triton asks of a block's ranges and of a program's warps."""
    for record in config.KERNELS.values():
        tiles = {tile for row in rows(record) for tile in row} | {record.interpreted, *record.candidates}
        tiles |= {rejected.tile for rejected in record.rejected}.union(*record.unproven.values())
        for tile in tiles - {LIBRARY}:
            sizes = [size for name, size in vars(tile).items() if name != "stages"]
            assert not [size for size in sizes if size & (size - 1)], tile


@pytest.mark.parametrize(
    ("kernel", "columns"),
    (("gated_forward_kernel", "2x{n}"), ("gated_split_kernel", "2x{n}"), ("gated_backward_kernel", "{n}")),
)
def test_operands_of_a_stage_are_the_compiled_ones(kernel, columns):
    """On sm_80 a loop holds all stages but the one it reads; nothing else is in shared memory."""
    record = config.KERNELS[kernel]
    for tile in record.tiles["sm_80"]:
        sizes = f"{tile.block_m}x{columns.format(n=tile.block_n)}x{tile.block_k}"
        held = tile.shared_memory(tile.block_m + record.operands * tile.block_n, 2) * (tile.stages - 1) // tile.stages
        assert BASELINE[f"sm_80 {kernel} [bfloat16 {sizes} aligned]"]["shared"] == held


def test_no_row_holds_an_unproven_tile():
    """Which is a candidate on one architecture alone, for operands of two bytes, where it was seen to compile."""
    found = [(arch, tile) for record in config.KERNELS.values() for arch, t in record.unproven.items() for tile in t]
    assert [arch for arch, _ in found] == ["sm_90"] and type(found[0][1]) is RingTile
    for record in config.KERNELS.values():
        held = (*record.candidates, record.interpreted, *(tile for row in rows(record) for tile in row))
        assert not any(isinstance(tile, RingTile) for tile in held)


@pytest.mark.parametrize("arch", config.SHARED_MEMORY)
def test_where_unproven_tiles_are_offered(arch, monkeypatch):
    def offered(dtype):
        return len(config.unproven("gated_forward_kernel", arch, dtype))

    halves = torch.bfloat16, torch.float16
    for version, compiles in (("3.6.0", True), ("3.7.1", False), ("3.9.1", True), ("4.0.0", False)):
        monkeypatch.setattr(config.triton, "__version__", version)
        assert [offered(dtype) for dtype in halves] == [compiles and arch == "sm_90"] * 2
        assert offered(torch.float32) == 0 == len(config.unproven("gated_backward_kernel", arch, torch.bfloat16))
    monkeypatch.setitem(config.SHARED_MEMORY, arch, 1000)
    assert offered(torch.bfloat16) == 0


@pytest.mark.parametrize("path", sorted(Path(config.__file__).parent.rglob("*.py")), ids=lambda path: path.name)
def test_the_tables_alone_name_architectures(path):
    named = re.search(r"sm_\d|gfx\d|[\"']sm_", path.read_text())
    assert bool(named) == (path.name == "config.py" or path.stem.endswith("_tiles"))
