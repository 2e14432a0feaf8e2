"""Models of the transformers library before and after `apply`: the same numbers, or their own forward."""

import copy
import os
import pickle
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("transformers")

import bilinear_ops as bo
from bilinear_ops.integrations import gate_forms
from bilinear_ops.integrations.transformers import apply, gated_weights, revert
from bilinear_ops.testing import randn

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

needs_stacked_experts = pytest.mark.skipif(version("transformers") < "5", reason="experts are not stacked")

SIZES = dict(
    hidden_size=24,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=12,
    vocab_size=53,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
DENSE = {
    "llama": {},
    "llama with biases": {"mlp_bias": True},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {},
    "gemma3_text": {},
    "phi3": {},
    "glm4": {},
    "olmo2": {},
    "granite": {},
}

FEW = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
EXPERTS = {
    "mixtral": {"options": {"num_local_experts": 4}, "gate": "activation='silu'"},
    "qwen2_moe": {"options": {"num_experts": 4, **FEW}, "gate": "activation='silu'"},
    "qwen3_moe": {"options": {"num_experts": 4, **FEW}, "gate": "activation='silu'"},
    "gpt_oss": {  # a limit that its activations reach
        "options": {"num_local_experts": 4, "num_experts_per_tok": 2, "swiglu_limit": 0.02},
        "gate": "activation='swish', beta=1.702, limit=0.02, offset=1.0",
    },
}


def build(kind: str, **options) -> nn.Module:
    """A tiny random model of this library's model type."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto import CONFIG_MAPPING

    torch.manual_seed(0)
    own = DENSE[kind] if kind in DENSE else EXPERTS[kind]["options"]
    config = CONFIG_MAPPING[kind.split()[0]](**{**SIZES, **own, **options})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for p in model.parameters():
        if p.dim() == 1:  # biases and norms do something
            p.data += 0.2 * torch.randn_like(p)
    return model


def tokens(length: int = 9) -> Tensor:
    return torch.randint(3, 53, (2, length))


def results(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """The logits and every gradient of a training step."""
    model.zero_grad()
    out = model(ids, labels=ids)
    out.loss.backward()
    return {"logits": out.logits.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, t in theirs.items():
        assert (ours[name] - t).abs().max() <= 1e-5 * t.abs().max(), name


def calls(monkeypatch) -> list[int]:
    """Grows with every run of the op."""
    seen: list[int] = []
    op = bo.gated.gated_op
    monkeypatch.setattr(bo.gated, "gated_op", lambda *args: seen.append(1) or op(*args))
    return seen


def mlp(model: nn.Module) -> nn.Module:
    return model.model.layers[0].mlp


@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize("kind", DENSE)
def test_dense_models_compute_the_same(kind, recompute, monkeypatch):
    model, ids = build(kind), tokens()
    before, keys, original = results(model, ids), list(model.state_dict()), type(mlp(model))
    report = apply(model, recompute=recompute)
    assert [e.status for e in report] == ["patched"] * 2 and str(report).count("patched") == 2
    seen = calls(monkeypatch)
    assert_same(results(model, ids), before)
    assert len(seen) == 2
    assert list(model.state_dict()) == keys
    assert isinstance(mlp(model), original) and type(mlp(model)).__name__ == original.__name__
    assert [e.status for e in revert(model)] == ["reverted"] * 2
    assert type(mlp(model)) is original and not [k for k in vars(mlp(model)) if "bilinear" in k]
    after = results(model, ids)
    assert all(torch.equal(after[n], t) for n, t in before.items())
    assert not revert(model)


@needs_stacked_experts
@pytest.mark.parametrize("products", ("grouped_mm", "batched_mm"))
@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_compute_the_same(kind, products, monkeypatch):
    model, ids = build(kind), tokens()
    model.set_experts_implementation(products)
    before, keys = results(model, ids), list(model.state_dict())
    report = apply(model)
    kinds = [type(m).__name__ for m in model.modules() if "bilinear" in "".join(vars(m))]
    assert [e.kind for e in report.of("patched")] == kinds and len(kinds) == (4 if kind == "qwen2_moe" else 2)
    gates = [e.reason for e in report if e.kind.endswith("Experts")]
    assert gates == [EXPERTS[kind]["gate"]] * 2
    seen: list[int] = []
    op = bo.gated.gate_op
    monkeypatch.setattr(bo.gated, "gate_op", lambda *args: seen.append(1) or op(*args))
    assert_same(results(model, ids), before)
    assert len(seen) == 2 and list(model.state_dict()) == keys
    expected = model(ids).logits
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(ids).logits, expected)
    assert len(seen) == 8
    if kind != "gpt_oss":
        model.model.layers[0].mlp.experts.act_fn.register_forward_hook(lambda m, args, out: 2 * out)
        model(ids)
        assert len(seen) == 9
        model.model.layers[0].mlp.experts.act_fn._forward_hooks.clear()
    revert(model)
    after = results(model, ids)
    assert all(torch.equal(after[n], t) for n, t in before.items())


@needs_stacked_experts
def test_experts_whose_gate_is_out_of_reach_are_left_alone():
    model = build("mixtral")
    model.set_experts_implementation("eager")
    assert {e.status for e in apply(model)} == {"left alone"}
    model.set_experts_implementation("grouped_mm")
    experts = model.model.layers[0].mlp.experts
    experts._apply_gate = lambda gate_up: gate_up.chunk(2, -1)[0]
    assert [e.status for e in apply(model)] == ["left alone", "patched"]


@pytest.mark.parametrize("kind", ("llama", "gemma3_text", "phi3"))
def test_half_precision_is_no_worse(kind):
    model, ids = build(kind), tokens()
    gold = copy.deepcopy(model).double()(ids).logits
    errors = []
    half = model.bfloat16()
    for _ in range(2):
        errors.append((half(ids).logits.double() - gold).square().mean().sqrt())
        apply(half) if len(errors) == 1 else None
    assert 0 < errors[1] <= 1.5 * errors[0]


def test_copies_stay_patched(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    model, ids = build("llama"), tokens()
    apply(model, recompute=True)
    expected, seen = model(ids).logits, calls(monkeypatch)
    for copied in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(ids).logits, expected)
        assert type(mlp(copied)) is type(mlp(model))
        assert vars(mlp(copied))["_bilinear_ops"] == vars(mlp(model))["_bilinear_ops"]
    assert len(seen) == 6
    other = copy.deepcopy(model)
    nn.init.zeros_(mlp(other).down_proj.weight)
    assert not torch.equal(other(ids).logits, expected) and torch.equal(model(ids).logits, expected)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(loaded(ids).logits, revert(model) and model(ids).logits)


class Doubled(nn.Linear):
    """Somebody's own Linear."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Plus(nn.Module):
    def forward(self, t: Tensor) -> Tensor:
        return t + 1


def add_hook(module: nn.Module) -> None:
    module.up_proj.register_forward_hook(lambda m, args, out: 2 * out)


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


@pytest.mark.filterwarnings("default::UserWarning")
def test_reports_and_errors():
    model = build("llama")
    with pytest.raises(ValueError, match="impl must be one of auto, triton, torch, got 'cuda'"):
        apply(model, impl="cuda")
    with pytest.raises(TypeError, match="unexpected keyword argument 'fast'"):
        apply(model, fast=True)
    with pytest.raises(ValueError, match="Linear has no gated MLP"):
        apply(nn.Linear(3, 4))
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got dict"):
        apply({})
    apply(model)
    kind = type(mlp(model))
    with pytest.warns(UserWarning, match="nothing was patched:\nalready patched: model.layers.0.mlp"):
        again = apply(model)
    assert [e.status for e in again] == ["already patched"] * 2 and type(mlp(model)) is kind
    unknown = build("llama", hidden_act="leaky_relu")
    with pytest.warns(UserWarning, match="LeakyReLU, not one activation of the table"):
        assert not apply(unknown).of("patched")


class Custom(nn.Module):
    """A gated MLP written in some other way."""

    def __init__(self, forward):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        self.act_fn, self.limit, self.dropout = nn.SiLU(), 1.5, nn.Dropout(0.1)
        self.how = forward

    def forward(self, x: Tensor) -> Tensor:
        return type(self).how(self, x)


PROVED = {
    "one side twice": lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)) * m.gate_proj(x)),
    "other order": lambda m, x: m.down_proj(m.up_proj(x) * m.act_fn(m.gate_proj(x))),
    "function": lambda m, x: m.down_proj(nn.functional.silu(m.gate_proj(x)) * m.up_proj(x)),
    "written out": lambda m, x: m.down_proj(m.gate_proj(x) * m.gate_proj(x).sigmoid() * m.up_proj(x)),
    "slope": lambda m, x: m.down_proj(m.gate_proj(x) * torch.sigmoid(1.7 * m.gate_proj(x)) * m.up_proj(x)),
    "limit": lambda m, x: m.down_proj(
        m.act_fn(m.gate_proj(x).clamp(max=m.limit)) * m.up_proj(x).clamp(min=-m.limit, max=m.limit)
    ),
    "limit after": lambda m, x: m.down_proj(
        m.act_fn(m.gate_proj(x)).clamp(max=0.1) * m.up_proj(x).clamp(min=-0.1, max=0.1)
    ),
    "offset": lambda m, x: m.down_proj((m.up_proj(x) + 1) * m.act_fn(m.gate_proj(x))),
    "gelu": lambda m, x: m.down_proj(nn.functional.gelu(m.gate_proj(x), approximate="tanh") * m.up_proj(x)),
}
REFUSED = {
    "dropout": lambda m, x: m.down_proj(m.dropout(m.act_fn(m.gate_proj(x)) * m.up_proj(x))),
    "training": lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)) * (m.up_proj(x) if m.training else m.gate_proj(x))),
    "scaled": lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)) * m.up_proj(x)) * 0.5,
    "unlike limits": lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x).clamp(max=2.0)) * m.up_proj(x).clamp(-1.0, 1.0)),
    "one limit": lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x).clamp(max=2.0)) * m.up_proj(x)),
    "odd limits": lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)).clamp(max=1.0) * m.up_proj(x).clamp(-2.0, 1.0)),
    "scaled gate": lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x) * 0.5) * m.up_proj(x)),
    "scaled input": lambda m, x: m.down_proj(m.act_fn(m.gate_proj(0.5 * x)) * m.up_proj(x)),
    "no activation": lambda m, x: m.down_proj(m.gate_proj(x) * m.up_proj(x)),
    "both sides": lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)) * m.act_fn(m.up_proj(x))),
    "residual": lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)) * m.up_proj(x)) + x,
    "sum": lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)) + m.up_proj(x)),
    "branch on values": lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)) * m.up_proj(x)) if x.sum() > 0 else x,
    "odd sigmoid": lambda m, x: m.down_proj(m.gate_proj(x) * torch.sigmoid(m.up_proj(x)) * m.up_proj(x)),
}


def custom(forward) -> nn.Module:
    return type("Custom", (Custom,), {"how": forward})(forward)


@pytest.mark.parametrize("how", PROVED)
def test_forms_that_are_proved(how, monkeypatch):
    module, x = custom(PROVED[how]), randn(5, 4)
    expected = module(x)
    assert apply(module)[0].status == "patched"
    seen = calls(monkeypatch)
    torch.testing.assert_close(module(x), expected)
    assert len(seen) == 1


@pytest.mark.parametrize("how", REFUSED)
def test_forms_that_are_refused(how):
    module = custom(REFUSED[how])
    (entry,) = apply(module)
    assert entry.status == "left alone" and entry.reason


class Gated(nn.Module):
    """Experts whose gate is a function of what they project to."""

    def __init__(self):
        super().__init__()
        self.act_fn, self.config = nn.SiLU(), SimpleNamespace(_experts_implementation="grouped_mm")

    def forward(self, x: Tensor) -> Tensor:
        return self._apply_gate(x)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = type(self).halves(gate_up)
        return self.act_fn(gate) * up


HALVES = {
    ("packed", True): lambda t: t.chunk(2, dim=-1),
    ("packed", False): lambda t: (t.chunk(2, dim=-1)[1], t.chunk(2, dim=-1)[0]),
    ("interleaved", True): lambda t: (t[..., ::2], t[..., 1::2]),
    ("interleaved", False): lambda t: (t[..., 1::2], t[..., ::2]),
}


@pytest.mark.parametrize("found", HALVES, ids=str)
def test_halves_of_experts_in_either_order(found):
    form = gate_forms.experts(type("Gated", (Gated,), {"halves": HALVES[found]})())
    assert (form.halves, form.gate_first) == found and form.options["activation"] == "silu"


def test_a_gate_of_one_half_twice_is_refused():
    module = type("Gated", (Gated,), {"halves": lambda t: (t.chunk(2, dim=-1)[0],) * 2})()
    with pytest.raises(gate_forms.NotAGate, match="does not act on the two halves"):
        gate_forms.experts(module)


def test_a_constant_that_changes_gives_the_forward_back(monkeypatch):
    module, x = (
        custom(lambda m, x: m.down_proj(m.gate_proj(x) * torch.sigmoid(m.limit * m.gate_proj(x)) * m.up_proj(x))),
        randn(5, 4),
    )
    assert apply(module)[0].reason == "activation='swish', beta=1.5"
    seen = calls(monkeypatch)
    module(x)
    module.limit = 2.0
    assert torch.equal(module(x), Custom.forward(module, x)) and len(seen) == 1


LIMITED = {  # MLPs of the library that clamp, and what is read from them
    "deepseek_v4.DeepseekV4MLP": "activation='silu', limit=0.3",
    "glm5_next.Glm5NextTextMLP": "activation='silu', limit=0.3",
    "step3p7.Step3p7MLP": "activation='silu_clamped', limit=0.3",
    "minimax_m3_vl.MiniMaxM3VLDenseMLP": "activation='swish', beta=1.5, limit=0.3, offset=1.0",
}


@pytest.mark.parametrize("name", LIMITED)
def test_limits_are_read_from_the_module(name):
    import importlib

    model, _, kind = name.partition(".")
    try:
        library = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    except ImportError:
        pytest.skip("not in this version of the library")
    sizes = dict(hidden_size=24, intermediate_size=56, dense_intermediate_size=56, mlp_bias=False, hidden_act="silu")
    limits = dict(swiglu_limit=0.3, swiglu_limits_shared=[0.3], swiglu_alpha=1.5)
    module = getattr(library, kind)(SimpleNamespace(**sizes, **limits), *([0] if kind == "Step3p7MLP" else []))
    x = 2 * randn(7, 24)
    leaves = [x.requires_grad_(), *module.parameters()]
    before = module(x)
    expected = (before, *torch.autograd.grad(before.square().sum(), leaves))
    (entry,) = apply(module)
    assert (entry.status, entry.reason) == ("patched", LIMITED[name])
    y = module(x)
    torch.testing.assert_close((y, *torch.autograd.grad(y.square().sum(), leaves)), expected, rtol=1e-5, atol=1e-6)


def test_the_table_of_activations():
    """Every activation of the library is ours in values and gradients, or unknown to us."""
    from transformers.activations import ACT2FN

    from bilinear_ops.integrations.gate_forms import activation_of

    known = []
    for name in ACT2FN:
        module = ACT2FN[name]
        options = activation_of(module)
        if options is None:
            continue
        known.append(name)
        z = torch.linspace(-9, 9, 4001, dtype=torch.float64, requires_grad=True)
        pair = module(z), bo.reference.gated.activate(z, **options)
        torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(*(torch.autograd.grad(y.sum(), z)[0] for y in pair), rtol=1e-9, atol=1e-9)
    assert {"silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "linear", "relu", "quick_gelu"} <= set(known)
    assert {"relu2", "relu6", "mish", "tanh", "hardswish", "sigmoid"} & set(ACT2FN) <= set(known)
    assert not {"leaky_relu", "prelu", "xielu", "gelu_10", "laplace"} & set(known)


@pytest.mark.parametrize(("kind", "training"), (("llama", True), ("phi3", False)))
def test_compiles_whole_with_any_length(kind, training):
    """No graph break, and at most one compilation more over ten lengths."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, counter = build(kind, num_hidden_layers=1), CompileCounter()
    apply(model)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.set_grad_enabled(training):
        for length in range(4, 14):
            ids = tokens(length)
            torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert counter.frame_count <= 2


def test_export():
    module, x = mlp(build("llama")), randn(2, 5, 24)
    apply(module)
    program = torch.export.export(module, (x,), dynamic_shapes=({1: torch.export.Dim.AUTO},))
    assert "bilinear_ops.gated" in str(program.graph)
    y = randn(2, 7, 24)
    torch.testing.assert_close(program.module()(y), module(y))


def test_generation_with_a_static_cache():
    model, ids = build("llama"), tokens(5)
    options = dict(max_new_tokens=8, do_sample=False, cache_implementation="static", eos_token_id=None)
    expected = model.generate(ids, **options)
    apply(model)
    assert torch.equal(model.generate(ids, **options), expected) and expected.shape == (2, 13)


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
