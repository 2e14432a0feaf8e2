"""Our layers in the layout of the `kernels` library, chosen by what each MLP computes, refusing the others."""

import copy

import pytest
import torch
from transformers_models import add_hook, assert_same, build, calls, mlp, results, tokens

pytest.importorskip("kernels.layer")  # of the library: our own folder `kernels` has no such module

from bilinear_ops.integrations import hub
from bilinear_ops.integrations.transformers import apply
from kernels import layer as kernels

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

TRAINING = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE


@pytest.fixture
def mapping(tmp_path):
    """Every layer of a repository of ours, for the CPU."""
    folder = hub.write_repository(tmp_path / "repository")
    layers = {name: kernels.LocalLayerRepository(folder, layer_name=name) for name in hub.ACTIVATIONS}
    return {name: {"cpu": layer} for name, layer in layers.items()}


@pytest.fixture(autouse=True)
def _classes_as_they_were():
    """The library keeps a layer's name on the class."""
    yield
    for kind in ("llama", "gemma2", "phi3"):
        for name in ("kernel_layer_name", "kernel_condition"):
            if hasattr(type(mlp(build(kind))), name):
                delattr(type(mlp(build(kind))), name)


def kernelized(model, mapping):
    with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
        return kernels.kernelize(model, mode=TRAINING, device="cpu", use_fallback=True)


@pytest.mark.parametrize(("kind", "layer"), (("llama", "SwiGLUMLP"), ("phi3", "SwiGLUMLP"), ("gemma2", "GeGLUMLP")))
def test_models_compute_the_same(kind, layer, mapping, monkeypatch):
    model, ids = build(kind), tokens()
    before, keys = results(model, ids), list(model.state_dict())
    assert {(e.status, e.reason) for e in hub.mark(model)} == {("marked", layer)}
    kernelized(model, mapping)
    seen = calls(monkeypatch)
    assert_same(results(model, ids), before)
    assert len(seen) == 2 and list(model.state_dict()) == keys
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, before["logits"])
    assert len(seen) == 4
    assert {e.status for e in apply(model)} == {"left alone"}


def test_the_model_chooses_its_layer(mapping, monkeypatch):
    """Two models of one class: the name on the class is that of the model marked last, and each keeps to its own."""
    swiglu, geglu, ids = build("llama"), build("llama", hidden_act="gelu"), tokens()
    hub.mark(swiglu)
    hub.mark(geglu)
    expected = [m(ids).logits for m in (swiglu, geglu)]
    seen = calls(monkeypatch)
    for model in (swiglu, geglu):
        kernelized(model, mapping)
    for model, logits in zip((swiglu, geglu), expected, strict=True):
        torch.testing.assert_close(model(ids).logits, logits)
    assert len(seen) == 2 and "forward" not in vars(mlp(swiglu))


def test_others_are_refused(mapping):
    model, ids = build("llama", hidden_act="relu"), tokens()
    (first, _) = hub.mark(model)
    assert first.status == "left alone" and "no layer has its gate: {'activation': 'relu'}" in first.reason
    for activation in ("relu", "gelu"):  # whatever others name the class
        kernels.replace_kernel_forward_from_hub(type(mlp(model)), "SwiGLUMLP")
        other = kernelized(build("llama", hidden_act=activation), mapping)
        with pytest.raises(ValueError, match="SwiGLUMLP cannot replace this LlamaMLP"):
            other(ids)
    proved = kernelized(build("llama"), mapping)
    torch.testing.assert_close(proved(ids).logits, build("llama")(ids).logits)
    patched = build("llama")
    apply(patched)
    assert {e.reason for e in hub.mark(patched)} == {"it is patched already: revert it first"}
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got dict"):
        hub.mark({})


def test_what_is_added_later_counts(mapping):
    model, ids = build("llama"), tokens()
    twin = copy.deepcopy(model)
    hub.mark(model)
    kernelized(model, mapping)
    for m in (model, twin):
        add_hook(mlp(m))
    torch.testing.assert_close(model(ids).logits, twin(ids).logits)
