"""The orders of contraction behind the Triton launcher, one by one, and what they may touch."""

import pytest
import torch

pytest.importorskip("triton")

import bilinear_ops as bo
from bilinear_ops import testing
from bilinear_ops.composite.interaction import matrices as composite
from bilinear_ops.kernels import config, tuning
from bilinear_ops.kernels.interaction import matrices as kernels
from bilinear_ops.kernels.interaction import ranking
from bilinear_ops.testing import assert_no_worse, gradients, randn

PAIRS = config.PairTile(8, 16, 16, 16, 4, 1)  # a tail in every dimension, tiles off the diagonal
DIRECTION = config.Tile(16, 16, 16, 4, 1)
ORDERS = {"pairs": PAIRS, "direction": DIRECTION, "library": config.LIBRARY}


def layer(K, d, h, dtype=torch.float32):
    return randn(h, d, dtype=dtype), randn(h, d, dtype=dtype), randn(K, h, dtype=dtype)


def assert_right(tensors, packed, order):
    kind = "packed" if packed else "full"
    with tuning.using(interaction_matrices=ORDERS[order]):
        q = kernels.interaction_matrices(*tensors, None, packed)
    eager = bo.reference.interaction_matrices(*tensors, layout=kind)
    assert_no_worse(q, eager, bo.reference.interaction_matrices(*(t.double() for t in tensors), layout=kind))
    assert packed or torch.equal(q, q.mT)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_paths_agree(dtype, packed, order):
    assert_right(layer(17, 18, 21, dtype=dtype), packed, order)


@pytest.mark.parametrize("size", list(testing.shapes("K d h", base=3, mixed=0, sizes=(1, 17, 65))), ids=str)
def test_sizes_down_the_table(size):
    w, v, c = layer(**size)
    gold = bo.reference.interaction_matrices(w.double(), v.double(), c.double())
    eager = bo.reference.interaction_matrices(w, v, c)
    assert_no_worse(bo.interaction_matrices(w, v, c, impl="triton"), eager, gold)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", testing.LAYOUTS)
def test_any_layout(kind, order):
    assert_right([testing.layout(t, kind) for t in layer(6, 6, 6)], False, order)


@pytest.mark.parametrize("order", ["pairs", "direction"])
@pytest.mark.parametrize("packed", [False, True])
def test_touches_only_its_memory(packed, order):
    tensors = [testing.guarded(t) for t in layer(5, 18, 21)]
    with testing.GuardedAllocations() as memory, tuning.using(interaction_matrices=ORDERS[order]):
        q = kernels.interaction_matrices(*tensors, None, packed)
    assert memory.allocated
    memory.check()
    expected = composite.interaction_matrices(*(t.clone() for t in tensors), None, packed)
    torch.testing.assert_close(q, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("o", [2, 30])
def test_factors(o, packed):
    """Mixed after the contraction where the rank is low, else before it."""
    w, v, p = layer(o, 9, 8)
    u = randn(50, o)
    assert composite.two_stage(50, o, 8) == (o == 2)
    q = kernels.interaction_matrices(w, v, p, u, packed)
    expected = composite.interaction_matrices(*(t.double() for t in (w, v, p, u)), packed)
    torch.testing.assert_close(q.double(), expected, rtol=1e-4, atol=1e-4)
    assert packed or torch.equal(q, q.mT)


@pytest.mark.parametrize("K", [3, 18])
def test_gradients(K):
    w, v, c = layer(K, 6, 7)
    dq = randn(K, 21)

    def through(impl):
        return lambda *t: bo.interaction_matrices(*t, layout="packed", impl=impl)

    ours = gradients(through("triton"), (w, v, c), dq)
    eager = gradients(lambda *t: bo.reference.interaction_matrices(*t, layout="packed"), (w, v, c), dq)
    gold = gradients(through("torch"), [t.double() for t in (w, v, c)], dq.double())
    for got, expected, exact in zip(ours, eager, gold, strict=True):
        assert_no_worse(got, expected, exact)


@pytest.mark.parametrize("size", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (20, 3, 0)])
def test_empty_sizes(size):
    w, v, c = layer(*size)
    q = bo.interaction_matrices(w, v, c, impl="triton")
    assert torch.equal(q, torch.zeros(size[0], size[1], size[1]))


def test_streaming_and_ranking_use_the_kernels(monkeypatch):
    launched = []
    original = kernels.interaction_matrices

    def recorded(*args, **options):
        launched.append(args)
        return original(*args, **options)

    for module in (kernels, ranking):
        monkeypatch.setattr(module, "interaction_matrices", recorded)
    w, v, c = layer(4, 6, 5)
    list(bo.iter_interaction_matrices(w, v, c, chunk_bytes=4000, impl="triton"))
    top = bo.interaction_topk(w, v, c, 2, impl="triton")
    moments = bo.interaction_moments(w, v, c, impl="triton")
    assert len(launched) >= 3
    torch.testing.assert_close(top.values, bo.interaction_topk(w, v, c, 2).values)
    torch.testing.assert_close(moments.fourths, bo.interaction_moments(w, v, c).fourths)


def test_the_order_of_contraction_takes_the_fewest_products():
    pairs, directions = (config.KERNELS[f"interaction_{name}_kernel"] for name in ("pairs", "direction"))

    def choice(arch, k, dtype=torch.bfloat16):
        (tile,) = config.interaction_matrices(arch, dtype, k)
        return tile

    for arch in config.SHARED_MEMORY:
        for dtype in (torch.bfloat16, torch.float32):
            assert isinstance(choice(arch, 8, dtype), config.Tile)
            assert isinstance(choice(arch, 512, dtype), config.PairTile)
    wide, narrow = pairs.tiles["sm_90"]
    assert (wide.block_k, narrow.block_k) == (256, 128)
    (alone,) = directions.tiles["sm_90"]
    found = [choice("sm_90", k) for k in (17, 63, 64, 128, 129, 256, 257, 384, 385)]
    assert found == [alone, alone, narrow, narrow, wide, wide, narrow, narrow, wide]
    assert isinstance(choice("sm_80", 31), config.Tile) and isinstance(choice("sm_80", 32), config.PairTile)
    assert choice("sm_90", 16, torch.float32) in directions.fp32["sm_90"]
    assert choice("sm_90", 512, torch.float32) in pairs.fp32["sm_90"]
