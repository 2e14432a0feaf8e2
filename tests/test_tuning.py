"""Tiles are measured when that was asked for, once, and remembered: with a fake clock, and kernels interpreted."""

import json
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

import bilinear_ops as bo
from bilinear_ops.kernels import config, launching, tuning
from bilinear_ops.kernels.records import RowTile
from bilinear_ops.testing import randn

SMALL = (config.Tile(32, 32, 16, 4, 1), config.Tile(16, 64, 32, 4, 1), config.LIBRARY)
ROWS = (RowTile(16, 32, 4), RowTile(32, 16, 4))
CANDIDATES = {
    **dict.fromkeys(config.KERNELS, ROWS),
    "gated_forward_kernel": SMALL,
    "gated_backward_kernel": SMALL,
    "interaction_pairs_kernel": (config.PairTile(8, 16, 16, 16, 4, 1),),
    "interaction_direction_kernel": (config.Tile(16, 16, 16, 4, 1), config.LIBRARY),
    "interaction_coefficients_kernel": SMALL,
    "interaction_weights_kernel": SMALL,
    "squared_difference_kernel": SMALL[:2],
    "accumulate_kernel": SMALL,
    "accumulate_backward_kernel": SMALL,
}


def gated(impl="triton"):
    x, w, v, p = randn(9, 16), randn(24, 16), randn(24, 16), randn(8, 24)
    return bo.gated_mlp(*(t.requires_grad_() for t in (x, w, v, p)), activation="silu", impl=impl)


def interaction(impl="triton"):
    return bo.interaction_matrices(*(randn(*s) for s in ((7, 5), (7, 5), (3, 7))), impl=impl)


def gradients_by_pairs(impl="triton"):
    return bo.interaction_matrices(*(randn(*s, requires_grad=True) for s in ((7, 5), (7, 5), (9, 7))), impl=impl)


def stochastic(impl="triton"):
    tensors = (randn(*s, requires_grad=True) for s in ((9, 6), (6, 12), (12, 5), (9, 12)))
    return bo.stochastic_rank1_linear(*tensors, samples=2, seed=3, impl=impl)


def sparse(impl="triton"):
    x, read, write = (randn(*s, requires_grad=True) for s in ((4, 6), (6, 400), (400, 5)))
    pairs = torch.tensor([1, 3]), torch.tensor([0, 2])
    bo.warmup(bo.eigen_form, (4, 6), (3, 2), (3, 2, 6), pairs=pairs, device="cpu")
    indices = torch.arange(8).view(4, 2)
    return bo.rank1_sparse(x, read, write, indices, randn(4, 2), impl=impl)


def faithfulness(impl="triton"):
    return bo.faithfulness_loss(*(randn(*s, requires_grad=True) for s in ((6, 7), (7, 4), (4, 6))), impl=impl)


def accumulate(impl="triton"):
    return bo.rank1_accumulate(*(randn(*s, requires_grad=True) for s in ((3, 7), (9, 7), (7, 5))), impl=impl)


def gate_networks(impl="triton"):
    tensors = (randn(*s, requires_grad=True) for s in ((9, 7), (7, 3), (7, 3), (7, 3), (7,)))
    return bo.component_gates(*tensors, impl=impl)


def uniform(impl="triton"):
    return bo.stochastic_mask(torch.zeros(5, 6), samples=2, seed=1, impl=impl)


CHOICES = {
    # the row kernels run within the library's choice
    gated: {"gated_forward_kernel", "gated_backward_kernel", "gate_kernel", "gate_backward_kernel"},
    interaction: {"interaction_matrices"},
    gradients_by_pairs: {"interaction_matrices"}
    | {f"interaction_{name}_kernel" for name in ("strips", "coefficients", "weights")},
    stochastic: {"mask_kernel", "mask_backward_kernel"},
    sparse: {"sparse_dots_kernel", "sparse_sums_kernel"},
    faithfulness: {"squared_difference_kernel"},
    accumulate: {"accumulate_kernel", "accumulate_backward_kernel"},
    gate_networks: {"component_gates_kernel", "component_gates_backward_kernel"},
    uniform: {"uniform_kernel"},
}


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """Tuning is on, its cache empty, and the `fastest` of the candidates is the one that is asked for."""

    class Clock:
        fastest = 0

        def __init__(self):
            self.measured = []

        def __call__(self, runs, device):
            self.measured.append(list(runs))
            return {tile: abs(i - self.fastest) + 0.5 for i, tile in enumerate(runs)}

        def forget(self):
            """As in a new process."""
            tuning._chosen.clear()
            self.measured.clear()

    clock = Clock()
    monkeypatch.setenv("BILINEAR_OPS_TUNE", "1")
    monkeypatch.setenv("BILINEAR_OPS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "seconds", clock)
    for kernel, tiles in CANDIDATES.items():
        monkeypatch.setitem(config.KERNELS, kernel, replace(config.KERNELS[kernel], candidates=tiles))
    monkeypatch.setattr(config, "tf32_allowed", lambda: True)  # else the gated layer's fp32 is the library's
    return clock


def found(call, impl="triton"):
    """The result of a call on the same numbers, and of its gradients."""
    torch.manual_seed(0)
    y = call(impl)
    if y.requires_grad:
        y.square().mean().backward()
    return y.detach()


def kept(folder):
    return {json.loads(path.read_text())["key"]["kernel"] for path in folder.iterdir()}


@pytest.mark.parametrize("call", CHOICES)
@pytest.mark.parametrize("fastest", (1, 3))
def test_measured_once_and_right_whatever_is_fastest(call, fastest, clock, tmp_path):
    clock.fastest = fastest
    first = found(call)
    torch.testing.assert_close(first, found(call, "torch"))
    assert kept(tmp_path) == CHOICES[call] and clock.measured
    chosen = dict(tuning._chosen)
    for candidates, key in zip(clock.measured, chosen, strict=True):
        assert key[0][0] == "kernel" and chosen[key] == candidates[min(fastest, len(candidates) - 1)]
    clock.measured.clear()
    assert torch.equal(found(call), first) and not clock.measured  # from memory
    clock.forget()
    assert torch.equal(found(call), first) and not clock.measured  # from the files
    assert tuning._chosen.items() <= chosen.items()


def test_table_decides_unless_asked(clock, tmp_path, monkeypatch):
    clock.fastest = 3  # the library
    found(gated)
    before = sorted(tmp_path.iterdir())
    clock.forget()
    for value in ("", "0", "off", None):
        monkeypatch.setenv("BILINEAR_OPS_TUNE", value) if value is not None else monkeypatch.delenv("BILINEAR_OPS_TUNE")
        ran = []
        original = config.tiles
        monkeypatch.setattr(config, "tiles", lambda *a, ran=ran, original=original: ran.append(a[0]) or original(*a))
        found(gated)
        assert (
            set(ran) == {"gated_forward_kernel", "gated_backward_kernel"} and not clock.measured and not tuning._chosen
        )
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "content",
    (
        b"",
        b"{",
        b"\xff\x00",
        b"[]",
        b"null",
        b"3",
        b"{}",
        b"[" * 100_000,
        b'{"key": 1, "tile": []}',
        "foreign",
        "unknown",
    ),
    ids=lambda c: repr(c[:12]),
)
def test_files_that_are_not_ours_are_measured_anew(content, clock, tmp_path):
    expected = found(interaction)
    (path,) = tmp_path.iterdir()
    good = json.loads(path.read_text())
    if content == "foreign":
        content = json.dumps({**good, "key": {**good["key"], "device": "another"}}).encode()
    elif content == "unknown":
        content = json.dumps({**good, "tile": "Tile(1, 2, 3)"}).encode()
    path.write_bytes(content)
    clock.forget()
    assert torch.equal(found(interaction), expected) and len(clock.measured) == 1
    assert json.loads(path.read_text()) == good and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_costs_a_warning(clock, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("BILINEAR_OPS_CACHE_DIR", str(tmp_path / "file" / "below"))
    with pytest.warns(UserWarning, match="could not be kept"):
        found(interaction)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found(interaction)
    assert len(clock.measured) == 1


def test_a_failed_write_leaves_what_was_there(clock, tmp_path, monkeypatch):
    found(interaction)
    (path,) = tmp_path.iterdir()
    before = path.read_bytes()
    monkeypatch.setattr(tuning.os, "replace", lambda *a: (_ for _ in ()).throw(OSError("full")))
    with pytest.warns(UserWarning, match="full"):
        tuning._write(path, {"key": "other"})
    assert path.read_bytes() == before


def test_a_capture_measures_nothing(clock, monkeypatch):
    with monkeypatch.context() as capture:
        capture.setattr(tuning, "_capturing", lambda t: True)
        found(gated)
        assert not clock.measured and not tuning._chosen
    clock.fastest = 1
    expected = found(gated)
    assert clock.measured
    clock.measured.clear()
    monkeypatch.setattr(tuning, "_capturing", lambda t: True)
    assert torch.equal(found(gated), expected) and not clock.measured  # what is known is used


@pytest.mark.parametrize("capturing", (True, False))
def test_a_capture_is_seen(capturing, monkeypatch):
    """Of the current stream, and only where the tensor is on a GPU."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    assert tuning._capturing(SimpleNamespace(is_cuda=True)) is capturing
    assert not tuning._capturing(SimpleNamespace(is_cuda=False))


def test_a_tuned_tile_that_runs_out_steps_down_to_the_table(clock):
    like, tuned, tried = randn(2, 2), RowTile(64, 64, 4), []
    tuning._chosen[tuning._key("gate_kernel", like, (1,))] = tuned

    def run(tile):
        tried.append(tile)
        if tile == tuned:
            raise OutOfResources(2, 1, "shared memory")
        return tile

    assert launching.launch("gate_kernel", like, (1,), ROWS, run) == ROWS[0] and tried == [tuned, ROWS[0]]


def test_tracing_measures_nothing(clock):
    class Layer(torch.nn.Module):
        def forward(self, x, w):
            return bo.gated_bilinear(x, w, w, impl="triton")

    x, w = randn(9, 16), randn(24, 16)
    torch.export.export(Layer(), (x, w))
    traced = []
    compiled = torch.compile(Layer(), fullgraph=True, backend=lambda gm, _: traced.append(len(clock.measured)) or gm)
    compiled(x, w)
    assert traced == [0] and clock.measured


def test_a_tile_that_does_not_run_is_left_out(clock, monkeypatch):
    def run(tile):
        if tile in broken:
            raise broken[tile]

    tiles = tuple(config.Tile(n, n, 16, 4, 1) for n in (16, 32, 64))
    record = replace(config.KERNELS["gated_forward_kernel"], candidates=())
    monkeypatch.setitem(config.KERNELS, "gated_forward_kernel", record)
    broken = {tiles[0]: OutOfResources(2, 1, "shared memory"), tiles[2]: RuntimeError("no register left")}
    assert tuning.preferred("gated_forward_kernel", randn(2, 2), (1,), tiles, run)[0] == tiles[1]
    assert clock.measured == [[tiles[1]]]
    broken[tiles[1]] = RuntimeError("another")
    with pytest.raises(OutOfResources):
        tuning.preferred("gated_forward_kernel", randn(2, 2), (2,), tiles, run)


FAULTS = {
    "none": lambda out, run: None,
    "the rounding of one element": lambda out, run: out[0].mul_(1 + 2**-8),
    "the rounding of terms that cancel": lambda out, run: out[11].add_(2**-9),
    "one element": lambda out, run: out[3].add_(0.1),
    "one element of no size": lambda out, run: out[5].fill_(torch.inf),
    "not written": lambda out, run: out[7].copy_(run[7]),
    "not always": lambda out, run: out[9].add_(1 if run["runs"] == 6 else 0),
    "an error": lambda out, run: (_ for _ in ()).throw(RuntimeError("no register left")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_unproven_tile_must_give_the_same_numbers(fault, clock, monkeypatch):
    """It is measured like the others if it does; else it is left out, with a warning."""
    monkeypatch.setenv("BILINEAR_OPS_TUNE_UNPROVEN", "1")
    proven, unproven = config.Tile(16, 16, 16, 4, 1), config.Tile(32, 32, 16, 4, 1)
    monkeypatch.setitem(
        config.KERNELS, "gated_forward_kernel", replace(config.KERNELS["gated_forward_kernel"], candidates=())
    )
    right, out = randn(64, dtype=torch.bfloat16), torch.empty(64, dtype=torch.bfloat16)
    right[11] = 0
    before = {"runs": 0}

    def run(tile):
        before.update(enumerate(out.clone()), runs=before["runs"] + (tile == unproven))
        out.copy_(right)
        if tile == unproven:
            FAULTS[fault](out, before)
        return out, None

    clock.fastest = 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chosen = tuning.preferred("gated_forward_kernel", right, (1,), (proven,), run, (unproven,))
    agrees = fault == "none" or fault.startswith("the rounding")
    assert chosen == ((unproven if agrees else proven), proven)
    assert clock.measured == [[proven, unproven] if agrees else [proven]]
    assert [str(w.message).startswith(f"{unproven} is left out") for w in caught] == ([] if agrees else [True])


def test_unproven_tiles_are_offered_when_asked_and_through_descriptors_alone(clock, monkeypatch):
    """Last, and only when tuning measures."""
    unproven = config.Tile(16, 16, 16, 4, 1)
    record = replace(config.KERNELS["gated_forward_kernel"], unproven={"interpreter": (unproven,)})
    monkeypatch.setitem(config.KERNELS, "gated_forward_kernel", record)
    clock.fastest = 99

    def measured(d, dtype):
        x, w, v = (randn(*shape, dtype=dtype) for shape in ((9, d), (24, d), (24, d)))
        ours = bo.gated_bilinear(x, w, v, impl="triton")
        bo.testing.assert_no_worse(
            ours, bo.reference.gated_bilinear(x, w, v), bo.reference.gated_bilinear(x.double(), w.double(), v.double())
        )
        return next((tiles for tiles in clock.measured if SMALL[0] in tiles), None)

    assert unproven not in measured(16, torch.bfloat16), "what could hang is not asked for"
    clock.forget()
    monkeypatch.setenv("BILINEAR_OPS_TUNE_UNPROVEN", "yes")
    assert measured(16, torch.bfloat16)[-1] == unproven, "what was kept without it does not count"
    assert dict(tuning._chosen) and unproven in tuning._chosen.values()
    clock.measured.clear()
    for d, dtype in ((17, torch.bfloat16), (16, torch.float32)):  # rows that are not aligned; operands of four bytes
        assert unproven not in measured(d, dtype)
    clock.forget()
    monkeypatch.delenv("BILINEAR_OPS_TUNE")
    assert measured(16, torch.bfloat16) is None


def test_what_a_choice_depends_on(monkeypatch):
    def key():
        tuning._code.cache_clear()
        return tuning._key("gate_kernel", t, (4, 8))

    t = randn(2, 2)
    keys = [
        key(),
        tuning._key("mask_kernel", t, (4, 8)),
        tuning._key("gate_kernel", t, (8, 8)),
        tuning._key("gate_kernel", t.half(), (4, 8)),
    ]
    with monkeypatch.context() as other:
        other.setattr(config, "tf32_allowed", lambda: True)
        keys.append(key())
    for module in (torch, tuning.triton):
        with monkeypatch.context() as other:
            other.setattr(module, "__version__", "0")
            keys.append(key())
    with monkeypatch.context() as other:
        other.setattr(tuning.Path, "read_bytes", lambda path: b"other kernels")
        keys.append(key())
    with monkeypatch.context() as other:
        other.setattr(tuning, "_device_name", lambda device: "another")
        keys.append(key())
    assert len(set(keys)) == len(keys) and key() == keys[0]
    assert [tuning.bucket(n) for n in (0, 1, 2, 3, 1000, 1024, 1025)] == [0, 1, 2, 4, 1024, 1024, 2048]


@pytest.mark.parametrize("arch", config.SHARED_MEMORY)
def test_candidates_begin_with_the_table(arch, monkeypatch):
    half = torch.bfloat16
    for kernel in ("gated_forward_kernel", "gated_backward_kernel"):
        tiles = config.gated(kernel, arch, half, 4096, 2048, 1024, True, 132)
        found = config.candidates(kernel, arch, half, tiles)
        assert found[: len(tiles)] == tiles and len(set(found)) == len(found) > len(tiles) and config.LIBRARY in found
        assert config.candidates(kernel, arch, torch.float32, (None,)) == (None,)  # TF32 was not opted in to
    for directions in (8, 512):
        tiles = config.interaction_matrices(arch, half, directions)
        found = config.candidates("interaction_matrices", arch, half, tiles)
        assert found[:1] == tiles and {type(t) for t in found} == {config.Tile, config.PairTile, type(config.LIBRARY)}
    for kernel, record in config.KERNELS.items():
        if "any" in record.tiles:
            found = config.candidates(kernel, arch, half, config.tiles(kernel, arch, half))
            assert len(found) > 1 and (config.LIBRARY in found) == kernel.startswith("accumulate")


def test_the_clock_itself(monkeypatch):
    ran = []
    runs = {tile: lambda tile=tile: ran.append(tile) for tile in SMALL}
    times = tuning.seconds(runs, torch.device("cpu"))
    assert list(times) == ran == list(SMALL) and all(t >= 0 for t in times.values())


def test_warmup_tunes_when_asked(clock, monkeypatch, tmp_path):
    monkeypatch.delenv("BILINEAR_OPS_TUNE")
    shapes = ((9, 16), (24, 16), (24, 16), (8, 24))
    options = {"activation": "silu", "impl": "triton"}
    state = torch.get_rng_state()
    bo.warmup(bo.gated_mlp, *shapes, device="cpu", **options)
    assert not clock.measured and not list(tmp_path.iterdir())
    clock.fastest = 1
    bo.warmup(bo.gated_mlp, *shapes, device="cpu", tune=True, backward=False, **options)
    assert kept(tmp_path) == {"gated_forward_kernel", "gate_kernel"}
    bo.warmup(bo.gated_mlp, *shapes, device="cpu", tune=True, **options)
    assert kept(tmp_path) == CHOICES[gated] and torch.equal(torch.get_rng_state(), state)
    clock.measured.clear()
    assert found(gated) is not None and not clock.measured  # what was measured holds
    assert {dict(key)["kernel"]: tile for key, tile in tuning._chosen.items()}["gated_forward_kernel"] == SMALL[0]


def test_warmup_takes_what_ops_take(clock):
    bo.warmup(bo.interaction_matrices, (7, 5), (7, 5), bo.Directions((3, 4), (4, 7)), device="cpu", impl="triton")
    bo.warmup(bo.interaction_moments, (7, 5), (7, 5), (3, 7), device="cpu")
    indices = torch.arange(8).view(4, 2)
    bo.warmup(bo.rank1_sparse, (4, 6), (6, 400), (400, 5), indices, (4, 2), bias=(5,), device="cpu", dtype=torch.half)
    with pytest.raises(RuntimeError, match=r"w must have shape"):
        bo.warmup(bo.gated_bilinear, (4, 6), (3,), (3,), device="cpu")


def test_warmup_refuses_to_tune_where_kernels_cannot_run(monkeypatch):
    with pytest.raises(RuntimeError, match="tune=True cannot run: float64 has no kernels"):
        bo.warmup(bo.gated_bilinear, (4, 6), (3, 6), (3, 6), dtype=torch.float64, device="cpu", tune=True)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="CPU tensors need TRITON_INTERPRET=1"):
        bo.warmup(bo.gated_bilinear, (4, 6), (3, 6), (3, 6), device="cpu", tune=True)


def test_the_report_says_where(clock, tmp_path):
    from bilinear_ops import environment

    found = environment.report()
    assert found["caches"]["tiles"] == str(tmp_path)
    assert found["environment"]["BILINEAR_OPS_TUNE"] == "1"
    assert f"tiles   {tmp_path}" in environment.text(found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_warmup_without_a_gpu_says_so():
    with pytest.raises(RuntimeError, match="warmup needs the device .* got cuda, and PyTorch finds no GPU"):
        bo.warmup(bo.gated_mlp, (4, 3), (5, 3), (5, 3), (2, 5))
