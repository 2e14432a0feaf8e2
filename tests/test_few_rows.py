"""The gated forward of few rows: parts of the contraction, summed in order by a second kernel."""

import pytest
import torch

pytest.importorskip("triton")

import bilinear_ops as bo
from bilinear_ops import testing
from bilinear_ops.composite import gated as composite
from bilinear_ops.kernels import config, few_rows, gated, tuning
from bilinear_ops.kernels.records import SplitTile, Tile
from bilinear_ops.results import ACTIVATIONS, Gate
from bilinear_ops.testing import randn

D, H, O = 264, 40, 24  # noqa: E741
TILE = SplitTile(16, 16, 16, 4, 1, blocks_per_sm=2)
SIZES = ((13, D, H), (1, D, H), (16, D + 1, H + 1))  # the last are no descriptors' business
NONE = type(config.LIBRARY)
MANY_SIZES = (torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow))


def inputs(m, d, h, dtype=torch.float32, bias=True):
    weights = [randn(h, d, dtype=dtype, scale=d**-0.5) for _ in range(2)]
    return [randn(m, d, dtype=dtype), *weights, *([randn(h, dtype=dtype) for _ in range(2)] if bias else (None, None))]


def forward(kernels, tensors, activation="silu", save=True):
    beta = torch.full((), 0.7, dtype=tensors[0].dtype) if activation == "swish" else None
    with tuning.using(gated_forward_kernel=TILE):
        return kernels.gate_forward(*tensors, Gate(activation, beta, None, None), save)


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """(parts, length of the contraction, length of a part) of every split product."""
    found = []
    sums = few_rows.partial_sums

    def counted(x, w, v, tile, key):
        parts = sums(x, w, v, tile, key)
        found.append((parts.shape[0], x.shape[1], config.span(tile, *x.shape[:1], w.shape[0], x.shape[1], 3)))
        return parts

    monkeypatch.setattr(gated, "partial_sums", counted)
    return found


@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("dtype", MANY_SIZES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_values(sizes, dtype, bias, launched):
    tensors = inputs(*sizes, dtype, bias)
    wide = [None if t is None else t.double() for t in tensors]
    for ours, eager, gold in zip(*(forward(k, t) for k, t in zip(
        (gated, composite, composite), (tensors, tensors, wide), strict=True
    )), strict=True):  # fmt: skip
        testing.assert_no_worse(ours, eager, gold)
    ((parts, d, span),) = launched
    assert parts == -(-d // span) >= 2 and span >= 2 * TILE.block_k and sizes[2] > 2 * TILE.block_n


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    tensors = inputs(5, D, H)
    ours, saved = forward(gated, tensors, activation, save=False)
    assert saved is None
    torch.testing.assert_close(ours, forward(composite, tensors, activation)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", MANY_SIZES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gradients(sizes, dtype, launched):
    m, d, h = sizes
    x, w, v, b_w, b_v = inputs(*sizes, dtype)
    tensors = [x, w, v, randn(O, h, dtype=dtype, scale=h**-0.5), b_w, b_v]
    dy = randn(m, O, dtype=dtype)

    def gradients(layer, tensors, dy):
        leaves = [t.detach().requires_grad_() for t in tensors]
        return torch.autograd.grad(layer(*leaves, activation="silu"), leaves, dy)

    with tuning.using(gated_forward_kernel=TILE):
        ours = gradients(lambda *t, **o: bo.gated_mlp(*t, **o, impl="triton"), tensors, dy)
    assert launched
    eager = gradients(bo.reference.gated_mlp, tensors, dy)
    gold = gradients(bo.reference.gated_mlp, [t.double() for t in tensors], dy.double())
    for one, other, exact in zip(ours, eager, gold, strict=True):
        testing.assert_no_worse(one, other, exact)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_touches_only_its_memory(sizes):
    """Outputs and parts lie between pads that stay NaN, inputs between pads that must not be read."""
    tensors = [testing.guarded(t) for t in inputs(*sizes)]
    with testing.GuardedAllocations() as memory:
        results = forward(gated, tensors)
    assert len(memory.allocated) == 3
    memory.check()
    for ours, expected in zip(results, forward(composite, [t.clone() for t in tensors]), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_parts_are_added_in_order():
    """Bitwise as the sum of the parts from the first to the last, after the bias."""
    x, w, v, b_w, b_v = inputs(13, D, H)
    parts = few_rows.partial_sums(x, w, v, TILE, ("test", x.device))
    a, z = b_w.expand(13, H), b_v.expand(13, H)
    for part in parts:
        a, z = a + part[0], z + part[1]
    _, az = forward(gated, [x, w, v, b_w, b_v])
    assert torch.equal(az, torch.cat((a, z), 1))
    assert not torch.equal(az[:, :H], parts.flip(0)[:, 0].sum(0) + b_w)


def test_few_rows_split_where_tiles_are_few():
    """By tiles against multiprocessors: H100's 132 and a card of 20, weights of one layer and of a larger one."""

    def choice(m, h=2048, multiprocessors=132, d=1024, aligned=True, kernel="gated_forward_kernel"):
        first = config.gated(kernel, "sm_90", torch.bfloat16, m, h, d, aligned, multiprocessors)[0]
        return type(first)

    assert choice(1) is choice(64) is SplitTile
    assert choice(65) is NONE
    assert choice(64, h=8192) is choice(64, multiprocessors=20) is Tile
    assert choice(64, d=4096) is choice(64, aligned=False) is NONE
    assert choice(64, kernel="gated_backward_kernel") is NONE
    for m in (1, 16, 17, 33, 64):
        tile, library = config.gated("gated_forward_kernel", "sm_90", torch.bfloat16, m, 2048, 1024, True, 132)
        assert library is config.LIBRARY and tile.block_m >= m and (tile.block_m == 16 or m > tile.block_m // 2)


@pytest.mark.parametrize(("m", "h", "d"), ((1, 2048, 1024), (16, 2048, 1024), (64, 2048, 1024), (64, 128, 64)))
def test_parts_move_less_than_half_of_the_weights_bytes(m, h, d):
    tile = SplitTile(64, 64, 64, 4, 3, blocks_per_sm=2)
    span = config.span(tile, m, h, d, 132)
    parts = -(-d // span)
    assert span % tile.block_k == 0 and parts * span >= d
    assert parts == 1 or 2 * parts * m * h * 4 * 2 <= 2 * h * d * 2 / 2
    assert parts * -(-h // 64) <= 132 * 2 or parts == 1
