"""HOSVD, CP, similarity, composition, re-expression and biases: each against the materialised tensor."""

import pytest
import torch

import bilinear_ops as bo
from bilinear_ops import analysis
from bilinear_ops.analysis import singular
from bilinear_ops.testing import randn

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # in functorch

HALF = (torch.bfloat16, torch.float16)


def doubles(*shapes, grad=False):
    return tuple(randn(*shape, dtype=torch.float64, requires_grad=grad) for shape in shapes)


def layer(d, h, o, **options):
    return doubles((h, d), (h, d), (o, h), **options)


def close(got, expected, rtol=1e-11):
    torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol)


def tensor(w, v, p):
    """B [o, d, d]."""
    b = torch.einsum("oh,hi,hj->oij", p, w, v)
    return (b + b.mT) / 2


def flattened(b, mode):
    return b.flatten(1) if mode == "output" else b.transpose(0, 1).flatten(1)


def graded(d, h, o, decades):
    """A layer whose singular values fall over many decades."""
    w, v, _ = layer(d, h, o)
    left, right = (torch.linalg.qr(t).Q for t in doubles((o, o), (h, o)))
    return w, v, left * 10 ** -torch.linspace(0, decades, o, dtype=torch.float64) @ right.t()


@pytest.mark.parametrize("tile", [4, 512])
@pytest.mark.parametrize("mode", singular.MODES)
@pytest.mark.parametrize(("d", "h", "o"), [(1, 1, 1), (5, 17, 4), (3, 7, 13), (2, 12, 12), (9, 4, 3)])
def test_hosvd(d, h, o, mode, tile, monkeypatch):
    monkeypatch.setattr(singular, "TILE", tile)
    w, v, p = layer(d, h, o)
    b = flattened(tensor(w, v, p), mode)
    u, s, _ = torch.linalg.svd(b, full_matrices=False)
    most = min(o, h) if mode == "output" else d
    found = analysis.hosvd(w, v, p, most, mode=mode)
    kept = s[s > 1e-10 * s[0]]  # the rest is zero
    close(found.S[: len(kept)], kept, 1e-9)
    assert (found.S[len(kept) :] < 1e-7 * s[0]).all()
    close(found.norm, b.norm())
    assert (found.U.gather(0, found.U.abs().argmax(0, keepdim=True)) > 0).all()
    for rank in range(min(most, 3) + 1):
        part = analysis.hosvd(w, v, p, rank, mode=mode)
        assert part.U.shape == (len(b), rank)
        close(part.U @ part.U.t(), u[:, :rank] @ u[:, :rank].t(), 1e-9)


def test_hosvd_gives_orthogonal_interaction_matrices():
    w, v, p = layer(5, 17, 4)
    found = analysis.hosvd(w, v, p, 4)
    q = bo.interaction_matrices(w, v, found.U.t() @ p).flatten(1)
    close(q @ q.t(), found.S.square().diag())


@pytest.mark.parametrize(("decades", "singular"), [(3, True), (5, True), (3, False), (8, False)])
def test_hosvd_keeps_small_singular_values(decades, singular):
    w, v, p = graded(16, 60, 12, decades)
    if singular:
        w[1], v[1] = w[0], v[0]
        w[2] = 0
    s = torch.linalg.svdvals(tensor(w, v, p).flatten(1))
    assert s[-1] < 10.0 ** (1 - decades) * s[0]
    torch.testing.assert_close(analysis.hosvd(w, v, p, 12).S, s, rtol=1e-6, atol=0)


def test_hosvd_of_inputs_keeps_small_singular_values():
    w, v, p = layer(12, 60, 8)
    rotation = torch.linalg.qr(doubles((12, 12))[0]).Q
    squeeze = rotation * 10 ** -torch.linspace(0, 4.5, 12, dtype=torch.float64) @ rotation.t()
    w, v = w @ squeeze, v @ squeeze
    s = torch.linalg.svdvals(flattened(tensor(w, v, p), "input"))
    assert s[-1] < 1e-4 * s[0]
    torch.testing.assert_close(analysis.hosvd(w, v, p, 12, mode="input").S, s, rtol=1e-6, atol=0)


@pytest.mark.parametrize("mode", singular.MODES)
def test_hosvd_in_float32(mode):
    w, v, p = (t.float() for t in graded(16, 60, 12, 3))
    s = torch.linalg.svdvals(flattened(tensor(w.double(), v.double(), p.double()), mode))
    found = analysis.hosvd(w, v, p, 12, mode=mode)
    assert found.S.dtype == found.U.dtype == torch.float32
    torch.testing.assert_close(found.S, s[:12].float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("mode", singular.MODES)
@pytest.mark.parametrize("condition", [0, 2])  # from the Gram matrix and from the Cholesky factor
def test_hosvd_gradients(mode, condition, monkeypatch):
    monkeypatch.setattr(singular, "TILE", 4)
    monkeypatch.setattr(singular, "CONDITION", condition)

    def invariant(w, v, p):
        found = analysis.hosvd(w, v, p, 2, mode=mode)
        return found.S, found.U @ found.U.t(), found.norm

    tensors = [t.requires_grad_() for t in graded(3, 5, 2, 1)]
    assert torch.autograd.gradcheck(invariant, tensors, fast_mode=True)


def dense_p(b, w, v):
    """The least-squares p for the terms sym(w_r v_r^T), from B."""
    terms = tensor(w, v, torch.eye(len(w)).double()).flatten(1)
    return torch.linalg.lstsq(terms.t(), b.flatten(1).t(), driver="gelsd").solution.t()


def dense_w(b, v, p):
    """The least-squares w [r, d] for given v and p: one column of the design for every element of w."""
    r, d = v.shape
    ones = torch.eye(r * d).double().view(r * d, r, d)
    design = torch.stack([tensor(one, v, p).flatten() for one in ones], 1)
    return torch.linalg.lstsq(design, b.flatten()[:, None], driver="gelsd").solution.view(r, d)


@pytest.mark.parametrize(("d", "h", "o", "rank"), [(5, 17, 4, 3), (4, 9, 6, 1), (3, 12, 5, 4), (7, 6, 2, 5)])
def test_cp_step_is_the_dense_step(d, h, o, rank):
    w, v, p = layer(d, h, o)
    b = tensor(w, v, p)
    first, second = w0, v0 = doubles((rank, d), (rank, d))
    expected = []
    for _ in range(3):
        p0 = dense_p(b, w0, v0)
        expected.append((b - tensor(w0, v0, p0)).norm() / b.norm())
        w0 = dense_w(b, v0, p0)
        v0 = dense_w(b, w0, dense_p(b, w0, v0))
    for steps, error in enumerate(expected):
        found = analysis.cp_decompose(
            w, v, p, rank, init=(first, second), steps=steps, inner_steps=200 * rank * d, tol=0
        )
        assert len(found.errors) == steps + 1
        close(found.errors[-1], error, 1e-10)
        if steps == 1:
            w1 = dense_w(b, second, dense_p(b, first, second))
            v1 = dense_w(b, w1, dense_p(b, w1, second))
            close(tensor(*found[:3]), tensor(w1, v1, dense_p(b, w1, v1)), 1e-10)


@pytest.mark.parametrize("inner_steps", [1, 3, 20])
def test_cp_descends(inner_steps):
    w, v, p = layer(6, 40, 5)
    b = tensor(w, v, p)
    found = analysis.cp_decompose(w, v, p, 6, steps=30, inner_steps=inner_steps, tol=0)
    assert len(found.errors) == 31  # a step that does not lower the error would have ended it
    assert (found.errors.diff() < 0).all()
    close(found.errors[-1], (b - tensor(*found[:3])).norm() / b.norm(), 1e-9)
    more = analysis.cp_decompose(w, v, p, 6, init=found[:2], steps=5, inner_steps=inner_steps, tol=0)
    close(more.errors[0], found.errors[-1], 1e-9)
    assert more.errors[-1] < found.errors[-1]
    strengths = found.p.norm(dim=0)
    assert (strengths.diff() <= 0).all()
    close(found.w.norm(dim=1), torch.ones(6).double())
    close(found.v.norm(dim=1), torch.ones(6).double())


def copied(w, v, p):
    """The same function by neurons that are copies of each other, up to scale and order."""
    return torch.cat([w, 2 * w, v]), torch.cat([v, v / 2, w]), torch.cat([0.3 * p, 0.3 * p, 0.4 * p], 1)


def test_cp_starts_from_neurons_that_differ():
    w, v, p = layer(12, 5, 6)
    copies = copied(w, v, p)
    found = analysis.cp_decompose(*copies, 5, steps=0)
    assert found.errors[0] < 1e-7
    close(tensor(*found[:3]), tensor(w, v, p))
    found = analysis.cp_decompose(*copies, 7)  # more than there are
    assert found.errors[-1] < 1e-7
    close(tensor(*found[:3]), tensor(w, v, p))


def test_cp_starts_from_neurons_that_span_the_others():
    v = torch.tensor([[1.0, 0.0], [0.54, 0.72], [0.64, -0.48], [0.0, 0.0]]).double()
    v = torch.nn.functional.pad(v, (0, 2))
    w = torch.eye(4)[[2, 2, 2, 3]].double()  # with one w, the third v is a sum of the first two
    v[3, 3] = 1
    p = torch.eye(4).double()
    p[:, 3] /= 100  # weak, but the only one that the first three cannot stand for
    assert analysis.cp_decompose(w, v, p, 3, steps=0).errors[0] < 1e-7


def test_cp_finds_a_smaller_layer():
    w, v, p = layer(12, 3, 6)
    near = tuple(t + 0.3 * torch.randn_like(t) for t in (w, v))
    found = analysis.cp_decompose(*copied(w, v, p), 3, init=near, tol=0)
    assert found.errors[0] > 0.1 and found.errors[-1] < 1e-7
    close(tensor(*found[:3]), tensor(w, v, p), 1e-6)


def test_cp_stops():
    w, v, p = layer(6, 40, 5)
    assert len(analysis.cp_decompose(w, v, p, 6, steps=50, tol=0.5).errors) == 2
    exact = analysis.cp_decompose(w, v, p, 40)
    assert exact.errors[-1] < 1e-7


def test_cp_in_float32():
    w, v, p = (t.float() for t in layer(6, 40, 5))
    found = analysis.cp_decompose(w, v, p, 4, steps=5)
    exact = analysis.cp_decompose(w.double(), v.double(), p.double(), 4, steps=5)
    for got, expected in zip(found, exact, strict=True):
        assert got.dtype == torch.float32
        close(got, expected.float(), 1e-6)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_exact_in_its_numbers(dtype):
    w, v, p = (t.to(dtype) for t in layer(6, 20, 5))
    wide = [t.double() for t in (w, v, p)]
    u = torch.eye(5)
    for fn in (
        lambda w, v, p: analysis.hosvd(w, v, p, 3),
        lambda w, v, p: analysis.cp_decompose(w, v, p, 3, steps=2),
        lambda w, v, p: (analysis.layer_similarity(w, v, p, v, v, p),),
        lambda w, v, p: analysis.reexpress(w, v, p, u.to(p.dtype)),
    ):
        for got, expected in zip(fn(w, v, p), fn(*wide), strict=True):
            assert got.dtype == torch.float32
            close(got, expected.float(), 1e-6)


@pytest.mark.parametrize(("h1", "h2", "d", "o"), [(1, 1, 1, 1), (5, 7, 3, 4), (17, 2, 4, 3)])
def test_layer_similarity(h1, h2, d, o):
    first, second = layer(d, h1, o), layer(d, h2, o)
    b1, b2 = tensor(*first), tensor(*second)
    close(analysis.layer_similarity(*first, *second), torch.cosine_similarity(b1.flatten(), b2.flatten(), 0))
    trace1, trace2 = (b.diagonal(dim1=1, dim2=2).sum(1) for b in (b1, b2))

    def gaussian(a, b, s, t):
        return 2 * (a * b).sum() + s @ t

    cosine = gaussian(b1, b2, trace1, trace2) / (
        gaussian(b1, b1, trace1, trace1).sqrt() * gaussian(b2, b2, trace2, trace2).sqrt()
    )
    close(analysis.layer_similarity(*first, *second, measure="gaussian"), cosine)


@pytest.mark.parametrize("measure", ["frobenius", "gaussian"])
def test_similarity_of_equal_functions_is_one(measure):
    w, v, p = layer(6, 20, 5)
    same = v.flip(0), 3 * w.flip(0), p.flip(1) / 3
    for other in ((w, v, p), same):
        close(analysis.layer_similarity(w, v, p, *other, measure=measure), torch.tensor(1.0).double(), 1e-14)
    close(analysis.layer_similarity(w, v, -p, *same, measure=measure), torch.tensor(-1.0).double(), 1e-14)


def test_gaussian_similarity_is_that_of_outputs_on_normal_inputs():
    first, second = layer(3, 4, 2), layer(3, 4, 2)
    x = torch.randn(400_000, 3, dtype=torch.float64)
    y1, y2 = bo.gated_mlp(x, *first), bo.gated_mlp(x, *second)
    drawn = (y1 * y2).sum() / (y1.norm() * y2.norm())
    assert abs(analysis.layer_similarity(*first, *second, measure="gaussian") - drawn) < 0.01
    assert abs(analysis.layer_similarity(*first, *second) - drawn) > 0.05


def test_virtual_interactions():
    first, second = layer(6, 7, 5), layer(5, 9, 4)
    x = doubles((11, 6))[0]
    virtual = analysis.virtual_interactions(first, second)
    q = bo.interaction_matrices(virtual.w, virtual.v, virtual.p)
    close(q, first[2].t() @ tensor(*second) @ first[2])
    for activation in ("identity", "silu"):
        hidden = bo.gated_bilinear(x, *first[:2], activation=activation)
        composed = bo.gated_mlp(bo.gated_mlp(x, *first, activation=activation), *second)
        close(bo.gated_mlp(hidden, *virtual[:3]), composed)
    close(virtual.scale, bo.neuron_gram(*first[:2]).diagonal().sqrt())


def test_virtual_interactions_do_not_depend_on_the_scale_of_neurons():
    (w, v, p), second = layer(6, 7, 5), layer(5, 9, 4)
    scale = torch.rand(7, dtype=torch.float64) + 0.1

    def ranked(first):
        found = analysis.virtual_interactions(first, second)
        return bo.interaction_topk(found.w * found.scale, found.v * found.scale, found.p, 5).values

    close(ranked((w, v, p)), ranked((w * scale[:, None], v, p / scale)))
    half = [300 * torch.ones(1, 8, dtype=torch.float16), torch.ones(1, 8, dtype=torch.float16)]
    virtual = analysis.virtual_interactions((*half, half[1].t()), (*half, half[1][:, :1]))
    assert virtual.scale.item() == 300 * 8


def test_virtual_interactions_with_the_residual_stream():
    first, second = layer(6, 7, 6), layer(6, 9, 4)
    x = doubles((11, 6))[0]
    virtual = analysis.virtual_interactions(first, second, residual=True)
    inputs = torch.cat([x, bo.gated_bilinear(x, *first[:2])], 1)
    close(bo.gated_mlp(inputs, *virtual[:3]), bo.gated_mlp(x + bo.gated_mlp(x, *first), *second))
    assert virtual.scale.shape == (13,)
    assert (virtual.scale[:6] == 1).all()


@pytest.mark.parametrize("directions", [4, 9])
def test_reexpress(directions):
    w, v, p = layer(5, 8, 4)
    (u,) = doubles((directions, 4))
    found = analysis.reexpress(w, v, p, u)
    q = bo.interaction_matrices(w, v, found.c)
    close(q, torch.einsum("ko,oij->kij", u, tensor(w, v, p)))
    close(torch.einsum("ko,kij->oij", found.outputs, q), tensor(w, v, p))
    close(found.outputs, torch.linalg.pinv(u).t())


def test_reexpress_through_fewer_directions_that_hold_the_layer():
    w, v, p = layer(5, 8, 3)
    (embed,) = doubles((4, 3))
    p = embed @ p  # outputs in three of four dimensions
    u = torch.randn(3, 3).double() @ embed.t()
    found = analysis.reexpress(w, v, p, u)
    close(found.outputs.t() @ found.c, p)


def test_reexpress_refuses_what_it_would_lose():
    w, v, p = layer(5, 8, 4)
    (u,) = doubles((9, 4))
    with pytest.raises(ValueError, match=r"span the layer's outputs, but \d+\.\d% of \|B\| lies outside"):
        analysis.reexpress(w, v, p, u[:3])
    for dependent in (u[:, :3] @ torch.randn(3, 4).double(), torch.cat([u[:2], u[:1]])):
        with pytest.raises(ValueError, match="directions must have rank"):
            analysis.reexpress(w, v, p, dependent)
    near = (u[:, :3] @ torch.randn(3, 4).double()).float()  # of full rank by its rounding errors alone
    with pytest.raises(ValueError, match="directions must have rank 4 .* got 3"):
        analysis.reexpress(w.float(), v.float(), p.float(), near)


@pytest.mark.parametrize("activation", ["identity", "silu"])
def test_augment_biases(activation):
    x, w, v, p, b_w, b_v, b_p = doubles((11, 5), (8, 5), (8, 5), (4, 8), (8,), (8,), (4,))
    ones = torch.cat([x, x.new_ones(11, 1)], 1)
    for biases in ((b_w, b_v), (None, b_v), (b_w, None)):
        augmented = analysis.augment_biases(w, v, p, *biases)
        expected = bo.gated_mlp(x, w, v, p, *biases, activation=activation)
        close(bo.gated_mlp(ones, *augmented, activation=activation), expected)
    if activation == "identity":
        close(
            bo.gated_mlp(ones, *analysis.augment_biases(w, v, p, b_w, b_v, b_p)),
            bo.gated_mlp(x, w, v, p, b_w, b_v, b_p),
        )


@pytest.mark.parametrize("given", [(1, 1, 1), (1, 0, 0), (0, 1, 1), (0, 0, 0)])
def test_bias_terms(given):
    x, w, v, p, *biases = doubles((11, 5), (8, 5), (8, 5), (4, 8), (8,), (8,), (4,))
    biases = [b if kept else None for b, kept in zip(biases, given, strict=True)]
    terms = analysis.bias_terms(w, v, p, *biases)
    parts = bo.gated_mlp(x, *terms.interaction), x @ terms.linear.t(), terms.constant
    close(sum(parts), bo.gated_mlp(x, w, v, p, *biases))
    close(bo.gated_mlp(2 * x, w, v, p, *biases), 4 * parts[0] + 2 * parts[1] + parts[2])


def test_gradients_of_the_rest():
    first, second = layer(2, 3, 2, grad=True), layer(2, 1, 2, grad=True)
    for measure in ("frobenius", "gaussian"):
        assert torch.autograd.gradcheck(lambda *t, m=measure: analysis.layer_similarity(*t, measure=m), first + second)
    above = layer(2, 3, 2, grad=True)
    assert torch.autograd.gradcheck(lambda *t: analysis.virtual_interactions(t[:3], t[3:]), first + above)
    for k in (2, 4):
        (u,) = doubles((k, 2), grad=True)
        assert torch.autograd.gradcheck(analysis.reexpress, (*first, u))
    biases = doubles((3,), (3,), (2,), grad=True)
    assert torch.autograd.gradcheck(analysis.augment_biases, first + biases)
    assert torch.autograd.gradcheck(lambda *t: analysis.bias_terms(*t)[1:], first + biases)


@pytest.mark.parametrize(("d", "h", "o"), [(0, 4, 3), (3, 0, 2), (3, 4, 0), (0, 0, 0)])
def test_empty_sizes(d, h, o):
    w, v, p = layer(d, h, o)
    for mode, most in (("output", min(o, h)), ("input", d)):
        for rank in {0, most}:
            found = analysis.hosvd(w, v, p, rank, mode=mode)
            assert found.U.shape == (o if mode == "output" else d, rank)
            assert not found.S.any() and found.norm == 0
    for rank in {0, h}:
        found = analysis.cp_decompose(w, v, p, rank)
        assert [t.shape for t in found[:3]] == [(rank, d), (rank, d), (o, rank)]
        assert found.errors.isnan().all()
    assert analysis.layer_similarity(w, v, p, w, v, p).isnan()
    virtual = analysis.virtual_interactions((w, v, p), layer(o, 5, 2))
    assert [t.shape for t in virtual] == [(5, h), (5, h), (2, 5), (h,)]
    again = analysis.reexpress(w, v, p, torch.eye(o).double())
    close(again.c, p)
    augmented = analysis.augment_biases(w, v, p, b_p=torch.ones(o).double())
    assert [t.shape for t in augmented] == [(h + 1, d + 1), (h + 1, d + 1), (o, h + 1)]
    assert [t.shape for t in analysis.bias_terms(w, v, p)[1:]] == [(o, d), (o,)]


CALLS = {
    "hosvd": lambda w, v, p: analysis.hosvd(w, v, p, 2),
    "cp_decompose": lambda w, v, p: analysis.cp_decompose(w, v, p, 2),
    "reexpress": lambda w, v, p: analysis.reexpress(w, v, p, torch.eye(4).double()),
    "augment_biases": analysis.augment_biases,
    "bias_terms": analysis.bias_terms,
    "strongest_directions": lambda w, v, p: analysis.strongest_directions(w, v, p, 2),
}


@pytest.mark.parametrize("name", CALLS)
def test_layers_are_checked(name):
    w, v, p = layer(5, 8, 4)
    with pytest.raises(RuntimeError, match=r"v must have shape \[h=8, d=5\], got \[7, 5\]"):
        CALLS[name](w, v[:7], p)
    with pytest.raises(RuntimeError, match="p must have the dtype of w"):
        CALLS[name](w, v, p.float())
    with pytest.raises(TypeError, match="v must be float64"):
        CALLS[name](w, v.long(), p)
    with pytest.raises(TypeError, match=r"w must be a torch\.Tensor, got list"):
        CALLS[name](w.tolist(), v, p)


def test_errors():
    w, v, p = layer(5, 8, 4)
    with pytest.raises(ValueError, match="mode must be one of output, input, got 'both'"):
        analysis.hosvd(w, v, p, 2, mode="both")
    for rank, mode, most in ((5, "output", 4), (-1, "output", 4), (6, "input", 5)):
        with pytest.raises(ValueError, match=f"rank must be between 0 and {most} in {mode} mode, got {rank}"):
            analysis.hosvd(w, v, p, rank, mode=mode)
    with pytest.raises(ValueError, match="rank must be between 0 and h=8, got 9"):
        analysis.cp_decompose(w, v, p, 9)
    with pytest.raises(ValueError, match="rank must be 3, the rows of init, got 2"):
        analysis.cp_decompose(w, v, p, 2, init=(w[:3], v[:3]))
    with pytest.raises(RuntimeError, match=r"v0 must have shape \[r=3, d=5\], got \[2, 5\]"):
        analysis.cp_decompose(w, v, p, 3, init=(w[:3], v[:2]))
    for call in (analysis.hosvd, analysis.cp_decompose):
        with pytest.raises(TypeError, match="rank must be an int, got float"):
            call(w, v, p, 2.0)
    with pytest.raises(TypeError, match=r"first must be \(w, v, p\), got GatedMLP"):
        analysis.virtual_interactions(bo.nn.GatedMLP(5, 8, 4), (w, v, p))
    with pytest.raises(ValueError, match="must not be negative, got -1, 10 and"):
        analysis.cp_decompose(w, v, p, 2, steps=-1)
    with pytest.raises(ValueError, match="measure must be one of frobenius, gaussian, got 'cosine'"):
        analysis.layer_similarity(w, v, p, w, v, p, measure="cosine")
    with pytest.raises(RuntimeError, match=r"p2 must have shape \[o=4, h2=8\], got \[3, 8\]"):
        analysis.layer_similarity(w, v, p, w, v, p[:3])
    with pytest.raises(RuntimeError, match=r"second\.w must have shape \[h2, m=4\], got \[8, 5\]"):
        analysis.virtual_interactions((w, v, p), (w, v, p))
    with pytest.raises(RuntimeError, match=r"first\.p must have shape \[d=5, h1=8\], got \[4, 8\]"):
        analysis.virtual_interactions((w, v, p), (w, v, p), residual=True)
    with pytest.raises(RuntimeError, match=r"directions must have shape \[K, o=4\], got \[4, 5\]"):
        analysis.reexpress(w, v, p, torch.ones(4, 5).double())
    with pytest.raises(RuntimeError, match=r"b_v must have shape \[h=8\], got \[5\]"):
        analysis.augment_biases(w, v, p, None, torch.ones(5).double())


def test_autocast_changes_nothing():
    first, second = ([t.float() for t in layer(d, 8, d)] for d in (5, 5))
    calls = (
        lambda: analysis.hosvd(*first, 3),
        lambda: analysis.cp_decompose(*first, 3, steps=2),
        lambda: (analysis.layer_similarity(*first, *second),),
        lambda: analysis.virtual_interactions(first, second),
        lambda: analysis.reexpress(*first, torch.eye(5)),
        lambda: analysis.bias_terms(*first, torch.ones(8), torch.ones(8))[1:],
        lambda: analysis.strongest_directions(*first, 2),
    )
    for call in calls:
        expected = call()
        with torch.autocast("cpu", torch.bfloat16):
            found = call()
        assert all(map(torch.equal, found, expected))
