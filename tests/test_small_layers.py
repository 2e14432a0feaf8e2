"""Small layers on CPU run eager PyTorch, larger ones the op: results, graphs, counts and errors are alike."""

import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import bilinear_ops as bo
from bilinear_ops import gated, testing
from bilinear_ops.composite.limits import limits
from bilinear_ops.testing import randn

M, D, H, OUT = 5, 4, 6, 3
SIDES = pytest.mark.parametrize("bound", (M * D * H, M * D * H - 1), ids=("eager", "op"))


@pytest.fixture
def bounded(bound, monkeypatch):
    monkeypatch.setattr(limits, "small_on_cpu", bound)


@pytest.fixture
def calls(monkeypatch):
    """How often the op is called by the package's own functions."""
    found = []
    op = gated.gated_op
    monkeypatch.setattr(gated, "gated_op", lambda *args: found.append(1) or op(*args))
    return found


def layer(**options) -> nn.Module:
    torch.manual_seed(0)
    return bo.nn.GatedMLP(D, H, OUT, bias=True, **{"activation": "silu", **options})


def both_sides(monkeypatch, f):
    """f() below the threshold, and above it."""
    found = []
    for bound in (M * D * H, M * D * H - 1):
        monkeypatch.setattr(limits, "small_on_cpu", bound)
        found.append(f())
    return found


@pytest.mark.parametrize("activation", ("identity", "swish", "silu_clamped"))
def test_results(activation, monkeypatch):
    x = randn(M, D)
    options = {"limit": 0.5, "offset": 1.0} if activation == "silu_clamped" else {}
    options |= {"beta": torch.tensor(0.6)} if activation == "swish" else {}
    module = layer(activation="silu")
    tensors = [x, module.w, module.v, module.p, module.b_w, module.b_v, module.b_p]

    def run():
        f = lambda *t: bo.gated_mlp(*t, activation=activation, **options)  # noqa: E731
        return testing.gradients(f, tensors, torch.ones(M, OUT))

    for small, large in zip(*both_sides(monkeypatch, run), strict=True):
        torch.testing.assert_close(small, large, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", (False, True))
def test_flops(training, monkeypatch):
    """As an eager layer's, forward and backward, at every size."""
    x, module = randn(M, D).requires_grad_(training), layer().requires_grad_(training)

    def run():
        with FlopCounterMode(display=False) as counter:
            y = module(x)
            if training:
                y.sum().backward()
        return counter.get_total_flops()

    assert both_sides(monkeypatch, run) == [(3 if training else 1) * 2 * M * H * (2 * D + OUT)] * 2


def test_flops_of_the_gradients_asked_for():
    """w's gradient alone: the products of dy with p, and of da with x."""
    module = layer()
    module.requires_grad_(False)
    module.w.requires_grad_()
    y = module(randn(M, D))
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * M * H * (D + OUT)


def test_flops_of_other_ops():
    w, v, c, x = randn(H, D), randn(H, D), randn(7, H).requires_grad_(), randn(M, D)
    read, write, gates = randn(D, 8).requires_grad_(), randn(8, OUT), torch.rand(M, 8)
    counts = {
        "interaction_topk": (lambda: bo.interaction_topk(w, v, c.detach(), 3), 2 * 7 * H * D * D),
        "interaction": (lambda: bo.interaction_matrices(w, v, c).sum().backward(), 2 * 7 * H * D * D),
        "rank1": (
            lambda: bo.stochastic_rank1_linear(x, read, write, gates, samples=2, seed=1).sum().backward(),
            2 * M * 8 * (D + 2 * OUT),
        ),
    }
    for name, (run, expected) in counts.items():
        with FlopCounterMode(display=False) as counter:
            run()
        found = {str(op).rpartition(".")[2]: n for op, n in counter.get_flop_counts()["Global"].items()}
        assert found[name] == expected, name
        assert name == "interaction_topk" or found[f"{name}_backward"] > 0


def test_a_counter_imported_first_has_the_formulas():
    """The other order is that of this session: the formulas wait for the counter, which imports Triton and numpy."""
    code = "import torch.utils.flop_counter as c, bilinear_ops, torch; c.flop_registry[torch.ops.bilinear_ops.gated]"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_look_for_the_counter_keeps_the_formulas_waiting():
    code = """
import sys, importlib.util, bilinear_ops, torch
finders = len(sys.meta_path)
assert importlib.util.find_spec("torch.utils.flop_counter").loader and "torch.utils.flop_counter" not in sys.modules
import torch.utils.flop_counter as c
c.flop_registry[torch.ops.bilinear_ops.gated]
assert len(sys.meta_path) < finders
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Seen(TorchDispatchMode):
    """The package's ops that run under it."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "bilinear_ops":
            self.ops.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@SIDES
def test_a_mode_sees_the_op(bounded, monkeypatch):
    monkeypatch.setattr(limits, "kept_masks", math.inf)
    monkeypatch.setattr(limits, "at_once", math.inf)
    with Seen() as mode:
        layer()(randn(M, D)).sum().backward()
        x = randn(M, D, requires_grad=True)
        bo.stochastic_rank1_linear(x, randn(D, 8), randn(8, OUT), torch.rand(M, 8), seed=3).sum().backward()
        bo.interaction_topk(randn(H, D), randn(H, D), randn(3, H), 2)
    assert set(mode.ops) == {"gated", "gated_backward", "rank1", "rank1_backward", "interaction_topk"}


@pytest.mark.parametrize("pre_dispatch", (False, True))
@SIDES
def test_make_fx(bounded, pre_dispatch):
    module, x = layer(), randn(M, D)
    graph = make_fx(lambda x: module(x), pre_dispatch=pre_dispatch)(x)
    assert "bilinear_ops.gated" in graph.code and "aten.mul" not in graph.code
    torch.testing.assert_close(graph(x), module(x))


@pytest.mark.parametrize("options", ({}, {"activation": "swish", "beta": nn.Parameter(torch.tensor(0.5))}))
@SIDES
def test_symbolic_trace(bounded, options):
    """One node, whose arguments are the layer's parameters."""
    module, x = layer(**options), randn(M, D)
    traced = torch.fx.symbolic_trace(module)
    assert [n.target for n in traced.graph.nodes if n.op == "call_function"] == [bo.gated_mlp]
    torch.testing.assert_close(traced(x), module(x))
    traced(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@SIDES
def test_jit_trace(bounded):
    module, x = layer(), randn(M, D)
    torch.testing.assert_close(torch.jit.trace(module, x)(x), module(x))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("transform", ("jvp", "vmap", "grad", "forward AD"))
def test_transforms(transform, monkeypatch):
    """The reference at every size: a registered op would have no tangent there."""
    module, x, t = layer(), randn(3, M, D), randn(3, M, D)
    runs = {
        "jvp": lambda: torch.func.jvp(module, (x,), (t,)),
        "vmap": lambda: (torch.func.vmap(module)(x),),
        "grad": lambda: (torch.func.grad(lambda x: module(x).square().sum())(x),),
    }

    def forward_ad():
        with torch.autograd.forward_ad.dual_level():
            y = module(torch.autograd.forward_ad.make_dual(x, t))
            return tuple(torch.autograd.forward_ad.unpack_dual(y))

    found = []
    for bound in (math.inf, -1):
        monkeypatch.setattr(limits, "small_on_cpu", bound)
        found.append(runs.get(transform, forward_ad)())
    for small, large in zip(*found, strict=True):
        assert small is not None
        torch.testing.assert_close(small, large)


class Marked(torch.Tensor):
    """A subclass that PyTorch's functions keep."""


@SIDES
def test_subclasses_are_kept(bounded):
    x, module = randn(M, D), layer()
    y = module(x.as_subclass(Marked))
    assert type(y) is Marked and torch.equal(y.as_subclass(torch.Tensor), bo.gated_mlp(x, **weights(module)))
    assert type(bo.gate(x.as_subclass(Marked), x)) is Marked


def weights(module):
    names = ("w", "v", "p", "b_w", "b_v", "b_p")
    return {name: getattr(module, name) for name in names} | {"activation": module.activation}


@SIDES
def test_jagged(bounded):
    """Sequences of different lengths: each as it is alone."""
    module, rows = layer(), [randn(2, D), randn(3, D)]
    x = torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True)
    y = module(x)
    assert y.is_nested and y.layout == torch.jagged
    for got, row in zip(y.unbind(), rows, strict=True):
        torch.testing.assert_close(got, module(row))
    y.values().sum().backward()
    alone = torch.cat(rows).requires_grad_()
    module(alone).sum().backward()
    torch.testing.assert_close(x.grad.values(), alone.grad)
    for got, row in zip(bo.gate(x, x, activation="relu").unbind(), rows, strict=True):
        torch.testing.assert_close(got, row * row.relu())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@SIDES
def test_what_cannot_work_says_so(bounded):
    module, x = layer(), randn(M, D)
    nested = torch.nested.nested_tensor([x, x])
    for bad, message in (
        (x.to_sparse(), "x must be a dense tensor, got torch.sparse_coo"),
        (x.to_mkldnn(), "x must be a dense tensor, got torch._mkldnn"),
        (nested, "x must be a dense tensor, got nested, torch.strided"),
    ):
        with pytest.raises(TypeError, match=message.replace(".", r"\.")):
            module(bad)
    jagged = torch.nested.nested_tensor([x, x], layout=torch.jagged)
    with pytest.raises(TypeError, match=r"x must be a dense tensor, got nested, torch\.jagged"):
        bo.rank1_linear(jagged, randn(D, 4), randn(4, OUT), torch.rand(4))
    with pytest.raises(RuntimeError, match='impl="triton" cannot run'):
        bo.gated_bilinear(jagged, module.w, module.v, impl="triton")


@pytest.mark.parametrize(
    "changes",
    (
        {"w": randn(H, D + 1), "v": randn(H, D + 1)},
        {"w": randn(H, D + 1)}, {"v": randn(1, D)}, {"p": randn(OUT, H + 1)}, {"p": randn(H)}, {"b_w": randn(1)},
        {"b_v": randn(H, 1)}, {"b_p": randn(OUT + 1)}, {"w": randn(H, D, dtype=torch.float64)},
        {"b_p": randn(OUT, dtype=torch.float64)}, {"p": randn(OUT, H).to("meta")}, {"x": torch.ones(M, D).long()},
        {"x": torch.tensor(1.0)}, {"v": randn(D)}, {"beta": 0.5}, {"activation": "none"}, {"limit": -1.0},
        {"limit": float("nan")}, {"limit": "1"}, {"w": [1.0]}, {"p": [1.0]}, {"p": None, "b_p": None}, {"b_w": [1.0]},
        {"b_v": 1.0}, {"b_p": [1.0]},
    ),
    ids=lambda c: f"{next(iter(c))} {getattr(next(iter(c.values())), 'shape', '')}",
)  # fmt: skip
def test_the_same_errors(changes, monkeypatch):
    """Eager PyTorch would broadcast a weight or a bias of one row, and name other functions."""
    arguments = {"x": randn(M, D), **weights(layer()), **changes}

    def run():
        with pytest.raises((RuntimeError, TypeError, ValueError)) as caught:
            bo.gated_mlp(**arguments)
        return caught.type, str(caught.value)

    small, large = both_sides(monkeypatch, run)
    assert small == large


@pytest.mark.parametrize("autocast", (False, True))
def test_autocast_takes_the_op(autocast, monkeypatch, calls):
    monkeypatch.setattr(limits, "small_on_cpu", math.inf)
    with torch.autocast("cpu", enabled=autocast):
        layer()(randn(M, D))
    assert len(calls) == autocast
