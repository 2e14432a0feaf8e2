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
    """All local maxima of |B(x, x)| on a fine grid over the circle, and no others."""
    torch.manual_seed(seed)
    w, v, p = layer(2, 6, 3)
    angle = torch.linspace(0, torch.pi, 100_001, dtype=torch.float64)[:-1]
    grid = bo.gated_mlp(torch.stack([angle.cos(), angle.sin()], 1), w, v, p).norm(dim=1)
    peaks = grid[(grid > grid.roll(1)) & (grid >= grid.roll(-1))].sort(descending=True).values
    found = analysis.strongest_directions(w, v, p, 10)
    close(found.strengths[0], peaks[0], 1e-7)
    assert len(found.strengths) == len(peaks)
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
    """Nor where a power step does: two eigenvalues of opposite sign and almost one magnitude, then at random."""
    torch.manual_seed(seed)
    w = torch.cat([torch.eye(2), torch.zeros(2, 3)], 1).double()
    opposite = w, w, torch.tensor([[1.0, -0.99]]).double()
    for w, v, p in (opposite, layer(5, 11, 3)):
        x = torch.nn.functional.normalize(torch.randn(64, 5).double(), dim=1)
        strength = strongest._strengths(x, w, v, p)
        for _ in range(20):
            x = strongest._climb(x, w, v, p, 1, 0.0)
            close(x.norm(dim=1), torch.ones(64).double())
            reached = strongest._strengths(x, w, v, p)
            assert (reached >= (1 - 1e-14) * strength).all()
            strength = reached


def test_a_step_ends_at_the_next_maximum_of_its_circle():
    w, v, p = layer(5, 11, 3)
    x, s = torch.linalg.qr(doubles((200, 5, 2))[0]).Q.unbind(2)
    slope = ((bo.gated_mlp(x, w, v, p) @ p)[:, None] * torch.stack([x @ v.t(), x @ w.t()], 1)).flatten(1)
    s = s * ((slope @ torch.cat([w, v])) * s).sum(1, keepdim=True).sign()  # uphill
    y0, y2 = (bo.gated_mlp(t, w, v, p) for t in (x, s))
    y1 = 0.5 * (bo.gated_mlp(x + s, w, v, p) - y0 - y2)
    angle, gained = strongest._next_maximum(y0, y1, y2)
    angles = torch.linspace(0, torch.pi, 20_001, dtype=torch.float64)[:, None, None]
    circle = strongest._strengths((angles.cos() * x + angles.sin() * s).flatten(0, 1), w, v, p).view(-1, 200)
    expected = circle[(circle.diff(dim=0) < 0).double().argmax(0), torch.arange(200)]
    assert (expected < 0.99 * circle.amax(0)).any()
    reached = strongest._strengths(angle.cos()[:, None] * x + angle.sin()[:, None] * s, w, v, p)
    close(reached, expected, 1e-7)
    close(reached, y0.norm(dim=1) * (1 + gained))


def test_conjugate_directions_save_steps():
    """A long narrow valley: steepest ascent, whose searches forget the last one, is far from the top as yet."""
    w = torch.eye(40).double()
    p = torch.cat([torch.tensor([1.0]), torch.linspace(0.9, 0.99, 39)]).double()[None]
    x = torch.nn.functional.normalize(torch.randn(4, 40).double(), dim=1)
    together = strongest._climb(x, w, w, p, 30, 0.0)
    for _ in range(30):
        x = strongest._climb(x, w, w, p, 1, 0.0)
    missed, missed_alone = (1 - strongest._strengths(t, w, w, p) for t in (together, x))
    assert (missed < 0.01 * missed_alone).all()


def test_a_climb_ends_after_two_steps_that_gain_nothing(monkeypatch):
    steps = []
    step = strongest._next_maximum
    monkeypatch.setattr(strongest, "_next_maximum", lambda *y: steps.append(len(y[0])) or step(*y))
    w = torch.eye(3).double()
    summits = w[:2]
    close(strongest._climb(summits, w, w, w, 10, 0.0), summits)
    assert steps == [2, 2]


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_any_scale_of_the_layer(scale):
    """Its strengths' squares leave the range of float32, in which climbs are chosen."""
    w, v, p = layer(6, 20, 5)
    found, expected = (analysis.strongest_directions(s * w, s * v, s * p, 3) for s in (scale, 1.0))
    close(found.vectors, expected.vectors, 1e-6)
    close(found.strengths / scale**3, expected.strengths)


def test_rounds_lose_little(monkeypatch):
    """The maxima found by the climbs that went on, beside those of all climbs."""
    w, v, p = layer(48, 96, 48)
    found = analysis.strongest_directions(w, v, p, 5)
    monkeypatch.setattr(strongest, "ROUNDS", ((0, 10_000),))
    everything = analysis.strongest_directions(w, v, p, 5)
    close(found.strengths[:1], everything.strengths[:1])
    assert found.strengths.sum() > 0.98 * everything.strengths.sum()


def test_no_climbs_without_steps():
    w, v, p = layer(6, 20, 5)
    found, best = (analysis.strongest_directions(w, v, p, 1, steps=n).strengths for n in (0, 500))
    assert 0 < found < 0.999 * best


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
    with pytest.raises(ValueError, match="tol must be a number, got nan"):
        analysis.strongest_directions(w, v, p, 1, tol=float("nan"))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="v must be finite"):
            analysis.strongest_directions(w, torch.full_like(v, bad), p, 1)
    with pytest.raises(TypeError, match="n must be an int, got float"):
        analysis.strongest_directions(w, v, p, 2.0)
    with pytest.raises(TypeError, match="x must be float64"):
        analysis.strength(torch.relu, torch.ones(3, dtype=torch.int64))
