"""What every number of a narrow type goes through: NaN passes, stores round to nearest even, float16 is widened."""

import pytest
import torch
from op_cases import CASES
from torch import Tensor

import bilinear_ops as bo
from bilinear_ops.results import ACTIVATIONS
from bilinear_ops.testing import layout, randn

IMPLS = ("torch", pytest.param("triton", marks=pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")))
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("limit", (None, 0.5), ids=("unbounded", "limit"))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_of_either_preactivation_passes_the_gate(activation, limit, impl):
    """A layer's own NaN is in both; here one factor is a number, which a comparison could make the whole."""
    options = {"beta": 0.7} if activation == "swish" else {}
    if activation == "silu_bounded":
        limit = None  # has bounds of its own
    elif activation == "silu_clamped":
        limit = 0.5  # needs them
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        a, z = (
            torch.tensor(row, dtype=dtype).requires_grad_() for row in ([[1.0, NAN, 0.3, -1.0]], [[NAN, 1.0, 0.4, NAN]])
        )
        y = bo.gate(a, z, activation=activation, limit=limit, impl=impl, **options)
        assert y.isnan().tolist() == [[True, True, False, True]]
        (da,) = torch.autograd.grad(y, a, torch.ones_like(y))
        assert da.isnan()[0, [0, 2, 3]].tolist() == [limit is None, False, limit is None], "act(NaN) within the limit"


NARROWING = (NAN, INF, -INF, 3.3e38, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, -7e4, 1e-7, 0.0, -0.0)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # of the interpreter's numpy
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_stores_of_kernels_round_as_torch_does(dtype):
    """Ties to even, overflow to infinity, and NaN stays NaN whatever its bits, also in the interpreter."""
    pytest.importorskip("triton")
    from store_kernel import store

    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    values = torch.cat([bits, torch.tensor(NARROWING)]).view(4, 4)
    out = torch.empty(4, 4, dtype=dtype)
    store[(1,)](values, out)
    torch.testing.assert_close(out, values.to(dtype), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(out.signbit() & ~out.isnan(), values.signbit() & ~values.isnan())


WIDENED = ("matrices", "topk", "eigen", "neuron", "layer", "entries", "diagonal", "active")


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("case", [name for name in CASES if name.startswith(WIDENED)])
def test_half_precision_is_computed_in_float32(case, dtype):
    """The result is that of the same numbers in float32, rounded once."""
    f, tensors = CASES[case]
    narrow = [t.to(dtype) for t in tensors]
    found, wide = f(bo, *narrow), f(bo, *(t.float() for t in narrow))
    assert torch.equal(found, wide.to(found.dtype))


def strided(t: Tensor) -> Tensor:
    return layout(t[None], "strided")[0]


@pytest.mark.parametrize("impl", IMPLS)
def test_biases_of_any_stride(impl):
    """Every other element of a buffer, the rest of which is NaN: values and gradients."""
    x, w, v, p = randn(9, 6), randn(24, 6), randn(24, 6), randn(5, 24)
    biases = [randn(24), randn(24), randn(5)]
    results = []
    for given in (biases, [strided(b) for b in biases]):
        leaves = [b.detach().requires_grad_() for b in given]
        y = bo.gated_mlp(x, w, v, p, *leaves, activation="silu", impl=impl)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    assert strided(biases[0]).stride() == (2,)
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
