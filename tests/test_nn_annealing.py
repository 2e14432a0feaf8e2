"""From SwiGLU layers to bilinear ones: the switch to swish, the schedule of its slope, and the fold at its end."""

import copy
import io

import pytest
import torch
from torch import nn

import bilinear_ops as bo
from bilinear_ops.nn import anneal_beta, bilinearise_, swish_
from bilinear_ops.testing import randn


def network(activation: str = "silu") -> nn.Sequential:
    return nn.Sequential(
        bo.nn.GatedMLP(3, 5, activation=activation, bias=True),
        bo.nn.GatedBilinear(3, 4, activation=activation, bias=True),
        bo.nn.GatedMLP(4, 5, 2),
    )


def test_swish_at_slope_one_is_silu():
    model, x = network(), randn(7, 3)
    expected, parameters = model(x), list(model.parameters())
    assert swish_(model) is model
    assert [layer.activation for layer in model] == ["swish", "swish", "identity"]
    torch.testing.assert_close(model(x), expected)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    model[0].beta.fill_(0.5)
    assert swish_(model)[0].beta == 0.5  # what is swish stays as it is
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    again = swish_(network())
    again.load_state_dict(torch.load(saved))
    assert torch.equal(again(x), model(x))


def test_the_slope_falls_over_the_first_steps():
    model = swish_(network())
    slopes = [anneal_beta(model, step, 20) for step in range(20)]
    torch.testing.assert_close(torch.tensor(slopes[:6]), 1 - torch.arange(6) / 6)
    assert slopes[6:] == [0.0] * 14
    assert anneal_beta(model, 2, 8, fraction=0.5) == 0.5
    assert model[0].beta == model[1].beta == 0.5 and model[2].beta is None


def test_annealing_compiles_once():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, x, counter = swish_(network()), randn(7, 3), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    found = []
    for step in range(5):
        anneal_beta(model, step, 10)
        found.append(compiled(x))
        torch.testing.assert_close(found[-1], model(x))
    assert counter.frame_count == 1 and not torch.allclose(found[0], found[1])


def test_the_fold_changes_nothing():
    model, x = swish_(network()), randn(7, 3)
    anneal_beta(model, 3, 10)
    expected, weight = model(x), model[0].p.clone()
    copied = bilinearise_(copy.deepcopy(model))
    assert torch.equal(model[0].p, weight) and torch.equal(model(x), expected)
    assert bilinearise_(model) is model
    assert [layer.activation for layer in model] == ["identity"] * 3 and not any(
        "beta" in n for n in model.state_dict()
    )
    for folded in (model, copied):
        torch.testing.assert_close(folded(x), expected)
    assert torch.equal(model[0].p, weight / 2)
    assert torch.equal(bilinearise_(model)[0].p, weight / 2)
    with pytest.raises(ValueError, match="Sequential is bilinear already"):
        anneal_beta(model, 10, 10)


def test_the_fold_halves_the_linears_that_were_given():
    gate, up, down = (nn.Linear(4, 4) for _ in range(3))
    weight = down.weight.clone()
    layer = bo.nn.GatedMLP.from_linear(gate=gate, up=up, down=down, activation="swish", beta=0.0)
    x = randn(7, 4)
    expected = layer(x)
    torch.testing.assert_close(layer.bilinearise()(x), expected)
    assert torch.equal(down.weight, weight) and layer.activation == "swish"
    torch.testing.assert_close(layer.bilinearise_()(x), expected)
    assert torch.equal(down.weight, weight / 2)


def test_shared_weights_are_halved_once_or_not_at_all():
    model, x = nn.Sequential(*(bo.nn.GatedMLP(4, 5, activation="swish", beta=0.0) for _ in range(2))), randn(7, 4)
    model[1].p = model[0].p
    expected = model(x)
    torch.testing.assert_close(bilinearise_(model)(x), expected)
    model = nn.Sequential(bo.nn.GatedMLP(4, 5, activation="swish", beta=0.0), bo.nn.GatedMLP(4, 5))
    model[1].p = model[0].p
    expected = model(x)
    with pytest.raises(ValueError, match="1.p is shared with a layer"):
        bilinearise_(model)
    assert torch.equal(model(x), expected) and model[0].activation == "swish"


def slopeless(d: int) -> nn.Module:
    return bo.nn.GatedMLP(d, d, activation="swish", beta=0.0)


def test_weights_of_one_memory_are_halved_once_or_not_at_all():
    """Parameters that are views of one storage are one weight, or none of them is halved."""
    model, x = nn.Sequential(slopeless(4), slopeless(4)), randn(7, 4)
    model[1].p = nn.Parameter(model[0].p.data)
    expected = model(x)
    torch.testing.assert_close(bilinearise_(model)(x), expected)

    packed = randn(8, 4)
    for view in (packed.t()[:, :4], packed[2:6], packed[1::2], packed.double().float()[:4]):
        model = nn.Sequential(slopeless(4), slopeless(4))
        model[0].p, model[1].p = nn.Parameter(packed[:4]), nn.Parameter(view)
        expected, shares = model(x), view.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()
        if shares:
            with pytest.raises(ValueError, match="p shares elements with another weight"):
                bilinearise_(model)
            assert torch.equal(model(x), expected)
        else:
            torch.testing.assert_close(bilinearise_(model)(x), expected)

    for other, clash in ((packed[4:], False), (packed[3:7], True)):
        model = nn.Sequential(slopeless(4), nn.Linear(4, 4))
        model[0].p, model[1].weight = nn.Parameter(packed[:4]), nn.Parameter(other)
        expected = model(x)
        if clash:
            with pytest.raises(ValueError, match="1.weight is shared with a layer"):
                bilinearise_(model)
            assert torch.equal(model(x), expected)
        else:
            torch.testing.assert_close(bilinearise_(model)(x), expected)


def test_one_layer_is_halved_as_a_model_of_it():
    """The halves of a packed tensor have no element in common; a weight tied to another is refused."""
    layer, x = bo.nn.GatedBilinear(4, 5, activation="swish", beta=0.0), randn(7, 4)
    packed = randn(10, 4)
    layer.w, layer.v = nn.Parameter(packed[1::2]), nn.Parameter(packed[::2])
    expected = layer(x)
    torch.testing.assert_close(layer.bilinearise_()(x), expected)
    tied = slopeless(4)
    tied.p = tied.w
    expected = tied(x)
    with pytest.raises(ValueError, match="w is shared with a layer"):
        tied.bilinearise_()
    assert torch.equal(tied(x), expected)


def test_what_cannot_be_annealed():
    for anneal in (swish_, bilinearise_, lambda m: anneal_beta(m, 0, 1)):
        with pytest.raises(ValueError, match="Linear has no"):
            anneal(nn.Linear(2, 3))
    with pytest.raises(ValueError, match="call swish_ first"):
        anneal_beta(network(), 0, 1)
    with pytest.raises(ValueError, match="has no gated layer with activation silu or swish"):
        anneal_beta(bo.nn.GatedMLP(2, 3, activation="relu"), 0, 1)
    model = swish_(network())
    with pytest.raises(ValueError, match="step must be at least 0 and steps at least 1, got -1 and 3"):
        anneal_beta(model, -1, 3)
    with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\], got 0"):
        anneal_beta(model, 0, 3, fraction=0)
    before = model.state_dict()
    model[0].beta.zero_()
    with pytest.raises(ValueError, match="got swish at beta 1"):
        bilinearise_(model)
    assert torch.equal(model[0].p, before["0.p"]) and model[0].activation == "swish"
    trained = nn.Sequential(bo.nn.GatedMLP(2, 3, activation="swish", beta=nn.Parameter(torch.tensor(1.0))))
    with pytest.raises(ValueError, match="a Parameter, is not annealed"):
        anneal_beta(trained, 0, 1)
    with pytest.raises(ValueError, match="a limit or an offset is not bilinear"):
        bo.nn.GatedMLP(2, 3, activation="swish", beta=0.0, limit=7.0).bilinearise_()
    normed = nn.utils.parametrizations.weight_norm(bo.nn.GatedMLP(2, 3, activation="swish", beta=0.0), "p")
    for fold in (bilinearise_, bo.nn.GatedMLP.bilinearise_):
        with pytest.raises(ValueError, match="p is no parameter to be halved in place"):
            fold(normed)
