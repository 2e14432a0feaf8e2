"""The modules: what they compute, how they start, what they share."""

import pytest
import torch
from torch import nn

import bilinear_ops as bo
from bilinear_ops.gated import ACTIVATIONS
from bilinear_ops.testing import randn


@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_modules_are_their_ops(activation, bias):
    beta = {"beta": 0.5} if activation == "swish" else {}
    x = randn(2, 5, 3)
    layer = bo.nn.GatedBilinear(3, 4, activation=activation, bias=bias, **beta)
    expected = bo.reference.gated_bilinear(x, layer.w, layer.v, layer.b_w, layer.b_v, activation=activation, **beta)
    torch.testing.assert_close(layer(x), expected)
    mlp = bo.nn.GatedMLP(3, 4, 2, activation=activation, bias=bias, **beta)
    weights = (mlp.w, mlp.v, mlp.p, mlp.b_w, mlp.b_v, mlp.b_p)
    torch.testing.assert_close(mlp(x), bo.reference.gated_mlp(x, *weights, activation=activation, **beta))
    assert sorted(dict(mlp.named_parameters())) == sorted(["w", "v", "p"] + ["b_w", "b_v", "b_p"] * bias)


def test_initialised_as_linear():
    torch.manual_seed(1)
    layer = bo.nn.GatedMLP(256, 512, 128, bias=True)
    for ours, like in ((layer.w, nn.Linear(256, 512)), (layer.v, nn.Linear(256, 512)), (layer.p, nn.Linear(512, 128))):
        assert ours.shape == like.weight.shape
        assert ours.abs().max() <= like.in_features**-0.5
        torch.testing.assert_close(ours.std(), like.weight.std(), rtol=0.02, atol=0)
    assert layer.b_p.abs().max() <= 512**-0.5


def test_beta_is_the_layers_own():
    beta = torch.tensor(0.5)
    layer = bo.nn.GatedMLP(3, 4, activation="swish", beta=beta)
    layer.beta.zero_()
    assert beta == 0.5
    assert "beta" not in repr(bo.nn.GatedMLP(3, 4, activation="swish", device="meta"))  # its value is not known


def test_trainable_beta():
    layer = bo.nn.GatedMLP(3, 4, activation="swish", beta=nn.Parameter(torch.tensor(0.5)))
    layer(randn(5, 3)).sum().backward()
    assert "beta" in dict(layer.named_parameters()) and layer.beta.grad is not None


@pytest.mark.parametrize("bias", (False, True))
def test_from_linear_shares_the_parameters(bias):
    gate, up, down = nn.Linear(3, 4, bias=bias), nn.Linear(3, 4, bias=bias), nn.Linear(4, 3, bias=bias)
    layer = bo.nn.GatedMLP.from_linear(gate=gate, up=up, down=down, activation="silu", recompute=True)
    assert layer.recompute
    x = randn(5, 3)
    torch.testing.assert_close(layer(x), down(up(x) * nn.functional.silu(gate(x))))
    assert layer.w is up.weight and layer.v is gate.weight and layer.p is down.weight and layer.b_p is down.bias
    assert not any(t.is_meta for t in (*layer.parameters(), *layer.buffers()))


@pytest.mark.parametrize(
    ("name", "function"),
    (
        ("gelu_pytorch_tanh", lambda z: nn.functional.gelu(z, approximate="tanh")),
        ("gelu_new", lambda z: nn.functional.gelu(z, approximate="tanh")),
        ("linear", lambda z: z),
        ("quick_gelu", lambda z: z * torch.sigmoid(1.702 * z)),
    ),
)
def test_from_linear_takes_names_of_other_libraries(name, function):
    gate, up, down = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 3)
    layer = bo.nn.GatedMLP.from_linear(gate=gate, up=up, down=down, activation=name)
    x = randn(5, 3)
    torch.testing.assert_close(layer(x), down(up(x) * function(gate(x))))
    with pytest.raises(ValueError, match="beta"):
        bo.nn.GatedMLP.from_linear(gate=gate, up=up, down=down, activation=name, beta=0.5)


@pytest.mark.parametrize("bias", (False, True))
def test_from_packed_shares_the_memory(bias):
    gate_up, down = nn.Linear(3, 8, bias=bias), nn.Linear(4, 3, bias=bias)
    layer = bo.nn.GatedMLP.from_packed(gate_up=gate_up, down=down, activation="silu", recompute=True)
    assert layer.recompute
    x = randn(5, 3)

    def packed(x):
        gate, up = gate_up(x).chunk(2, -1)
        return down(up * nn.functional.silu(gate))

    torch.testing.assert_close(layer(x), packed(x))
    with torch.no_grad():
        layer.w.mul_(2), layer.v.mul_(3)
    torch.testing.assert_close(layer(x), packed(x))
    layer(x).sum().backward()
    assert len(list(layer.parameters())) == 3 * (1 + bias) and all(p.grad is not None for p in layer.parameters())


def test_from_linear_checks_sizes_and_dtypes():
    half = nn.Linear(3, 4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="of one dtype, got torch.bfloat16, torch.float32, torch.float32"):
        bo.nn.GatedMLP.from_linear(gate=half, up=nn.Linear(3, 4), down=nn.Linear(4, 3), activation="silu")
    with pytest.raises(ValueError, match=r"got \[5, 3\], \[4, 3\], \[3, 4\]"):
        bo.nn.GatedMLP.from_linear(gate=nn.Linear(3, 5), up=nn.Linear(3, 4), down=nn.Linear(4, 3), activation="silu")


@pytest.mark.parametrize("kind", (bo.nn.GatedBilinear, bo.nn.GatedMLP))
def test_bilinearise(kind):
    """swish at beta 0 is z / 2: folding the half in changes nothing, biases included."""
    layer = kind(3, 4, activation="swish", beta=0.5, bias=True)
    x = randn(5, 3)
    with pytest.raises(ValueError, match="swish at beta 0.5"):
        layer.bilinearise_()
    layer.beta.zero_()
    before = layer(x)
    assert layer.bilinearise_() is layer
    assert layer.activation == "identity" and layer.beta is None
    torch.testing.assert_close(layer(x), before)
    assert torch.equal(layer.bilinearise_()(x), layer(x))
    with pytest.raises(ValueError, match="got silu"):
        kind(3, 4, activation="silu").bilinearise_()


def test_bad_options():
    with pytest.raises(ValueError, match="activation must be one of"):
        bo.nn.GatedMLP(3, 4, activation="softplus")
    with pytest.raises(ValueError, match="beta belongs to"):
        bo.nn.GatedBilinear(3, 4, activation="silu", beta=0.5)


def test_repr():
    layer = bo.nn.GatedMLP(3, 4, 2, activation="swish", beta=0.5, recompute=True)
    expected = "d_in=3, d_hidden=4, activation='swish', beta=0.5, bias=False, d_out=2, recompute=True"
    assert repr(layer) == f"GatedMLP({expected})"
