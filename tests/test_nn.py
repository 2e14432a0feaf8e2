"""The modules: what they compute, how they start, what they share."""

import pytest
import torch
from torch import nn

import bilinear_ops as bo
from bilinear_ops.results import ACTIVATIONS
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


@pytest.mark.parametrize("shape", ((), (1,)))
def test_trainable_beta(shape):
    """Stored as [1], which FSDP2 can shard; the caller's Parameter is the layer's, and layers may share it."""
    beta = nn.Parameter(torch.full(shape, 0.5))
    layer, other = (bo.nn.GatedMLP(3, 4, activation="swish", beta=beta) for _ in range(2))
    x = randn(5, 3)
    expected = bo.reference.gated_mlp(x, layer.w, layer.v, layer.p, activation="swish", beta=0.5)
    torch.testing.assert_close(layer(x), expected)
    layer(x).sum().backward()
    assert layer.beta is beta is other.beta and beta.shape == (1,) and beta.grad.shape == (1,)
    assert "beta" in dict(layer.named_parameters())


def test_beta_is_checked():
    for beta in (torch.ones(2), nn.Parameter(torch.ones(1, 1))):
        with pytest.raises(RuntimeError, match=r"beta must be a float or have shape \[\] or \[1\], got"):
            bo.nn.GatedMLP(3, 4, activation="swish", beta=beta)
    with pytest.raises(TypeError, match="beta must be a float or a tensor, got str"):
        bo.nn.GatedMLP(3, 4, activation="swish", beta="0.5")


@pytest.mark.parametrize("trained", (False, True))
@pytest.mark.parametrize("shape", ((), (1,)))
def test_checkpoints_of_both_shapes_of_beta_load(trained, shape):
    beta = nn.Parameter(torch.tensor(1.0)) if trained else 1.0
    model = nn.Sequential(bo.nn.GatedMLP(3, 4, activation="swish", beta=beta))
    kept = model[0].beta.shape
    saved = {**model.state_dict(), "0.beta": torch.full(shape, 0.25)}
    model.load_state_dict(saved)
    assert model[0].beta.item() == 0.25 and model[0].beta.shape == kept and saved["0.beta"].shape == shape


@pytest.mark.parametrize("beta", (0.5, torch.tensor(0.5), nn.Parameter(torch.tensor(0.5))))
def test_meta_initialisation_reaches_every_tensor(beta):
    """`to_empty` leaves memory as it was, here NaN; `reset_parameters` must write all of it."""
    layer = bo.nn.GatedMLP(3, 4, activation="swish", beta=beta, bias=True, device="meta")
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for t in (*layer.parameters(), *layer.buffers()):
            t.fill_(torch.nan)
    layer.reset_parameters()
    assert all(t.isfinite().all() for t in (*layer.parameters(), *layer.buffers()))
    assert layer.beta.item() == 0.5


def test_a_beta_without_a_value_starts_at_one():
    beta = nn.Parameter(torch.empty((), device="meta"))
    layer = bo.nn.GatedMLP(3, 4, activation="swish", beta=beta, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert layer.beta.item() == 1


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


class Adapted(nn.Module):
    """As adapters do it: the weight of the Linear shows, what is added to it does not."""

    def __init__(self, base):
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight, base.bias

    def forward(self, x):
        return self.base(x) + 1


def hooked(register):
    linear = nn.Linear(3, 4)
    getattr(linear, register)(lambda *_: None)
    return linear


def patched():
    linear = nn.Linear(3, 4)
    linear.forward = lambda x: x
    return linear


@pytest.mark.parametrize(
    ("linear", "message"),
    [
        (Adapted(nn.Linear(3, 4)), r"got test_nn\.Adapted: merge adapters"),
        (type("Quantised", (nn.Linear,), {})(3, 4), r"got \w+\.Quantised: merge"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), "got .*ParametrizedLinear: merge"),
        (hooked("register_forward_pre_hook"), "got one with hooks: remove them"),
        (hooked("register_forward_hook"), "got one with hooks: remove them"),
        (hooked("register_full_backward_pre_hook"), "got one with hooks: remove them"),
        (hooked("register_full_backward_hook"), "got one with hooks: remove them"),
        (patched(), "got one whose forward is replaced"),
        (torch.ones(4, 3), r"got torch\.Tensor"),
    ],
)
@pytest.mark.parametrize("name", ("gate", "up"))
def test_from_linear_refuses_what_it_would_drop(name, linear, message):
    linears = {"gate": nn.Linear(3, 4), "up": nn.Linear(3, 4), "down": nn.Linear(4, 3), name: linear}
    with pytest.raises(TypeError, match=rf"{name} must be a plain torch\.nn\.Linear, {message}"):
        bo.nn.GatedMLP.from_linear(**linears, activation="silu")


def test_from_packed_refuses_what_it_would_drop():
    with pytest.raises(TypeError, match="gate_up must be a plain torch.nn.Linear, got one with hooks"):
        gate_up = hooked("register_forward_hook")
        bo.nn.GatedMLP.from_packed(gate_up=gate_up, down=nn.Linear(2, 3), activation="silu")


@pytest.mark.parametrize("bias", (False, True))
def test_to_linear_is_the_way_back(bias):
    layer = bo.nn.GatedMLP(3, 4, 2, activation="silu", bias=bias)
    gate, up, down = layer.to_linear()
    x = randn(5, 3)
    torch.testing.assert_close(down(up(x) * nn.functional.silu(gate(x))), layer(x))
    assert [type(m) for m in (gate, up, down)] == [nn.Linear] * 3
    assert (up.in_features, up.out_features, down.in_features, down.out_features) == (3, 4, 4, 2)
    again = bo.nn.GatedMLP.from_linear(gate=gate, up=up, down=down, activation="silu")
    for name, t in layer.named_parameters():
        assert again.get_parameter(name) is t
    assert len(list(again.parameters())) == len(list(layer.parameters()))


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


@pytest.mark.parametrize("kind", (bo.nn.GatedBilinear, bo.nn.GatedMLP))
def test_limit_and_offset(kind):
    layer, x = kind(3, 4, **{**bo.gates.GPT_OSS, "limit": 0.2}, bias=True), 2 * randn(5, 3)
    a, z = x @ layer.w.t() + layer.b_w, x @ layer.v.t() + layer.b_v
    gate = bo.reference.gate(a, z, **{**bo.gates.GPT_OSS, "limit": 0.2})
    torch.testing.assert_close(layer(x), gate if kind is bo.nn.GatedBilinear else gate @ layer.p.t() + layer.b_p)
    assert "beta=1.702, limit=0.2, offset=1, bias=True" in repr(layer)
    with pytest.raises(ValueError, match="limit must be positive, got -1"):
        kind(3, 4, limit=-1.0)
    with pytest.raises(TypeError, match="offset must be a float, got Tensor"):
        kind(3, 4, offset=torch.tensor(1.0))


def test_limit_and_offset_from_linear():
    gate, up, down = (nn.Linear(4, 4) for _ in range(3))
    x, options = 2 * randn(5, 4), {**bo.gates.GPT_OSS, "limit": 0.2}
    layer = bo.nn.GatedMLP.from_linear(gate=gate, up=up, down=down, **options)
    torch.testing.assert_close(layer(x), down(bo.reference.gate(up(x), gate(x), **options)))
    packed = nn.Linear(4, 8)
    packed.load_state_dict({n: torch.cat([getattr(gate, n), getattr(up, n)]) for n in ("weight", "bias")})
    again = bo.nn.GatedMLP.from_packed(gate_up=packed, down=down, **options)
    assert torch.equal(again(x), layer(x))
