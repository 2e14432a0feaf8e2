"""Masked rank-1 subcomponents against their reference in float64: values, gradients, sizes, layouts, memory."""

from itertools import cycle

import pytest
import torch
from torch import Tensor

import bilinear_ops as bo
from bilinear_ops import testing
from bilinear_ops.composite.limits import limits
from bilinear_ops.composite.rank1 import masked as composite
from bilinear_ops.kernels.rank1 import masked as kernels
from bilinear_ops.testing import randn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MANY_SIZES = (*DTYPES[:2], pytest.param(DTYPES[2], marks=pytest.mark.slow))  # bfloat16 stands for both that round
IMPLS = ("torch", "triton")


def inputs(
    tokens: int, c: int, d_in: int, d_out: int, dtype: torch.dtype = torch.float32, bias: bool = True
) -> dict[str, Tensor | None]:
    """Unit-scale activations, and gates in [0, 1]."""
    return {
        "x": randn(tokens, d_in, dtype=dtype),
        "read": randn(d_in, c, dtype=dtype, scale=max(d_in, 1) ** -0.5),
        "write": randn(c, d_out, dtype=dtype, scale=max(c, 1) ** -0.5),
        "gates": torch.rand(tokens, c).to(dtype),
        "bias": randn(d_out, dtype=dtype) if bias else None,
        "weight": randn(d_out, d_in, dtype=dtype, scale=max(d_in, 1) ** -0.5),
    }


def stochastic(module, **options):
    """module.stochastic_rank1_linear over a dict's values."""

    def call(names: list[str], *tensors: Tensor) -> Tensor:
        return module.stochastic_rank1_linear(**dict(zip(names, tensors, strict=True)), **options)

    return call


def linear(module, **options):
    def call(names: list[str], *tensors: Tensor) -> Tensor:
        return module.rank1_linear(**dict(zip(names, tensors, strict=True)), **options)

    return call


def assert_right(op, tensors: dict[str, Tensor | None], impl: str, dy: Tensor | None = None, **options) -> None:
    tensors = {name: t for name, t in tensors.items() if t is not None}
    names, values = list(tensors), list(tensors.values())
    x, write = tensors["x"], tensors["write"]
    if dy is None:
        samples = (options.get("samples", 1),) if op is stochastic else ()
        dy = randn(*samples, *x.shape[:-1], write.shape[1], dtype=x.dtype)

    def run(fn, double: bool = False) -> list[Tensor]:
        wide = [t.double() for t in values] if double else values
        return testing.gradients(lambda *t: fn(names, *t), wide, dy.double() if double else dy)

    ours, eager = run(op(bo, impl=impl, **options)), run(op(bo.reference, **options))
    gold = run(op(bo.reference, **options), double=True)
    for name, *results in zip(("y", *(f"d{n}" for n in names)), ours, eager, gold, strict=True):
        testing.assert_no_worse(*results, what=name)


def without_weight(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {**tensors, "weight": None}


SHAPES = list(
    zip(
        testing.shapes("tokens c d_in d_out"),
        cycle((1, 4)),
        cycle(("uniform", "tensor", None)),
        cycle(("continuous", "binomial")),
        cycle((True, False, False)),
        strict=False,
    )
)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", MANY_SIZES)
@pytest.mark.parametrize(("shape", "samples", "delta", "sampling", "bias"), SHAPES)
def test_sizes(shape, samples, delta, sampling, bias, dtype, impl):
    tensors = inputs(**shape, dtype=dtype, bias=bias)
    options = dict(samples=samples, seed=3, sampling=sampling)
    if delta is None:
        tensors = without_weight(tensors)
    elif delta == "uniform":
        options["delta"] = delta
    else:
        tensors["delta"] = torch.rand(samples, shape["tokens"]).to(dtype)
    assert_right(stochastic, tensors, impl, **options)


ROUTING = torch.arange(34) % 3 > 0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("samples", (1, 4))
@pytest.mark.parametrize("delta", (None, "uniform", "tensor"))
@pytest.mark.parametrize("routed", (False, True))
def test_options(samples, delta, routed, dtype, impl):
    tensors = inputs(34, 40, 24, 16, dtype)
    options = dict(samples=samples, seed=5, stream=2)
    if routed:
        options["routing"] = ROUTING
    if delta is None and not routed:
        tensors = without_weight(tensors)
    elif delta == "uniform":
        options["delta"] = delta
    elif delta == "tensor":
        tensors["delta"] = torch.rand(samples, 34)
    assert_right(stochastic, tensors, impl, **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routed", (False, True))
@pytest.mark.parametrize("delta", (False, True))
@pytest.mark.parametrize("mask", ((34, 40), (40,), (34, 1), ()))
def test_given_masks(mask, delta, routed, dtype, impl):
    """rank1_linear: full and broadcast masks."""
    tensors = inputs(34, 40, 24, 16, dtype)
    tensors["mask"] = torch.rand(mask).to(tensors.pop("gates").dtype)
    if delta:
        tensors["delta"] = torch.rand(34)
    elif not routed:
        tensors = without_weight(tensors)
    assert_right(linear, tensors, impl, **({"routing": ROUTING} if routed else {}))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("source", ((2, 3, 17, 40), (3, 17, 40), (40,), (2, 1, 1, 40), (3, 1, 40), (2, 3, 17, 1)))
def test_adversarial_source(source, impl):
    """A given source broadcasts inside g + (1 - g) source, and its gradient is summed over what it was broadcast to."""
    tensors = inputs(51, 40, 24, 16)
    tensors = {**tensors, "x": tensors["x"].view(3, 17, 24), "gates": tensors["gates"].view(3, 17, 40)}
    tensors |= {"source": torch.rand(source), "delta": torch.rand(2, 3, 17)}
    assert_right(stochastic, tensors, impl, samples=2)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("gates", ((17, 40), (40,), (3, 1, 40), (1, 17, 40), (3, 17, 1), ()))
def test_broadcast_gates(gates, impl):
    """Also over a sample dimension that x already has: every row draws its own mask."""
    tensors = inputs(51, 40, 24, 16)
    tensors |= {"x": tensors["x"].view(3, 17, 24), "gates": torch.rand(gates)}
    assert_right(stochastic, tensors, impl, samples=2, seed=3, delta="uniform")
    full = {**tensors, "gates": tensors["gates"].expand(3, 17, 40).contiguous()}
    options = dict(samples=2, seed=3, delta="uniform", impl=impl)
    assert torch.equal(*(bo.stochastic_rank1_linear(**t, **options) for t in (tensors, full)))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("delta", (None, "uniform"))
def test_given_acts(delta, impl):
    tensors = inputs(34, 40, 24, 16)
    acts = tensors["x"] @ tensors["read"]
    options = dict(samples=2, seed=3, delta=delta, impl=impl)
    y = bo.stochastic_rank1_linear(**tensors, acts=acts, **options)
    assert torch.equal(y, bo.stochastic_rank1_linear(**tensors, **options))
    through, direct = [], []
    for found, given in ((direct, False), (through, True)):
        leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
        acts = leaves["x"] @ leaves["read"] if given else None
        bo.stochastic_rank1_linear(**leaves, acts=acts, **options).square().sum().backward()
        found += [leaves[name].grad for name in ("x", "read", "write", "gates", "bias")]
    torch.testing.assert_close(through, direct, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("routed", (False, True))
def test_what_delta_takes_away_does_not_go_through_given_acts(routed, impl):
    """acts receives m * (dy L^T), as attributions mean it; the gradient of -delta (x R) L goes to x, read and write."""
    x, read, write, gates, weight = (randn(*s) for s in ((9, 6), (6, 5), (5, 4), (9, 5), (4, 6)))
    delta, dy = torch.rand(2, 9), randn(2, 9, 4)
    routing = torch.arange(9) % 3 > 0 if routed else None
    options = dict(samples=2, seed=3, stream=1, weight=weight, delta=delta, routing=routing)
    leaves = [t.requires_grad_() for t in (x, read, write)]
    acts = (x @ read).detach().requires_grad_()
    y = bo.stochastic_rank1_linear(*leaves, gates, acts=acts, impl=impl, **options)
    found = torch.autograd.grad(y, (acts, *leaves), dy, retain_graph=True)
    mask = bo.stochastic_mask(gates, samples=2, seed=3, stream=1)
    own = torch.ones(9) if routing is None else routing.float()
    torch.testing.assert_close(found[0], (mask * (dy @ write.t()) * own[:, None]).sum(0))
    frozen = bo.stochastic_rank1_linear(*leaves, gates, acts=acts.detach(), impl=impl, **options)
    torch.testing.assert_close(torch.autograd.grad(frozen, leaves, dy), found[1:])
    theirs = bo.reference.stochastic_rank1_linear(*leaves, gates, acts=acts, **options)
    torch.testing.assert_close(torch.autograd.grad(theirs, (acts, *leaves), dy, retain_graph=True), found)
    graph = torch.autograd.grad(y.square().sum(), (acts, *leaves), create_graph=True)
    plain = torch.autograd.grad(theirs.square().sum(), (acts, *leaves))
    torch.testing.assert_close(graph, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("remainder", (1e-1, 1e-2, 1e-3))
@pytest.mark.parametrize("given", (False, True))
def test_the_remainder_under_autocast(given, remainder):
    """Its gradient of delta is no difference of two bfloat16 products: within 0.5 % at any size of the remainder."""
    x, read, write, gates = randn(64, 48), randn(48, 24), randn(24, 32), torch.rand(64, 24)
    error = randn(32, 48)
    weight = (read @ write).t()
    weight = weight + remainder * weight.norm() / error.norm() * error
    routing = torch.arange(64) % 4 > 0
    dy = randn(2, 64, 32)

    def gradient(dtype):
        delta = torch.full((2, 64), 0.5, dtype=dtype, requires_grad=True)
        x_, read_, write_, gates_, weight_ = (t.to(dtype) for t in (x, read, write, gates, weight))
        if given:
            y = bo.rank1_linear(x_, read_, write_, gates_, weight=weight_, delta=delta[0], routing=routing)[None]
        else:
            y = bo.stochastic_rank1_linear(
                x_, read_, write_, gates_, weight=weight_, delta=delta, routing=routing, samples=2, seed=3
            )
        return torch.autograd.grad(y, delta, dy[: len(y)].to(y.dtype))[0].double()

    with torch.autocast("cpu", torch.bfloat16):
        found = gradient(torch.float32)
    gold = gradient(torch.float64)
    assert (found - gold).norm() <= 0.005 * gold.norm()
    assert not found[:, ~routing].any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bias", (None, torch.ones(4)))
def test_nan_subcomponents_do_not_reach_tokens_routed_past_them(bias, impl):
    x, weight = randn(9, 6), randn(4, 6)
    read, write, gates = randn(6, 5), randn(5, 4), torch.rand(9, 5)
    read[2, 1] = write[3, 0] = gates[1, 2] = float("nan")
    routing = torch.arange(9) % 3 > 0
    x.requires_grad_()
    options = dict(bias=bias, weight=weight, routing=routing, impl=impl)
    expected = torch.nn.functional.linear(x.detach(), weight, bias)
    for y in (
        bo.rank1_linear(x, read, write, gates, **options),
        bo.stochastic_rank1_linear(x, read, write, gates, samples=2, seed=3, delta="uniform", **options),
    ):
        assert y[..., routing, :].isnan().any()
        torch.testing.assert_close(y[..., ~routing, :], expected[~routing].expand_as(y[..., ~routing, :]))
        (dx,) = torch.autograd.grad(y.sum(), x)
        copies = y.numel() // expected.numel()
        torch.testing.assert_close(dx[~routing], (copies * weight.sum(0)).expand(3, 6))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("sampling", ("continuous", "binomial"))
def test_draws_are_those_of_stochastic_mask(sampling, impl):
    """The op equals rank1_linear under the masks and deltas that are drawn as tensors."""
    tensors = inputs(34, 40, 24, 16)
    gates = tensors.pop("gates")
    options = dict(samples=3, seed=8, stream=1)
    masks = bo.stochastic_mask(gates, sampling=sampling, **options)
    deltas = bo.stochastic_delta((34,), device="cpu", **options)
    y = bo.stochastic_rank1_linear(**tensors, gates=gates, delta="uniform", sampling=sampling, impl=impl, **options)
    for y_s, mask, delta in zip(y, masks, deltas, strict=True):
        torch.testing.assert_close(y_s, bo.reference.rank1_linear(**tensors, mask=mask, delta=delta))


@pytest.mark.parametrize("impl", IMPLS)
def test_delta_identity(impl):
    """Against the difference matrix, formed in float64."""
    t = inputs(34, 40, 24, 16)
    mask, delta = t.pop("gates"), torch.rand(34)
    wide = {name: v.double() for name, v in t.items()}
    difference = wide["weight"] - (wide["read"] @ wide["write"]).t()
    expected = ((wide["x"] @ wide["read"]) * mask) @ wide["write"] + wide["bias"]
    expected += delta[:, None] * (wide["x"] @ difference.t())
    y = bo.rank1_linear(**t, mask=mask, delta=delta, impl=impl)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mask", (True, False))
def test_all_on_is_the_original_layer(mask, impl):
    """m = delta = 1, or routing past the subcomponents: exactly x W^T + b."""
    t = inputs(34, 40, 24, 16)
    del t["gates"]
    original = (t["x"] @ t["weight"].t()) + t["bias"]
    mask = torch.ones(34, 40) if mask else None
    assert torch.equal(bo.rank1_linear(**t, mask=mask, delta=torch.ones(34), impl=impl), original)
    nobody = torch.zeros(34, dtype=torch.bool)
    assert torch.equal(bo.rank1_linear(**t, mask=mask, routing=nobody, impl=impl), original)


@pytest.mark.parametrize("impl", IMPLS)
def test_routing_mixes_the_two_layers(impl):
    t = inputs(34, 40, 24, 16)
    mask = t.pop("gates")
    y = bo.rank1_linear(**t, mask=mask, delta=torch.rand(34), routing=ROUTING, impl=impl)
    original = (t["x"] @ t["weight"].t()) + t["bias"]
    torch.testing.assert_close(y[~ROUTING], original[~ROUTING])
    assert not torch.isclose(y[ROUTING], original[ROUTING]).all(1).any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", testing.LAYOUTS)
def test_layouts(kind, impl):
    tensors = {k: t if t.dim() == 1 else testing.layout(t, kind) for k, t in inputs(34, 40, 24, 16).items()}
    tensors["delta"] = testing.layout(torch.rand(2, 34), kind)
    dy = testing.layout(randn(68, 16), kind)
    dy = dy[:34].expand(2, 34, 16) if kind == "expanded" else torch.stack([dy[:34], dy[34:]], 2).permute(2, 0, 1)
    assert_right(stochastic, tensors, impl, dy=dy, samples=2, seed=3)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lead", ((), (0,), (2, 3), (2, 0, 3)))
def test_leading_dimensions(lead, impl):
    tensors = {**inputs(1, 12, 8, 4), "x": randn(*lead, 8), "gates": torch.rand(*lead, 12)}
    assert_right(stochastic, tensors, impl, samples=2, seed=3, delta="uniform")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("empty", ("tokens", "c", "d_in", "d_out"))
def test_empty(empty, impl):
    tensors = inputs(**{**dict(tokens=3, c=4, d_in=5, d_out=2), empty: 0})
    assert_right(stochastic, tensors, impl, samples=2, seed=3, delta="uniform")


def test_slabs_and_blocks_change_nothing(monkeypatch):
    """However the composite cuts the tokens, with gates that repeat inside them."""
    tensors = {**inputs(30, 12, 8, 4), "gates": torch.rand(15, 12)}
    tensors["x"] = tensors["x"].view(2, 15, 8)
    whole = bo.stochastic_rank1_linear(**tensors, samples=2, seed=3, delta="uniform")
    monkeypatch.setattr(limits, "slab", 12 * 4)
    torch.testing.assert_close(bo.stochastic_rank1_linear(**tensors, samples=2, seed=3, delta="uniform"), whole)
    assert_right(stochastic, tensors, "torch", samples=2, seed=3, delta="uniform")


@pytest.mark.parametrize("impl", IMPLS)
def test_needed_gradients_only(impl):
    """Each gradient alone is what it is among all, and nothing else gets one."""
    tensors = {**inputs(9, 12, 8, 4), "source": torch.rand(2, 9, 12), "delta": torch.rand(2, 9)}
    names, op = list(tensors), stochastic(bo, samples=2, impl=impl)
    full = testing.gradients(lambda *t: op(names, *t), list(tensors.values()), torch.ones(2, 9, 4))[1:]
    for wanted in range(len(names)):
        leaves = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(tensors.values())]
        op(names, *leaves).backward(torch.ones(2, 9, 4))
        assert [t.grad is not None for t in leaves] == [i == wanted for i in range(len(names))]
        torch.testing.assert_close(leaves[wanted].grad, full[wanted])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64))
def test_masks_keep_their_own_dtype(dtype, impl):
    """Gates, masks and deltas of any float dtype beside fp32 tensors; their gradients come back in it."""
    tensors = {**inputs(9, 12, 8, 4), "gates": torch.rand(9, 12).to(dtype), "delta": torch.rand(2, 9).to(dtype)}
    names = list(tensors)
    run = [stochastic(module, samples=2, seed=3, **o) for module, o in ((bo, {"impl": impl}), (bo.reference, {}))]
    ours, theirs = (
        testing.gradients(lambda *t, f=f: f(names, *t), list(tensors.values()), randn(2, 9, 4).fill_(0.5)) for f in run
    )
    assert [t.dtype for t in ours] == [torch.float32, *(t.dtype for t in tensors.values())]
    torch.testing.assert_close(ours[0], theirs[0].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_saved_for_backward(impl):
    """At most one [tokens, C] array beside the inputs at four samples, where eager code keeps four a sample."""
    tensors = {name: t.requires_grad_() for name, t in inputs(64, 48, 16, 24).items()}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.itemsize
        return t

    def count(module, **options) -> int:
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            module.stochastic_rank1_linear(**tensors, samples=4, seed=3, delta="uniform", **options).sum()
        for t in tensors.values():
            saved.pop(t.data_ptr(), None)
        return sum(saved.values())

    assert 0 < count(bo, impl=impl) <= 64 * 48 + 4 * 64 + 8  # acts, the deltas, the seed
    assert count(bo.reference) >= 3 * 4 * 64 * 48


@pytest.mark.parametrize("module", (composite, kernels))
@pytest.mark.parametrize("rows", (33, 1))
def test_nothing_outside_the_outputs(rows, module):
    acts, write, dy = (testing.guarded(randn(*shape)) for shape in ((33, 35), (35, 9), (2, 33, 9)))
    gates, source, delta = (testing.guarded(torch.rand(*s)) for s in ((rows, 35), (2, rows, 35), (2, 33)))
    masks = composite.Masks(gates, source, delta, torch.arange(33) % 3 > 0, None, None, None, 0, 2, "source")
    y = testing.guarded(torch.zeros(2, 33, 9))
    with testing.GuardedAllocations() as allocations:
        module.masked_apply(y, acts, write, masks, 0.0)
        grads = module.masked_apply_backward(dy, acts, write, masks, [True] * 5)
    allocations.check()
    assert allocations.allocated and all(t.isfinite().all() for t in (y, *grads))


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_stays_in_its_token(impl):
    tensors = inputs(4, 12, 8, 4)
    tensors["x"][1, 3] = float("nan")
    y = bo.stochastic_rank1_linear(**tensors, samples=2, seed=3, impl=impl)
    assert y[:, 1].isnan().all() and y[:, [0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_overflow_of_the_weight_stays_with_the_tokens_routed_to_it(impl):
    x, read, write, weight = (torch.randn(*s) for s in ((4, 6), (6, 3), (3, 5), (5, 6)))
    weight[0] = float("inf")
    routing = torch.tensor([True, False, True, True])
    y = bo.rank1_linear(x, read, write, weight=weight, routing=routing, impl=impl)
    assert y[routing].isfinite().all() and not y[~routing].isfinite().all()
    torch.testing.assert_close(y[routing], bo.reference.rank1_linear(x[routing], read, write))
