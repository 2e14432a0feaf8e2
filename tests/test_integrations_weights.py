"""The weights of a layer, with the norm before it folded in."""

import pytest
import torch
from torch import nn
from transformers_models import DENSE, add_hook, build, mlp, tokens

import bilinear_ops as bo
from bilinear_ops.integrations.transformers import apply, gated_weights

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.mark.parametrize("kind", [k for k in DENSE if k != "olmo2"])
def test_gated_weights(kind):
    """Folded weights turn the residual stream, normalised without a scale, into the MLP's output."""
    model = build(kind)
    layer = model.model.layers[1]
    norm = layer.pre_feedforward_layernorm if "gemma" in kind else layer.post_attention_layernorm
    seen = {}
    handles = [
        norm.register_forward_hook(lambda m, args, out: seen.update(x=args[0])),
        layer.mlp.register_forward_hook(lambda m, args, out: seen.update(args=args[0], y=out)),
    ]
    with torch.no_grad():
        model(tokens())
    for handle in handles:
        handle.remove()
    apply(model)
    weights = gated_weights(model, 1)
    eps = getattr(norm, "eps", None) or norm.variance_epsilon
    x = seen["x"] * (seen["x"].square().mean(-1, keepdim=True) + eps).rsqrt()
    y = bo.reference.gated_mlp(x, *weights[:6], activation=weights.activation, beta=weights.beta)
    torch.testing.assert_close(y, seen["y"], rtol=1e-4, atol=1e-5)
    raw = gated_weights(model, "model.layers.1.mlp", fold_norm=False)
    torch.testing.assert_close(
        bo.reference.gated_mlp(seen["args"], *raw[:6], activation=raw.activation), seen["y"], rtol=1e-4, atol=1e-5
    )
    assert raw.p.data_ptr() == layer.mlp.down_proj.weight.data_ptr() and not raw.w.requires_grad
    assert raw.activation == ("gelu_tanh" if "gemma" in kind else "silu")


def test_gated_weights_refuses():
    model = build("olmo2")
    with pytest.raises(ValueError, match="is not the output of a norm: use fold_norm=False"):
        gated_weights(model, 0)
    assert gated_weights(model, 0, fold_norm=False).w.shape == (56, 24)
    with pytest.raises(ValueError, match="layer must be that of one gated MLP, got 7"):
        gated_weights(model, 7)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module"):
        gated_weights(None, 0)
    model = build("llama")
    model.model.layers[0].post_attention_layernorm = nn.LayerNorm(24)
    with pytest.raises(ValueError, match="a LayerNorm, is not an RMSNorm"):
        gated_weights(model, 0)
    add_hook(mlp(model))
    with pytest.raises(ValueError, match="up_proj has hooks"):
        gated_weights(model, 0)
