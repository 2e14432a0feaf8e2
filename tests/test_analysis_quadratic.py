"""The best quadratic of a gated layer, against least squares on samples and against the layers that are quadratic."""

import pytest
import torch
from analysis_inputs import close, doubles, layer

import bilinear_ops as bo
from bilinear_ops import analysis
from bilinear_ops.analysis import quadratic
from bilinear_ops.composite.limits import limits

SAMPLES = 1_000_000
GATED = [a for a in quadratic.FITTED if a != "identity"]
FEW = ("swish", "relu", "tanh")  # a slope, a kink, a bounded gate


def biased(d, h):
    """b_w, b_v, mean and cov."""
    b_w, b_v, mean, root = doubles((h,), (h,), (d,), (d, d))
    root = 0.5 * root + torch.eye(d)
    return {"b_w": b_w, "b_v": b_v, "mean": mean, "cov": root @ root.t()}


def output(x, w, v, p, activation, o):
    beta = o.get("beta", 1.0)
    return bo.reference.gated_mlp(x, w, v, p, o.get("b_w"), o.get("b_v"), activation=activation, beta=beta)


def coefficients(found, i, j):
    return torch.cat([found.constant[:, None], found.linear, found.q[:, i, j]], 1).t()


@pytest.mark.parametrize("activation", (*FEW, *(pytest.param(a, marks=pytest.mark.ci) for a in GATED if a not in FEW)))
@pytest.mark.parametrize("bias", [False, True])
def test_against_least_squares(activation, bias):
    """Values within 5 standard errors (White's) of a fit to a million samples, explained variance too."""
    d, error = 3, 2e-3
    w, v, p = layer(d, 5, 2)
    o = biased(d, 5) if bias else {}
    o |= {"beta": 1.7} if activation == "swish" else {}
    found = analysis.best_quadratic(w, v, p, activation, error=error, **o)
    x = torch.randn(SAMPLES, d, dtype=torch.float64)
    x = o["mean"] + x @ torch.linalg.cholesky(o["cov"]).t() if bias else x
    y = output(x, w, v, p, activation, o)
    i, j = torch.triu_indices(d, d)
    terms = torch.cat([torch.ones(SAMPLES, 1).double(), x, x[:, i] * x[:, j] * (2 - (i == j).double())], 1)
    inverse = torch.linalg.inv(terms.t() @ terms)
    fit = inverse @ (terms.t() @ y)
    rest = y - terms @ fit
    for k in range(2):
        scores = terms * rest[:, k, None]
        deviation = (inverse @ (scores.t() @ scores) @ inverse).diagonal().sqrt()
        assert ((coefficients(found, i, j)[:, k] - fit[:, k]).abs() <= 5 * deviation).all()
    squares, of_y = rest.square(), (y - y.mean(0)).square()
    left = squares.mean(0) / of_y.mean(0)
    deviation = ((squares - left * of_y) / of_y.mean(0)).std(0) / SAMPLES**0.5
    sampled = error if bias or activation not in quadratic.PAIRED else 0.0
    assert ((found.explained - (1 - left)).abs() <= 5 * (deviation.square() + sampled**2).sqrt()).all()
    assert (found.explained < 0.9999).all() and (found.explained > 0.3).all()


@pytest.mark.parametrize("bias", [False, True])
def test_a_bilinear_layer_is_its_own(bias):
    w, v, p = layer(4, 7, 3)
    o = biased(4, 7) if bias else {}
    found = analysis.best_quadratic(w, v, p, "identity", **o)
    close(found.q, bo.interaction_matrices(w, v, p))
    terms = analysis.bias_terms(w, v, p, o.get("b_w"), o.get("b_v"))
    close(found.linear, terms.linear)
    close(found.constant, terms.constant)
    close(found.explained, torch.ones(3).double())
    x = doubles((5, 4))[0]
    fitted = bo.quadratic_form(x, found.q) + x @ found.linear.t() + found.constant
    close(fitted, output(x, w, v, p, "identity", o))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_without_biases_it_is_half_of_the_bilinear_layer(activation):
    """The even part of the layer, by `even_odd_split`'s theorem, and a linear part from the odd one."""
    w, v, p = layer(4, 7, 3)
    found = analysis.best_quadratic(w, v, p, activation)
    close(found.q, bo.interaction_matrices(w, v, p) / 2)
    close(found.constant, torch.zeros(3).double())
    assert found.linear.abs().max() > 0.1


def test_swish_without_a_slope_is_half_of_the_bilinear_layer():
    w, v, p = layer(4, 7, 3)
    found = analysis.best_quadratic(w, v, p, "swish", beta=0.0, **biased(4, 7))
    close(found.explained, torch.ones(3).double(), 1e-9)


def test_sampling_stops_at_its_error(monkeypatch):
    monkeypatch.setattr(quadratic, "SAMPLES", 256)
    monkeypatch.setattr(limits, "block", 7 * 100)
    w, v, p = layer(4, 7, 3)
    exact = analysis.best_quadratic(w, v, p, "gelu").explained
    o = {"b_v": torch.zeros(7).double()}  # no closed form is looked for
    rough, fine = (analysis.best_quadratic(w, v, p, "gelu", error=e, **o).explained for e in (0.05, 0.003))
    assert (fine - exact).abs().max() < 5 * 0.003
    assert (fine - exact).abs().max() < (rough - exact).abs().max() < 5 * 0.05
    close(analysis.best_quadratic(w, v, p, "gelu", error=0.05, **o).explained, rough, 0)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_closed_variances_by_tiles(activation, monkeypatch):
    w, v, p = layer(4, 7, 3)
    cov = biased(4, 7)["cov"]
    whole = analysis.best_quadratic(w, v, p, activation, cov=cov)
    monkeypatch.setattr(limits, "gram_neurons", 3)
    close(analysis.best_quadratic(w, v, p, activation, cov=cov).explained, whole.explained)
    spherical = analysis.best_quadratic(w, v, p, activation)
    assert (spherical.explained - whole.explained).abs().max() > 1e-3


@pytest.mark.parametrize("activation", ["silu", "swish", "relu", "gelu", "hardswish", "sigmoid"])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients(activation, bias, monkeypatch):
    monkeypatch.setattr(quadratic, "SAMPLES", 64)
    monkeypatch.setattr(limits, "block", 2 * 40)  # two blocks of samples
    monkeypatch.setattr(limits, "gram_neurons", 1)
    inputs = layer(2, 2, 2)
    o = biased(2, 2) if bias else {}
    o |= {"beta": torch.tensor(1.3).double()} if activation == "swish" else {}

    def fit(w, v, p, *more):
        named = dict(zip(o, more, strict=True))
        return tuple(analysis.best_quadratic(w, v, p, activation, error=1.0, **named))

    arguments = [t.detach().requires_grad_() for t in (*inputs, *o.values())]
    assert torch.autograd.gradcheck(fit, arguments)


def test_half_precision_is_exact_in_its_numbers():
    w, v, p = (t.to(torch.bfloat16) for t in layer(4, 7, 3))
    found = analysis.best_quadratic(w, v, p, "gelu")
    expected = analysis.best_quadratic(w.double(), v.double(), p.double(), "gelu")
    for got, exact in zip(found, expected, strict=True):
        assert got.dtype == torch.float32
        close(got, exact.float(), 1e-6)


@pytest.mark.parametrize(("d", "h", "k"), [(0, 4, 3), (3, 0, 2), (3, 4, 0)])
def test_empty(d, h, k):
    for activation in ("identity", "silu", "relu"):
        found = analysis.best_quadratic(*layer(d, h, k), activation)
        assert [list(t.shape) for t in found] == [[k, d, d], [k, d], [k], [k]]
        assert all((t == 0).all() for t in found[:3])
        assert found.explained.isnan().all()


def test_an_output_that_does_not_vary():
    w, v, p = layer(3, 4, 2)
    p[0] = 0
    for activation in ("identity", "silu", "gelu"):
        found = analysis.best_quadratic(w, v, p, activation)
        assert found.explained.isnan().tolist() == [True, False]


def test_errors():
    w, v, p = layer(3, 4, 2)
    for name in ("silu_clamped", "silu_bounded", "elu"):
        with pytest.raises(ValueError, match=f"activation must be one of identity, silu, .*, got '{name}'"):
            analysis.best_quadratic(w, v, p, name)
    with pytest.raises(ValueError, match="beta belongs to activation='swish', got 2.0 with 'silu'"):
        analysis.best_quadratic(w, v, p, "silu", beta=2.0)
    with pytest.raises(ValueError, match="error must be above 0, got 0"):
        analysis.best_quadratic(w, v, p, "silu", error=0)
    with pytest.raises(ValueError, match="cov must be positive definite"):
        analysis.best_quadratic(w, v, p, "silu", cov=-torch.eye(3).double())
    with pytest.raises(RuntimeError, match=r"cov must have shape \[d=3, d=3\], got \[2, 2\]"):
        analysis.best_quadratic(w, v, p, "silu", cov=torch.eye(2).double())
    for name in ("w", "mean", "cov"):
        bad = {"w": w, "mean": torch.zeros(3).double(), "cov": torch.eye(3).double()}
        bad[name] = torch.full_like(bad[name], torch.nan)
        with pytest.raises(ValueError, match=f"{name} must be finite"):
            analysis.best_quadratic(bad["w"], v, p, "silu", mean=bad["mean"], cov=bad["cov"])
