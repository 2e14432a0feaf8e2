"""The gate as a function of both pre-activations: limits, offsets, models' presets, and `bo.gate` alone."""

import pytest
import torch
from torch import Tensor

import bilinear_ops as bo
from bilinear_ops import gates, testing
from bilinear_ops.results import ACTIVATIONS
from bilinear_ops.testing import randn

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of PyTorch itself

IMPLS = ("torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BOUNDED = {  # limits that unit-scale numbers cross on every side
    "swish, limit, offset": {"activation": "swish", "beta": 1.702, "limit": 0.7, "offset": 1.0},
    "silu, limit": {"activation": "silu", "limit": 0.7},
    "identity, limit": {"activation": "identity", "limit": 0.7},
    "gelu, offset": {"activation": "gelu", "offset": -0.5},
    "silu_clamped, limit": {"activation": "silu_clamped", "limit": 0.4},
    "silu_bounded, offset": {"activation": "silu_bounded", "offset": 0.5},
}


def halves(m: int, h: int, dtype: torch.dtype, layout: str) -> tuple[Tensor, Tensor]:
    """a and z of some layout."""
    both = 2 * randn(m, 2 * h, dtype=dtype)
    if layout == "packed":
        return both.chunk(2, 1)
    if layout == "interleaved":
        return both[:, 1::2], both[:, ::2]
    return both[:, :h].contiguous(), testing.layout(both[:, h:], layout)


def assert_right(tensors: tuple[Tensor, ...], impl: str, **options: object) -> None:
    dy = randn(*tensors[0].shape, dtype=tensors[0].dtype)
    ours = testing.gradients(lambda *t: bo.gate(*t, impl=impl, **options), tensors, dy)
    eager = testing.gradients(lambda *t: bo.reference.gate(*t, **options), tensors, dy)
    gold = testing.gradients(lambda *t: bo.reference.gate(*t, **options), [t.double() for t in tensors], dy.double())
    for name, *results in zip(("hid", "da", "dz"), ours, eager, gold, strict=True):
        testing.assert_no_worse(*results, what=name)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BOUNDED)
def test_bounded_gates(name, dtype, impl):
    """Through the whole layer: y and every gradient; 0.7 and 0.4 lie between numbers of half precision."""
    options = BOUNDED[name]
    m, d, h, o = 34, 24, 40, 16
    tensors = [randn(m, d, dtype=dtype), *(randn(h, d, dtype=dtype, scale=0.2) for _ in range(2))]
    tensors += [randn(o, h, dtype=dtype, scale=0.2), *(randn(n, dtype=dtype) for n in (h, h, o))]
    dy = randn(m, o, dtype=dtype)
    wide = [t.double() for t in tensors]
    a, z = (t.detach() for t in (wide[0] @ wide[1].t() + wide[4], wide[0] @ wide[2].t() + wide[5]))
    crossing = options.get("limit", 0.7)
    assert all((t > crossing).any() and (t < -crossing).any() for t in (a, z))
    for recompute in (False, True):
        ours = testing.gradients(
            lambda *t, r=recompute: bo.gated_mlp(*t, impl=impl, recompute=r, **options), tensors, dy
        )
        eager = testing.gradients(lambda *t: bo.reference.gated_mlp(*t, **options), tensors, dy)
        gold = testing.gradients(lambda *t: bo.reference.gated_mlp(*t, **options), wide, dy.double())
        names = ("y", "dx", "dw", "dv", "dp", "db_w", "db_v", "db_p")
        for what, *results in zip(names, ours, eager, gold, strict=True):
            testing.assert_no_worse(*results, what=what)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", ("packed", "interleaved", "transposed", "expanded"))
def test_gate_takes_any_strides(layout, impl):
    assert_right(halves(33, 70, torch.float32, layout), impl, **BOUNDED["swish, limit, offset"])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gate_of_every_activation(activation, dtype, impl):
    assert_right(halves(17, 65, dtype, "packed"), impl, activation=activation)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", ((5,), (2, 3, 5), (0, 5), (3, 0), (2, 0, 5)))
def test_gate_shapes(shape, impl):
    tensors = randn(*shape), randn(*shape)
    assert_right(tensors, impl, activation="silu", limit=0.5)
    assert bo.gate(*tensors, impl=impl).is_contiguous()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", BOUNDED)
def test_nothing_flows_outside_of_a_limit(name, impl):
    options = BOUNDED[name]
    limit = options.get("limit")
    if limit is None:
        pytest.skip("no limit")
    a = torch.tensor([[0.1, 0.9, -0.9, 0.1, limit, -limit]])
    z = torch.tensor([[0.1, 0.1, 0.1, 5.0, 0.1, 0.1]])
    _, da, dz = testing.gradients(lambda *t: bo.gate(*t, impl=impl, **options), (a, z), torch.ones(1, 6))
    outside = torch.tensor([[False, True, True, False, False, False]])
    assert torch.equal(da == 0, outside)
    assert torch.equal(dz == 0, torch.tensor([[False, False, False, True, False, False]]))


def cited(a: Tensor, z: Tensor) -> dict[str, Tensor]:
    """The presets as the models' own code has them, written in other words."""

    def bounded(t: Tensor, low: float, high: float) -> Tensor:
        return torch.where(t > high, torch.full_like(t, high), torch.where(t < low, torch.full_like(t, low), t))

    def swish(t: Tensor, slope: float) -> Tensor:
        return t / (1 + torch.exp(-slope * t))

    return {
        "GPT_OSS": (bounded(a, -7, 7) + 1) * swish(bounded(z, -1e9, 7), 1.702),
        "DEEPSEEK_V4": bounded(a, -10, 10) * swish(bounded(z, -1e9, 10), 1),
        "STEP": bounded(a, -7, 7) * bounded(swish(z, 1), -1e9, 7),
        "KIMI": 4 * torch.tanh(z / 4) * torch.sigmoid(z) * 25 * torch.tanh(a / 25),
        "QUICK_GELU": a * swish(z, 1.702),
        "RELU2": a * torch.where(z > 0, z * z, torch.zeros_like(z)),
    }


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("preset", [name for name in vars(gates) if name.isupper()])
def test_presets_are_the_cited_formulas(preset, impl):
    a, z = 8 * randn(40, 24).double(), 8 * randn(40, 24).double()
    if impl == "triton":
        a, z = a.float(), z.float()
    ours = testing.gradients(lambda *t: bo.gate(*t, impl=impl, **getattr(gates, preset)), (a, z), torch.ones_like(a))
    gold = testing.gradients(lambda *t: cited(*t)[preset], (a.double(), z.double()), torch.ones_like(a).double())
    exact = dict(rtol=1e-5, atol=1e-5) if impl == "triton" else dict(rtol=1e-12, atol=1e-12)
    torch.testing.assert_close([t.double() for t in ours], list(gold), **exact)


@pytest.mark.parametrize("name", (*BOUNDED, *ACTIVATIONS))
def test_gradcheck(name):
    options = BOUNDED.get(name, {"activation": name})
    tensors = [randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda *t: bo.gate(*t, **options), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: bo.gate(*t, **options), tensors)


def test_gradcheck_beta():
    tensors = [randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    tensors.append(torch.tensor(0.7, dtype=torch.float64, requires_grad=True))

    def gate(a: Tensor, z: Tensor, beta: Tensor) -> Tensor:
        return bo.gate(a, z, activation="swish", beta=beta, limit=0.6, offset=1.0)

    assert torch.autograd.gradcheck(gate, tensors) and torch.autograd.gradgradcheck(gate, tensors)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_of_beta(impl):
    """Inside the kernels too, where z is clamped first."""
    a, z = halves(34, 40, torch.float32, "packed")
    beta, found = torch.tensor(0.7, requires_grad=True), []
    for gate in (lambda **o: bo.gate(a, z, impl=impl, **o), lambda **o: bo.reference.gate(a, z, **o)):
        y = gate(activation="swish", beta=beta, limit=0.6, offset=1.0)
        found.append(torch.autograd.grad(y.square().sum(), beta)[0])
    torch.testing.assert_close(*found, rtol=1e-5, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl):
    a, z = (t.requires_grad_() for t in (randn(5, 4), randn(5, 4)))
    numbers = [torch.tensor(n) for n in (0.7, 0.5, 1.0)]
    torch.library.opcheck(bo.gated.gate_op, (a, z, *numbers, "swish", impl))
    for need in ([True] * 3, [False, True, False]):
        args = (randn(5, 4), a.detach(), z.detach(), *numbers, "swish", need, impl)
        torch.library.opcheck(bo.gated.gate_backward_op, args)


@pytest.mark.parametrize("name", BOUNDED)
def test_func_transforms(name):
    options = BOUNDED[name]
    a, z, tangent = (randn(5, 4, dtype=torch.float64) for _ in range(3))
    for transform in (
        lambda f: torch.func.jacrev(f, argnums=(0, 1))(a, z),
        lambda f: torch.func.jvp(f, (a, z), (tangent, tangent)),
        lambda f: torch.func.vmap(f)(a, z),
    ):
        pair = [transform(lambda a, z, m=m: m.gate(a, z, **options)) for m in (bo, bo.reference)]
        torch.testing.assert_close(*pair)


def test_no_limit_or_offset_recompiles():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    a, z = halves(9, 8, torch.float32, "interleaved")
    x, w, p = randn(5, 3), randn(8, 3), randn(2, 8)
    numbers, tensors = CompileCounter(), CompileCounter()

    @torch.compile(fullgraph=True, backend=numbers)
    def gate(a: Tensor, z: Tensor, limit: float, offset: float) -> Tensor:
        return bo.gate(a, z, activation="silu", limit=limit, offset=offset)

    @torch.compile(fullgraph=True, backend=tensors)
    def mlp(limit: Tensor, offset: Tensor) -> Tensor:
        return bo.gated_mlp(x, w, w, p, activation="silu", limit=limit, offset=offset)

    for limit, offset in ((0.5, 1.0), (0.25, 0.5), (1.5, 0.25), (2.5, -1.5)):
        options = dict(activation="silu", limit=limit, offset=offset)
        torch.testing.assert_close(gate(a, z, limit, offset), bo.reference.gate(a, z, **options))
        expected = bo.reference.gated_mlp(x, w, w, p, **options)
        torch.testing.assert_close(mlp(torch.tensor(limit), torch.tensor(offset)), expected)
    assert numbers.frame_count <= 2 and tensors.frame_count == 1


@pytest.mark.parametrize("impl", IMPLS)
def test_compile(impl):
    """Forward and backward in one graph, for any number of tokens."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(both: Tensor) -> Tensor:
        return bo.gate(both[..., 1::2], both[..., ::2], impl=impl, **gates.GPT_OSS)

    for m in (5, 6, 9):
        both = randn(m, 8, requires_grad=True)
        results = []
        for y in (compiled(both), bo.reference.gate(both[..., 1::2], both[..., ::2], **gates.GPT_OSS)):
            results.append((y, torch.autograd.grad(y.square().sum(), both)))
        torch.testing.assert_close(*results)
    assert counter.frame_count <= 2


def test_gate_errors():
    a = randn(5, 4)
    with pytest.raises(RuntimeError, match=r"z must have the shape of a, \[5, 4\], got \[4\]"):
        bo.gate(a, a[0])
    with pytest.raises(RuntimeError, match="z must have shape .*h=4"):
        bo.gate(a, randn(5, 3))
    with pytest.raises(ValueError, match="activation must be one of"):
        bo.gate(a, a, activation="softplus")
    with pytest.raises(ValueError, match="mask does not go with limit or offset"):
        bo.gated_mlp(a, a[:3], a[:3], randn(2, 3), mask=torch.ones(3), limit=1.0)
    with pytest.raises(TypeError, match="z must be a torch.Tensor"):
        bo.gate(a, None)
