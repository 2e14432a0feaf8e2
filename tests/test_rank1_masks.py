"""The uniforms behind the masks: exactly splitmix64, the same integers everywhere, uniform and independent."""

import math

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import bilinear_ops as bo
from bilinear_ops import reference
from bilinear_ops.composite.limits import limits
from bilinear_ops.composite.rank1 import masks as composite
from bilinear_ops.kernels import tuning
from bilinear_ops.kernels.rank1 import masks as kernels
from bilinear_ops.kernels.records import RowTile

WORD = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & WORD
    return z ^ (z >> 31)


def oracle(seed: int, site: int, sample: int, row: int, column: int) -> float:
    """One draw in Python's integers."""
    state = mix(mix(seed + (site + 1) * GOLDEN & WORD) + (sample + 1) * GOLDEN & WORD)
    word = mix(state + ((row << 24) + column // 2 + 1) * GOLDEN & WORD)
    half = word >> 32 * (column % 2) & 0xFFFFFFFF
    return ((half ^ 1 << 31) >> 8) * 2.0**-24


def test_oracle_is_splitmix64():
    """Against the published first outputs of the generator seeded with 1234567."""
    known = (6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821)
    assert tuple(mix(1234567 + n * GOLDEN & WORD) for n in range(1, 6)) == known


@pytest.mark.parametrize("seed", (0, 7, -1, 2**63 - 1))
@pytest.mark.parametrize("draw", (reference.rank1.masks.uniform, composite.uniform, kernels.uniform))
def test_exact(draw, seed):
    u = draw(torch.tensor(seed), 3, 2, 5, 7)
    expected = [[[oracle(seed, 3, s, r, c) for c in range(7)] for r in range(5)] for s in range(2)]
    assert u.dtype == torch.float32 and u.tolist() == expected


@pytest.mark.parametrize("shape", ((0, 4), (4, 0), (1, 1), (33, 66), (70, 131)))
def test_same_for_every_tile(shape, monkeypatch):
    expected = reference.rank1.masks.uniform(torch.tensor(5), 0, 2, *shape)
    for block in (1, 100, 1 << 15):
        monkeypatch.setattr(limits, "draws", block)
        assert torch.equal(composite.uniform(torch.tensor(5), 0, 2, *shape), expected)
    for tile in (RowTile(16, 128, 4), RowTile(32, 16, 4), RowTile(64, 64, 4)):
        with tuning.using(uniform_kernel=tile):
            assert torch.equal(kernels.uniform(torch.tensor(5), 0, 2, *shape), expected)


@pytest.mark.parametrize("draw", (reference.rank1.masks.uniform, composite.uniform, kernels.uniform))
def test_draws_at_any_numbers(draw, monkeypatch):
    """Rows and columns in any order, odd ones first, far ones among them: the draws that they have in the whole."""
    monkeypatch.setattr(limits, "draws", 100)
    rows, columns = torch.tensor([7, 2, 69, 3, 2**39]), torch.tensor([129, 0, 5, 4, 3, 130, 17])
    for r, c in ((rows, columns), (rows, None), (None, columns)):
        row = list(range(5)) if r is None else r.tolist()
        column = list(range(7)) if c is None else c.tolist()
        expected = [[[oracle(5, 1, s, i, j) for j in column] for i in row] for s in range(2)]
        with tuning.using(uniform_kernel=RowTile(2, 4, 4)):
            assert draw(torch.tensor(5), 1, 2, 5, 7, r, c).tolist() == expected


@pytest.mark.parametrize("impl", ("torch", "triton"))
@pytest.mark.parametrize("sampling", ("continuous", "binomial"))
def test_part_of_a_batch_has_its_masks(sampling, impl):
    """Tokens and subcomponents by their numbers: in the masks, in the layer that draws them and in its gradients."""
    whole = {k: torch.randn(s) for k, s in dict(x=(3, 5, 4), read=(4, 9), write=(9, 6), weight=(6, 4)).items()}
    gates = torch.rand(3, 5, 9).requires_grad_()
    tokens, chosen = torch.arange(15).view(3, 5), torch.tensor([8, 1, 3])
    options = dict(samples=2, seed=3, sampling=sampling, impl=impl)
    mask = bo.stochastic_mask(gates, **options)
    part = (slice(None), slice(1, 4))
    numbers = dict(row_numbers=tokens[part], column_numbers=chosen)
    assert torch.equal(bo.stochastic_mask(gates[part][..., chosen], **options, **numbers), mask[:, :, 1:4][..., chosen])

    def layer(module, gates, numbers, tokens, chosen, **options):
        x, read, write = whole["x"][tokens], whole["read"][:, chosen], whole["write"][chosen]
        y = module.stochastic_rank1_linear(
            x, read, write, gates, weight=whole["weight"], delta="uniform", **options, **numbers
        )
        return y, *torch.autograd.grad(y.square().sum(), gates)

    some = gates[part][..., chosen]
    found = layer(bo, some, numbers, part, chosen, **options)
    del options["impl"]
    torch.testing.assert_close(found, layer(bo.reference, some, numbers, part, chosen, **options))
    everything = layer(bo.reference, gates, {}, slice(None), slice(None), **options)
    rows = layer(bo, gates[part], {"row_numbers": tokens[part]}, part, slice(None), **options)
    torch.testing.assert_close(rows, (everything[0][:, :, 1:4], everything[1][part]))


@triton.jit
def tile_at(seed_ptr, out_ptr, row, column):
    u = kernels.uniform_tile(
        kernels.sample_state(seed_ptr, tl.cast(4, tl.int64), tl.cast(1, tl.int64)), row, column, 2, 4
    )
    tl.store(out_ptr + tl.arange(0, 2)[:, None] * 4 + tl.arange(0, 4)[None, :], u)


@pytest.mark.parametrize("row", (2**31 - 1, 2**32 + 5, 2**39))
def test_no_wrap_in_far_rows(row):
    """Rows whose number, or whose number times C, leaves int32."""
    seed, column = torch.tensor(11), 3072
    expected = [[oracle(11, 4, 1, row + r, column + c) for c in range(4)] for r in range(2)]
    out = torch.empty(2, 4)
    tile_at[(1,)](seed, out, row, column)
    assert out.tolist() == expected
    state = reference.rank1.masks.sample_states(seed, 4, 2)[1]
    ((rows, u),) = composite.uniform_blocks(state, seed.device, row, row + 2, column + 4)
    assert rows == slice(row, row + 2) and u[:, column:].tolist() == expected


def kolmogorov_smirnov(u: Tensor) -> float:
    """sqrt(n) times the largest distance between the sample and U(0, 1)."""
    u = u.flatten().double().sort().values
    n = u.numel()
    grid = torch.arange(n + 1, dtype=torch.float64) / n
    return max((grid[1:] - u).max().item(), (u - grid[:-1]).max().item()) * math.sqrt(n)


CRITICAL = 1.95  # exceeded with probability 0.001


@pytest.mark.parametrize("gate", (0.0, 0.3, 0.9))
def test_masks_are_uniform_above_the_gate(gate):
    masks = bo.stochastic_mask(torch.full((1000, 250), gate), samples=4, seed=1)  # a million draws
    assert masks.min() >= gate and masks.max() <= 1
    assert kolmogorov_smirnov((masks.double() - gate) / (1 - gate)) < CRITICAL
    chosen = bo.stochastic_mask(torch.full((1000, 250), gate), samples=4, seed=1, sampling="binomial")
    assert set(chosen.unique().tolist()) == {torch.tensor(gate).item(), 1.0}
    assert abs((chosen == 1).double().mean() - 0.5) < 4 * 0.5 / 1e3


def test_deltas_are_uniform():
    assert kolmogorov_smirnov(bo.stochastic_delta((1000, 250), samples=4, seed=1, device="cpu")) < CRITICAL


def test_every_bit_is_fair():
    bits = (bo.stochastic_delta((2**18,), seed=2, device="cpu") * 2**24).long()[..., None] >> torch.arange(24) & 1
    assert (bits.double().mean((0, 1)) - 0.5).abs().max() < 5 * 0.5 / 2**9


def draws(seed: int = 3, stream: int = 0) -> Tensor:
    return bo.stochastic_mask(torch.zeros(500, 500), samples=3, seed=seed, stream=stream).double() - 0.5


NEIGHBOURS = {
    "samples": lambda: (draws()[0], draws()[1]),
    "rows": lambda: (draws()[:, :-1], draws()[:, 1:]),
    "columns of a word": lambda: (draws()[..., ::2], draws()[..., 1::2]),
    "words": lambda: (draws()[..., :-2], draws()[..., 2:]),
    "diagonals": lambda: (draws()[:, :-1, :-2], draws()[:, 1:, 2:]),
    "seeds": lambda: (draws(3), draws(4)),
    "distant seeds": lambda: (draws(3), draws(3 + 2**32)),
    "streams": lambda: (draws(), draws(stream=1)),
    "seed and stream": lambda: (draws(4, 0), draws(3, 1)),
    "masks and deltas": lambda: (draws()[..., 0], bo.stochastic_delta((500,), samples=3, seed=3, device="cpu") - 0.5),
}


@pytest.mark.parametrize("pair", NEIGHBOURS)
def test_independent(pair):
    """Neither the draws nor their squares of neighbours are correlated: both within 4.5 standard deviations of 0."""
    a, b = NEIGHBOURS[pair]()
    for x, y in ((a, b), (a.square() - 1 / 12, b.square() - 1 / 12)):
        assert abs((x * y).sum() / (x.square().sum() * y.square().sum()).sqrt()) < 4.5 / math.sqrt(a.numel())


@pytest.mark.parametrize("sampling", ("continuous", "binomial"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_masks_are_the_same_bits_everywhere(dtype, sampling):
    gates = torch.rand(2, 35, 67).to(dtype)
    options = dict(samples=2, seed=9, sampling=sampling, stream=1)
    expected = bo.reference.stochastic_mask(gates, **options)
    assert expected.dtype == torch.float32
    for impl in ("torch", "triton"):
        assert torch.equal(bo.stochastic_mask(gates, **options, impl=impl), expected)
        delta = bo.stochastic_delta((2, 35), samples=2, seed=9, device="cpu", impl=impl)
        assert torch.equal(delta, bo.reference.stochastic_delta((2, 35), samples=2, seed=9, device="cpu"))


@pytest.mark.parametrize("default", (torch.float64, torch.bfloat16))
def test_masks_do_not_depend_on_the_default_dtype(default):
    gates = torch.rand(35, 6, dtype=torch.float32)
    mask, delta = (bo.stochastic_mask(gates, samples=2, seed=9), bo.stochastic_delta((35,), seed=9))
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        assert torch.equal(bo.stochastic_mask(gates, samples=2, seed=9), mask)
        assert torch.equal(bo.stochastic_delta((35,), seed=9), delta)
    finally:
        torch.set_default_dtype(before)


def test_seed_is_an_int_or_a_tensor():
    gates = torch.rand(4, 6)
    assert torch.equal(bo.stochastic_mask(gates, seed=5), bo.stochastic_mask(gates, seed=torch.tensor(5)))
    wide = bo.stochastic_mask(gates.double(), seed=5)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), bo.stochastic_mask(gates, seed=5))


@pytest.mark.parametrize("sampling", ("continuous", "binomial"))
def test_gradient_of_masks(sampling):
    gates = torch.rand(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda g: bo.stochastic_mask(g, samples=2, seed=1, sampling=sampling), gates, eps=1e-6
    )


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_subset_routing(impl):
    """Every number of sites is alike likely, then every site; the reference draws the same."""
    routing = bo.subset_routing(4, (50, 400), seed=1, impl=impl)
    assert routing.shape == (4, 50, 400) and routing.dtype == torch.bool
    assert torch.equal(routing, bo.reference.subset_routing(4, (50, 400), seed=1))
    chosen = routing.sum(0).flatten()
    assert chosen.min() == 1 and ((chosen.bincount()[1:] / 20_000 - 0.25).abs() < 0.02).all()  # 6 deviations
    assert ((routing.flatten(1).double().mean(1) - 2.5 / 4).abs() < 0.02).all()
    pairs = routing[:, chosen.view(50, 400) == 2].double()
    assert (((pairs @ pairs.t()) / pairs.shape[1])[~torch.eye(4).bool()] - 1 / 6).abs().max() < 0.03
    assert not torch.equal(routing, bo.subset_routing(4, (50, 400), seed=1, stream=1))
    with pytest.raises(ValueError, match="sites must be at least 1, got 0"):
        bo.subset_routing(0, (3,), seed=1)
