"""Tests for a GPU, `pytest -m gpu`; where a test makes sense interpreted, it runs on a CPU too."""

import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import interprets, pytest_runtest_call
from test_gated import DTYPES, assert_right, inputs, mlp
from torch import Tensor

pytest.importorskip("triton")

import bilinear_ops as bo
from bench.harness.measuring import check
from bench.harness.workload import Run, Workload, workloads
from bench.static import smallest
from bilinear_ops import reference
from bilinear_ops.composite import gated as composite
from bilinear_ops.kernels import config, gated, tuning
from bilinear_ops.results import ACTIVATIONS, Gate
from bilinear_ops.testing import assert_no_worse, gradients, randn

GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
ON_BOTH = pytest.mark.parametrize("device", ("cpu", GPU))
ON_GPU = pytest.mark.parametrize("device", (GPU,))

SMALLEST = {str(w): w for w in smallest.workloads(torch.device("cpu"))}
# One dtype each: what a stream, a graph or a device changes, it changes for all; and interpreted ones take their time.
ONE_EACH = [n for n, w in SMALLEST.items() if w.dtype == (torch.float16 if "fused" in w.case else torch.float32)]


def find(name: str, device: str) -> Workload:
    return next(w for w in smallest.workloads(torch.device(device)) if str(w) == name)


@pytest.mark.parametrize(
    ("device", "name"),
    [pytest.param("cpu", n, marks=pytest.mark.ci) for n in ONE_EACH]
    + [pytest.param("cuda", n, marks=GPU.marks) for n in SMALLEST],
)
def test_every_kernel_is_right_and_repeats_its_bits(name, device):
    assert not check(find(name, device), seed=1, repeats=20 if device == "cuda" else 2).failed


@ON_GPU
@pytest.mark.parametrize("name", [str(w) for w in workloads(torch.device("cuda"), "tiny", "triton")])
def test_every_benched_op_is_right_and_repeats_its_bits(name, device):
    (workload,) = (w for w in workloads(torch.device(device), "tiny", "triton") if str(w) == name)
    assert not check(workload, seed=1, repeats=20).failed


@ON_GPU
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ((1, 64, 128, 64), (130, 65, 129, 33), (512, 256, 640, 256)), ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_sizes(activation, shape, dtype, device):
    assert_right([t.to(device) for t in inputs(*shape, dtype)], activation, "triton")


@ON_GPU
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("shape", ((1, 64, 128), (130, 72, 136), (4000, 264, 648)), ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_unproven_tiles(activation, shape, dtype, device):
    """What tuning compares before it measures them, here at odd sizes and with every gate: many rounds of the ring."""
    tiles = config.unproven("gated_forward_kernel", config.architecture(torch.device(device)), dtype)
    if not tiles:
        pytest.skip("this device has none")
    (m, d, h), number = shape, torch.tensor(0.8, device=device)
    x, w, v, b_w, b_v = (randn(*s, dtype=dtype).to(device) for s in ((m, d), (h, d), (h, d), (h,), (h,)))
    gate_of = Gate(activation, number if activation == "swish" else None, number, number)
    for tile in tiles:
        with tuning.using(gated_forward_kernel=tile):
            found = [gated.gate_forward(x, w, v, b_w, b_v, gate_of, True) for _ in range(5)]
        eager = composite.gate_forward(x, w, v, b_w, b_v, gate_of, True)
        gold = composite.gate_forward(*(t.double() for t in (x, w, v, b_w, b_v)), gate_of, True)
        for results in found:
            assert all(map(torch.equal, results, found[0]))
        for ours, rounded, exact in zip(found[0], eager, gold, strict=True):
            assert_no_worse(ours, rounded, exact)


def replayed(run: Run) -> tuple[Tensor, ...]:
    """What `run` leaves when it is captured and replayed."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for t in found:
        t.zero_()
    graph.replay()
    torch.cuda.synchronize()
    return found


def on_side_stream(run: Run) -> tuple[Tensor, ...]:
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        found = run()
    torch.cuda.synchronize()
    return found


@ON_GPU
@pytest.mark.parametrize("way", (replayed, on_side_stream))
@pytest.mark.parametrize("name", ONE_EACH)
def test_same_bits_from_a_graph_and_on_a_side_stream(name, way, device):
    workload = find(name, device)
    run = workload.ours(*workload.inputs(0))
    expected = [t.clone() for t in run()]  # compiles, too
    assert all(map(torch.equal, way(run), expected))


@ON_GPU
@pytest.mark.parametrize("name", ONE_EACH)
def test_second_device(name, device):
    """With the first one current, as a model spread over devices leaves it."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    results = []
    for where in ("cuda:0", "cuda:1"):
        workload = find(name, where)
        tensors = (t.to(where) for t in find(name, "cuda:0").inputs(0))
        results.append([t.cpu() for t in workload.ours(*tensors)()])
    assert torch.cuda.current_device() == 0 and all(map(torch.equal, *results))


@ON_BOTH
@pytest.mark.parametrize("wrong", range(5))
def test_mixed_devices_are_refused(wrong, device):
    """Whichever argument is elsewhere, named, before anything is launched."""
    other = "meta" if device == "cpu" else "cpu"
    calls: dict[Callable[..., Any], tuple[tuple[int, ...], ...]] = {
        bo.gated_mlp: ((5, 3), (4, 3), (4, 3), (2, 4)),
        bo.interaction_matrices: ((4, 3), (4, 3), (2, 4)),
        bo.interaction_topk: ((4, 3), (4, 3), (2, 4)),
        bo.rank1_linear: ((5, 3), (3, 4), (4, 2), (5, 4)),
        bo.stochastic_rank1_linear: ((5, 3), (3, 4), (4, 2), (5, 4)),
        bo.faithfulness_loss: ((5, 3), (3, 4), (4, 5)),
        bo.rank1_accumulate: ((5, 4), (3, 4), (4, 2)),
        bo.component_gates: ((5, 4), (4, 3), (4, 3), (4, 3), (4,)),
    }
    for op, shapes in calls.items():
        if wrong >= len(shapes):
            continue
        tensors = [randn(*s).to(other if i == wrong else device) for i, s in enumerate(shapes)]
        options = {bo.interaction_topk: {"n": 1}, bo.stochastic_rank1_linear: {"seed": 0}}.get(op, {})
        with pytest.raises(RuntimeError, match=rf"must be on the device of .*{other if wrong else device}"):
            op(*tensors, **options, impl="triton")
    bo.interaction_matrices(*(randn(*s).to(device) for s in calls[bo.interaction_matrices]), impl="triton")


def test_mixed_devices_of_indices():
    tensors = [randn(*s) for s in ((5, 3), (3, 4), (4, 2))]
    with pytest.raises(RuntimeError, match="indices must be on the device of x, cpu, got meta"):
        bo.rank1_sparse(*tensors, torch.zeros(5, 2, dtype=torch.int64, device="meta"), randn(5, 2), impl="triton")


# More than 2^31 elements where the kernels write or read; on a CPU the same lines with a few.


def large(device: str, few: int, many: int) -> int:
    return many if device == "cuda" else few


def drawn(device: str, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).bfloat16()


def assert_tail_right(got: Tensor, spec: Callable[..., Tensor], *tensors: Tensor) -> None:
    assert_no_worse(got, spec(*tensors), spec(*(t.double() for t in tensors)))


@ON_BOTH
def test_large_gated(device):
    m, d, h = large(device, 70, 1 << 19), 64, large(device, 72, 4224)  # hid: 2.2e9 elements
    x, w, v = drawn(device, m, d), drawn(device, h, d), drawn(device, h, d)
    with torch.no_grad():
        y = bo.gated_bilinear(x, w, v, impl="triton")
    assert_tail_right(y[-4:].clone(), reference.gated_bilinear, x[-4:], w, v)


@ON_BOTH
@pytest.mark.parametrize("outputs", (8, 520), ids=("direction", "pairs"))  # a direction at a time, and all at once
def test_large_interaction(outputs, device):
    d, h = large(device, 18, {8: 16400, 520: 2048}[outputs]), 64  # q: 2.2e9 elements
    outputs = large(device, min(outputs, 20), outputs)
    w, v, c = drawn(device, h, d), drawn(device, h, d), drawn(device, outputs, h)
    q = bo.interaction_matrices(w, v, c, impl="triton")
    i = slice(d - 8, d)
    assert_tail_right(q[-1, i, i].clone(), lambda *t: reference.interaction_matrices(*t)[0], w[:, i], v[:, i], c[-1:])


@ON_BOTH
def test_large_masked(device):
    """Gates of 1 are masks of 1, whatever is drawn: the tail's samples are the plain product."""
    m, c, d, s = large(device, 20, 1 << 18), large(device, 70, 2112), 16, 4  # masked activations: 2.2e9 elements
    x, read, write = drawn(device, m, d), drawn(device, d, c), drawn(device, c, d)
    gates = torch.ones(c, device=device)
    with torch.no_grad():
        y = bo.stochastic_rank1_linear(x, read, write, gates, samples=s, seed=1, impl="triton")
    assert_tail_right(y[-1, -4:].clone(), reference.rank1_linear, x[-4:], read, write)


@ON_BOTH
def test_large_sparse(device):
    c, d = large(device, 800, 1 << 22), 520  # vectors: 2.2e9 elements
    x, columns, write = drawn(device, 3, d), drawn(device, c, d), drawn(device, c, 8)
    indices = c - 1 - torch.arange(6, device=device).view(3, 2)
    gates = torch.rand(3, 2, device=device)
    with torch.no_grad():
        y = bo.rank1_sparse(x, columns.t(), write, indices, gates, impl="triton")
    tail = slice(c - 8, c)

    def spec(x: Tensor, columns: Tensor, write: Tensor, gates: Tensor) -> Tensor:
        return reference.rank1_sparse(x, columns.t(), write, indices - (c - 8), gates)

    assert_tail_right(y, spec, x, columns[tail], write[tail], gates)


@ON_BOTH
def test_large_faithfulness(device):
    """All of the loss is in the last row."""
    o, i = large(device, 70, 1 << 16), large(device, 70, 33_000)  # weight: 2.2e9 elements
    weight = torch.zeros(o, i, dtype=torch.bfloat16, device=device)
    weight[-1] = 1
    none = (
        torch.zeros(i, 1, dtype=torch.bfloat16, device=device),
        torch.zeros(1, o, dtype=torch.bfloat16, device=device),
    )
    loss = bo.faithfulness_loss(weight, *none, impl="triton")
    torch.testing.assert_close(loss.double().cpu(), torch.tensor(1 / o, dtype=torch.float64), rtol=1e-6, atol=0)


@ON_BOTH
def test_large_accumulate(device):
    rows, d, c = large(device, 5, 2112), large(device, 70, 1024), 24  # weights: 2.2e9 elements
    gates, read, write = drawn(device, rows, c).float(), drawn(device, d, c), drawn(device, c, d)
    with torch.no_grad():
        weights = bo.rank1_accumulate(gates, read, write, impl="triton")
    assert_tail_right(weights[-1, -4:].clone(), reference.rank1_accumulate, gates[-1].bfloat16(), read, write[:, -4:])


@ON_BOTH
def test_large_component_gates(device):
    m, c = large(device, 70, 1 << 19), large(device, 70, 4224)  # logits: 2.2e9 elements
    network = [drawn(device, c, 2) for _ in range(3)]
    acts, b2 = drawn(device, m, 1).expand(m, c), drawn(device, c)
    with torch.no_grad():
        logits = bo.component_gates(acts, *network, b2, impl="triton")
    assert_tail_right(logits[-4:].clone(), reference.component_gates, acts[-4:], *network, b2)


@ON_BOTH
def test_large_uniform(device):
    m, c = large(device, 70, 1 << 19), large(device, 34, 4224)  # 2.2e9 numbers
    mask = bo.stochastic_mask(torch.zeros(m, 1, device=device).expand(m, c), seed=1, impl="triton").view(m, c)
    tail = bo.stochastic_mask(torch.zeros(m, 2, device=device), seed=1, impl="torch").view(m, 2)
    assert torch.equal(mask[-4:, :2], tail[-4:])  # a number depends on its row and column alone


@ON_GPU
def test_tuning(device, tmp_path, monkeypatch):
    """Measured for real, never within a capture, and right with what was chosen."""
    from bilinear_ops.kernels import tuning

    monkeypatch.setenv("BILINEAR_OPS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "_chosen", {})
    shapes = ((4096, 512), (1024, 512), (1024, 512), (512, 1024))
    bo.warmup(bo.gated_mlp, *shapes, dtype=torch.bfloat16, device=device, tune=True, activation="silu")
    assert {"gated_forward_kernel", "gated_backward_kernel"} <= {dict(key)["kernel"] for key in tuning._chosen}
    assert_right([t.to(device) for t in inputs(4096, 512, 1024, 512, torch.bfloat16)], "silu", "triton")
    monkeypatch.setattr(tuning, "_chosen", {})
    x, w = drawn(device, 4096, 256), drawn(device, 512, 256)
    bo.gated_bilinear(x, w, w, impl="triton")  # compiles the table's tile
    monkeypatch.setenv("BILINEAR_OPS_TUNE", "1")
    monkeypatch.setattr(tuning, "seconds", lambda *a: pytest.fail("measured"))
    replayed(lambda: (bo.gated_bilinear(x, w, w, impl="triton"),))


# Ways into the kernels that tests on CPU tensors with impl="torch" do not take.

TRAINED = (40, 24, 48, 16)  # m, d, h, o


def assert_trains(fn: Callable[..., Tensor], eager: Callable[..., Tensor], tensors: list[Tensor]) -> None:
    """Values and gradients of `fn` no worse than those of `eager`."""
    dy = randn(TRAINED[0], TRAINED[3]).to(tensors[0].device)
    dy = dy.to(eager(*tensors).dtype)
    gold = gradients(mlp(reference, "silu"), [t.double() for t in tensors], dy.double())
    for ours, theirs, exact in zip(gradients(fn, tensors, dy), gradients(eager, tensors, dy), gold, strict=True):
        assert ours.dtype == theirs.dtype
        assert_no_worse(ours, theirs, exact)


@ON_BOTH
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_compiled(dtype, device):
    tensors = [t.to(device) for t in inputs(*TRAINED, dtype)]
    compiled = torch.compile(
        mlp(bo, "silu", impl="triton"), fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager"
    )
    assert_trains(compiled, mlp(reference, "silu"), tensors)


@ON_BOTH
@pytest.mark.parametrize("allowed", (False, True))
def test_tf32(allowed, device):
    """Not asked for, products keep float32's accuracy; asked for, they lose no more than PyTorch's own."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, allowed
    try:
        tensors = [t.to(device) for t in inputs(*TRAINED, torch.float32)]
        assert_trains(mlp(bo, "silu", impl="triton"), mlp(reference, "silu"), tensors)
    finally:
        matmul.allow_tf32 = before


@ON_BOTH
def test_autocast(device):
    def casting(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*tensors: Tensor) -> Tensor:
            with torch.autocast(device, torch.bfloat16):
                return fn(*tensors)

        return call

    tensors = [t.to(device) for t in inputs(*TRAINED, torch.float32, bias=False)[:4]]
    ours, eager = casting(mlp(bo, "silu", impl="triton")), casting(mlp(reference, "silu"))
    assert ours(*tensors).dtype == torch.bfloat16
    assert_trains(ours, eager, tensors)


FIRST_IN_CAPTURE = """
import torch, bilinear_ops as bo
x, w, v = (torch.ones(64, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
graph = torch.cuda.CUDAGraph()
try:
    with torch.cuda.graph(graph):
        y = bo.gated_bilinear(x, w, v, impl="triton")
except RuntimeError as error:
    print("refused:", error)
else:
    y.zero_()
    graph.replay()
    print("replayed:", (y == 64 * 64).all().item())
"""


@ON_GPU
def test_first_call_within_a_capture(device):
    """Either the graph is right, or the error says that a capture is under way."""
    done = subprocess.run([sys.executable, "-c", FIRST_IN_CAPTURE], capture_output=True, text=True, timeout=300)
    assert "replayed: True" in done.stdout or ("refused:" in done.stdout and "captur" in done.stdout), done.stderr
    x = torch.ones(64, 64, device=device, dtype=torch.bfloat16)
    warm = lambda: (bo.gated_bilinear(x, x, x, impl="triton"),)  # noqa: E731
    warm()
    assert (replayed(warm)[0] == 64 * 64).all()


# The session itself.


@pytest.mark.parametrize(
    ("expression", "interpreted"),
    (
        ("", True),
        ("not gpu and not slow", True),
        ("not gpu and not slow and not ci", True),
        ("ci", True),
        ("slow", True),
        ("not slow", True),
        ("not (gpu or slow)", True),
        ("gpu", False),
        ("gpu and not slow", False),
        ("gpu or slow", False),
    ),
)
def test_gpu_tests_alone_are_not_interpreted(expression, interpreted):
    assert interprets(expression) == interpreted


def test_a_gpu_test_launches_kernels_on_the_device(monkeypatch):
    from triton import knobs

    def call(marker: object, launches: int) -> None:
        running = pytest_runtest_call(SimpleNamespace(get_closest_marker=lambda name: marker))
        next(running)
        for _ in range(launches):
            knobs.runtime.launch_enter_hook(None)
        with pytest.raises(StopIteration):
            running.send(None)

    call(None, 0)
    with pytest.raises(AssertionError, match="this session interprets"):
        call(object(), 1)
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # an attribute would stay when it is put back
    with pytest.raises(AssertionError, match="no kernel was launched"):
        call(object(), 0)
    call(object(), 1)
    assert not knobs.runtime.launch_enter_hook.calls
