"""The paths behind the gated launchers, one by one, and what they may touch."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from bilinear_ops import testing
from bilinear_ops.composite import gated as composite
from bilinear_ops.kernels import config, gated, tuning
from bilinear_ops.kernels import launching as via
from bilinear_ops.results import Gate
from bilinear_ops.testing import randn

M, D, H, O = 70, 48, 80, 40  # noqa: E741
SMALL = config.Tile(32, 64, 32, 4, 1, group_m=2)  # several tiles a program, and a tail in every dimension
# bfloat16 stands for both that round
MANY_SIZES = (torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow))
TILES = pytest.mark.parametrize("tile", (SMALL, config.LIBRARY), ids=("fused", "library"))


def call_forward(kernels, tensors):
    x, w, v, b_w, b_v, beta = tensors
    return kernels.gate_forward(x, w, v, b_w, b_v, Gate("swish", beta), True)


def call_backward(kernels, tensors):
    dy, p, az, beta = tensors
    return kernels.gate_backward(dy, p, az, Gate("swish", beta), True, True)


def call_kernels(call, tensors, tile):
    with tuning.using(gated_forward_kernel=tile, gated_backward_kernel=tile):
        return call(gated, tensors)


def forward_inputs(dtype=torch.float32, m=M):
    weights = [randn(H, D, dtype=dtype, scale=D**-0.5) for _ in range(2)]
    return [randn(m, D, dtype=dtype), *weights, randn(H, dtype=dtype), randn(H, dtype=dtype), torch.tensor(0.7)]


def backward_inputs(dtype=torch.float32, m=M):
    p = randn(O, H, dtype=dtype, scale=H**-0.5)
    return [randn(m, O, dtype=dtype), p, randn(m, 2 * H, dtype=dtype), torch.tensor(0.7)]


CALLS = [(call_forward, forward_inputs), (call_backward, backward_inputs)]


def assert_same(call, tensors, tile):
    wide = [t.double() for t in tensors]
    results = call_kernels(call, tensors, tile), call(composite, tensors), call(composite, wide)
    for ours, eager, gold in zip(*results, strict=True):
        if gold.dim():  # one number may be right by luck: test_gradient_of_beta compares many
            testing.assert_no_worse(ours, eager.to(ours.dtype), gold)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    (
        ("plain", torch.float32),
        ("plain", torch.bfloat16),
        ("offset", torch.bfloat16),
        pytest.param("offset", torch.float32, marks=pytest.mark.slow),
        pytest.param("plain", torch.float16, marks=pytest.mark.slow),
    ),
)
@TILES
def test_gradient_of_beta(tile, kind, dtype):
    """A sum whose terms cancel: the errors of eight draws as one vector."""
    draws = []
    for _ in range(8):
        tensors = backward_inputs(dtype, m=SMALL.block_m + 3)
        tensors = [testing.layout(t, kind) if t.dim() == 2 and kind == "offset" else t for t in tensors]
        wide = [t.double() for t in tensors]
        calls = call_kernels(call_backward, tensors, tile), call_backward(composite, tensors)
        draws.append([results[2] for results in (*calls, call_backward(composite, wide))])
    ours, eager, gold = (torch.stack(results) for results in zip(*draws, strict=True))
    testing.assert_no_worse(ours, eager.to(ours.dtype), gold)


@pytest.mark.parametrize(("call", "inputs"), CALLS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@TILES
def test_paths_agree(call, inputs, tile, dtype):
    assert_same(call, inputs(dtype), tile)


@pytest.mark.parametrize(("call", "inputs"), CALLS)
@pytest.mark.parametrize("kind", testing.LAYOUTS)
def test_pointers_take_what_descriptors_cannot(call, inputs, kind, monkeypatch):
    tensors = inputs(m=SMALL.block_m + 3)
    described = [testing.layout(t, kind) if t.dim() == 2 and i < 2 else t for i, t in enumerate(tensors)]
    seen = []
    original = via.describable
    monkeypatch.setattr(via, "describable", lambda *t: seen.append(original(*t)) or seen[-1])
    assert_same(call, described, SMALL)
    assert_same(call, tensors, SMALL)
    assert seen == [kind == "sliced", True]  # of these layouts, only a row stride is a descriptor's business


@pytest.mark.parametrize(("call", "inputs"), CALLS)
@TILES
@pytest.mark.parametrize("kind", ("plain", "offset"))
def test_touches_only_its_memory(call, inputs, tile, kind):
    """Outputs lie between pads that stay NaN, inputs between pads that must not be read."""
    tensors = [testing.guarded(t) for t in inputs()]
    if kind == "offset":
        tensors[1] = testing.layout(tensors[1], "offset")
    with testing.GuardedAllocations() as memory:
        results = call_kernels(call, tensors, tile)
    assert len(memory.allocated) >= 2
    memory.check()
    for ours, expected in zip(results, call(composite, inputs_copy(tensors)), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def inputs_copy(tensors):
    return [t.clone() for t in tensors]


def test_steps_down_when_the_device_runs_out():
    from triton.runtime.errors import OutOfResources

    tried = []

    def launch(tile):
        tried.append(tile)
        if tile == 1:
            raise OutOfResources(2, 1, "shared memory")
        return tile

    assert via.first_that_fits((1, 2, 3), launch) == 2 and tried == [1, 2]
    with pytest.raises(OutOfResources):
        via.first_that_fits((1,), launch)


def test_table_sends_each_case_down_its_path(monkeypatch):
    """fp32 stays with the library unless TF32 was opted in to; every fused tile fits its device."""
    half, single, forward = torch.bfloat16, torch.float32, "gated_forward_kernel"
    record = config.KERNELS[forward]

    def choice(kernel, arch, dtype, m=4096, n=2048, k=1024, descriptors=True, multiprocessors=132):
        return config.gated(kernel, arch, dtype, m, n, k, descriptors, multiprocessors)

    assert choice(forward, "sm_90", half) == tuple(record.tiles["sm_90"])
    assert choice(forward, "sm_90", half, descriptors=False) == tuple(record.pointers) == (config.LIBRARY,)
    assert choice(forward, "sm_86", half, descriptors=False) == tuple(record.tiles["sm_120"])
    assert choice(forward, "sm_90", single) == (config.LIBRARY,)
    assert choice(forward, "sm_90", half, k=4096) == (config.LIBRARY,)
    for kernel in (forward, "gated_backward_kernel"):
        for arch in config.SHARED_MEMORY:
            assert config.LIBRARY not in choice(kernel, arch, half, k=4095)
    monkeypatch.setattr(config, "tf32_allowed", lambda: True)
    assert config.LIBRARY not in choice(forward, "sm_90", single)
    assert choice(forward, "sm_120", single) == (config.LIBRARY,)
    assert choice("gated_backward_kernel", "sm_100", single) == (config.LIBRARY,)


def test_few_tiles_take_smaller_ones_or_the_library():
    """By tiles against multiprocessors: at least one tile for every two of them."""
    large, small = config.KERNELS["gated_forward_kernel"].tiles["sm_90"]  # 128 rows by 128 and by 64 columns

    def choice(m, n, multiprocessors):
        return config.gated("gated_forward_kernel", "sm_90", torch.bfloat16, m, n, 512, True, multiprocessors)

    assert choice(128, 1024, 16) == (large, small)
    assert choice(128, 1024, 17) == (small,) == choice(128, 1024, 32)
    assert choice(128, 1024, 33) == (config.LIBRARY,)
    assert choice(129, 1024, 32) == (large, small)
    assert choice(16, 1024 * 4, 64) == (large, small)  # few tokens of a wide layer are no few tiles


def test_programs_of_a_grid(monkeypatch):
    monkeypatch.setattr(config, "processors", lambda device: 4)
    for blocks, programs in ((1, 4), (2, 8), (0, 15)):
        assert via.programs(config.Tile(16, 16, 16, 4, 1, blocks_per_sm=blocks), 33, 80, None) == programs
    assert via.programs(config.Tile(16, 16, 16, 4, 1), 16, 33, None) == 3
    assert "maxnreg" not in config.Tile(16, 16, 16, 4, 1).launch()
    assert config.Tile(16, 16, 16, 4, 1, registers=128).launch()["maxnreg"] == 128


def test_warps_are_specialised_on_one_architecture_unless_switched_off(monkeypatch):
    monkeypatch.delenv("BILINEAR_OPS_WARP_SPECIALIZE", raising=False)
    monkeypatch.setattr(config.triton, "__version__", "3.6.0")
    assert not config.warp_specialized("sm_100")
    monkeypatch.setattr(config.triton, "__version__", "3.10.0+git1")
    assert [arch for arch in config.SHARED_MEMORY if config.warp_specialized(arch)] == ["sm_100"]
    monkeypatch.setenv("BILINEAR_OPS_WARP_SPECIALIZE", "0")
    assert not config.warp_specialized("sm_100")


@pytest.mark.parametrize("spelling", ("new", "old"))
def test_tf32_switch_is_read_in_either_spelling(spelling):
    before, old = torch.backends.cuda.matmul.fp32_precision, torch.get_float32_matmul_precision()
    try:
        assert not config.tf32_allowed()
        if spelling == "new":
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision("high")
        assert config.tf32_allowed()
    finally:
        torch.set_float32_matmul_precision(old)
        torch.backends.cuda.matmul.fp32_precision = before
    assert not config.tf32_allowed()


OFFSETS = """
import torch
from bilinear_ops.kernels import config, gated, tuning
from bilinear_ops.results import Gate
stride, d = 70_000_000, 33  # column 32 lies 2.2e9 elements in: past 2^31; the buffer is committed lazily
torch.manual_seed(0)
x = torch.empty(stride * (d - 1) + 16, dtype=torch.float16).as_strided((16, d), (1, stride))
x.copy_(torch.randn(16, d))
w, v = torch.randn(2, 8, d).half()
with tuning.using(gated_forward_kernel=config.Tile(16, 16, 16, 4, 1)):
    hid, _ = gated.gate_forward(x, w, v, None, None, Gate("identity"), False)
torch.testing.assert_close(hid.float(), (x.float() @ w.float().T) * (x.float() @ v.float().T), rtol=1e-2, atol=1e-2)
"""


def test_offsets_past_2_to_the_31():
    subprocess.run([sys.executable, "-c", OFFSETS], check=True)
