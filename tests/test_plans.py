"""Plans of launches: a plan passes what a launch without one would, and no other launch finds it."""

import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

import bilinear_ops as bo
from bilinear_ops import _impl
from bilinear_ops.kernels import config, few_rows, gated, tuning
from bilinear_ops.kernels import launching as via
from bilinear_ops.kernels.records import RowTile, SplitTile, Tile
from bilinear_ops.results import Gate
from bilinear_ops.testing import randn

M, D, H, OUT = 5, 8, 16, 24
FEW = SplitTile(16, 16, 16, 4, 1, blocks_per_sm=2)
KERNELS = ("gated_forward_kernel", "gate_kernel", "gated_backward_kernel", "gate_backward_kernel")
SILU = Gate("silu", None, None, None)


class Recorded:
    """A kernel that compiles at once and does nothing but say whether a launch was bound anew or followed a plan."""

    def __init__(self, kernel, launches):
        self.arg_names, self.launches = kernel.arg_names, launches

    def __getitem__(self, grid):
        def bound(*arguments, **constants):
            arguments += tuple(constants[name] for name in self.arg_names[len(arguments) :])
            self.launches.append(("bound", (*grid, 1, 1)[:3], arguments))
            return Compiled(self.launches)

        return bound


class Compiled:
    def __init__(self, launches):
        self.launches = launches

    def __getitem__(self, grid):
        return lambda *arguments: self.launches.append(("planned", grid, arguments))


@pytest.fixture
def launches(monkeypatch):
    """(how, grid, arguments) of every launch."""
    found = []
    for name in KERNELS:
        monkeypatch.setattr(gated, name, Recorded(getattr(gated, name), found))
    for name in ("gated_split_kernel", "gated_sum_kernel"):
        monkeypatch.setattr(few_rows, name, Recorded(getattr(few_rows, name), found))
    monkeypatch.setattr(via, "INTERPRET", False)  # or none would be kept
    via.forget_plans()
    yield found
    via.forget_plans()


def gate(shape=(M, H), dtype=torch.float32, activation="silu", limit=None, layout=None):
    a, z = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype)
    gated.gate(layout(a) if layout else a, z, Gate(activation, None, limit, None))


def forward(save=False, bias=False):
    b_w = randn(H) if bias else None
    gated.gate_forward(randn(M, D), randn(H, D), randn(H, D), b_w, None, SILU, save)


def backward(need_hid=True, need_beta=False, p=True):
    tensors = (randn(M, OUT), randn(OUT, H)) if p else (randn(M, H), None)
    gated.gate_backward(*tensors, randn(M, 2 * H), Gate("swish", torch.ones(()), None, None), need_hid, need_beta)


def layer(precision=None):
    """A call of the public function, under autocast if there is a precision."""
    tensors = randn(M, D), randn(H, D), randn(H, D), randn(D, H)
    with nullcontext() if precision is None else torch.autocast("cpu", precision):
        bo.gated_mlp(*tensors, impl="triton")


def few(save=False, sum_tile=None):
    """Rows few enough for a split contraction: two launches."""
    others = {} if sum_tile is None else {"gated_sum_kernel": sum_tile}
    with tuning.using(gated_forward_kernel=FEW, **others):
        gated.gate_forward(randn(M, 9 * D), randn(H, 9 * D), randn(H, 9 * D), None, None, SILU, save)


def strided(t):
    return torch.cat((t, t), 1)[:, : t.shape[1]]


def unaligned(t):
    return t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t)


def with_tf32(call):
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        call()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def with_tile(call):
    with tuning.using(gate_kernel=RowTile(16, 32, 4)):
        call()


# A key is (kernel, device, options, tuning, switches, *layouts), a layout (dtype, shape, strides, alignment).
def without(*parts):
    return lambda key: tuple(part for i, part in enumerate(key) if i not in parts)


def without_layouts(part):
    def cut(key):
        layouts = (t and tuple(n for i, n in enumerate(t) if i != part) for t in key[5:])
        return (*key[:5], *layouts)

    return cut


OPTIONS, TUNING, SWITCHES = without(2), without(3), without(4)
FLIPS = {
    "dtype": (gate, partial(gate, dtype=torch.bfloat16), without_layouts(0)),
    "autocast": (layer, partial(layer, torch.bfloat16), without_layouts(0)),
    "shape": (gate, partial(gate, (M + 1, H)), without_layouts(1)),
    "strides": (gate, partial(gate, layout=strided), without_layouts(2)),
    "alignment": (gate, partial(gate, layout=unaligned), without_layouts(3)),
    "activation": (gate, partial(gate, activation="relu"), OPTIONS),
    "a number": (gate, partial(gate, limit=torch.ones(())), without(7, 8, 9)),
    "a bias": (forward, partial(forward, bias=True), without(8, 9)),
    "what is saved": (forward, partial(forward, save=True), OPTIONS),
    "a needed hid": (backward, partial(backward, need_hid=False), OPTIONS),
    "a needed beta": (backward, partial(backward, need_beta=True), OPTIONS),
    "a needed hid, alone": (partial(backward, p=False), partial(backward, p=False, need_hid=False), without(10)),
    "a needed beta, alone": (partial(backward, p=False), partial(backward, p=False, need_beta=True), OPTIONS),
    "TF32": (gate, partial(with_tf32, gate), SWITCHES),
    "a tile in use": (gate, partial(with_tile, gate), TUNING),
}


@pytest.mark.parametrize("dropped", (False, True), ids=("whole key", "part dropped"))
@pytest.mark.parametrize("flip", FLIPS)
def test_a_plan_is_found_by_the_whole_of_its_key(flip, dropped, launches, monkeypatch):
    base, flipped, cut = FLIPS[flip]
    if dropped:
        key = via.plan_key
        monkeypatch.setattr(via, "plan_key", lambda *args: cut(key(*args)))

    def how(call):
        launches.clear()
        try:
            call()
        except (ValueError, StopIteration):  # another launch's plan has other arguments
            return "misled"
        return launches[0][0]

    assert how(base) == "bound" and how(base) == "planned"
    assert (how(flipped) == "bound") == (not dropped)


def test_a_key_holds_device_and_tuning(monkeypatch):
    def key(index=0):
        like = SimpleNamespace(device=torch.device("cuda", index), dtype=torch.float32, is_cuda=False)
        return via.plan_key("gate_kernel", like, ())

    assert key() == key() != key(1)
    with tuning.measuring():
        assert key() != before_measuring(key)
    before = key()
    monkeypatch.setattr(tuning, "_chosen", {**tuning._chosen, (("kernel", "another"),): None})
    assert key() != before
    before = key()
    monkeypatch.setattr(config, "architecture", lambda device: "sm_100")
    monkeypatch.setattr(config.triton, "__version__", "3.9.0")
    monkeypatch.delenv("BILINEAR_OPS_WARP_SPECIALIZE", raising=False)
    assert key() != before
    monkeypatch.setenv("BILINEAR_OPS_WARP_SPECIALIZE", "0")
    assert key() == before


def before_measuring(key):
    return (*key()[:3], (None, len(tuning._chosen), False), *key()[4:])


CALLS = {
    "gate": gate,
    "forward": forward,
    "saving forward": partial(forward, True, True),
    "few rows": few,
    "backward": backward,
    "backward of beta": partial(backward, False, True),
    "backward alone": partial(backward, p=False),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_plan_passes_what_its_launch_would(call, launches):
    """Other tensors of the same layouts: the same arguments, with descriptors of their own."""
    call()
    call()
    via.forget_plans()
    call()
    each = len(launches) // 3
    for i in range(each):
        first, planned, bound = launches[i::each]
        assert [how for how, *_ in (first, planned, bound)] == ["bound", "planned", "bound"]
        assert planned[1] == bound[1]
        assert list(map(facts, planned[2])) == list(map(facts, bound[2]))
        for before, after in zip(first[2], planned[2], strict=True):
            if isinstance(after, TensorDescriptor):
                assert after is not before and after.base is not before.base


def facts(argument):
    """What a kernel sees of an argument, but for its address."""
    if isinstance(argument, TensorDescriptor):
        fields = {name: value for name, value in vars(argument).items() if name != "base"}
        return "descriptor", argument.base.dtype, fields
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.numel()
    return argument


def test_both_launches_of_few_rows_are_planned(launches):
    for _ in range(2):
        few()
    assert [how for how, *_ in launches] == ["bound", "bound", "planned", "planned"]
    few(save=True)
    few(sum_tile=RowTile(4, 16, 4))
    assert [how for how, *_ in launches[4:]] == ["bound", "bound", "planned", "bound"]


def test_a_plan_launches_on_the_tensors_it_is_given(launches):
    x, w, v = randn(M, D), randn(H, D), randn(H, D)
    gated.gate_forward(x, w, v, None, None, SILU, True)
    x, w, v = randn(M, D), randn(H, D), randn(H, D)
    hid, az = gated.gate_forward(x, w, v, None, None, SILU, True)
    how, _, arguments = launches[-1]
    bases = [a.base.data_ptr() for a in arguments if isinstance(a, TensorDescriptor)]
    a, z = az.chunk(2, 1)
    assert how == "planned" and bases == [t.data_ptr() for t in (x, w, v, hid, a, z)]


def test_the_library_is_planned_too(launches, monkeypatch):
    asked = []
    monkeypatch.setattr(config, "gated", lambda *args: asked.append(args) or (config.LIBRARY,))
    for _ in range(2):
        forward()
        backward()
    assert len(asked) == 2  # once each


def test_plans_are_bounded(monkeypatch):
    monkeypatch.setattr(via, "MOST_PLANS", 3)
    monkeypatch.setattr(via, "INTERPRET", False)
    via.forget_plans()
    for i in range(10):
        via.keep(("kernel", torch.device("cpu"), i), None)
        assert len(via._plans) <= 3 and via.planned(("kernel", torch.device("cpu"), i)) is None
    via.forget_plans()


def test_a_tile_that_does_not_fit_leaves_no_plan(launches, monkeypatch):
    from triton.runtime.errors import OutOfResources

    bind = Recorded.__getitem__

    def fails_once(self, grid):
        monkeypatch.setattr(Recorded, "__getitem__", bind)
        raise OutOfResources(2, 1, "shared memory")

    monkeypatch.setattr(Recorded, "__getitem__", fails_once)
    tiles = Tile(128, 128, 64, 8, 3), Tile(64, 64, 32, 4, 2)
    monkeypatch.setattr(config, "gated", lambda *args: tiles)
    forward()
    assert [plan.tile for plan in via._plans.values()] == [tiles[1]]


def test_no_device_is_made_current_that_is(monkeypatch):
    made = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: made.append(device) or nullcontext())
    for index in (0, 1):
        t = SimpleNamespace(is_cuda=True, get_device=lambda i=index: i, device=torch.device("cuda", index))
        with via.on_device_of(t):
            pass
    assert made == [torch.device("cuda", 1)]


def test_properties_are_looked_up_once(monkeypatch):
    seen = []
    found = SimpleNamespace(major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: seen.append(device) or found)
    _impl._known_why_not.cache_clear()
    try:
        t = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32)
        assert [_impl.why_not_triton(t) for _ in range(3)] == [None] * 3 and len(seen) == 1
    finally:
        _impl._known_why_not.cache_clear()


@pytest.mark.ci
@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler for the stubbed driver")
def test_the_host_can_be_timed(tmp_path):
    """Compiled kernels pass through Triton's own launcher into the stub, planned ones too."""
    receipts = tmp_path / "receipts.jsonl"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.host", "--seconds", "0.01", "--json", str(receipts)]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert receipts.read_text().count('"kind": "host, stubbed driver"') == 8
