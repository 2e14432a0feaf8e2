"""What is more than a plain MLP, before `apply` or after it, runs its own forward."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers_models import add_hook, assert_same, build, calls, mlp, results, tokens

from bilinear_ops.integrations.transformers import apply, revert
from bilinear_ops.testing import randn

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


class Doubled(nn.Linear):
    """Somebody's own Linear."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Plus(nn.Module):
    def forward(self, t: Tensor) -> Tensor:
        return t + 1


def add_pre_hook(module: nn.Module) -> None:
    module.down_proj.register_forward_pre_hook(lambda m, args: (2 * args[0],))


def add_activation_hook(module: nn.Module) -> None:
    module.act_fn.register_forward_hook(lambda m, args, out: 2 * out)


def add_backward_hook(module: nn.Module) -> None:
    module.gate_proj.register_full_backward_hook(lambda m, into, out: (2 * into[0],))


def add_parametrisation(module: nn.Module) -> None:
    nn.utils.parametrize.register_parametrization(module.gate_proj, "weight", Plus())


def add_adapter(module: nn.Module) -> None:
    lora = pytest.importorskip("peft").tuners.lora
    config = lora.LoraConfig(r=2, lora_alpha=8, init_lora_weights=False)
    module.gate_proj = lora.layer.Linear(module.gate_proj, "default", config=config, r=2, lora_alpha=8)


def replace_forward(module: nn.Module) -> None:
    """As the library's tensor parallelism and accelerate do."""
    original = module.up_proj.forward
    module.up_proj.forward = lambda x: 2 * original(x)


def replace_class(module: nn.Module) -> None:
    """As quantisation does."""
    module.gate_proj.__class__ = Doubled


def quantise(module: nn.Module) -> None:
    quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(module.down_proj), {nn.Linear})
    module.down_proj = quantised[0]


def replace_activation(module: nn.Module) -> None:
    module.act_fn = nn.Softplus()


def shard(module: nn.Module) -> None:
    """A weight that is a tensor of another class, as a DTensor or a quantised one is."""
    from torch.testing._internal.two_tensor import TwoTensor

    weight = module.up_proj.weight.detach()
    module.up_proj.weight = nn.Parameter(TwoTensor(weight, weight.clone()), requires_grad=False)


CHANGES = (
    add_hook,
    add_pre_hook,
    add_activation_hook,
    add_backward_hook,
    add_parametrisation,
    add_adapter,
    replace_forward,
    replace_class,
    quantise,
    replace_activation,
    shard,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changed_modules_are_left_alone(change):
    """Reported, and bitwise what they were."""
    model, ids = build("llama"), tokens()
    change(mlp(model))
    before, kind = model(ids).logits, type(mlp(model))
    report = apply(model)
    assert [e.status for e in report] == ["left alone", "patched"] and report[0].name == "model.layers.0.mlp"
    assert report[0].reason and type(mlp(model)) is kind
    revert(model.model.layers[1])
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("compiled", (False, True))
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_what_is_added_later_counts(change, compiled):
    """After `apply`, and where compiled after the first call: the module runs its own forward again."""
    if compiled and change in (quantise, shard):
        pytest.skip("not compiled by PyTorch either")
    module = mlp(build("llama"))
    twin = copy.deepcopy(module)
    apply(module)
    x = randn(5, 24, requires_grad=True)
    torch._dynamo.reset()
    run = torch.compile(module, backend="eager") if compiled else module
    before = run(x)
    torch.testing.assert_close(before, twin(x))
    for m in (module, twin):
        torch.manual_seed(1)  # of the adapter's weights
        change(m)
    y, expected = run(x), twin(x)
    assert type(y) is type(expected) and torch.equal(y, expected)
    assert change in (add_backward_hook, shard) or not torch.equal(y, before)
    if change not in (quantise, shard):
        assert torch.equal(*(torch.autograd.grad(t.sum(), x)[0] for t in (y, expected)))


def test_a_hook_that_goes_gives_the_op_back(monkeypatch):
    module, x = mlp(build("llama")), randn(5, 24)
    apply(module)
    seen = calls(monkeypatch)
    handle = module.gate_proj.register_forward_hook(lambda m, args, out: None)
    module(x)
    assert not seen
    handle.remove()
    module(x)
    assert len(seen) == 1
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: None)
    module(x)
    handle.remove()
    assert len(seen) == 1


def test_adapters_of_peft_still_train():
    peft = pytest.importorskip("peft")
    ids = tokens()
    gradients = []
    for first in (True, False, None):  # patched before peft comes, after, never
        model = build("llama")
        if first is True:
            assert len(apply(model).of("patched")) == 2
        torch.manual_seed(2)
        config = peft.LoraConfig(target_modules=["layers.0.mlp.up_proj"], r=2, init_lora_weights=False)
        model = peft.get_peft_model(model, config)
        if first is False:
            report = apply(model)
            assert [e.status for e in report] == ["left alone", "patched"] and "lora" in report[0].reason
        gradients.append(results(model, ids))
    adapters = [n for n in gradients[0] if "lora" in n]
    assert len(adapters) == 2 and all(gradients[2][n].abs().sum() > 0 for n in adapters)
    for ours in gradients[:2]:
        assert_same(ours, gradients[2])
