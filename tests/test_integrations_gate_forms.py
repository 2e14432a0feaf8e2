"""Which gates are read from a forward, and which forwards are refused."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers_models import calls

import bilinear_ops as bo
from bilinear_ops.integrations import gate_forms
from bilinear_ops.integrations.transformers import apply
from bilinear_ops.testing import randn

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


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
    "bounded": lambda m, x: m.down_proj(
        (25.0 * torch.tanh(m.up_proj(x) / 25.0)) * (torch.sigmoid(m.gate_proj(x)) * (m.gate_proj(x) / 4).tanh() * 4.0)
    ),
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
    "scaled product": lambda m, x: m.down_proj(100.0 * (m.act_fn(m.gate_proj(x)) * m.up_proj(x))),
    "divided": lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)) / m.up_proj(x)),
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


def test_multipliers_are_refused():
    """Falcon-H1 scales the gate's input and the output: an op of ours would have to as well."""
    library = pytest.importorskip("transformers.models.falcon_h1.modeling_falcon_h1")
    sizes = dict(hidden_size=24, intermediate_size=56, mlp_bias=False, hidden_act="silu", mlp_multipliers=[0.5, 2.0])
    module, x = library.FalconH1MLP(SimpleNamespace(**sizes)), randn(5, 24)
    before = module(x)
    assert [e.status for e in apply(module)] == ["left alone"]
    assert torch.equal(module(x), before)


def test_the_table_of_activations():
    """Every activation of the library is ours in values and gradients, or unknown to us."""
    from transformers.activations import ACT2FN

    from bilinear_ops.integrations.gate_expressions import activation_of

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


class Bounded(nn.Module):
    """Kimi's pair, as a module of both sides."""

    def __init__(self, bound: float = 4.0, linear_bound: float = 25.0):
        super().__init__()
        self.bound, self.linear_bound = bound, linear_bound

    def forward(self, z: Tensor, a: Tensor) -> Tensor:
        gated = self.bound * torch.tanh(z / self.bound) * torch.sigmoid(z)
        return gated * (self.linear_bound * torch.tanh(a / self.linear_bound))


class BoundedMLP(nn.Module):
    def __init__(self, gate: nn.Module):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        self.act_fn = gate

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x), self.up_proj(x)))


class OnlyInTraining(Bounded):
    def forward(self, z: Tensor, a: Tensor) -> Tensor:
        return super().forward(z, a) if self.training else z * a


@pytest.mark.parametrize("compiled", (False, True))
def test_a_gate_of_both_sides_that_is_a_module(compiled, monkeypatch):
    module, x = BoundedMLP(Bounded()), 20 * randn(5, 4)
    twin = BoundedMLP(Bounded())
    twin.load_state_dict(module.state_dict())
    assert apply(module)[0].reason == "activation='silu_bounded'"
    torch._dynamo.reset()
    seen = calls(monkeypatch)
    run = torch.compile(module, backend="eager") if compiled else module
    torch.testing.assert_close(run(x), twin(x))
    assert len(seen) == 1
    for m in (module, twin):
        m.act_fn.bound = 3.0  # a constant of the child
    assert torch.equal(run(x), twin(x)) and len(seen) == 1
    for m in (module, twin):
        m.act_fn.bound = 4.0
        m.act_fn.register_forward_hook(lambda m, args, out: 2 * out)
    assert torch.equal(run(x), twin(x)) and len(seen) == 1
    for m in (module, twin):
        m.act_fn = Bounded(2.0)
    assert torch.equal(run(x), twin(x)) and len(seen) == 1


class Doubled(Bounded):
    def forward(self, z: Tensor, a: Tensor) -> Tensor:
        return 2.0 * super().forward(z, a)


@pytest.mark.parametrize(
    "gate", (Doubled(), Bounded(4.0, 24.0), Bounded(3.0, 25.0), Bounded(5.0, 20.0), OnlyInTraining())
)
def test_other_gates_of_both_sides_are_refused(gate):
    assert apply(BoundedMLP(gate))[0].status == "left alone"


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
