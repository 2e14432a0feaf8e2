"""Gates, and even and odd parts, against the layers that they take apart."""

import pytest
import torch
from analysis_inputs import close, doubles, layer

import bilinear_ops as bo
from bilinear_ops import analysis
from bilinear_ops.testing import assert_no_worse

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # in functorch

GATED = [("silu", 1.0), ("swish", 0.0), ("swish", 1.7), ("swish", -0.5), ("relu", 1.0), ("gelu", 1.0)]

GATED += [("gelu_tanh", 1.0), ("identity", 1.0)]

EVEN = GATED[:-1]  # of the bilinear layer itself, the even part is all of it


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


def test_even_odd_split_checks_its_input():
    with pytest.raises(TypeError, match="x must be float64"):
        analysis.even_odd_split(torch.relu, torch.ones(3, dtype=torch.int64))


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


@pytest.mark.parametrize("function", (analysis.even_odd_split, analysis.strength))
def test_functions_are_checked(function):
    x = doubles((7, 5))[0]
    for fn, error, message in (
        (x, TypeError, "fn must be callable, got Tensor"),
        (lambda x: 1.0, TypeError, r"fn\(x\) must be a torch.Tensor, got float"),
        (lambda x: x > 0, TypeError, r"fn\(x\) must be float64"),
        (lambda x: x.sum(0), RuntimeError, r"fn\(x\) must have shape \[7, 'o'\], got \[5\]"),
        (lambda x: x.sum(), RuntimeError, r"fn\(x\) must have shape"),
    ):
        with pytest.raises(error, match=message):
            function(fn, x)
    with pytest.raises(RuntimeError, match=r"x must have shape \[..., d\], got \[\]"):
        function(torch.relu, x.sum())


@pytest.mark.parametrize(("activation", "beta"), GATED)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_gated_interactions_are_the_layer(activation, beta, shape):
    w, v, p = layer(5, 8, 4)
    (x,) = doubles((*shape, 5))
    q = analysis.gated_interactions(x, w, v, p, activation, beta=beta)
    assert q.shape == (*shape, 4, 5, 5)
    close(q, q.mT)
    expected = bo.gated_mlp(x, w, v, p, activation=activation, beta=beta)
    close(torch.einsum("...i,...kij,...j->...k", x, q, x), expected)
    if activation == "identity":
        close(q, bo.interaction_matrices(w, v, p).expand_as(q))
    u = doubles((2, 4))[0]
    close(
        analysis.gated_interactions(x, w, v, bo.Directions(u, p), activation, beta=beta),
        torch.einsum("ko,...oij->...kij", u, q),
    )


def test_gated_interactions_of_a_layer_with_biases():
    w, v, p = layer(5, 8, 4)
    b_w, b_v, x = doubles((8,), (8,), (3, 5))
    one = torch.cat([x, torch.ones(3, 1).double()], 1)
    q = analysis.gated_interactions(one, *analysis.augment_biases(w, v, p, b_w, b_v), "silu")
    expected = bo.gated_mlp(x, w, v, p, b_w, b_v, activation="silu")
    close(torch.einsum("ti,tkij,tj->tk", one, q, one), expected)


def test_gated_interactions_gradients_and_autocast():
    w, v, p = layer(3, 4, 2, grad=True)
    (x,) = doubles((2, 3), grad=True)
    assert torch.autograd.gradcheck(lambda *t: analysis.gated_interactions(*t, "silu"), (x, w, v, p))
    inputs = [t.detach().float() for t in (x, w, v, p)]
    expected = analysis.gated_interactions(*inputs, "gelu")
    with torch.autocast("cpu", torch.bfloat16):
        assert analysis.gated_interactions(*inputs, "gelu").equal(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("t", "d", "h", "k"), [(0, 3, 4, 2), (2, 0, 4, 2), (2, 3, 0, 2), (2, 3, 4, 0), (2, 3, 4, 2)])
def test_gated_interactions_of_any_size(dtype, t, d, h, k):
    w, v, p = (t.to(dtype) for t in layer(d, h, k))
    found = analysis.gated_interactions(torch.ones(t, d, dtype=dtype), w, v, p, "silu")
    assert found.shape == (t, k, d, d) and found.dtype == dtype


def test_gated_interactions_errors():
    w, v, p = layer(5, 8, 4)
    (x,) = doubles((3, 5))
    for activation in ("sigmoid", "relu2"):
        with pytest.raises(ValueError, match=f"activation must be one of identity, silu, .*, got '{activation}'"):
            analysis.gated_interactions(x, w, v, p, activation)
    with pytest.raises(RuntimeError, match=r"x must have shape \[\.\.\., d=5\], got \[3, 4\]"):
        analysis.gated_interactions(x[:, :4], w, v, p, "silu")
    with pytest.raises(RuntimeError, match="x must have the dtype of w"):
        analysis.gated_interactions(x.float(), w, v, p, "silu")
    with pytest.raises(TypeError, match=r"v must be a torch\.Tensor, got list"):
        analysis.gated_interactions(x, w, v.tolist(), p, "silu")
    x[1] = torch.nan
    found = analysis.gated_interactions(x, w, v, p, "silu")
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()
