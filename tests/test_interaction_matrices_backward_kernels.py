"""The kernels of the interaction matrices' gradients, in both orders of contraction, and what they may touch."""

import pytest
import torch

pytest.importorskip("triton")

import bilinear_ops as bo
from bilinear_ops import testing
from bilinear_ops.composite.interaction import matrices as composite
from bilinear_ops.kernels import config, tuning
from bilinear_ops.kernels.interaction import matrices_backward as kernels
from bilinear_ops.testing import assert_no_worse, gradients, randn

DIRECTION, PAIRS = 3, 18  # directions: a tail, and more than one tile by pairs
ORDERS = {
    DIRECTION: {"accumulate_backward_kernel"},
    PAIRS: {f"interaction_{n}_kernel" for n in ("strips", "coefficients", "weights")},
}
ALL = [True, True, True, False]


def layer(K, d=21, h=41, dtype=torch.float32):
    """Two strips of columns, the last with a tail; two tiles of neurons."""
    return randn(h, d, dtype=dtype), randn(h, d, dtype=dtype), randn(K, h, dtype=dtype)


def gradient(K, d=21, packed=False, dtype=torch.float32):
    return randn(K, *((d * (d + 1) // 2,) if packed else (d, d)), dtype=dtype)


def assert_right(tensors, dq):
    layout = {"layout": "packed" if dq.dim() == 2 else "full"}
    ours = gradients(lambda *t: bo.interaction_matrices(*t, impl="triton", **layout), tensors, dq)
    eager = gradients(lambda *t: bo.reference.interaction_matrices(*t, **layout), tensors, dq)
    gold = gradients(
        lambda *t: bo.reference.interaction_matrices(*t, **layout), [t.double() for t in tensors], dq.double()
    )
    for what, *results in zip(("matrices", "dw", "dv", "dc"), ours, eager, gold, strict=True):
        assert_no_worse(*results, what=what)


@pytest.fixture(autouse=True)
def _few_rows_of_zeros(monkeypatch):
    """Past the last direction, as many as the interpreter's tiles need."""
    monkeypatch.setattr(kernels, "ROWS", 16)


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels launched."""
    from triton.runtime.interpreter import InterpretedFunction

    names, run = set(), InterpretedFunction.run
    monkeypatch.setattr(
        InterpretedFunction, "run", lambda self, *a, **o: (names.add(self.__name__), run(self, *a, **o))[1]
    )
    return names


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("K", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.ci)])
def test_gradients(dtype, K, packed):
    assert_right(layer(K, dtype=dtype), gradient(K, packed=packed, dtype=dtype))


@pytest.mark.parametrize("K", ORDERS)
def test_each_order_runs_its_kernels(K, launched):
    w, v, c = layer(K)
    kernels.interaction_matrices_backward(gradient(K), w, v, c, None, ALL)
    assert launched == ORDERS[K]


@pytest.mark.parametrize("size", list(testing.shapes("K d h", base=3, mixed=0, sizes=(1, 17, 37))), ids=str)
def test_sizes_down_the_table(size):
    assert_right(layer(**size), gradient(size["K"], size["d"]))


@pytest.mark.parametrize("K", (6, 18))
@pytest.mark.parametrize("kind", testing.LAYOUTS)
def test_any_layout(kind, K):
    """Of the tensors and of the result's gradient."""
    tensors = [testing.layout(t, kind) for t in layer(K, 18, 6)]
    full, packed = testing.layout(randn(K, 18 * 18), kind).unflatten(1, (18, 18)), gradient(K, 18, packed=True)
    for dq in (full, testing.layout(packed, kind)):
        found = kernels.interaction_matrices_backward(dq, *tensors, None, ALL)
        expected = composite.interaction_matrices_backward(*(t.double() for t in (dq, *tensors)), None, ALL)
        for got, gold in zip(found[:3], expected[:3], strict=True):
            torch.testing.assert_close(got.double(), gold, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("K", ORDERS)
def test_touches_only_its_memory(K, packed):
    tensors = [testing.guarded(t) for t in layer(K)]
    dq = testing.guarded(gradient(K, packed=packed))
    with testing.GuardedAllocations() as memory:
        found = kernels.interaction_matrices_backward(dq, *tensors, None, ALL)
    assert memory.allocated
    memory.check()
    expected = composite.interaction_matrices_backward(dq.clone(), *(t.clone() for t in tensors), None, ALL)
    for got, gold in zip(found[:3], expected[:3], strict=True):
        torch.testing.assert_close(got, gold, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("K", ORDERS)
def test_several_blocks_of_directions_and_parts_of_strips(K, monkeypatch):
    """What is added up in several pieces is what it is in one, and the same at every call."""
    monkeypatch.setattr(config, "processors", lambda device: 4)
    w, v, c = layer(K, 37, 9)
    dq = gradient(K, 37)
    one = kernels.interaction_matrices_backward(dq, w, v, c, None, ALL)
    monkeypatch.setattr(kernels, "FOLDED", 10 * 1536)  # pairs of three strips
    found, again = (kernels.interaction_matrices_backward(dq, w, v, c, None, ALL) for _ in range(2))
    for got, same, expected in zip(found[:3], again[:3], one[:3], strict=True):
        assert torch.equal(got, same)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(("o", "packed"), [(2, False), (2, True), (30, True)])
def test_factors(o, packed, monkeypatch):
    """Mixed after the contraction where the rank is low, else before it; a block of few directions at a time."""
    monkeypatch.setattr(kernels, "MIXED", 20 * 81)
    (w, v, p), u, dq = layer(o, 9, 8), randn(50, o), gradient(50, 9, packed)
    assert composite.two_stage(50, o, 8) == (o == 2)
    for need in ([True] * 4, [False, True, False, True], [False, False, True, False]):
        found = kernels.interaction_matrices_backward(dq, w, v, p, u, need)
        expected = composite.interaction_matrices_backward(*(t.double() for t in (dq, w, v, p, u)), [True] * 4)
        for got, gold, needed in zip(found, expected, need, strict=True):
            assert (got is not None) == needed
            if needed:
                torch.testing.assert_close(got.double(), gold, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("d", [1, 16, 33, 65])
def test_folded(d, packed):
    """Strip after strip of 16 columns, each with its rows to its own last column; up to three tiles each way."""
    dq = gradient(2, d, packed)
    full = composite.unpack_symmetric(0.5 * dq, d) if packed else 0.5 * (dq + dq.mT)
    if not packed:
        full.diagonal(dim1=1, dim2=2).mul_(0.5)
    square = torch.zeros(16, (d + 15) // 16 * 16, (d + 15) // 16 * 16)
    square[:2, :d, :d] = full.triu()
    strips = [square[:, : j + 16, j : j + 16].flatten(1) for j in range(0, d, 16)]
    assert torch.equal(kernels.folded(dq, d, torch.float32), torch.cat(strips, 1))


@pytest.mark.parametrize("K", ORDERS)
def test_needed_gradients_only(K, launched):
    w, v, c = layer(K)
    dq = gradient(K)
    full = kernels.interaction_matrices_backward(dq, w, v, c, None, ALL)
    for wanted, other in enumerate(("coefficients", "coefficients", "weights")):
        need = [i == wanted for i in range(4)]
        launched.clear()
        found = kernels.interaction_matrices_backward(dq, w, v, c, None, need)
        assert [t is not None for t in found] == need
        torch.testing.assert_close(found[wanted], full[wanted])
        assert f"interaction_{other}_kernel" not in launched


@pytest.mark.parametrize("K", ORDERS)
def test_what_a_choice_leaves_to_pytorch(K):
    """PyTorch, but not for "triton"."""
    w, v, c = layer(K)
    dq = gradient(K)
    kernel = "accumulate_backward_kernel" if K == DIRECTION else "interaction_weights_kernel"
    with tuning.using(**{kernel: config.LIBRARY}):
        found = kernels.interaction_matrices_backward(dq, w, v, c, None, ALL)
        with pytest.raises(RuntimeError, match="leaves these sizes to PyTorch"):
            kernels.interaction_matrices_backward(dq, w, v, c, None, ALL, library=False)
    for got, gold in zip(found[:3], composite.interaction_matrices_backward(dq, w, v, c, None, ALL)[:3], strict=True):
        torch.testing.assert_close(got, gold, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("K", ORDERS)
def test_contract(K):
    (w, v, c), dq = layer(K, 3, 5), gradient(K, 3)
    for need in (ALL, [False, True, False, False]):
        args = (dq, w, v, c, None, False, need, "triton")
        torch.library.opcheck(torch.ops.bilinear_ops.interaction_backward.default, args)


@pytest.mark.parametrize("size", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (20, 3, 0)])
def test_empty_sizes(size):
    tensors = layer(*size)
    found = gradients(lambda *t: bo.interaction_matrices(*t, impl="triton"), tensors, gradient(size[0], size[1]))
    for got, t in zip(found[1:], tensors, strict=True):
        assert torch.equal(got, torch.zeros_like(t))


def test_the_order_of_contraction_takes_the_fewest_products():
    half = torch.bfloat16
    found = {arch: [config.interaction_pairs(arch, half, k) for k in (8, 512)] for arch in config.SHARED_MEMORY}
    assert set(map(tuple, found.values())) == {(False, True)}
    assert [config.interaction_pairs("interpreter", half, k) for k in (8, 9, 16, 17)] == [False, True, True, True]
