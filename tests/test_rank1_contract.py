"""What PyTorch asks of the masked rank-1 ops: autograd to second order, opcheck, transforms, compile, errors."""

import pytest
import torch
from torch import Tensor

import bilinear_ops as bo
from bilinear_ops.testing import assert_no_worse, randn

# torch.compile and export warn about PyTorch's own deprecations
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

NAMES = ("x", "read", "write", "gates", "bias", "weight", "delta")


def inputs(dtype: torch.dtype = torch.float32, m: int = 5, samples: int = 2) -> list[Tensor]:
    """x, read, write, gates, bias, weight, delta of a tiny layer, all asking for gradients."""
    shapes = ((m, 3), (3, 4), (4, 2), (m, 4), (2,), (2, 3), (samples, m))
    tensors = [randn(*s, dtype=dtype) for s in shapes]
    tensors[3], tensors[6] = tensors[3].sigmoid(), tensors[6].sigmoid()
    return [t.requires_grad_() for t in tensors]


def layer(module=bo, **options):
    return lambda *t: module.stochastic_rank1_linear(
        **dict(zip(NAMES, t, strict=False)), **{"samples": 2, "seed": 3, **options}
    )


ROUTING = torch.tensor([True, False, True, True, False])
OPTIONS = ({}, {"sampling": "binomial"}, {"routing": ROUTING}, {"source": torch.full((4,), 0.3, dtype=torch.float64)})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradcheck(options):
    """With the drawn masks fixed by the seed."""
    tensors = inputs(torch.float64)
    assert torch.autograd.gradcheck(layer(**options), tensors)
    assert torch.autograd.gradgradcheck(layer(**options), tensors)


def test_gradcheck_of_given_masks():
    x, read, write, mask, bias, weight, delta = inputs(torch.float64)

    def linear(x, read, write, mask, bias, weight, delta):
        return bo.rank1_linear(x, read, write, mask, bias, weight=weight, delta=delta, routing=ROUTING)

    tensors = (x, read, write, mask, bias, weight, delta[0].detach().requires_grad_())
    assert torch.autograd.gradcheck(linear, tensors) and torch.autograd.gradgradcheck(linear, tensors)


def test_double_backward_of_related_tensors():
    """write computed from read: a gradient must not flow to read twice."""
    x, read, _, gates, *_ = inputs(torch.float64)
    results = []
    for module in (bo, bo.reference):
        y = module.stochastic_rank1_linear(x, read, read.t().sin(), gates, samples=2, seed=3)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), (x, read, gates)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("impl", ("torch", "triton"))
@pytest.mark.parametrize("save", (False, True))
@pytest.mark.parametrize("sampling", ("given", "source", "continuous"))
def test_opcheck(sampling, save, impl):
    x, read, write, gates, bias, weight, delta = inputs()
    source = torch.rand(2, 5, 4).requires_grad_() if sampling == "source" else None
    seed = torch.tensor(3) if sampling == "continuous" else None
    numbers = (None, torch.arange(4)) if sampling == "continuous" else (None, None)
    tail = (ROUTING, seed, *numbers, 0, 2, sampling)
    args = (x, read, write, None, weight, bias, gates, source, delta, *tail, save, impl)
    torch.library.opcheck(bo.rank1.masked.rank1_op, args)


@pytest.mark.parametrize("impl", ("torch", "triton"))
@pytest.mark.parametrize("need", ([True] * 9, [True, False] * 4 + [True], [False, True] * 4 + [False]), ids=str)
def test_opcheck_backward(need, impl):
    x, read, write, gates, bias, weight, delta = (t.detach() for t in inputs())
    source = torch.rand(1, 1, 4)
    for kept, acts in ((randn(5, 4), None), (randn(0), randn(5, 4))):
        given = acts is not None  # the result then does not depend on read
        wanted = [need[0], need[1] and not given, need[2], need[3] and given, *need[4:]]
        tensors = (
            randn(2, 5, 2),
            kept,
            x,
            read,
            write,
            acts,
            weight,
            bias,
            gates,
            source,
            delta,
            ROUTING,
            None,
            None,
            None,
        )
        torch.library.opcheck(bo.rank1.masked.rank1_backward_op, (*tensors, 0, 2, "source", wanted, impl))


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_opcheck_uniform(impl):
    torch.library.opcheck(bo.rank1.masks.uniform_op, (torch.tensor(3), 0, 2, 5, 7, None, torch.arange(7), impl))


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compile(backend):
    """One graph, forward and backward, any number of tokens: one compilation and one for dynamic sizes."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    _, read, write, _, bias, weight, _ = inputs()

    def step(x: Tensor, gates: Tensor) -> Tensor:
        options = dict(samples=2, seed=3, weight=weight, delta="uniform")
        return bo.stochastic_rank1_linear(x, read, write, gates, bias, **options)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for m in (5, 6, 9, 17):
        x, gates = randn(m, 3, requires_grad=True), torch.rand(m, 4).requires_grad_()
        results = [torch.autograd.grad(f(x, gates).square().sum(), (x, gates, read, write)) for f in (compiled, step)]
        torch.testing.assert_close(*results)
    assert counter.frame_count <= 2


def test_no_seed_recompiles():
    from torch._dynamo.testing import CompileCounter

    x, read, write, gates, *_ = inputs()
    for seeds in (range(7), [torch.tensor(i) for i in range(7)]):
        torch._dynamo.reset()
        counter = CompileCounter()

        @torch.compile(fullgraph=True, backend=counter)
        def step(seed: int | Tensor) -> Tensor:
            return bo.stochastic_rank1_linear(x, read, write, gates, samples=2, seed=seed)

        for seed in seeds:
            expected = bo.reference.stochastic_rank1_linear(x, read, write, gates, samples=2, seed=seed)
            torch.testing.assert_close(step(seed), expected)
        assert counter.frame_count <= 2  # the first int is a constant to torch.compile, from the second on symbolic


def test_func_transforms():
    tensors = tuple(t.detach() for t in inputs(torch.float64))
    tangents = tuple(randn(*t.shape, dtype=torch.float64) for t in tensors)
    transforms = (
        lambda f: torch.func.grad(lambda *t: f(*t).square().sum(), argnums=tuple(range(7)))(*tensors),
        lambda f: torch.func.jacrev(f)(*tensors),
        lambda f: torch.func.jvp(f, tensors, tangents),
        lambda f: torch.func.vmap(f, in_dims=(0, *[None] * 6))(tensors[0].expand(3, 5, 3), *tensors[1:]),
    )
    for transform in transforms:
        torch.testing.assert_close(transform(layer()), transform(layer(bo.reference)))
    assert transforms[2](layer())[1].abs().sum() > 0


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_autocast(impl):
    """Casts x, read, write, bias and weight; gates and deltas keep their dtype; delta's remainder is formed before."""
    tensors = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(impl=impl)(*tensors)
        grads = torch.autograd.grad(y.float().sum(), tensors)
    assert y.dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in grads)
    x, read, write, gates, bias, weight, delta = (t.detach() for t in tensors)
    gold = layer(bo.reference)(*(t.detach().double() for t in tensors))
    x, read, write, bias, weight = (t.bfloat16() for t in (x, read, write, bias, weight))
    assert_no_worse(y, layer(bo.reference)(x, read, write, gates, bias, weight, delta), gold)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(impl=impl)(*tensors[:6])
    assert torch.equal(y, layer(impl=impl)(x, read, write, gates, bias, weight))


def bad(**changes):
    good = dict(zip(NAMES, (t.detach() for t in inputs()), strict=True)) | {"samples": 2, "seed": 3}
    return bo.stochastic_rank1_linear(**{**good, **changes})


ERRORS = {
    "C of write": (dict(write=randn(5, 2)), RuntimeError, r"write must have shape \[c=4, o\], got \[5, 2\]"),
    "C of gates": (dict(gates=randn(5, 3)), RuntimeError, r"gates must broadcast to \[5, 4\], got \[5, 3\]"),
    "shape of weight": (dict(weight=randn(3, 2)), RuntimeError, r"weight must have shape \[o=2, i=3\], got \[3, 2\]"),
    "shape of delta": (dict(delta=randn(3, 5)), RuntimeError, r"delta must broadcast to \[2, 5\], got \[3, 5\]"),
    "shape of source": (dict(source=randn(3)), RuntimeError, r"source must broadcast to \[2, 5, 4\], got \[3\]"),
    "shape of acts": (dict(acts=randn(4, 4)), RuntimeError, r"acts must have shape \[5, 4\], got \[4, 4\]"),
    "shape of routing": (dict(routing=ROUTING[:3]), RuntimeError, r"routing must broadcast to \[5\], got \[3\]"),
    "dtype of read": (dict(read=randn(3, 4).half()), RuntimeError, "read must have the dtype of x, torch.float32"),
    "device of gates": (dict(gates=randn(5, 4).to("meta")), RuntimeError, "gates must be on the device .*got meta"),
    "no gates": (dict(gates=None), TypeError, "gates must be a torch.Tensor, got NoneType"),
    "integer gates": (dict(gates=torch.ones(5, 4).int()), TypeError, "gates must be float64, .*got torch.int32"),
    "float routing": (dict(routing=randn(5)), TypeError, "routing must be a bool tensor, got torch.float32"),
    "no seed": (dict(seed=None), TypeError, "seed must be an int or an int64 tensor .*got NoneType"),
    "no seed for deltas": (dict(seed=None, source=randn(4), delta="uniform"), TypeError, "seed must be an int"),
    "float seed": (dict(seed=1.0), TypeError, "seed must be an int or an int64 tensor .*got float"),
    "dtype of seed": (dict(seed=torch.tensor(1.0)), TypeError, "seed must be an int or an int64 tensor, got torch.fl"),
    "shape of seed": (dict(seed=torch.tensor([1])), RuntimeError, r"seed must be an int or have shape \[\], got \[1\]"),
    "samples": (dict(samples=0), ValueError, "samples must be at least 1, got 0"),
    "sampling": (dict(sampling="normal"), ValueError, "sampling must be one of continuous, binomial, got 'normal'"),
    "delta option": (dict(delta="normal"), ValueError, "delta must be a tensor or \"uniform\", got 'normal'"),
    "delta without weight": (dict(weight=None), ValueError, "delta needs weight, got None"),
    "routing without weight": (dict(weight=None, delta=None, routing=ROUTING), ValueError, "routing needs weight"),
    "impl": (dict(impl="cuda"), ValueError, "impl must be .*got 'cuda'"),
}


@pytest.mark.parametrize(("changes", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_bad_argument(changes, error, message, monkeypatch):
    monkeypatch.setattr(bo.rank1.masked, "rank1_op", lambda *args: pytest.fail("work began before the check"))
    with pytest.raises(error, match=message):
        bad(**changes)


LINEAR_ERRORS = {
    "shape of mask": (dict(mask=randn(5, 3)), RuntimeError, r"mask must broadcast to \[5, 4\], got \[5, 3\]"),
    "delta without weight": (dict(delta=randn(5)), ValueError, "delta needs weight, got None"),
    "mask that is a list": (dict(mask=[1.0]), TypeError, "mask must be a torch.Tensor, got list"),
}


@pytest.mark.parametrize(("changes", "error", "message"), LINEAR_ERRORS.values(), ids=LINEAR_ERRORS)
def test_bad_argument_of_given_masks(changes, error, message):
    with pytest.raises(error, match=message):
        bo.rank1_linear(randn(5, 3), randn(3, 4), randn(4, 2), **changes)


def test_missing_seed_of_masks():
    with pytest.raises(TypeError, match="seed"):
        bo.stochastic_mask(torch.rand(3))
    with pytest.raises(TypeError, match="seed must be an int"):
        bo.stochastic_delta((3,), seed=None)
    with pytest.raises(ValueError, match="samples must be at least 1"):
        bo.stochastic_mask(torch.rand(3), seed=1, samples=0)
