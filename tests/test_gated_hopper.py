"""The gated forward of warp roles, which no GPU has run: its own text run in many orders, a twin of its arithmetic that
Triton interprets, and its machine code."""

import re
import types

import pytest
import torch

pytest.importorskip("triton")

import gluon_stub
from ring_twin import twin_kernel
from test_compiled import facts

from bilinear_ops.composite import gated as composite
from bilinear_ops.kernels import config, gated, gated_hopper, tile, tuning
from bilinear_ops.kernels import launching as via
from bilinear_ops.kernels.records import RingTile
from bilinear_ops.results import Gate
from bilinear_ops.testing import assert_no_worse, randn

M, D, H = 136, 136, 264  # 2 x 3 tiles of 3 steps each, and a tail in every dimension
STEPS = 2 * 3 * 3
BLOCKS = 128, 128, 64


def plain(function):
    return types.FunctionType(function.fn.__code__, {})


def interpreted(a, z, beta, limit, offset, activation):
    """The gate's kernel."""
    numbers = (None if n is None else torch.tensor(n) for n in (beta, limit, offset))
    return gated.gate(a.as_subclass(torch.Tensor), z.as_subclass(torch.Tensor), Gate(activation, *numbers))


def product(a, z, *_):
    """The gate "identity"."""
    return a * z


ALSO = {"grouped": plain(tile.grouped), "column_halves": plain(tile.column_halves)}


def inputs(dtype, bias=True):
    x, w, v = (randn(*shape, dtype=dtype, scale=s) for shape, s in (((M, D), 1), ((H, D), D**-0.5), ((H, D), D**-0.5)))
    return x, w, v, *((randn(H, dtype=dtype), randn(H, dtype=dtype)) if bias else (None, None))


@pytest.fixture
def launched(monkeypatch):
    """The launcher with the kernel's text run in an order by chance: its results, and the barriers of each program."""

    def run(tensors, gate_of, save=True, stages=3, seed=0, programs=2, gate=product, change=("", "")):
        barriers = []

        def start(key, tile, kernel, grid, *arguments, **constants):
            if kernel is not gated_hopper.gated_ring_kernel:
                return launch(key, tile, kernel, grid, *arguments, **constants)
            roles = gluon_stub.Roles(seed)
            barriers.extend(gluon_stub.run(kernel, grid, arguments, constants, roles, ALSO | {"gate": gate}, change))

        monkeypatch.setattr(via, "start", start)
        monkeypatch.setattr(config, "processors", lambda device: programs)
        with tuning.using(gated_forward_kernel=RingTile(*BLOCKS, 4, stages, group_m=2)):
            return *gated.gate_forward(*tensors, gate_of, save), barriers

    launch = via.start
    return run


def assert_right(found, tensors, gate_of, save=True):
    expected = composite.gate_forward(*tensors, gate_of, save)
    gold = composite.gate_forward(*(None if t is None else t.double() for t in tensors), gate_of, save)
    for ours, eager, exact in zip(found, expected, gold, strict=True):
        if exact is not None:
            assert_no_worse(ours, eager, exact)


@pytest.mark.parametrize("stages", (2, 3, 4, 5))
@pytest.mark.parametrize("programs", (1, 4))
def test_right_in_any_order(stages, programs, launched):
    """Also where the stages divide neither a tile's steps nor a program's; and each phase of a barrier has its end."""
    tensors = inputs(torch.bfloat16)
    for seed in range(3):
        *found, barriers = launched(tensors, Gate("identity"), stages=stages, seed=seed, programs=programs)
        assert_right(found, tensors, Gate("identity"))
        assert len(barriers) == programs
        for full, empty in barriers:
            assert [b.phase for b in full] == [b.phase for b in empty] and len(full) == stages
            assert all(b.pending == b.count and b.bytes == 0 for b in (*full, *empty))
        assert sum(b.phase for full, _ in barriers for b in full) == STEPS


@pytest.mark.parametrize("activation", ("relu", "swish"))
def test_gates(activation, launched):
    """With a limit and an offset, or without either and without biases or saved pre-activations."""
    beta = torch.tensor(1.3) if activation == "swish" else None
    whole = activation == "swish"
    gate_of = Gate(activation, beta, *((torch.tensor(0.8), torch.tensor(1.0)) if whole else (None, None)))
    tensors = inputs(torch.float16, bias=whole)
    *found, _ = launched(tensors, gate_of, save=whole, gate=interpreted)
    assert_right(found, tensors, gate_of, save=whole)


LAST = "b_az = warpgroup_mma_wait(0, deps=(b_az,))\n        mbarrier.arrive(empty.index(last), count=1)"
BROKEN = {
    "a ring of one stage": ("STAGES: gl.constexpr,\n):", "STAGES: gl.constexpr,\n):\n    STAGES = 1"),
    "the first round waits for a release": ("parity ^ 1)", "parity)"),
    "parities of steps": ("step // STAGES & 1", "step & 1"),
    "released by one warpgroup": ("empty.index(stage), count=WARPGROUPS", "empty.index(stage), count=1"),
    "released before the product": ("warpgroup_mma_wait(1,", "warpgroup_mma_wait(2,"),
    "read before the last product": (LAST, LAST.replace("wait(0", "wait(1")),
    "the last stage kept": (LAST, LAST.partition("\n")[0]),
    "released twice": ("pred=d > 0", "pred=True"),
    "fewer bytes than are copied": (" + v.block_type.nbytes", ""),
    "no wait for the copies": ("mbarrier.wait(full.index(stage), parity)", "pass"),
    "no wait for the products": ("mbarrier.wait(empty.index(stage), parity ^ 1)", "pass"),
    "the rows of one warpgroup": ("slice(WARPGROUP * ROWS, ROWS)", "slice(0, ROWS)"),
    "a buffer of both warpgroups": ("staged.index(2 * WARPGROUP + i)", "staged.index(i)"),
    "a store before the buffer is read": ("tma.store_wait(1)", "tma.store_wait(2)"),
    "the end before the last store": ("    tma.store_wait(0)\n", ""),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_protocol_is_noticed(name, launched):
    """In at least one of a few orders: it never ends, counts wrongly, or gives other numbers."""
    gate_of = Gate("identity")
    tensors = inputs(torch.bfloat16)

    def noticed(seed):
        try:
            *found, _ = launched(tensors, gate_of, seed=seed, change=BROKEN[name])
            assert_right(found, tensors, gate_of)
        except (gluon_stub.Deadlock, AssertionError):
            return True
        return False

    assert any(map(noticed, range(8)))


def test_the_protocol_passes_where_broken_ones_must_fail(launched):
    tensors = inputs(torch.bfloat16)
    for seed in range(8):
        *found, _ = launched(tensors, Gate("identity"), seed=seed)
        assert_right(found, tensors, Gate("identity"))


@pytest.mark.parametrize(("activation", "stages", "programs"), (("silu", 5, 1), ("silu_clamped", 2, 3)))
def test_twin(activation, stages, programs):
    """Its arithmetic in Triton's interpreter: 2 x 2 tiles of 3 steps, with a tail in every dimension."""
    m, d, h, block = 21, 40, 19, 16
    number = torch.tensor(0.8) if activation == "silu_clamped" else None
    gate_of = Gate(activation, None, number, number)
    tensors = [randn(*shape) for shape in ((m, d), (h, d), (h, d), (h,), (h,))]
    hid, az = torch.empty(m, h), torch.empty(m, 2 * h)
    ring, uses = torch.empty(programs, stages, 3 * block, block), torch.zeros(programs, stages, dtype=torch.int32)
    twin_kernel[(programs,)](
        *tensors, None, number, number, hid, *az.chunk(2, 1), 2 * h, ring, uses, m, h, d,
        ACTIVATION=activation, BLOCK_M=block, BLOCK_H=block, BLOCK_D=block, GROUP_M=2, STAGES=stages,
    )  # fmt: skip
    assert_right((hid, az), tensors, gate_of)
    assert uses.min() > 0 and uses.max() > 1 and uses.sum() == 4 * 3  # none negative, and two rounds of the ring


def assert_compiled(found):
    """Wide products of which none is waited for alone, no spills, and barriers as the kernel's text has them."""
    stages = 4
    assert found["spills"] == found["waits"] == 0 and found["matrix"] == {"HGMMA.64x256x16": 4}
    assert found["shared"] <= config.SHARED_MEMORY["sm_90"]
    ptx = found["ptx"]
    inits = [line.rpartition(" ")[2] for line in ptx if line.startswith("mbarrier.init")]
    assert inits == ["1", "2"] * stages  # arrivals: the copies' at `full`, each warpgroup's at `empty`
    (expected,) = (int(line.rpartition(" ")[2]) for line in ptx if "expect_tx" in line)
    assert expected == (BLOCKS[0] + 2 * BLOCKS[1]) * BLOCKS[2] * 2  # bytes, of three copies
    assert ptx.count("cp.async.bulk.tensor.2d.shared") == 3 and ptx.count("cp.async.bulk.tensor.2d.global") == 2 * 6
    assert ptx.count("mbarrier.try_wait") == 3 and ptx.count("mbarrier.arrive.shared") == 2 * 2
    registers = [int(re.search(r"\d+$", line)[0]) for line in ptx if line.startswith("setmaxnreg")]
    assert registers.count(240) == 2 and 24 in registers  # of each warpgroup that multiplies, and of the third
    assert (2 * 240 + 24) * 128 <= 65_536


def assert_ordered(ptx):
    """What one thread does for its warpgroup follows a barrier of the warpgroup, and that what the others must do."""
    steps = [line for line in ptx if not line.startswith(("setmaxnreg", "mbarrier.init", "mbarrier.try_wait"))]
    copying = [line for line in steps if "expect_tx" in line or line.endswith("2d.shared")]
    steps = [line for line in steps if line not in copying]
    for i, line in enumerate(steps):
        if line == "mbarrier.arrive.shared":
            assert steps[i - 2 : i] == ["wgmma.wait_group", "bar.sync"]
        if line == "cp.async.bulk.tensor.2d.global":
            assert steps[i - 3 : i] == ["stmatrix", "fence.proxy.async", "bar.sync"]
        if line == "stmatrix" and steps[i - 1] != "stmatrix":
            assert steps[i - 2 : i] == ["cp.async.bulk.wait_group.read", "bar.sync"]


def test_compiled():
    found = facts("rings")["rings"]["identity"]
    assert_compiled(found)
    assert_ordered(found["ptx"])


@pytest.mark.ci
def test_more_of_them_compiled():
    """With the newest Triton; 3.6 spills 70 times in silu_bounded's epilogue, if everything is asked for."""
    for found in facts("more_rings")["more_rings"].values():
        assert_compiled(found)
        assert_ordered(found["ptx"])


def test_a_plan_of_it_has_descriptors_of_its_own_kind():
    """For the tensors of each launch, with the layout of the first."""
    first, then, launches = randn(8, 64, dtype=torch.bfloat16), randn(8, 64, dtype=torch.bfloat16), []
    described = gated_hopper.described(first, 8, 64)
    compiled = {(2, 1, 1): lambda *arguments: launches.append(arguments)}
    plan = via.Plan(RingTile(*BLOCKS, 4, 2), compiled, (2,), (described, None, 3))
    plan.launch(then, None)
    ((found, *rest),) = launches
    assert type(found) is type(described) and found.base is then and rest == [None, 3]
    assert vars(found) == vars(described) | {"base": then} and not torch.is_tensor(plan.slots[0][1].base)
