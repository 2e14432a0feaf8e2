"""Layers expanded, mixed and routed from original weights; transcoders."""

import pytest
import torch
import torch.nn.functional as F

import bilinear_ops as bo
from bilinear_ops.composite.limits import limits
from bilinear_ops.results import ACTIVATIONS
from bilinear_ops.testing import randn


@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("factor", (1, 2, 3))
def test_expansion_reproduces_the_output(factor, activation, bias):
    layer = bo.nn.GatedMLP(6, 5, 4, activation=activation, bias=bias).double()
    x = randn(9, 6, dtype=torch.float64)
    before = {n: t.clone() for n, t in layer.state_dict().items()}
    new, origin = bo.init.expand_gated_mlp(layer, factor)
    torch.testing.assert_close(new(x), layer(x), rtol=1e-12, atol=1e-12)
    assert new.w.shape == (5 * factor, 6) and torch.equal(new.v, layer.v[origin]) and origin.shape == (5 * factor,)
    assert all(torch.equal(t, layer.state_dict()[n]) for n, t in before.items())
    up, down = torch.nn.Linear(6, 5, bias=bias).double(), torch.nn.Linear(5, 4, bias=bias).double()
    new_up, new_down, origin = bo.init.expand_mlp(up, down, factor)
    torch.testing.assert_close(new_down(torch.tanh(new_up(x))), down(torch.tanh(up(x))), rtol=1e-12, atol=1e-12)
    assert new_up.out_features == new_down.in_features == len(origin)


def test_expansion_of_subcomponents():
    layer = bo.nn.Rank1Linear(6, 4, 5, weight=randn(4, 6))
    new, origin = bo.init.expand_rank1(layer, 3)
    x, mask = randn(9, 6), torch.rand(9, 5)
    torch.testing.assert_close(new(x, mask[:, origin]), layer(x, mask))
    torch.testing.assert_close(new.weight, layer.weight)
    with pytest.raises(ValueError, match="factor must be at least 1, got 0"):
        bo.init.expand_rank1(layer, 0)


def test_noise_breaks_the_symmetry():
    layer = bo.nn.GatedMLP(200, 50, activation="silu", bias=True)
    new, origin = bo.init.expand_gated_mlp(layer, 2, noise=0.1, generator=torch.Generator().manual_seed(0))
    for name in ("w", "v", "b_w", "b_v"):
        was, now = getattr(layer, name), getattr(new, name)
        relative = (now - was[origin]).square().mean().sqrt() / was.square().mean().sqrt()
        assert abs(relative - 0.1) < (0.005 if was.dim() == 2 else 0.03)
        assert not torch.equal(now[:50], now[50:])
    assert torch.equal(new.p, layer.p[:, origin] / 2)


@pytest.mark.parametrize("tokens", (2, 400))  # after the original, and materialised
@pytest.mark.parametrize("pattern", (False, True))
@pytest.mark.parametrize("slack", (False, True))
def test_mixed_weights_equal_the_materialised_form(tokens, pattern, slack):
    original = randn(4, 6)
    given = torch.rand(9, 4) < 0.5 if pattern else None
    mixed = bo.nn.MixedWeights(original, 9, slack=slack, pattern=given)
    torch.nn.init.normal_(mixed.entries)
    if slack:
        torch.nn.init.normal_(mixed.slack)
    x, dy = randn(tokens, 6, requires_grad=True), randn(tokens, 9)
    mixing = mixed.mixing.to_dense() if pattern else mixed.mixing
    assert given is None or not mixing[~given].any()
    leaf = mixing.detach().requires_grad_()
    y = F.linear(x, leaf @ original + (mixed.slack.detach() if slack else 0))
    torch.testing.assert_close(mixed(x), y)
    dx, dmixing = torch.autograd.grad(y, (x, leaf), dy)
    found = torch.autograd.grad(mixed(x), (x, mixed.entries), dy)
    torch.testing.assert_close(found, (dx, dmixing if given is None else dmixing[given]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed.penalty(), mixing.abs().sum())


def test_mixtures_start_as_copies():
    original = randn(4, 6)
    forward = bo.nn.MixedWeights(original, 8, slack=True)
    torch.testing.assert_close(forward.weight, original.repeat(2, 1))
    reverse = bo.nn.MixedWeights(original, 8, "reverse")
    torch.testing.assert_close(reverse.weight, original.repeat(2, 1))
    torch.testing.assert_close(reverse.residual(), torch.zeros(4, 6))
    assert {n for n, _ in reverse.named_parameters()} == {"entries", "replacement"}
    x = randn(3, 6)
    torch.testing.assert_close(reverse(x), F.linear(x, reverse.replacement))
    for call, message in (
        (lambda: bo.nn.MixedWeights(original, 8, "back"), "direction must be one of forward, reverse, got 'back'"),
        (lambda: bo.nn.MixedWeights(original, 8, "reverse", slack=True), "slack belongs to direction='forward'"),
        (forward.residual, "residual belongs to direction='reverse'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(RuntimeError, match=r"pattern must have shape \[8, 4\], got \[4, 8\]"):
        bo.nn.MixedWeights(original, 8, pattern=torch.ones(4, 8).bool())


def layer_tensors(tokens=300, d=6, h=7, o=5):
    shapes = ((tokens, d), (h, d), (h, d), (o, h), (h,), (h,), (o,))
    return [randn(*s, requires_grad=True) for s in shapes]


@pytest.mark.parametrize("impl", ("torch", "triton"))
@pytest.mark.parametrize("activation", ("identity", "silu", "swish"))
def test_routing_with_ones_is_ordinary_training(activation, impl, monkeypatch):
    """Bit for bit, in several blocks of rows."""
    monkeypatch.setattr(limits, "gradient_bytes", 1)
    monkeypatch.setattr(limits, "gradient_rows", 16)
    tensors, dy = layer_tensors(40), randn(40, 5)
    for wanted in (tensors, tensors[3:4], tensors[2:4]):
        expected = torch.autograd.grad(bo.gated_mlp(*tensors, activation=activation, impl=impl), wanted, dy)
        y = bo.nn.routed_gated_mlp(*tensors, route=torch.ones(7), activation=activation, impl=impl)
        for got, ordinary in zip(torch.autograd.grad(y, wanted, dy), expected, strict=True):
            assert torch.equal(got, ordinary)


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_routing_masks_weight_gradients_alone(impl):
    tensors, dy, route = layer_tensors(12), randn(2, 6, 5), torch.rand(2, 6, 7)
    x, w, v, p, b_w, b_v, b_p = tensors
    a, z = F.linear(x, w, b_w), F.linear(x, v, b_v)
    hid = a * F.silu(z)
    y = F.linear(hid, p, b_p)
    (dx,) = torch.autograd.grad(y, x, dy.view(12, 5), retain_graph=True)
    da, dz = torch.autograd.grad(y, (a, z), dy.view(12, 5))
    flat = route.view(12, 7)
    da, dz = da * flat, dz * flat
    expected = (dx, da.t() @ x, dz.t() @ x, dy.view(12, 5).t() @ (hid * flat), da.sum(0), dz.sum(0), dy.sum((0, 1)))
    shaped = x.view(2, 6, 6)
    found = bo.nn.routed_gated_mlp(shaped, w, v, p, b_w, b_v, b_p, route=route, activation="silu", impl=impl)
    torch.testing.assert_close(found.view(12, 5), y)
    for got, wanted in zip(torch.autograd.grad(found, tensors, dy), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_routes():
    gates = torch.tensor([[0.9, 0.2, 0.6]])
    assert bo.nn.route(gates, "threshold").tolist() == [[1, 0, 1]]
    assert bo.nn.route(gates, "topk").tolist() == [[1, 0, 0]]
    rows = torch.tensor([[0.9, 0.1, 0.7], [0.2, 0.3, 0.4]])
    assert bo.nn.route(rows, "topk", k=2).tolist() == [[1, 0, 1], [0, 1, 1]]
    with pytest.raises(TypeError, match="k must be an int, got float"):
        bo.nn.route(rows, "topk", k=2.0)
    assert bo.nn.route(gates, "proportional") is not gates and torch.equal(bo.nn.route(gates, "proportional"), gates)
    with pytest.raises(ValueError, match="rule must be one of threshold, topk, proportional, got 'all'"):
        bo.nn.route(gates, "all")
    with pytest.raises(RuntimeError, match=r"route must broadcast to \[12, 7\], got \[6\]"):
        bo.nn.routed_gated_mlp(*layer_tensors(12), route=torch.ones(6))


def test_topk_transcoder_is_its_dense_form():
    model = bo.nn.Transcoder(6, 5, 20, k=3)
    for t in model.parameters():
        torch.nn.init.normal_(t)
    x, dy = randn(2, 4, 6, requires_grad=True), randn(2, 4, 5)
    acts = F.relu(x @ model.read + model.b_read)
    kept = torch.zeros_like(acts).scatter(-1, acts.topk(3).indices, 1.0)
    y = (acts * kept) @ model.write + model.b_write
    torch.testing.assert_close(model(x), y)
    wanted = (x, *model.parameters())
    for got, expected in zip(
        torch.autograd.grad(model(x), wanted, dy), torch.autograd.grad(y, wanted, dy), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_jumprelu_transcoder():
    """Features above the threshold pass unchanged; the threshold learns from those within the bandwidth of it."""
    model = bo.nn.Transcoder(6, 5, 4, kind="jumprelu", bandwidth=0.2)
    with torch.no_grad():
        model.log_threshold.fill_(0.5).log_()
        model.read.zero_()
        model.b_read.copy_(torch.tensor([0.3, 0.45, 0.55, 0.9]))
    x = randn(3, 6)
    features = model.features(x)
    torch.testing.assert_close(features, torch.tensor([0, 0, 0.55, 0.9]).expand(3, 4))
    torch.testing.assert_close(model(x), features @ model.write + model.b_write)
    dlog, dbias = torch.autograd.grad(features.sum(), (model.log_threshold, model.b_read))
    torch.testing.assert_close(dlog, torch.tensor([0, 1, 1, 0]) * 3 * (-0.5 / 0.2) * 0.5)
    torch.testing.assert_close(dbias, torch.tensor([0.0, 0, 3, 3]))
    with pytest.raises(ValueError, match="kind must be one of topk, jumprelu, got 'relu'"):
        bo.nn.Transcoder(6, 5, 4, kind="relu")
