"""Interaction matrices: against the brute-force third-order tensor, in both layouts, with gradients and budgets."""

import gc
import itertools
import subprocess
import sys

import pytest
import torch

import bilinear_ops as bo
from bilinear_ops.composite.interaction import matrices as composite
from bilinear_ops.composite.limits import limits
from bilinear_ops.testing import LAYOUTS, assert_no_worse, gradients, layout, randn, shapes

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # in functorch

CASES = list(shapes("K d h", sizes=(1, 2, 17, 64, 65, 130)))
# every order of contraction at small sizes: one by one, by pairs, and in two stages
ORDERS = [(5, 6, 7, None), (60, 6, 7, None), (60, 6, 7, 3), (60, 6, 7, 20), (5, 6, 7, 3)]


def layer(K, d, h, o=None, dtype=torch.float64):
    """w, v and the coefficients, as a tensor or as Directions."""
    w, v = randn(h, d, dtype=dtype), randn(h, d, dtype=dtype)
    return (
        w,
        v,
        randn(K, h, dtype=dtype) if o is None else bo.Directions(randn(K, o, dtype=dtype), randn(o, h, dtype=dtype)),
    )


def brute_force(w, v, c):
    """sum_h C_kh 1/2 (W_hi V_hj + W_hj V_hi) through the tensor [h, d, d]."""
    c = c.u @ c.p if isinstance(c, bo.Directions) else c
    b = torch.einsum("hi,hj->hij", w, v)
    return torch.einsum("kh,hij->kij", c, (b + b.mT) / 2)


@pytest.mark.parametrize("size", CASES, ids=str)
def test_equals_the_third_order_tensor(size):
    w, v, c = layer(**size)
    gold = brute_force(w, v, c)
    q = bo.interaction_matrices(w, v, c)
    assert (q - gold).abs().max() <= 1e-12 * gold.abs().max()
    assert torch.equal(q, q.mT)
    packed = bo.interaction_matrices(w, v, c, layout="packed")
    assert (packed - bo.pack_symmetric(gold)).abs().max() <= 1e-12 * gold.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", CASES, ids=str)
def test_no_worse_than_eager(size, dtype):
    w, v, c = layer(**size, dtype=dtype)
    gold = bo.reference.interaction_matrices(w.double(), v.double(), c.double())
    q = bo.interaction_matrices(w, v, c)
    assert_no_worse(q, bo.reference.interaction_matrices(w, v, c), gold)
    assert torch.equal(q, q.mT)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["full", "packed"])
def test_every_order_and_its_gradients(order, kind):
    w, v, c = layer(*order)
    tensors = [w, v, *c] if isinstance(c, bo.Directions) else [w, v, c]

    def through(module):
        return lambda w, v, *c: module.interaction_matrices(
            w, v, bo.Directions(*c) if len(c) == 2 else c[0], layout=kind
        )

    dq = torch.randn_like(through(bo)(*tensors))
    for got, expected in zip(
        gradients(through(bo), tensors, dq), gradients(through(bo.reference), tensors, dq), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_orders_are_the_ones_meant():
    assert not composite.two_stage(60, 20, 7) and composite.two_stage(60, 3, 7)
    assert 5 <= limits.loop_max < 60


def test_packed_gradient_gathers_the_full_one():
    w, v, c = layer(3, 5, 4)
    dpacked = randn(3, 15, dtype=torch.float64)
    packed = gradients(lambda *t: bo.interaction_matrices(*t, layout="packed"), (w, v, c), dpacked)
    full = gradients(lambda *t: bo.pack_symmetric(bo.interaction_matrices(*t)), (w, v, c), dpacked)
    for a, b in zip(packed, full, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("order", [(3, 4, 3, None), (50, 2, 2, None), (50, 2, 3, 1)])
def test_gradcheck(order):
    w, v, c = layer(*order)
    tensors = tuple(t.requires_grad_() for t in ((w, v, *c) if isinstance(c, bo.Directions) else (w, v, c)))

    def f(w, v, *c):
        return bo.interaction_matrices(w, v, bo.Directions(*c) if len(c) == 2 else c[0], layout="packed")

    assert torch.autograd.gradcheck(f, tensors)
    assert torch.autograd.gradgradcheck(f, tensors)


@pytest.mark.parametrize("order", ORDERS)
def test_only_needed_gradients(order):
    """Each alone is what it is among all of them."""
    w, v, c = layer(*order)
    tensors = [w, v, *c] if isinstance(c, bo.Directions) else [w, v, c]

    def gradients_of(needed):
        leaves = [t.clone().requires_grad_(i in needed) for i, t in enumerate(tensors)]
        c = leaves[2] if len(leaves) == 3 else bo.Directions(*leaves[2:])
        bo.interaction_matrices(leaves[0], leaves[1], c).square().sum().backward()
        return [t.grad for t in leaves]

    together = gradients_of(range(len(tensors)))
    for i, expected in enumerate(together):
        alone = gradients_of([i])
        assert [g is not None for g in alone] == [j == i for j in range(len(tensors))]
        torch.testing.assert_close(alone[i], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("K", [3, 60])
def test_any_layout(K, kind):
    tensors = [layout(t, kind) for t in layer(K, 6, 6)]
    dq = torch.randn(6, K, 6, dtype=torch.float64).transpose(0, 1)
    got = gradients(bo.interaction_matrices, tensors, dq)
    assert all(g.is_contiguous() for g in got)
    expected = gradients(bo.reference.interaction_matrices, [t.contiguous() for t in tensors], dq)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("K", "d", "h"), [(0, 3, 4), (3, 0, 4), (3, 4, 0), (60, 0, 2), (60, 3, 0)])
@pytest.mark.parametrize("kind", ["full", "packed"])
def test_empty_sizes(K, d, h, kind):
    w, v, c = (t.requires_grad_() for t in layer(K, d, h))
    q = bo.interaction_matrices(w, v, c, layout=kind)
    assert torch.equal(q, bo.reference.interaction_matrices(w, v, c, layout=kind))
    q.sum().backward()
    assert w.grad.shape == w.shape and not w.grad.any()


def test_is_the_layer():
    """x^T Q_k x is <direction_k, gated_mlp(x)>; biases enter as an input that is always one."""
    d, h, o = 5, 7, 3
    w, v, p = (randn(*s, dtype=torch.float64) for s in ((h, d), (h, d), (o, h)))
    b_w, b_v = randn(h, dtype=torch.float64), randn(h, dtype=torch.float64)
    x, directions = randn(2, 4, d, dtype=torch.float64), randn(6, o, dtype=torch.float64)
    q = bo.interaction_matrices(w, v, bo.Directions(directions, p))
    torch.testing.assert_close(bo.quadratic_form(x, q), bo.gated_mlp(x, w, v, p) @ directions.t())
    w, v = torch.cat([w, b_w[:, None]], 1), torch.cat([v, b_v[:, None]], 1)
    augmented = torch.cat([x, torch.ones_like(x[..., :1])], -1)
    q = bo.interaction_matrices(w, v, directions @ p, layout="packed")
    expected = bo.gated_mlp(x, w[:, :d], v[:, :d], p, b_w, b_v) @ directions.t()
    torch.testing.assert_close(bo.quadratic_form(augmented, q), expected)


def test_packing():
    q = randn(2, 3, 4, 4, dtype=torch.float64)
    q = (q + q.mT).requires_grad_()
    packed = bo.pack_symmetric(q)
    i, j = torch.triu_indices(4, 4)
    assert torch.equal(packed, q[..., i, j]) and packed.shape == (2, 3, 10)
    assert torch.equal(bo.unpack_symmetric(packed, 4), q)
    assert torch.autograd.gradcheck(bo.pack_symmetric, q)
    assert torch.autograd.gradcheck(lambda t: bo.unpack_symmetric(t, 4), packed.detach().requires_grad_())


@pytest.mark.parametrize("kind", ["full", "packed"])
@pytest.mark.parametrize("order", ORDERS)
def test_streamed_equals_materialised(order, kind):
    w, v, c = layer(*order)
    gold = bo.interaction_matrices(w, v, c, layout=kind)
    chunks = list(bo.iter_interaction_matrices(w, v, c, layout=kind, chunk_bytes=9000))
    assert len(chunks) > 1 or order[0] == 5
    covered = [k for s, _ in chunks for k in range(order[0])[s]]
    assert covered == list(range(order[0]))
    torch.testing.assert_close(torch.cat([q for _, q in chunks]), gold)


PEAK = """
import resource, torch
torch.set_num_threads(1)
import bilinear_ops as bo
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) * 1024
bo.interaction_matrices(torch.randn(64, 8), torch.randn(64, 8), torch.randn(64, 64)).sum()  # the libraries' own buffers
w, v, c = torch.randn({h}, {d}), torch.randn({h}, {d}), torch.randn({K}, {h})
torch.mm(c, c.t())
open("/proc/self/clear_refs", "w").write("5")
before = resident()
{run}
print(peak() - before)
"""


def peak_bytes(run, K, d, h):
    code = PEAK.format(K=K, d=d, h=h, run=run)
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def peak_allocation(run):
    """Bytes of tensors that `run` holds at most at any moment, by the profiler's record of allocations."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profile:
        run()
    changes = (e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
    return max(itertools.accumulate(changes))


@pytest.mark.parametrize(
    "order, kind, dtype, impl, budget",
    [
        ((200, 64, 32), "full", torch.float32, "torch", 1 << 20),
        ((500, 32, 16), "packed", torch.float32, "torch", 1 << 19),
        ((100, 48, 150), "full", torch.bfloat16, "torch", 1 << 20),
        ((40, 64, 32), "packed", torch.float64, "torch", 1 << 20),
        ((300, 64, 32, 10), "full", torch.float32, "torch", 3 << 19),
        ((40, 32, 40), "full", torch.float32, "triton", 1 << 17),
        ((60, 17, 20), "packed", torch.bfloat16, "triton", 1 << 15),
        ((100, 17, 40, 5), "full", torch.float32, "triton", 1 << 17),
    ],
)
def test_streaming_keeps_its_budget(order, kind, dtype, impl, budget):
    w, v, c = layer(*order, dtype=dtype)

    def run():
        for _, q in bo.iter_interaction_matrices(w, v, c, layout=kind, chunk_bytes=budget, impl=impl):
            q.sum()
            if impl == "triton":
                gc.collect()  # an interpreted launch is a cycle that holds its arguments

    assert budget // 2 < peak_allocation(run) <= budget


@pytest.mark.slow  # counts the libraries' buffers too
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_streaming_keeps_its_budget_of_resident_memory():
    budget = 64 << 20
    run = f"for _, q in bo.iter_interaction_matrices(w, v, c, chunk_bytes={budget}): q.sum()"
    used = peak_bytes(run, 400, 256, 64)  # 105 MB of matrices
    assert budget // 4 < used <= budget + (4 << 20)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_packed_output_is_nearly_all_of_the_peak():
    output = 512 * (512 * 513 // 2) * 4
    used = peak_bytes("q = bo.interaction_matrices(w, v, c, layout='packed')", 512, 512, 2048)
    assert output <= used <= 1.15 * output


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_global_ranking_holds_tiles_only():
    """Resident, not allocated: blocks of changing sizes once scattered over 600 MB of heap."""
    assert peak_bytes("bo.interaction_topk(w, v, c, 100, scope='global')", 256, 2048, 256) < 100 << 20


def test_contract():
    w, v, c = (t.requires_grad_() for t in layer(4, 3, 5))
    torch.library.opcheck(torch.ops.bilinear_ops.interaction.default, (w, v, c, None, True, "torch"))
    u = randn(4, 4, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.bilinear_ops.interaction.default, (w, v, c, u, False, "torch"))
    dq = randn(4, 3, 3, dtype=torch.float64)
    for need in ([True, False, True, False], [False, True, False, True]):
        args = (dq, w.detach(), v.detach(), c.detach(), u.detach(), False, need, "torch")
        torch.library.opcheck(torch.ops.bilinear_ops.interaction_backward.default, args)


def test_transforms_use_the_reference():
    w, v, c = layer(4, 3, 5)
    jvp = torch.func.jvp(bo.interaction_matrices, (w, v, c), (w, v, c))[1]
    torch.testing.assert_close(jvp, 3 * bo.interaction_matrices(w, v, c))
    batched = torch.func.vmap(bo.interaction_matrices, (None, None, 0))(w, v, torch.stack([c, 2 * c]))
    torch.testing.assert_close(batched[1], 2 * batched[0])


def test_compiles_whole():
    w, v, c = (t.requires_grad_() for t in layer(4, 3, 5))
    f = torch.compile(lambda *t: bo.interaction_matrices(*t).square().sum(), fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(f(w, v, c), (w, v, c))
    expected = torch.autograd.grad(bo.reference.interaction_matrices(w, v, c).square().sum(), (w, v, c))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_leaves_precision_alone():
    w, v, c = layer(4, 3, 5, dtype=torch.float32)
    x = randn(6, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q = bo.interaction_matrices(w, v, c)
        assert q.dtype == bo.quadratic_form(x, q).dtype == bo.interaction_diagonal(w, v, c).dtype == torch.float32
        assert bo.neuron_gram(w, v).dtype == bo.layer_inner(w, v, c, w, v, c).dtype == torch.float32


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (RuntimeError, r"v must have shape \[h=5, d=3\]", lambda w, v, c: bo.interaction_matrices(w, v[:4], c)),
        (RuntimeError, r"v must have shape \[h=5, d=3\]", lambda w, v, c: bo.interaction_matrices(w, v[:, :2], c)),
        (RuntimeError, r"c must have shape \[K, h=5\]", lambda w, v, c: bo.interaction_matrices(w, v, c[:, :4])),
        (RuntimeError, r"c.p must have", lambda w, v, c: bo.interaction_matrices(w, v, bo.Directions(c, c))),
        (RuntimeError, "c must have the dtype", lambda w, v, c: bo.interaction_matrices(w, v, c.float())),
        (TypeError, "c must be a torch.Tensor", lambda w, v, c: bo.interaction_matrices(w, v, 3)),
        (TypeError, "w must be float", lambda w, v, c: bo.interaction_matrices(w.long(), v, c)),
        (ValueError, "layout must be one of", lambda w, v, c: bo.interaction_matrices(w, v, c, layout="upper")),
        (ValueError, "impl must be", lambda w, v, c: bo.interaction_matrices(w, v, c, impl="cuda")),
        (RuntimeError, "float64", lambda w, v, c: bo.interaction_matrices(w, v, c, impl="triton")),
        (ValueError, "chunk_bytes must be at", lambda *layer: bo.iter_interaction_matrices(*layer, chunk_bytes=1)),
        (RuntimeError, r"t must have shape \[..., 6\] for d=3", lambda w, v, c: bo.unpack_symmetric(c, 3)),
        (RuntimeError, r"q must have shape \[..., d, d\]", lambda w, v, c: bo.pack_symmetric(c)),
        (RuntimeError, r"q must have shape \[K, 6\] for d=3", lambda w, v, c: bo.quadratic_form(w, c)),
    ],
)  # fmt: skip
def test_errors(error, message, call):
    with pytest.raises(error, match=message):
        call(*layer(4, 3, 5))
