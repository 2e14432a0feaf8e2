"""Strongest directions against brute force, and strength."""

import pytest
import torch
from analysis_inputs import close, doubles, layer

import bilinear_ops as bo
from bilinear_ops import analysis
from bilinear_ops.analysis import strongest

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # in functorch


@pytest.mark.parametrize("seed", range(5))
def test_strongest_direction_in_the_plane(seed):
    """The largest of the local maxima of |B(x, x)| on a fine grid over the circle, and no others than those."""
    torch.manual_seed(seed)
    w, v, p = layer(2, 6, 3)
    angle = torch.linspace(0, torch.pi, 100_001, dtype=torch.float64)[:-1]
    grid = bo.gated_mlp(torch.stack([angle.cos(), angle.sin()], 1), w, v, p).norm(dim=1)
    peaks = grid[(grid > grid.roll(1)) & (grid >= grid.roll(-1))].sort(descending=True).values
    found = analysis.strongest_directions(w, v, p, 10)
    close(found.strengths[0], peaks[0], 1e-7)
    for strength in found.strengths:
        close(strength, peaks[(peaks - strength).abs().argmin()], 1e-7)


def test_strongest_directions_are_stationary_and_distinct():
    w, v, p = layer(32, 128, 32)
    vectors, strengths = analysis.strongest_directions(w, v, p, 7)
    assert len(strengths) == 7
    assert (strengths.diff() <= 0).all()
    close(vectors.norm(dim=1), torch.ones(7).double())
    assert (vectors.gather(1, vectors.abs().argmax(1, keepdim=True)) > 0).all()
    assert (vectors @ vectors.t() - torch.eye(7).double()).abs().max() < strongest.SAME
    y = bo.gated_mlp(vectors, w, v, p)
    close(y.norm(dim=1), strengths)
    gradient = ((y @ p) * (vectors @ v.t())) @ w + ((y @ p) * (vectors @ w.t())) @ v
    close(torch.cosine_similarity(gradient, vectors), torch.ones(7).double(), 1e-7)
    x = torch.nn.functional.normalize(torch.randn(20_000, 32).double(), dim=1)
    assert strengths[0] > 1.1 * bo.gated_mlp(x, w, v, p).norm(dim=1).max()
    fewer = analysis.strongest_directions(w, v, p, 3)
    close(fewer.vectors, vectors[:3], 1e-4)


def test_strongest_direction_of_one_output_is_its_top_eigenvector():
    w, v, p = layer(12, 40, 1)
    values, vectors = torch.linalg.eigh(bo.interaction_matrices(w, v, p)[0])
    found = analysis.strongest_directions(w, v, p, 1)
    close(found.strengths[0], values.abs().max())
    close((found.vectors[0] @ vectors[:, values.abs().argmax()]).abs(), torch.tensor(1.0).double(), 1e-6)


def test_strongest_directions_of_separate_outputs():
    """B(x, x) = (3 x_0^2, 2 x_3^2, x_6^2) has a maximum on each of its axes."""
    w = torch.eye(9)[[0, 3, 6]].double()
    found = analysis.strongest_directions(w, w, torch.tensor([3.0, 2.0, 1.0]).double().diag(), 9)
    close(found.strengths, torch.tensor([3.0, 2.0, 1.0]).double())
    close(found.vectors, w, 1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_climbing_never_goes_down(seed):
    """Where a power step does: two eigenvalues of opposite sign and almost one magnitude, then at random."""
    torch.manual_seed(seed)
    w = torch.cat([torch.eye(2), torch.zeros(2, 3)], 1).double()
    opposite = w, w, torch.tensor([[1.0, -0.99]]).double()
    for w, v, p in (opposite, layer(5, 11, 3)):
        x = torch.nn.functional.normalize(torch.randn(64, 5).double(), dim=1)
        strength, below = strongest._strengths(x, w, v, p), 0
        for _ in range(20):
            y = bo.gated_mlp(x, w, v, p)
            power = torch.nn.functional.normalize(strongest._apply(x, w, v, y @ p), dim=1)
            below += int((strongest._strengths(power, w, v, p) < (1 - 1e-9) * strength).sum())
            x, gained = strongest._climb(x, w, v, p)
            reached = strongest._strengths(x, w, v, p)
            assert (reached >= (1 - 1e-14) * strength).all()
            close(reached, strength * (1 + gained))
            strength = reached
        assert below or len(p) > 1  # or the first layer would not test the way round


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_strongest_directions_of_other_dtypes(dtype):
    w, v, p = (t.to(dtype) for t in layer(6, 20, 5))
    found = analysis.strongest_directions(w, v, p, 3)
    expected = analysis.strongest_directions(w.double(), v.double(), p.double(), 3)
    for got, exact in zip(found, expected, strict=True):
        assert got.dtype == torch.float32
        close(got, exact.float(), 1e-6)


@pytest.mark.parametrize(("d", "h", "o", "n"), [(0, 4, 3, 2), (3, 0, 2, 2), (3, 4, 0, 2), (3, 4, 2, 0)])
def test_no_directions(d, h, o, n):
    found = analysis.strongest_directions(*layer(d, h, o), n)
    assert found.vectors.shape == (0, d)
    assert found.strengths.shape == (0,)


def test_no_directions_of_a_dead_layer():
    w, v, p = layer(3, 4, 2)
    assert len(analysis.strongest_directions(w, v, 0 * p, 2).strengths) == 0


def test_strength():
    w, v, p = layer(5, 8, 4)
    x = doubles((2, 7, 5))[0]
    found = analysis.strength(lambda x: bo.gated_mlp(x, w, v, p), x)
    assert found.shape == (2, 7)
    close(found, bo.gated_mlp(x, w, v, p).norm(dim=-1) / x.norm(dim=-1).square())
    close(analysis.strength(lambda x: bo.gated_mlp(x, w, v, p), 5 * x), found)
    assert analysis.strength(lambda x: bo.gated_mlp(x, w, v, p), 0 * x).isnan().all()
    assert analysis.strength(lambda x: bo.gated_mlp(x, w, v, p), x[:, :0]).shape == (2, 0)
    assert torch.autograd.gradcheck(
        lambda x: analysis.strength(lambda x: bo.gated_mlp(x, w, v, p), x), x[0].clone().requires_grad_()
    )
    large = torch.full((1, 8), 100.0, dtype=torch.float16)  # |x|^2 is beyond float16
    close(analysis.strength(lambda x: x, large), torch.tensor([1 / (100 * 8**0.5)]), 1e-6)


def test_errors():
    w, v, p = layer(5, 8, 4)
    for n, options in ((-1, {}), (2, {"steps": -1}), (2, {"tol": -1.0})):
        with pytest.raises(ValueError, match="n, steps and tol must not be negative"):
            analysis.strongest_directions(w, v, p, n, **options)
    with pytest.raises(TypeError, match="n must be an int, got float"):
        analysis.strongest_directions(w, v, p, 2.0)
    with pytest.raises(TypeError, match="x must be float64"):
        analysis.strength(torch.relu, torch.ones(3, dtype=torch.int64))
