"""Biases as one more input and as three parts, against the biased layer."""

import pytest
import torch
from analysis_inputs import close, doubles, layer

import bilinear_ops as bo
from bilinear_ops import analysis


@pytest.mark.parametrize("activation", ["identity", "relu", "silu"])
def test_augment_biases(activation):
    x, w, v, p, b_w, b_v, b_p = doubles((11, 5), (8, 5), (8, 5), (4, 8), (8,), (8,), (4,))
    ones = torch.cat([x, x.new_ones(11, 1)], 1)
    for biases in ((b_w, b_v), (None, b_v), (b_w, None)):
        augmented = analysis.augment_biases(w, v, p, *biases)
        expected = bo.gated_mlp(x, w, v, p, *biases, activation=activation)
        close(bo.gated_mlp(ones, *augmented, activation=activation), expected)
    if activation != "silu":  # b_p is multiplied by act(1)
        close(
            bo.gated_mlp(ones, *analysis.augment_biases(w, v, p, b_w, b_v, b_p), activation=activation),
            bo.gated_mlp(x, w, v, p, b_w, b_v, b_p, activation=activation),
        )


@pytest.mark.parametrize("given", [(1, 1, 1), (1, 0, 0), (0, 1, 1), (0, 0, 0)])
def test_bias_terms(given):
    x, w, v, p, *biases = doubles((11, 5), (8, 5), (8, 5), (4, 8), (8,), (8,), (4,))
    biases = [b if kept else None for b, kept in zip(biases, given, strict=True)]
    terms = analysis.bias_terms(w, v, p, *biases)
    parts = bo.gated_mlp(x, *terms.interaction), x @ terms.linear.t(), terms.constant
    close(sum(parts), bo.gated_mlp(x, w, v, p, *biases))
    close(bo.gated_mlp(2 * x, w, v, p, *biases), 4 * parts[0] + 2 * parts[1] + parts[2])


def test_gradients():
    tensors = layer(2, 3, 2, grad=True) + doubles((3,), (3,), (2,), grad=True)
    assert torch.autograd.gradcheck(analysis.augment_biases, tensors)
    assert torch.autograd.gradcheck(lambda *t: analysis.bias_terms(*t)[1:], tensors)


@pytest.mark.parametrize(("d", "h", "o"), [(0, 4, 3), (3, 0, 2), (3, 4, 0), (0, 0, 0)])
def test_empty_sizes(d, h, o):
    w, v, p = layer(d, h, o)
    augmented = analysis.augment_biases(w, v, p, b_p=torch.ones(o).double())
    assert [t.shape for t in augmented] == [(h + 1, d + 1), (h + 1, d + 1), (o, h + 1)]
    assert [t.shape for t in analysis.bias_terms(w, v, p)[1:]] == [(o, d), (o,)]


@pytest.mark.parametrize("call", [analysis.augment_biases, analysis.bias_terms])
def test_errors(call):
    with pytest.raises(RuntimeError, match=r"b_v must have shape \[h=8\], got \[5\]"):
        call(*layer(5, 8, 4), None, torch.ones(5).double())


@pytest.mark.parametrize("bias", (False, True))
def test_weights_of_a_module_are_all_of_it(bias):
    module = bo.nn.GatedMLP(4, 6, 3, bias=bias, dtype=torch.float64)
    w, v, p = analysis.layer_weights(module)
    x = doubles((7, 4))[0]
    whole = torch.cat([x, torch.ones(7, 1).double()], 1) if bias else x
    close(bo.gated_mlp(whole, w, v, p), module(x))
    assert bias or w is module.w
    (module(x).sum() - bo.gated_mlp(whole, w, v, p).sum()).backward()
    assert all(t.grad.abs().max() < 1e-12 for t in module.parameters())


def test_an_embedding_is_folded_in_with_the_biases():
    """The recipe of `layer_weights`: the entries of a token with itself, with the bias, and of the bias."""
    embedding, module = doubles((9, 4))[0], bo.nn.GatedMLP(4, 6, 3, bias=True, dtype=torch.float64)
    basis = torch.block_diag(embedding.t(), torch.ones(1, 1).double())
    w, v, p = analysis.layer_weights(module)
    q = bo.interaction_matrices(w @ basis, v @ basis, p)
    tokens = torch.arange(9)
    close((q[:, tokens, tokens] + 2 * q[:, tokens, -1] + q[:, -1:, -1]).t(), module(embedding))


def test_weights_of_other_modules_are_refused():
    with pytest.raises(ValueError, match="must have no limit and no offset"):
        analysis.layer_weights(bo.nn.GatedMLP(3, 4, offset=1.0))
    with pytest.raises(ValueError, match="must have no activation to be a quadratic form, got 'silu'"):
        analysis.layer_weights(bo.nn.GatedMLP(4, 6, activation="silu"))
    with pytest.raises(TypeError, match="module must be a GatedMLP, got Linear"):
        analysis.layer_weights(torch.nn.Linear(4, 6))
    layer = bo.nn.GatedMLP(4, 6, activation="swish", beta=0.0)
    assert analysis.layer_weights(layer.bilinearise_())[2] is layer.p
