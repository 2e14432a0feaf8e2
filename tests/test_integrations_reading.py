"""What a patched model's MLPs compute on their way, eager and compiled, and under the readers' own tools."""

import pytest
import torch
from transformers_models import add_hook, build, mlp, tokens

import bilinear_ops as bo
from bilinear_ops.integrations.transformers import apply, read
from bilinear_ops.testing import randn

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def hooked(model, ids):
    """(a, z, hid) of every layer by hooks on the Linears of a model that is not patched."""
    seen = {}
    handles = []
    for n, layer in enumerate(model.model.layers):
        keep = seen.setdefault(f"model.layers.{n}.mlp", {})
        for name, linear in (("a", layer.mlp.up_proj), ("z", layer.mlp.gate_proj)):
            handles.append(linear.register_forward_hook(lambda m, args, out, k=keep, n=name: k.update({n: out})))
        handles.append(layer.mlp.down_proj.register_forward_pre_hook(lambda m, args, k=keep: k.update(hid=args[0])))
    model(ids)
    for handle in handles:
        handle.remove()
    return {name: (k["a"], k["z"], k["hid"]) for name, k in seen.items()}


@pytest.mark.parametrize("compiled", (False, True))
def test_the_same_as_hooks_see(compiled):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, counter = build("llama", mlp_bias=True), CompileCounter()
    lengths = [tokens(n) for n in (9, 11)]
    expected = [hooked(model, ids) for ids in lengths]
    apply(model)
    before = [model(ids, use_cache=False).logits for ids in lengths]
    run = torch.compile(model, backend=counter, fullgraph=True) if compiled else model
    with read(model) as seen:
        assert not seen
        for ids, logits, hooks in zip(lengths, before, expected, strict=True):
            torch.testing.assert_close(run(ids, use_cache=False).logits, logits)
            assert seen.keys() == hooks.keys()
            for name, triple in hooks.items():
                torch.testing.assert_close(tuple(seen[name]), triple)
    assert counter.frame_count <= 2
    kept = dict(seen)
    run(lengths[0], use_cache=False)
    assert all(seen[name] is kept[name] for name in kept)  # not after the context


def test_losses_have_gradients_in_what_is_read():
    model, ids = build("llama"), tokens()
    apply(model)
    with read(model, ["model.layers.1.mlp"]) as seen:
        loss = model(ids, labels=ids).loss
    assert list(seen) == ["model.layers.1.mlp"]
    dhid, dz = torch.autograd.grad(loss, [seen["model.layers.1.mlp"].hid, seen["model.layers.1.mlp"].z])
    assert dhid.abs().sum() > 0 and dz.abs().sum() > 0


def test_what_cannot_be_read():
    model = build("llama")
    with pytest.raises(ValueError, match="names must be of patched MLPs, got none"), read(model):
        pass
    apply(model)
    with pytest.raises(ValueError, match=r"got \['mlp'\] for \['model.layers.0.mlp', 'model.layers.1.mlp'\]"):
        with read(model, ["mlp"]):
            pass
    add_hook(mlp(model))
    with read(model), pytest.raises(RuntimeError, match="model.layers.0.mlp is read, but runs its own forward"):
        model(tokens())


@pytest.mark.parametrize("kind", (bo.nn.GatedBilinear, bo.nn.GatedMLP))
def test_a_layer_of_ours(kind):
    layer, x = kind(3, 4, **bo.gates.GPT_OSS, bias=True), randn(5, 3)
    found = torch.compile(layer.activations, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(found.z, x @ layer.v.t() + layer.b_v)
    torch.testing.assert_close(found.a, x @ layer.w.t() + layer.b_w)
    torch.testing.assert_close(
        found.hid if kind is bo.nn.GatedBilinear else found.hid @ layer.p.t() + layer.b_p, layer(x)
    )
