"""Faithfulness, importance minimality, the leaky hard sigmoids, and weights accumulated from subcomponents."""

import pytest
import torch

import bilinear_ops as bo
from bilinear_ops import testing
from bilinear_ops.composite.limits import limits
from bilinear_ops.composite.rank1 import losses as composite
from bilinear_ops.kernels.rank1 import losses as kernels
from bilinear_ops.testing import randn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MANY_SIZES = (*DTYPES[:2], pytest.param(DTYPES[2], marks=pytest.mark.slow))  # bfloat16 stands for both that round
IMPLS = ("torch", "triton")


def decomposition(d_out, d_in, c, dtype=torch.float32):
    return [randn(d_out, d_in, dtype=dtype), randn(d_in, c, dtype=dtype), randn(c, d_out, dtype=dtype)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", MANY_SIZES)
@pytest.mark.parametrize("shape", list(testing.shapes("d_out d_in c", mixed=4)))
def test_faithfulness(shape, dtype, impl, monkeypatch):
    monkeypatch.setattr(limits, "band", 1000)  # several bands
    tensors = decomposition(**shape, dtype=dtype)
    ours = testing.gradients(lambda *t: bo.faithfulness_loss(*t, impl=impl), tensors, torch.ones(()))
    eager = testing.gradients(bo.reference.faithfulness_loss, tensors, torch.ones(()))
    wide = [t.double() for t in tensors]
    gold = testing.gradients(bo.reference.faithfulness_loss, wide, torch.ones((), dtype=torch.float64))
    for what, *results in zip(("loss", "dweight", "dread", "dwrite"), ours, eager, gold, strict=True):
        testing.assert_no_worse(*results, what=what)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("residual", (1e-2, 1e-3, 1e-4))
def test_faithfulness_of_a_good_fit(residual, impl):
    """Accurate to 1e-4 where the fit is close, as Gram matrices in fp32 are not."""
    _, read, write = decomposition(96, 80, 100)
    product = (read.double() @ write.double()).t()
    noise = randn(96, 80).double()
    weight = (product + residual * product.norm() / noise.norm() * noise).float()
    gold = (weight.double() - product).square().mean()
    loss = bo.faithfulness_loss(weight, read, write, impl=impl)
    assert abs(loss - gold) <= 1e-4 * gold
    cross = (read * (weight.t() @ write.t())).sum()
    gram = weight.square().sum() - 2 * cross + ((read.t() @ read) * (write @ write.t())).sum()
    assert residual > 1e-4 or abs(gram / weight.numel() - gold) > 1e-2 * gold


@pytest.mark.parametrize("impl", IMPLS)
def test_faithfulness_under_autocast(impl):
    """A loss is not cast."""
    tensors = decomposition(40, 30, 20)
    expected = bo.reference.faithfulness_loss(*tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(bo.faithfulness_loss(*tensors, impl=impl), expected)


def test_faithfulness_gradcheck():
    tensors = [t.requires_grad_() for t in decomposition(4, 3, 5, torch.float64)]
    assert torch.autograd.gradcheck(bo.faithfulness_loss, tensors)
    assert torch.autograd.gradgradcheck(bo.faithfulness_loss, tensors)


@pytest.mark.parametrize("impl", IMPLS)
def test_faithfulness_opcheck(impl):
    tensors = [t.requires_grad_() for t in decomposition(4, 3, 5)]
    torch.library.opcheck(bo.rank1.losses.squared_difference_op, (*tensors, impl))
    for need in ([True] * 3, [False, True, False]):
        args = (torch.ones(()), *(t.detach() for t in tensors), need, impl)
        torch.library.opcheck(bo.rank1.losses.squared_difference_backward_op, args)


@pytest.mark.parametrize("module", (composite, kernels))
def test_faithfulness_holds_no_difference(module, monkeypatch):
    """Nothing of the weight's size is allocated on the way to the loss, and nothing written outside."""
    monkeypatch.setattr(limits, "band", 1000)
    tensors = [testing.guarded(t) for t in decomposition(70, 60, 5)]
    with testing.GuardedAllocations() as allocations:
        loss = module.squared_difference(*tensors)
    allocations.check()
    assert loss.isfinite() and 0 < max(t.numel() for t in allocations.allocated) <= 1000


def test_faithfulness_of_nothing():
    assert bo.faithfulness_loss(*decomposition(0, 3, 5)).isnan()
    torch.testing.assert_close(bo.faithfulness_loss(torch.ones(2, 3), randn(3, 0), randn(0, 2)), torch.tensor(1.0))


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64))
@pytest.mark.parametrize("pnorm", (0.5, 1.0, 2.0, torch.tensor(0.9)))
def test_importance_minimality(pnorm, dtype):
    gates = torch.rand(2, 3, 5).to(dtype)
    expected = torch.stack([(g.double() + 1e-12) ** pnorm for g in gates.flatten(0, 1)]).sum(0) / 6
    result = bo.importance_minimality(gates, pnorm=pnorm)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(bo.importance_minimality(gates[0, 0], pnorm=1.0, eps=0.0).to(dtype), gates[0, 0])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("relative", (False, True))
def test_pooled_faithfulness(relative, impl):
    """Several layers by their elements: neither the mean of means nor a function of their order."""
    layers = [decomposition(70, 33, 5), decomposition(3, 40, 9)]
    leaves = [[t.double().requires_grad_() for t in layer] for layer in layers]
    residuals = [w - (r @ wr).t() for w, r, wr in leaves]
    denominator = sum(w.square().sum() for w, _, _ in leaves) if relative else 70 * 33 + 3 * 40
    expected = sum(r.square().sum() for r in residuals) / denominator
    flat = [t for layer in layers for t in layer]

    def pooled(module, **options):
        return lambda *t: module.pooled_faithfulness_loss((t[:3], t[3:]), relative=relative, **options)

    gradients = torch.autograd.grad(expected, [t for layer in leaves for t in layer])
    for found in (
        testing.gradients(pooled(bo, impl=impl), flat, torch.ones(())),
        testing.gradients(pooled(bo.reference), flat, torch.ones(())),
    ):
        for got, wanted in zip(found, (expected.detach(), *gradients), strict=True):
            torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))
    assert bo.pooled_faithfulness_loss([]).isnan()


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64))
def test_smooth_l0(dtype):
    gates = torch.rand(2, 3, 5).to(dtype)
    expected = torch.stack([g.double() ** 2 / (g.double() ** 2 + 0.01) for g in gates.flatten(0, 1)]).sum(0) / 6
    result = bo.smooth_l0(gates, gamma=0.1)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(bo.smooth_l0(torch.tensor([0.0, 0.1, 1e6]), gamma=0.1), torch.tensor([0.0, 0.5, 1.0]))


def test_frequency_penalty():
    """Both forms: with the number of tokens as scale that of the sums over them, or with a mean that is given."""
    gates = torch.rand(12, 5, dtype=torch.float64, requires_grad=True)
    frequencies = bo.importance_minimality(gates, pnorm=0.7)
    powers = (gates + 1e-12) ** 0.7
    expected = (powers.mean(0) * torch.log2(1 + powers.sum(0) * 2)).sum()  # two workers
    loss = bo.frequency_penalty(frequencies, scale=24)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, gates)[0], torch.autograd.grad(expected, gates)[0])
    running = torch.rand(5, dtype=torch.float64, requires_grad=True)
    f = torch.rand(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f: bo.frequency_penalty(f, scale=7.0, running=running), f)
    given = bo.frequency_penalty(f, scale=7.0, running=running)
    torch.testing.assert_close(given, (f * torch.log2(1 + 7 * running)).sum())
    assert torch.autograd.grad(given, running, allow_unused=True) == (None,)


def test_lower_leaky_hard_sigmoid():
    """Its rule: at x <= 0 only negative gradients pass, scaled by alpha; above 1 none do."""
    x = torch.tensor([-2.0, -0.5, 0.0, 0.25, 1.0, 1.5], requires_grad=True)
    y = bo.lower_leaky_hard_sigmoid(x, 0.1)
    assert y.tolist() == [0.0, 0.0, 0.0, 0.25, 1.0, 1.0]
    (up,) = torch.autograd.grad(y, x, torch.full_like(x, 2.0), retain_graph=True)
    (down,) = torch.autograd.grad(y, x, torch.full_like(x, -2.0))
    torch.testing.assert_close(up, torch.tensor([0.0, 0.0, 0.0, 2.0, 2.0, 0.0]))
    torch.testing.assert_close(down, torch.tensor([-0.2, -0.2, -0.2, -2.0, -2.0, 0.0]))
    default = torch.autograd.grad(-bo.lower_leaky_hard_sigmoid(x).sum(), x)[0]
    assert default[0] == torch.tensor(-0.01)
    mapped = torch.func.vmap(torch.func.grad(lambda t: -bo.lower_leaky_hard_sigmoid(t)))(x.detach())
    torch.testing.assert_close(mapped, default)


def test_upper_leaky_hard_sigmoid():
    x = torch.tensor([-2.0, 0.25, 0.75, 1.5], dtype=torch.float64, requires_grad=True)
    expected = torch.tensor([0.0, 0.25, 0.75, 1.05], dtype=torch.float64)
    torch.testing.assert_close(bo.upper_leaky_hard_sigmoid(x, 0.1), expected)
    assert torch.autograd.gradcheck(bo.upper_leaky_hard_sigmoid, x)


ERRORS = {
    "C of gates": (lambda: bo.rank1_accumulate(randn(2, 4), randn(5, 3), randn(3, 4)), RuntimeError, "gates must have"),
    "shape of base": (
        lambda: bo.rank1_accumulate(randn(2, 3), randn(5, 3), randn(3, 4), base=randn(5, 4)),
        RuntimeError,
        r"base must broadcast to \[2, 4, 5\], got \[5, 4\]",
    ),
    "no gates": (lambda: bo.rank1_accumulate(None, randn(5, 3), randn(3, 4)), TypeError, "gates must be a torch.Ten"),
    "C of write": (
        lambda: bo.faithfulness_loss(randn(4, 5), randn(5, 3), randn(2, 4)),
        RuntimeError,
        "write must have",
    ),
    "integers": (lambda: bo.importance_minimality(torch.ones(3).int(), pnorm=1.0), TypeError, "gates must be float64"),
    "lower": (lambda: bo.lower_leaky_hard_sigmoid(torch.ones(3).int()), TypeError, "x must be float64"),
    "smooth L0 of integers": (lambda: bo.smooth_l0(torch.ones(3).int(), gamma=0.1), TypeError, "gates must be float64"),
    "C of running": (
        lambda: bo.frequency_penalty(torch.rand(3), scale=1.0, running=torch.rand(4)),
        RuntimeError,
        r"running must have shape \[C=3\], got \[4\]",
    ),
    "upper": (lambda: bo.upper_leaky_hard_sigmoid(1.0), TypeError, "x must be a torch.Tensor"),
}


@pytest.mark.parametrize(("call", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_bad_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
