"""The gated layer against its reference in float64: values and gradients, sizes, layouts, memory, errors."""

from functools import partial
from itertools import cycle

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import bilinear_ops as bo
from bilinear_ops import _gated_backward, testing
from bilinear_ops.composite.gated import preactivations, row_blocks
from bilinear_ops.composite.limits import limits
from bilinear_ops.results import ACTIVATIONS
from bilinear_ops.testing import randn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MANY_SIZES = (*DTYPES[:2], pytest.param(DTYPES[2], marks=pytest.mark.slow))  # bfloat16 stands for both that round
IMPLS = ("torch", "triton")


def inputs(
    m: int, d: int, h: int, o: int, dtype: torch.dtype = torch.float32, bias: bool = True
) -> list[Tensor | None]:
    """x, w, v, p, b_w, b_v, b_p with unit-scale activations."""
    biases = [randn(n, dtype=dtype) if bias else None for n in (h, h, o)]
    weights = [randn(n, k, dtype=dtype, scale=max(k, 1) ** -0.5) for n, k in ((h, d), (h, d), (o, h))]
    return [randn(m, d, dtype=dtype), *weights, *biases]


def mlp(module, activation: str, **options):
    """module.gated_mlp over positional tensors, the last of them beta where the activation has one."""

    def call(*tensors: Tensor | None) -> Tensor:
        if activation != "swish":
            return module.gated_mlp(*tensors, activation=activation, **options)
        return module.gated_mlp(*tensors[:-1], activation=activation, beta=tensors[-1], **options)

    return call


def assert_right(tensors: list[Tensor | None], activation: str, impl: str, dy: Tensor | None = None, **options) -> None:
    if activation == "swish":
        tensors = [*tensors, torch.tensor(0.7, device=tensors[0].device)]
    x, p = tensors[0], tensors[3]
    dy = randn(*x.shape[:-1], p.shape[0], dtype=x.dtype).to(x.device) if dy is None else dy
    ours = testing.gradients(mlp(bo, activation, impl=impl, **options), tensors, dy)
    eager = testing.gradients(mlp(bo.reference, activation), tensors, dy)
    gold = testing.gradients(
        mlp(bo.reference, activation), [t if t is None else t.double() for t in tensors], dy.double()
    )
    names = [
        n for n, t in zip(("x", "w", "v", "p", "b_w", "b_v", "b_p", "beta"), tensors, strict=False) if t is not None
    ]
    for name, *results in zip(("y", *(f"d{n}" for n in names)), ours, eager, gold, strict=True):
        testing.assert_no_worse(*results, what=name)


SHAPES = list(zip(testing.shapes("m d h o"), cycle(ACTIVATIONS), cycle((True, False, False)), strict=False))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", MANY_SIZES)
@pytest.mark.parametrize(("shape", "activation", "bias"), SHAPES, ids=lambda s: str(s) if isinstance(s, str) else None)
def test_sizes(shape, activation, bias, dtype, impl):
    assert_right(inputs(**shape, dtype=dtype, bias=bias), activation, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, dtype, bias, impl):
    assert_right(inputs(34, 24, 40, 16, dtype, bias), activation, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize("kind", testing.LAYOUTS)
def test_layouts(kind, recompute, impl):
    """Every argument and the gradient, in every layout: none needs to be contiguous."""
    tensors = [t if t.dim() == 1 else testing.layout(t, kind) for t in inputs(34, 24, 40, 16)]
    assert_right(tensors, "silu", impl, dy=testing.layout(randn(34, 16), kind), recompute=recompute)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_strides(impl):
    """Gradients as `sum`, `cat`, `transpose` and `expand` hand them back."""
    tensors = inputs(6, 8, 16, 4)
    heads = {
        "sum": lambda y: y.sum(),
        "cat": lambda y: torch.cat([y, 2 * y], 1).square().sum(),
        "transpose": lambda y: y.t().contiguous().square().sum(),
        "expand": lambda y: (y.mean(0, keepdim=True).expand(5, 4) * randn(5, 4)).sum(),
    }
    for head in heads.values():
        torch.manual_seed(1)
        ours = testing.gradients(lambda *t, head=head: head(bo.gated_mlp(*t, impl=impl)), tensors, torch.ones(()))
        torch.manual_seed(1)
        theirs = testing.gradients(lambda *t, head=head: head(bo.reference.gated_mlp(*t)), tensors, torch.ones(()))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lead", ((), (0,), (2, 3), (2, 0, 3)))
def test_leading_dimensions(lead, impl):
    x, *weights = inputs(1, 8, 12, 4)
    assert_right([randn(*lead, 8), *weights], "gelu", impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("empty", ("m", "d", "h", "o"))
def test_empty(empty, impl):
    assert_right(inputs(**{**dict(m=3, d=4, h=5, o=2), empty: 0}), "swish", impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("activation", ("silu", "swish", "relu", "gelu", "gelu_tanh"))
def test_even_part_is_bilinear(activation, impl):
    """With act(z) = z s(z), s(z) + s(-z) = 1: mlp(x) + mlp(-x) is the bilinear layer, for every x."""
    x, w, v, p, *_ = inputs(33, 24, 40, 16, bias=False)
    beta = {"beta": 0.6} if activation == "swish" else {}
    both = bo.gated_mlp(x, w, v, p, activation=activation, impl=impl, **beta)
    both = both + bo.gated_mlp(-x, w, v, p, activation=activation, impl=impl, **beta)
    torch.testing.assert_close(both, bo.gated_mlp(x, w, v, p, impl=impl), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_biases_are_augmentation(impl):
    x, w, v, p, b_w, b_v, _ = inputs(9, 8, 12, 4)
    one = torch.ones(9, 1)
    augmented = (torch.cat(pair, 1) for pair in ((x, one), (w, b_w[:, None]), (v, b_v[:, None])))
    expected = bo.reference.gated_mlp(*augmented, p)
    torch.testing.assert_close(bo.gated_mlp(x, w, v, p, b_w, b_v, impl=impl), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_gated_bilinear(impl):
    """The layer without p: its hidden values and gradients."""
    x, w, v, _, b_w, b_v, _ = inputs(34, 24, 40, 16)
    tensors, dy = (x, w, v, b_w, b_v), randn(34, 40)
    for activation in ACTIVATIONS:
        ours = partial(bo.gated_bilinear, activation=activation, impl=impl)
        eager = partial(bo.reference.gated_bilinear, activation=activation)
        results = testing.gradients(ours, tensors, dy), testing.gradients(eager, tensors, dy)
        gold = testing.gradients(eager, [t.double() for t in tensors], dy.double())
        for result in zip(*results, gold, strict=True):
            testing.assert_no_worse(*result, what=activation)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("beta", (0.0, 1.0, -2.5))
def test_beta(beta, impl):
    """A float, tensors of any float dtype: the same numbers; beta 0 is half the identity; 1 is silu."""
    tensors = inputs(9, 8, 12, 4)
    y = bo.gated_mlp(*tensors, activation="swish", beta=beta, impl=impl)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        t = torch.tensor(beta, dtype=dtype, requires_grad=True)
        again = bo.gated_mlp(*tensors, activation="swish", beta=t, impl=impl)
        torch.testing.assert_close(again, y, rtol=1e-5, atol=1e-5)
        (gradient,) = torch.autograd.grad(again.sum(), t)
        assert gradient.dtype == dtype and gradient.isfinite()
    if beta == 0.0:
        *front, b_p = tensors
        half = bo.gated_mlp(*front, impl=impl) / 2 + b_p
        torch.testing.assert_close(y, half, rtol=1e-5, atol=1e-5)
    if beta == 1.0:
        torch.testing.assert_close(y, bo.gated_mlp(*tensors, activation="silu", impl=impl), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("wanted", range(8))
def test_needed_gradients_only(wanted, impl):
    """Each gradient alone is what it is among all, and nothing else gets one."""
    tensors = [*inputs(9, 8, 12, 4), torch.tensor(0.7)]
    fn = mlp(bo, "swish", impl=impl)
    full = testing.gradients(fn, tensors, torch.ones(9, 4))[1:]
    leaves = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
    fn(*leaves).backward(torch.ones(9, 4))
    assert [t.grad is not None for t in leaves] == [i == wanted for i in range(8)]
    torch.testing.assert_close(leaves[wanted].grad, full[wanted])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter's numpy, which is the point
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_inf_propagate(activation, impl):
    x, w, v, p, *_ = inputs(4, 8, 16, 4, bias=False)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    beta = {"beta": 0.7} if activation == "swish" else {}
    ours = bo.gated_mlp(x, w, v, p, activation=activation, impl=impl, **beta)
    theirs = bo.reference.gated_mlp(x, w, v, p, activation=activation, **beta)
    assert torch.equal(ours.isfinite().all(1), theirs.isfinite().all(1))
    assert ours[1].isnan().all()


def test_recompute_gives_the_same_gradients():
    tensors, dy = inputs(34, 24, 40, 16), randn(34, 16)
    kept = testing.gradients(mlp(bo, "silu"), tensors, dy)
    again = testing.gradients(mlp(bo, "silu", recompute=True), tensors, dy)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


@pytest.mark.parametrize(("recompute", "per_token"), ((False, 2 * 48 + 16), (True, 16)))
def test_saved_for_backward(recompute, per_token):
    """x and [a | z], or x alone: at most d + 2h or d elements a token beside the parameters."""
    m, d, h = 64, 16, 48
    x, *parameters = (t.requires_grad_() for t in inputs(m, d, h, 16))
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        bo.gated_mlp(x, *parameters, activation="silu", recompute=recompute).sum()
    for t in parameters:
        saved.pop(t.data_ptr(), None)
    assert 0 < sum(saved.values()) <= per_token * m


@pytest.mark.parametrize("kind", ("contiguous", "transposed", "sliced", "packed"))
def test_weights_are_not_copied(kind):
    """With 8 tokens, every allocation of a step that asks for x's gradient is smaller than a weight."""
    tokens, n = 8, 256
    x, w, v, p, *_ = inputs(tokens, n, n, n, bias=False)
    if kind == "packed":
        v, w = torch.cat([v, w]).chunk(2)
    elif kind != "contiguous":
        w, v, p = (testing.layout(t, kind) for t in (w, v, p))
    x.requires_grad_()
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profile:
        bo.gated_mlp(x, w, v, p, activation="silu").sum().backward()
    largest = max(e.self_cpu_memory_usage for e in profile.events())
    assert 0 < largest < n * n * w.itemsize


def test_packed_weights_get_one_gradient():
    x, w, v, p, *_ = inputs(9, 8, 12, 4, bias=False)
    packed = torch.cat([v, w]).requires_grad_()
    half_v, half_w = packed.chunk(2)
    bo.gated_mlp(x, half_w, half_v, p, activation="silu").sum().backward()
    _, _, dw, dv, _ = testing.gradients(mlp(bo.reference, "silu"), [x, w, v, p], torch.ones(9, 4))
    torch.testing.assert_close(packed.grad, torch.cat([dv, dw]), rtol=1e-5, atol=1e-5)


def test_small_layers_on_cpu_are_eager(monkeypatch):
    """Where a call costs more than the arithmetic; never under recompute, an explicit impl, or above the bound."""
    tensors = inputs(9, 8, 12, 4)
    calls = []
    op = bo.gated.gated_op
    monkeypatch.setattr(bo.gated, "gated_op", lambda *args: calls.append(1) or op(*args))
    monkeypatch.setattr(limits, "small_on_cpu", 9 * 8 * 12)
    assert torch.equal(bo.gated_mlp(*tensors), bo.reference.gated_mlp(*tensors)) and not calls
    bo.gated_mlp(*tensors, impl="torch")
    bo.gated_mlp(*tensors, recompute=True)
    monkeypatch.setattr(limits, "small_on_cpu", 9 * 8 * 12 - 1)
    bo.gated_mlp(*tensors)
    assert len(calls) == 3


def test_no_block_of_a_few_rows_is_left_over(monkeypatch):
    """The library's product of two rows sums less accurately: an error of dx 3.7 times that of eager PyTorch."""
    monkeypatch.setattr(limits, "gradient_bytes", 1)
    monkeypatch.setattr(limits, "gradient_rows", 341)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    heights = [rows.stop - rows.start for rows in row_blocks(torch.empty(2048, 3), 5)]
    assert len(heights) == 7 and sum(heights) == 2048 and min(heights) >= 290


def packed_weights(how):
    """w, v and biases that lie side by side, or nearly so."""
    both, other, biases = randn(12, 4), randn(12, 4), randn(12)
    if how == "transposed":
        both = both.t().contiguous().t()
    w, v = {
        "swapped": lambda: (both[6:], both[:6]),
        "interleaved": lambda: (both[::2], both[1::2]),
        "overlapping": lambda: (both[:6], both[5:11]),
        "two storages": lambda: (both[:6], other[6:]),
        "shared": lambda: (both[:6], both[:6]),
        "other strides": lambda: (both[:6], both.view(-1)[24:].view(4, 6).t()),
    }.get(how, lambda: both.chunk(2))()
    return w, v, biases[:6], biases[6:] if how != "apart biases" else randn(6)


@pytest.mark.parametrize("biased", (False, True))
@pytest.mark.parametrize(
    "how",
    ("packed", "transposed", "swapped", "interleaved", "overlapping", "two storages", "shared", "other strides"),
)
def test_packed_weights_are_one_product(how, biased):
    w, v, b_w, b_v = packed_weights(how)
    x, dadz = randn(5, 4), randn(5, 12)
    biases = (b_w, b_v) if biased else (None, None)
    expected = torch.cat([torch.nn.functional.linear(x, t, b) for t, b in zip((w, v), biases, strict=True)], 1)
    count = 1 if how in ("packed", "transposed") else 2
    with Products() as products:
        found = preactivations(x, w, v, *biases)
    torch.testing.assert_close(found, expected)
    assert len(products.found) == count
    with Products() as products:
        dx = _gated_backward.input_gradient(dadz, w, v)
    torch.testing.assert_close(dx, dadz[:, :6] @ w + dadz[:, 6:] @ v)
    assert len(products.found) == count


def test_biases_of_packed_weights_that_lie_apart():
    w, v, b_w, b_v = packed_weights("apart biases")
    x = randn(5, 4)
    expected = torch.cat((torch.nn.functional.linear(x, w, b_w), torch.nn.functional.linear(x, v, b_v)), 1)
    with Products() as products:
        found = preactivations(x, w, v, b_w, b_v)
    torch.testing.assert_close(found, expected)
    assert len(products.found) == 2
    torch.testing.assert_close(preactivations(x, w, v, b_w, None)[:, 6:], x @ v.t())


class Products(TorchDispatchMode):
    """The matrix products that PyTorch computes within."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            self.found.append(func)
        return func(*args, **(kwargs or {}))
