"""Explanations of single inputs add up to the layer's own outputs."""

import pytest
import torch
from analysis_inputs import close, doubles, layer

import bilinear_ops as bo
from bilinear_ops import analysis


def explained(shape=(2, 7), n=3):
    w, v, p = layer(5, 8, 4)
    x = doubles((*shape, 5))[0]
    pairs = analysis.interaction_eigh(w, v, p)
    return x, pairs, analysis.explain(x, pairs, n), bo.gated_mlp(x, w, v, p)


def test_contributions_and_remainder_are_the_logits():
    x, pairs, (contributions, remainder), logits = explained()
    assert contributions.shape == (2, 7, 4, 3) and remainder.shape == (2, 7, 4)
    close(contributions.sum(-1) + remainder, logits)
    assert (contributions.abs().diff(dim=-1) <= 0).all()
    terms = pairs.values * torch.einsum("krd,ted->tekr", pairs.vectors, x).square()
    largest = terms.gather(-1, terms.abs().argsort(-1, descending=True))[..., :3]
    close(contributions, largest)
    assert (contributions < 0).any() and (contributions > 0).any(), "contributions have signs"


def test_float32_on_a_layer_of_images_size():
    w, v, p = (t.float() for t in layer(64, 128, 10))
    x = torch.rand(20, 64)
    logits = bo.gated_mlp(x, w, v, p)
    found = analysis.explain(x, analysis.interaction_eigh(w, v, p), 8)
    error = (found.contributions.sum(-1) + found.remainder - logits).abs().max()
    assert error <= 1e-5 * logits.abs().max()


def test_what_is_not_quadratic_is_in_the_remainder():
    w, v, p = layer(5, 8, 4)
    b_w, b_v, b_p, x = doubles((8,), (8,), (4,), (7, 5))
    logits = bo.gated_mlp(x, w, v, p, b_w, b_v, b_p, activation="silu")
    pairs = analysis.interaction_eigh(w, v, p, 2)
    found = analysis.explain(x, pairs, 1, logits=logits)
    close(found.contributions.sum(-1) + found.remainder, logits)
    alone = analysis.explain(x, pairs, 1, logits=bo.gated_mlp(x, w, v, p))
    close(found.contributions, alone.contributions)
    assert (found.remainder - alone.remainder).abs().max() > 0.1


@pytest.mark.parametrize("n", [0, 5])
def test_none_and_all_of_them(n):
    _, _, found, logits = explained((3,), n)
    close(found.remainder, logits if n == 0 else torch.zeros_like(logits))


def test_gradients():
    w, v, p, x = (t.requires_grad_() for t in (*layer(3, 4, 2), *doubles((2, 3))))
    for logits in (None, doubles((2, 2))[0]):
        assert torch.autograd.gradcheck(
            lambda x, w, v, p, y=logits: tuple(
                analysis.explain(x, analysis.interaction_eigh(w, v, p, method="dense"), 2, logits=y)
            ),
            (x, w, v, p),
        )


def test_other_dtypes_and_nan():
    w, v, p = layer(5, 8, 4)
    pairs = analysis.interaction_eigh(w, v, p)
    x = doubles((7, 5))[0]
    x[3] = torch.nan
    found = analysis.explain(x, pairs, 2)
    assert all(t[3].isnan().all() and t[:3].isfinite().all() and t[4:].isfinite().all() for t in found)
    assert {t.dtype for t in analysis.explain(x.bfloat16(), pairs.to(torch.bfloat16), 2)} == {torch.bfloat16}
    assert [t.shape for t in analysis.explain(x[:0], pairs, 2)] == [(0, 4, 2), (0, 4)]


def test_errors():
    w, v, p = layer(5, 8, 4)
    pairs, few = analysis.interaction_eigh(w, v, p), analysis.interaction_eigh(w, v, p, 2)
    x, logits = doubles((7, 5), (7, 4))
    with pytest.raises(ValueError, match="pairs must be all 5 of each output, got 2: give logits"):
        analysis.explain(x, few, 1)
    for n in (-1, 3):
        with pytest.raises(ValueError, match=f"n must be from 0 to 2, the number of pairs, got {n}"):
            analysis.explain(x, few, n, logits=logits)
    with pytest.raises(TypeError, match="n must be an int, got float"):
        analysis.explain(x, pairs, 1.0)
    with pytest.raises(TypeError, match="pairs must be EigenPairs, got Tensor"):
        analysis.explain(x, pairs.values, 1)
    with pytest.raises(RuntimeError, match=r"logits must have shape \[7, 4\], got \[6, 4\]"):
        analysis.explain(x, pairs, 1, logits=logits[:6])
    with pytest.raises(RuntimeError, match=r"logits must have shape \[\.\.\., K=4\], got \[7, 3\]"):
        analysis.explain(x, pairs, 1, logits=logits[:, :3])
    with pytest.raises(RuntimeError, match="values must have the dtype of x"):
        analysis.explain(x.float(), pairs, 1)
