"""Gate networks of subcomponents against their reference in float64, in several blocks both ways."""

import pytest
import torch
from torch import Tensor

import bilinear_ops as bo
from bilinear_ops import testing
from bilinear_ops.composite.limits import limits
from bilinear_ops.composite.rank1 import gates as composite
from bilinear_ops.kernels.rank1 import gates as kernels
from bilinear_ops.testing import randn

# torch.compile and torch.func warn about PyTorch's own deprecations
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MANY_SIZES = (*DTYPES[:2], pytest.param(DTYPES[2], marks=pytest.mark.slow))  # bfloat16 stands for both that round
IMPLS = ("torch", "triton")
ON_BOTH = pytest.mark.parametrize("impl", IMPLS)
NAMES = ("acts", "w1", "b1", "w2", "b2")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Blocks of 8 columns and 7 rows: every size above that runs several of them both ways."""
    monkeypatch.setattr(limits, "gate_columns", 8)
    monkeypatch.setattr(limits, "gate_elements", 60)


def inputs(tokens: int = 9, c: int = 11, hidden: int = 5, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    weights = [randn(c, hidden, dtype=dtype) for _ in range(3)]
    return [randn(tokens, c, dtype=dtype), *weights, randn(c, dtype=dtype)]


def gates(module, **options):
    return lambda *tensors: module.component_gates(*tensors, **options)


def assert_right(tensors: list[Tensor], impl: str, dy: Tensor | None = None) -> None:
    dy = randn(*tensors[0].shape, dtype=tensors[0].dtype) if dy is None else dy
    ours = testing.gradients(gates(bo, impl=impl), tensors, dy)
    eager = testing.gradients(gates(bo.reference), tensors, dy)
    gold = testing.gradients(gates(bo.reference), [t.double() for t in tensors], dy.double())
    for what, *results in zip(("logits", *NAMES), ours, eager, gold, strict=True):
        testing.assert_no_worse(*results, what=what)


@ON_BOTH
@pytest.mark.parametrize("dtype", MANY_SIZES)
@pytest.mark.parametrize("shape", list(testing.shapes("tokens c hidden", mixed=4, sizes=(1, 7, 17, 65))))
def test_sizes(shape, dtype, impl):
    assert_right(inputs(**shape, dtype=dtype), impl)


@ON_BOTH
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", testing.LAYOUTS)
def test_layouts(kind, dtype, impl):
    acts, w1, b1, w2, b2 = inputs(dtype=dtype)
    tensors = [*(testing.layout(t, kind) for t in (acts, w1, b1, w2)), b2]
    assert_right(tensors, impl, testing.layout(randn(9, 11, dtype=dtype), kind))


@ON_BOTH
@pytest.mark.parametrize("empty", ("tokens", "c", "hidden"))
def test_empty(empty, impl):
    assert_right(inputs(**{empty: 0}), impl)


@ON_BOTH
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_leading_dimensions_and_mixed_dtypes(dtype, impl):
    """Half-precision activations beside fp32 networks: fp32 logits, gradients in each tensor's own dtype."""
    acts, *weights = inputs(12)
    acts = acts.to(dtype).view(2, 3, 2, 11)
    dy = randn(2, 3, 2, 11)
    y, *grads = testing.gradients(gates(bo, impl=impl), [acts, *weights], dy)
    assert y.dtype == torch.float32 and [g.dtype for g in grads] == [dtype, *[torch.float32] * 4]
    expected = testing.gradients(gates(bo.reference), [acts, *weights], dy)
    for got, wanted in zip((y, *grads), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_hidden_units_beyond_fp16():
    """Units of 200 * 400 are beyond its range, the logits and gradients are not."""
    sizes = (((9, 11), 200), ((11, 5), 400), ((11, 5), 1), ((11, 5), 2**-10), ((11,), 1))
    tensors = [torch.full(shape, n, dtype=torch.float16) for shape, n in sizes]
    results = testing.gradients(gates(bo), tensors, torch.ones(9, 11).half())
    expected = testing.gradients(gates(bo.reference), [t.double() for t in tensors], torch.ones(9, 11).double())
    for found, wanted in zip(results[:4], expected, strict=False):  # w2's are units themselves
        torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=0)


def test_gradcheck():
    tensors = [t.requires_grad_() for t in inputs(4, 3, 5, torch.float64)]
    assert torch.autograd.gradcheck(bo.component_gates, tensors)
    assert torch.autograd.gradgradcheck(bo.component_gates, tensors)


@ON_BOTH
@pytest.mark.parametrize("wanted", range(5))
def test_needed_gradients_only(wanted, impl):
    tensors = inputs()
    full = testing.gradients(gates(bo, impl=impl), tensors, torch.ones(9, 11))[1:]
    leaves = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
    bo.component_gates(*leaves, impl=impl).backward(torch.ones(9, 11))
    assert [t.grad is not None for t in leaves] == [i == wanted for i in range(5)]
    torch.testing.assert_close(leaves[wanted].grad, full[wanted])


@ON_BOTH
def test_opcheck(impl):
    tensors = [t.requires_grad_() for t in inputs()]
    torch.library.opcheck(bo.rank1.gates.gates_op, (*tensors, impl))
    plain = [t.detach() for t in tensors]
    for need in ([True] * 5, [False, True, False, True, False]):
        torch.library.opcheck(bo.rank1.gates.gates_backward_op, (randn(9, 11), *plain, need, impl))


@ON_BOTH
def test_compile(impl):
    """One graph, forward and backward."""
    tensors = inputs()
    compiled = torch.compile(gates(bo, impl=impl), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(*(testing.gradients(f, tensors, randn(9, 11).fill_(1)) for f in (compiled, gates(bo))))


def test_transforms():
    tensors = tuple(inputs())
    tangents = tuple(torch.randn_like(t) for t in tensors)
    for transform in (
        lambda f: torch.func.jvp(f, tensors, tangents)[1],
        lambda f: torch.func.grad(lambda *t: f(*t).sum(), argnums=(0, 1))(*tensors),
    ):
        torch.testing.assert_close(transform(gates(bo)), transform(gates(bo.reference)))


@pytest.mark.parametrize("tokens", (3, 300))
def test_saved_is_the_inputs(tokens):
    """Small layers and large ones: what backward keeps beside the parameters is [tokens, C]."""
    tensors = [t.requires_grad_() for t in inputs(tokens)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        bo.component_gates(*tensors)
    assert {t.data_ptr() for t in saved} <= {t.data_ptr() for t in tensors}
    assert sum(t.numel() for t in saved) == tokens * 11 + 3 * 11 * 5 + 11


@pytest.mark.parametrize(("path", "tokens", "c"), ((composite, 20, 11), (kernels, 70, 90)), ids=IMPLS)
def test_nothing_outside_the_outputs(path, tokens, c):
    """Nor anything of [tokens, C, H]; of the kernels, in several tiles both ways."""
    acts, w1, b1, w2, b2 = (testing.guarded(t) for t in inputs(tokens, c))
    with testing.GuardedAllocations() as allocations:
        logits = path.component_gates(acts, w1, b1, w2, b2)
        grads = path.component_gates_backward(logits, acts, w1, b1, w2, [True] * 5)
    allocations.check()
    assert all(t.isfinite().all() for t in (logits, *grads))
    assert max(t.numel() for t in allocations.allocated) <= max(acts.numel(), 3 * w1.numel())


def test_autocast_leaves_gates_alone():
    tensors = inputs()
    expected = bo.component_gates(*tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(bo.component_gates(*tensors), expected)


ERRORS = {
    "C of acts": (dict(acts=randn(9, 1)), RuntimeError, r"acts must have shape \[..., C=11\], got \[9, 1\]"),
    "H of w2": (dict(w2=randn(11, 4)), RuntimeError, r"w2 must have shape \[C=11, H=5\], got \[11, 4\]"),
    "shape of b2": (dict(b2=randn(4)), RuntimeError, r"b2 must have shape \[C=11\], got \[4\]"),
    "dtype of b1": (dict(b1=randn(11, 5).half()), RuntimeError, "b1 must have the dtype of w1, torch.float32"),
    "device of acts": (dict(acts=randn(9, 11).to("meta")), RuntimeError, "acts must be on the device .*got meta"),
    "acts that are a list": (dict(acts=[1.0]), TypeError, "acts must be a torch.Tensor, got list"),
    "impl": (dict(impl="cuda"), ValueError, "impl must be .*got 'cuda'"),
    "integer acts": (dict(acts=torch.ones(9, 11).int()), TypeError, "acts must be float64, .*got torch.int32"),
}


@pytest.mark.parametrize(("changes", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_bad_argument(changes, error, message):
    with pytest.raises(error, match=message):
        bo.component_gates(**{**dict(zip(NAMES, inputs(), strict=True)), **changes})
