"""Strongest directions against brute force, gates and parities against the layers they take apart."""

import pytest
import torch

import bilinear_ops as bo
from bilinear_ops import analysis
from bilinear_ops.analysis import strongest as directions
from bilinear_ops.testing import assert_no_worse, randn

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # in functorch

GATED = [("silu", 1.0), ("swish", 0.0), ("swish", 1.7), ("swish", -0.5), ("relu", 1.0), ("gelu", 1.0)]
GATED += [("gelu_tanh", 1.0), ("identity", 1.0)]
EVEN = GATED[:-1]  # of the bilinear layer itself, the even part is all of it


def doubles(*shapes):
    return tuple(randn(*shape, dtype=torch.float64) for shape in shapes)


def layer(d, h, o):
    return doubles((h, d), (h, d), (o, h))


def close(got, expected, rtol=1e-11):
    torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol)


def trained(activation, beta):
    """A gated layer taught a function that is neither even nor odd."""
    model = bo.nn.GatedMLP(6, 12, 4, activation=activation, beta=beta)
    teacher = torch.randn(6, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x = torch.randn(256, 6)
    y = (x @ teacher).relu() * x[:, :4]
    first = None
    for _ in range(150):
        loss = (model(x) - y).square().mean()
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * first
    return [t.detach().double() for t in (model.w, model.v, model.p)]


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
    assert (vectors @ vectors.t() - torch.eye(7).double()).abs().max() < directions.SAME
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
        strength, below = directions._strengths(x, w, v, p), 0
        for _ in range(20):
            y = bo.gated_mlp(x, w, v, p)
            power = torch.nn.functional.normalize(directions._apply(x, w, v, y @ p), dim=1)
            below += int((directions._strengths(power, w, v, p) < (1 - 1e-9) * strength).sum())
            x, gained = directions._climb(x, w, v, p)
            reached = directions._strengths(x, w, v, p)
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


@pytest.mark.parametrize(("activation", "beta"), GATED)
@pytest.mark.parametrize("bias", [False, True])
def test_gates_make_the_layer_bilinear(activation, beta, bias):
    x, w, v, p, b_w, b_v = doubles((3, 7, 5), (8, 5), (8, 5), (4, 8), (8,), (8,))
    b_w, b_v = (b_w, b_v) if bias else (None, None)
    gates = analysis.glu_gates(x, v, activation, b_v=b_v, beta=beta)
    assert gates.shape == (3, 7, 8)
    hidden = gates * bo.gated_bilinear(x, w, v, b_w, b_v)
    close(hidden @ p.t(), bo.gated_mlp(x, w, v, p, b_w, b_v, activation=activation, beta=beta))


@pytest.mark.parametrize(("activation", "beta"), EVEN)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gates_of_both_signs_sum_to_one(activation, beta, dtype):
    z = torch.cat([torch.linspace(-9, 9, 201), torch.zeros(1), torch.tensor([200.0, 1e-7])]).to(dtype)[:, None]
    one = torch.ones(1, 1, dtype=dtype)
    there, back = (analysis.glu_gates(x, one, activation, beta=beta) for x in (z, -z))
    assert there.dtype == dtype
    assert (there >= 0).all() and (there <= 1).all()
    assert (there.double() + back.double() - 1).abs().max() <= 2 * torch.finfo(dtype).eps
    exact = analysis.glu_gates(z.double(), one.double(), activation, beta=beta)
    eager = {"gelu": lambda: 0.5 * (1 + torch.erf(z / 2**0.5)), "relu": lambda: exact.to(dtype)}.get(
        activation, lambda: torch.sigmoid(exact.logit().to(dtype))
    )()
    assert_no_worse(there, eager, exact)


def test_gates_gradients():
    x, v = (t.requires_grad_() for t in doubles((3, 5), (4, 5)))
    (b_v,) = doubles((4,))
    beta = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    for activation in ("silu", "gelu", "gelu_tanh"):
        assert torch.autograd.gradcheck(
            lambda x, v, b, a=activation: analysis.glu_gates(x, v, a, b_v=b), (x, v, b_v.requires_grad_())
        )
    assert torch.autograd.gradcheck(lambda x, v, b: analysis.glu_gates(x, v, "swish", beta=b), (x, v, beta))


def test_gates_refuse_activations_without_them():
    (x,) = doubles((3, 5))
    for activation in ("sigmoid", "tanh"):
        with pytest.raises(ValueError, match=f"activation must be one of identity, silu, .*, got '{activation}'"):
            analysis.glu_gates(x, x, activation)
    with pytest.raises(ValueError, match="beta belongs to activation='swish', got 2.0 with 'silu'"):
        analysis.glu_gates(x, x, "silu", beta=2.0)
    with pytest.raises(RuntimeError, match=r"v must have shape \[h, d=5\], got \[3, 4\]"):
        analysis.glu_gates(x, x[:, :4], "silu")
    for call in (analysis.even_odd_split, analysis.strength):
        with pytest.raises(TypeError, match="x must be float64"):
            call(torch.relu, torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        analysis.strongest_directions(x, x, x.t(), -1)


@pytest.mark.parametrize(("activation", "beta"), EVEN)
@pytest.mark.parametrize("weights", ["random", "trained"])
def test_half_of_a_gated_layer_is_bilinear(activation, beta, weights):
    """The theorem of `even_odd_split`, to rounding, at every scale of the input."""
    w, v, p = layer(6, 12, 4) if weights == "random" else trained(activation, beta)
    directions = doubles((200, 6))[0]

    def gated(x):
        return bo.gated_mlp(x, w, v, p, activation=activation, beta=beta)

    for scale in (1e-3, 1.0, 1e3):
        x = scale * directions
        even, odd = analysis.even_odd_split(gated, x)
        size = gated(x).abs().max()
        close((even + odd) / size, gated(x) / size, 1e-14)
        close((even - odd) / size, gated(-x) / size, 1e-14)
        bilinear = bo.gated_mlp(x, w, v, p)
        close(even / size, bilinear / 2 / size, 1e-14)
        best = torch.maximum(analysis.strength(gated, x), analysis.strength(gated, -x))
        of_bilinear = analysis.strength(lambda x: bo.gated_mlp(x, w, v, p), x)
        assert (best >= (0.5 - 1e-13) * of_bilinear).all()
    if beta:  # the bound says nothing new of a layer that is even
        assert odd.abs().max() > 0.01 * size
    else:
        assert odd.abs().max() <= 1e-14 * size


def test_a_sigmoid_gate_has_no_such_half():
    w, v, p = layer(6, 12, 4)
    (x,) = doubles((20, 6))
    even, _ = analysis.even_odd_split(lambda x: bo.gated_mlp(x, w, v, p, activation="sigmoid"), x)
    assert (even - bo.gated_mlp(x, w, v, p) / 2).abs().max() > 0.1


def test_even_odd_split_of_parities():
    (x,) = doubles((4, 3))
    even, odd = analysis.even_odd_split(lambda x: x.square() + x**3, x)
    close(even, x.square())
    close(odd, x**3)
    assert torch.autograd.gradcheck(lambda x: tuple(analysis.even_odd_split(torch.exp, x)), x.requires_grad_())
