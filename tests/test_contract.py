"""What PyTorch asks of an op, for every registered op: opcheck, autograd to second order, transforms, compile."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import bilinear_ops as bo
from bilinear_ops.results import ACTIVATIONS
from bilinear_ops.testing import randn

# torch.compile and export warn about PyTorch's own deprecations
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def inputs(dtype: torch.dtype = torch.float32, m: int = 5) -> list[Tensor]:
    """x, w, v, p, b_w, b_v, b_p of a tiny layer, all asking for gradients."""
    shapes = ((m, 3), (4, 3), (4, 3), (2, 4), (4,), (4,), (2,))
    return [randn(*s, dtype=dtype, requires_grad=True) for s in shapes]


def options(activation: str) -> dict[str, object]:
    return {"activation": activation, "beta": 0.7 if activation == "swish" else 1.0}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    tensors = inputs(torch.float64)
    assert torch.autograd.gradcheck(lambda *t: bo.gated_mlp(*t, **options(activation)), tensors)
    assert torch.autograd.gradcheck(lambda *t: bo.gated_mlp(*t, **options(activation), recompute=True), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: bo.gated_mlp(*t, **options(activation)), tensors)


def test_gradcheck_beta():
    tensors = [*inputs(torch.float64), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)]

    def layer(*t: Tensor) -> Tensor:
        return bo.gated_mlp(*t[:-1], activation="swish", beta=t[-1])

    assert torch.autograd.gradcheck(layer, tensors) and torch.autograd.gradgradcheck(layer, tensors)


def test_double_backward_of_related_weights():
    """v computed from w: a gradient must not flow to w twice."""
    x, w, _, p, *_ = inputs(torch.float64)
    results = []
    for module in (bo, bo.reference):
        y = module.gated_mlp(x, w, w.sin(), p, activation="silu")
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), (x, w, p)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("impl", ("torch", "triton"))
@pytest.mark.parametrize("down", (False, True))
@pytest.mark.parametrize("save", (False, True))
def test_opcheck(save, down, impl):
    x, w, v, p, b_w, b_v, b_p = inputs()
    limit, offset = (torch.tensor(0.5), torch.tensor(1.0)) if save else (None, None)
    beta = torch.tensor(0.7, requires_grad=True)
    args = (x, w, v, p if down else None, b_w, b_v, b_p if down else None, beta, limit, offset, "swish", save, impl)
    torch.library.opcheck(bo.gated.gated_op, args)


@pytest.mark.parametrize("impl", ("torch", "triton"))
@pytest.mark.parametrize("need", ([True] * 8, [True, False] * 4, [False, True] * 4), ids=str)
def test_opcheck_backward(need, impl):
    args = (
        randn(5, 2),
        randn(5, 8),
        *(t.detach() for t in inputs()),
        *(torch.tensor(n) for n in (0.7, 0.5, 1.0)),
        "swish",
        need,
        impl,
    )
    torch.library.opcheck(bo.gated.gated_backward_op, args)


def test_a_profiler_shows_the_op():
    """The autograd function of each op has the name of the op."""
    x, w, v, p, *_ = inputs()
    calls = {
        "GatedBackward": lambda: bo.gated.gated_op(x, w, v, p, *[None] * 6, "identity", True, "torch")[0],
        "InteractionBackward": lambda: bo.interaction_matrices(w, v, p),
        "SquaredDifferenceBackward": lambda: bo.rank1.losses.squared_difference_op(x[:2], w.t(), p.t(), "torch"),
    }
    for name, call in calls.items():
        assert type(call().grad_fn).__name__ == name


@pytest.mark.parametrize("backend", (pytest.param("aot_eager", marks=pytest.mark.slow), "inductor"))
@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_compile(backend, impl):
    """One graph, forward and backward, any number of tokens: one compilation and one for dynamic sizes."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    _, *weights = inputs()

    def layer(x: Tensor) -> Tensor:
        return bo.gated_mlp(x, *weights, activation="silu", impl=impl)

    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for m in (5, 6, 9, 17):
        x = randn(m, 3, requires_grad=True)
        results = [torch.autograd.grad(y.square().sum(), (x, *weights)) for y in (compiled(x), layer(x))]
        torch.testing.assert_close(*results)
    assert counter.frame_count <= 2


def test_no_beta_recompiles():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    tensors, counter = inputs(), CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def layer(beta: float | Tensor) -> Tensor:
        return bo.gated_mlp(*tensors, activation="swish", beta=beta)

    for value in (0.5, 0.25, 0.0, 1.0, 0.125, -3.0):
        torch.testing.assert_close(layer(value), bo.reference.gated_mlp(*tensors, activation="swish", beta=value))
    assert counter.frame_count <= 2  # the first float is a constant to torch.compile, from the second on it is symbolic
    torch._dynamo.reset()
    counter.clear()
    for value in (0.5, 0.25, 0.0, 1.0):
        layer(torch.tensor(value))
    assert counter.frame_count == 1

    module, beta = bo.nn.GatedMLP(3, 4, activation="swish", beta=0.5), CompileCounter()
    compiled = torch.compile(module, fullgraph=True, backend=beta)
    for value in (0.5, 0.25, 0.0, 1.0):
        module.beta.fill_(value)
        compiled(tensors[0])
    assert beta.frame_count == 1


def test_export():
    module = bo.nn.GatedMLP(3, 4, activation="silu", bias=True)
    x = randn(5, 3)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.testing.assert_close(program.module()(randn(7, 3).fill_(0.5)), module(torch.full((7, 3), 0.5)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_func_transforms(activation):
    tensors = tuple(t.detach() for t in inputs(torch.float64))

    def through(module, transform):
        return transform(lambda *t: module.gated_mlp(*t, **options(activation)))

    tangents = tuple(randn(*t.shape, dtype=torch.float64) for t in tensors)
    transforms = (
        lambda f: torch.func.grad(lambda *t: f(*t).square().sum(), argnums=tuple(range(7)))(*tensors),
        lambda f: torch.func.jacrev(f)(*tensors),
        lambda f: torch.func.jvp(f, tensors, tangents),
        lambda f: torch.func.vmap(f, in_dims=(0, *[None] * 6))(randn(3, 5, 3, dtype=torch.float64), *tensors[1:]),
        lambda f: torch.func.hessian(lambda x: f(x, *tensors[1:]).sum())(tensors[0]),
    )
    for transform in transforms:
        torch.manual_seed(1)
        ours = through(bo, transform)
        torch.manual_seed(1)
        torch.testing.assert_close(ours, through(bo.reference, transform))


def test_forward_mode():
    tensors = inputs(torch.float64)
    tangents = [randn(*t.shape, dtype=torch.float64) for t in tensors]
    results = []
    for module in (bo, bo.reference):
        with torch.autograd.forward_ad.dual_level():
            dual = [torch.autograd.forward_ad.make_dual(*pair) for pair in zip(tensors, tangents, strict=True)]
            results.append(torch.autograd.forward_ad.unpack_dual(module.gated_mlp(*dual)).tangent)
    assert results[0].abs().sum() > 0
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpoint(reentrant):
    tensors = inputs()
    plain = bo.gated_mlp(*tensors, activation="silu")
    again = checkpoint(lambda *t: bo.gated_mlp(*t, activation="silu"), *tensors, use_reentrant=reentrant)
    grads = [torch.autograd.grad(y.sum(), tensors) if not reentrant else y.sum().backward() for y in (plain, again)]
    if not reentrant:
        torch.testing.assert_close(*grads)
    else:  # both were added up
        torch.testing.assert_close([t.grad / 2 for t in tensors], list(torch.autograd.grad(
            bo.gated_mlp(*tensors, activation="silu").sum(), tensors)))  # fmt: skip


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_autocast(impl):
    """Casts as F.linear does: bf16 out, fp32 gradients, beta left alone, float64 left alone."""
    tensors = inputs()
    beta = torch.tensor(0.7, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = bo.gated_mlp(*tensors, activation="swish", beta=beta, impl=impl)
        assert y.dtype == torch.bfloat16
        assert bo.gated_mlp(*inputs(torch.float64)).dtype == torch.float64
        grads = torch.autograd.grad(y.float().sum(), (*tensors, beta))  # backward inside autocast, too
    assert all(g.dtype == torch.float32 for g in grads)
    narrow = [t.detach().bfloat16() for t in tensors]
    torch.testing.assert_close(y, bo.gated_mlp(*narrow, activation="swish", beta=beta.detach(), impl=impl))
    meta = [t.to("meta") for t in tensors]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert bo.gated_mlp(*meta).shape == (5, 2)


def test_meta_and_inference():
    tensors = inputs()
    assert bo.gated_mlp(*(t.to("meta") for t in tensors)).shape == (5, 2)
    with torch.inference_mode():
        torch.testing.assert_close(bo.gated_mlp(*tensors), bo.reference.gated_mlp(*tensors))


def _sensitive(dtype: torch.dtype = torch.float32) -> dict[str, tuple]:
    """Calls of the ops that never cast, with the arguments to differentiate."""
    w, v, c = (randn(*s, dtype=dtype, requires_grad=True) for s in ((4, 3), (4, 3), (2, 4)))
    read, write = randn(3, 4, dtype=dtype, requires_grad=True), randn(4, 5, dtype=dtype, requires_grad=True)
    weight = ((read @ write).t() + 1e-3 * randn(5, 3)).detach().requires_grad_()
    return {
        "interaction_matrices": (bo.interaction_matrices, (w, v, c)),
        "faithfulness_loss": (bo.faithfulness_loss, (weight, read, write)),
        "rank1_accumulate": (bo.rank1_accumulate, (torch.rand(2, 4, requires_grad=True), read, write)),
        "quadratic_form": (bo.quadratic_form, (randn(5, 3, requires_grad=True), randn(2, 3, 3, requires_grad=True))),
    }


@pytest.mark.parametrize("name", _sensitive())
def test_no_cast_under_autocast(name):
    """Sums that cancel keep their precision: called and under vmap, for first and second derivatives."""
    f, tensors = _sensitive()[name]

    def results(enabled: bool) -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y = f(*tensors)
            mapped = torch.func.vmap(lambda t: f(t, *tensors[1:]))(torch.stack([tensors[0]] * 2).detach())
        once = torch.autograd.grad(y.square().sum(), tensors, create_graph=True)
        return [y, mapped, *once, *torch.autograd.grad(sum(g.square().sum() for g in once), tensors)]

    torch.testing.assert_close(results(True), results(False))


def test_no_cast_in_a_registered_backward():
    f, tensors = _sensitive()["faithfulness_loss"]
    expected = torch.autograd.grad(f(*tensors), tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # not recommended, but done
        for create_graph in (False, True):
            torch.testing.assert_close(torch.autograd.grad(f(*tensors), tensors, create_graph=create_graph), expected)


def test_modules_copy_and_pickle():
    module = bo.nn.GatedMLP(3, 4, 2, activation="swish", beta=0.5, bias=True)
    x = randn(5, 3)
    stream = io.BytesIO()
    torch.save(module.state_dict(), stream)
    stream.seek(0)
    fresh = bo.nn.GatedMLP(3, 4, 2, activation="swish", bias=True)
    fresh.load_state_dict(torch.load(stream))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), fresh):
        assert torch.equal(other(x), module(x))


def _of_single() -> dict[str, tuple]:
    """Functions of an implementation, whose kernels or blocks hold numbers of their own, and float32 tensors."""
    t = {n: randn(*map(int, n)) for n in ("53", "43", "24", "34", "54", "5", "46", "4", "64")}
    network = [randn(6, 4) for _ in range(3)]
    return {
        "gated_mlp": (
            lambda impl, *ts: bo.gated_mlp(*ts, activation="silu", impl=impl),
            t["53"],
            t["43"],
            t["43"],
            t["24"],
        ),
        "interaction_matrices": (lambda impl, *ts: bo.interaction_matrices(*ts, impl=impl), t["43"], t["43"], t["24"]),
        "rank1_linear": (lambda impl, *ts: bo.rank1_linear(*ts, impl=impl), t["53"], t["34"], t["46"], t["54"]),
        "rank1_accumulate": (lambda impl, *ts: bo.rank1_accumulate(*ts, impl=impl), t["54"], t["34"], t["46"]),
        "component_gates": (lambda impl, *ts: bo.component_gates(*ts, impl=impl), randn(5, 6), *network, randn(6)),
        "faithfulness_loss": (lambda impl, *ts: bo.faithfulness_loss(*ts, impl=impl), t["64"], t["43"], randn(3, 6)),
        "stochastic_mask": (lambda impl, g: bo.stochastic_mask(g, seed=3, impl=impl), torch.rand(5, 6)),
    }


@pytest.mark.parametrize("impl", ("torch", "triton"))
@pytest.mark.parametrize("name", _of_single())
def test_nothing_depends_on_the_default_dtype(name, impl):
    f, *tensors = _of_single()[name]
    trained = [t.requires_grad_() for t in tensors]
    results = []
    for default in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(default)
        try:
            y = f(impl, *tensors)
            results.append((y, *torch.autograd.grad(y.square().sum(), trained)))
        finally:
            torch.set_default_dtype(torch.float32)
    for expected, got in zip(*results, strict=True):
        assert torch.equal(got, expected) and got.dtype == torch.float32


def test_a_profiler_sees_the_ops_of_a_direct_call():
    """A plain call goes past the dispatcher, where a profiler would not find the op's name."""
    tensors = [t.requires_grad_() for t in inputs()]
    with torch.profiler.profile() as found:
        bo.gated_mlp(*tensors, activation="silu", impl="torch").sum().backward()
    names = {event.name for event in found.events()}
    assert {"bilinear_ops::gated", "bilinear_ops::gated_backward"} <= names


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_a_lazily_negated_tensor_is_resolved(impl):
    x, *weights = inputs()
    negated = torch._neg_view(x)
    assert negated.is_neg()
    y = bo.gated_mlp(negated, *weights, activation="silu", impl=impl)
    assert torch.equal(y, bo.gated_mlp(negated.resolve_neg(), *weights, activation="silu", impl=impl))
    leaf = x.clone().requires_grad_()
    dy = torch._neg_view(torch.ones_like(y))
    (dx,) = torch.autograd.grad(bo.gated_mlp(leaf, *weights, activation="silu", impl=impl), leaf, dy)
    (expected,) = torch.autograd.grad(
        bo.gated_mlp(leaf, *weights, activation="silu", impl=impl), leaf, -torch.ones_like(y)
    )
    assert torch.equal(dx, expected)
