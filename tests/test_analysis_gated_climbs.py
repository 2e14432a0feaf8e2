"""The strongest directions of gated layers against all of a circle, and what they keep of bilinear ones."""

import pytest
import torch
from analysis_inputs import close, layer
from torch.nn.functional import normalize

import bilinear_ops as bo
from bilinear_ops import analysis
from bilinear_ops.analysis import gated_climbs, strongest
from bilinear_ops.nn import GatedMLP

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # in functorch

ACTIVATIONS = [("silu", 1.0), ("swish", -0.7), ("relu", 1.0), ("gelu", 1.0), ("sigmoid", 1.0), ("tanh", 1.0)]


@pytest.mark.parametrize(("activation", "beta"), ACTIVATIONS)
@pytest.mark.parametrize("radius", [0.5, 3.0, 100.0])
def test_strongest_direction_in_the_plane(activation, beta, radius):
    w, v, p = layer(2, 6, 3)
    angle = torch.linspace(0, 2 * torch.pi, 200_001, dtype=torch.float64)[:-1]
    circle = radius * torch.stack([angle.cos(), angle.sin()], 1)
    grid = bo.gated_mlp(circle, w, v, p, activation=activation, beta=beta).norm(dim=1) / radius**2
    found = analysis.strongest_directions(w, v, p, 10, activation=activation, beta=beta, radius=radius)
    close(found.strengths[0], grid.max(), 1e-6)
    y = bo.gated_mlp(radius * found.vectors, w, v, p, activation=activation, beta=beta)
    close(found.strengths, y.norm(dim=1) / radius**2)
    assert (found.strengths.diff() <= 0).all()


def test_they_are_stationary_distinct_and_signed():
    w, v, p = layer(16, 48, 16)
    vectors, strengths = analysis.strongest_directions(w, v, p, 6, activation="silu", radius=8.0)
    assert len(strengths) == 6
    close(vectors.norm(dim=1), torch.ones(6).double())
    x = (8 * vectors).requires_grad_()
    (gradient,) = torch.autograd.grad(bo.gated_mlp(x, w, v, p, activation="silu").norm(dim=1).sum(), x)
    close(torch.cosine_similarity(gradient, vectors), torch.ones(6).double(), 1e-6)
    assert (vectors @ vectors.t() - torch.eye(6).double()).max() < strongest.SAME
    drawn = 8 * normalize(torch.randn(50_000, 16).double(), dim=1)
    assert strengths[0] > 1.1 * bo.gated_mlp(drawn, w, v, p, activation="silu").norm(dim=1).max() / 64
    opposite = bo.gated_mlp(-8 * vectors, w, v, p, activation="silu").norm(dim=1) / 64
    assert (opposite < 0.9 * strengths).all(), "x and -x are not one maximum"


def test_climbing_never_goes_down():
    w, v, p = layer(5, 11, 3)
    x = normalize(torch.randn(64, 5).double(), dim=1)
    gated = gated_climbs.Gated("silu", 1.0, 2.0)
    _, strength = gated_climbs.climb_gated(x, (w, v, p), gated, 0, 0.0)
    for _ in range(15):
        x, reached = gated_climbs.climb_gated(x, (w, v, p), gated, 1, 0.0)
        assert (reached >= (1 - 1e-14) * strength).all()
        strength = reached


def test_restarts_find_what_bilinear_maxima_miss(monkeypatch):
    """tanh gates saturate: at a large radius the maxima are elsewhere."""
    w, v, p = layer(12, 24, 12)
    options = {"activation": "tanh", "radius": 50.0}
    found = analysis.strongest_directions(w, v, p, 1, **options).strengths[0]
    monkeypatch.setattr(gated_climbs, "RESTARTS", 0)
    assert analysis.strongest_directions(w, v, p, 1, **options).strengths[0] < found


def test_a_swish_without_slope_is_half_of_the_bilinear_layer():
    w, v, p = layer(6, 20, 5)
    found = analysis.strongest_directions(w, v, p, 4, activation="swish", beta=0.0, radius=3.0)
    bilinear = analysis.strongest_directions(w, v, p, 2)
    close(found.strengths[::2], bilinear.strengths / 2, 1e-7)  # x and -x are both there
    close(analysis.strongest_directions(w, v, p, 2, radius=3.0).strengths, bilinear.strengths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    w, v, p = (t.to(dtype) for t in layer(6, 20, 5))
    found = analysis.strongest_directions(w, v, p, 3, activation="silu", radius=2.0)
    expected = analysis.strongest_directions(*(t.double() for t in (w, v, p)), 3, activation="silu", radius=2.0)
    assert {t.dtype for t in found} == {torch.float32}
    close(found.strengths, expected.strengths.float(), 1e-6)


@pytest.mark.parametrize(("d", "h", "o", "n"), [(0, 4, 3, 2), (3, 0, 2, 2), (3, 4, 0, 2), (3, 4, 2, 0)])
def test_no_directions(d, h, o, n):
    found = analysis.strongest_directions(*layer(d, h, o), n, activation="silu", radius=1.0)
    assert found.vectors.shape == (0, d) and found.strengths.shape == (0,)


def test_errors():
    w, v, p = layer(5, 8, 4)
    with pytest.raises(ValueError, match="radius is needed with activation='silu'"):
        analysis.strongest_directions(w, v, p, 1, activation="silu")
    with pytest.raises(ValueError, match="radius must be above 0, got 0"):
        analysis.strongest_directions(w, v, p, 1, activation="silu", radius=0)
    with pytest.raises(ValueError, match=r"activation must be one of .*, got 'elu'"):
        analysis.strongest_directions(w, v, p, 1, activation="elu", radius=1.0)
    for call in (
        lambda: analysis.strongest_directions(w, v, p, 1, activation="silu", beta=2.0, radius=1.0),
        lambda: analysis.kept_strength(w, w, v, p, "silu", torch.ones(1).double(), beta=2.0),
    ):
        with pytest.raises(ValueError, match="beta belongs to activation='swish', got 2.0 with 'silu'"):
            call()
    with pytest.raises(RuntimeError, match=r"x must have shape \[m, d=5\], got \[8, 4\]"):
        analysis.kept_strength(w[:, :4], w, v, p, "silu", torch.ones(1).double())
    with pytest.raises(RuntimeError, match=r"radii must have shape \[r\], got \[\]"):
        analysis.kept_strength(w, w, v, p, "silu", torch.tensor(1.0).double())


def test_a_trained_swiglu_keeps_at_least_half():
    """At lengths 1 to 100, in the strongest directions of its bilinear layer; at large ones it is the ReGLU."""
    model = GatedMLP(6, 24, 4, activation="silu")
    teacher, x = torch.randn(6, 4), torch.randn(512, 6)
    y = (x @ teacher).relu() * x[:, :4]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        losses.append((model(x) - y).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    w, v, p = (t.detach().double() for t in (model.w, model.v, model.p))
    vectors = analysis.strongest_directions(w, v, p, 5).vectors
    radii = torch.logspace(0, 2, 9, dtype=torch.float64)
    kept = analysis.kept_strength(vectors, w, v, p, "silu", radii)
    assert kept.shape == (len(vectors), 9)
    assert (kept >= 0.5).all() and (kept[:, -1] > 0.55).any()
    for r, column in zip(radii, kept.t(), strict=True):
        of = [
            analysis.strength(lambda t: bo.gated_mlp(t, w, v, p, activation="silu"), s * r * vectors) for s in (1, -1)
        ]
        close(column, torch.maximum(*of) / analysis.strength(lambda t: bo.gated_mlp(t, w, v, p), vectors))
    close(kept[:, -1], analysis.kept_strength(vectors, w, v, p, "relu", radii)[:, 0], 0.02)


def test_kept_strength_gradients_and_dtypes():
    w, v, p = layer(3, 4, 2, grad=True)
    x, radii = torch.randn(2, 3).double().requires_grad_(), torch.tensor([0.7, 3.0]).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: analysis.kept_strength(*t[:4], "silu", t[4]), (x, w, v, p, radii))
    half = [t.detach().half() for t in (x, w, v, p)]
    assert analysis.kept_strength(*half, "silu", radii.detach().half()).dtype == torch.float32
    assert analysis.kept_strength(x[:0], w, v, p, "silu", radii).shape == (0, 2)
    assert analysis.kept_strength(x, w, v, 0 * p, "silu", radii).isnan().all()
