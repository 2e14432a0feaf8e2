"""Eigenpairs of interaction matrices and their gradients, against dense decompositions in float64."""

import pytest
import torch
from analysis_inputs import layer

import bilinear_ops as bo
from bilinear_ops.analysis import interaction_eigh
from bilinear_ops.analysis.eigen import eigensolvers, krylov
from bilinear_ops.analysis.eigen.operators import Factored, Formed
from bilinear_ops.testing import randn

WHICH = ("abs", "positive", "negative", "both")


def matrices(w, v, c, basis=None):
    if basis is not None:
        w, v = w @ basis, v @ basis
    return bo.reference.interaction_matrices(w, v, c)


def expected(q, n, which):
    """Eigenvalues and eigenvectors in the documented order, and the largest magnitude left out."""
    values, vectors = torch.linalg.eigh(q)
    found = []
    for spectrum in values.detach():
        ascending = spectrum.argsort().tolist()
        descending = ascending[::-1]
        found.append(
            {
                "abs": sorted(ascending, key=lambda i, s=spectrum: -abs(s[i].item()))[:n],
                "positive": descending[:n],
                "negative": ascending[:n],
                "both": descending[:n] + ascending[:n],
            }[which]
        )
    rest = [
        [abs(s[i].item()) for i in range(len(s)) if i not in chosen] for s, chosen in zip(values, found, strict=True)
    ]
    index = torch.tensor(found, dtype=torch.int64).view(len(q), 2 * n if which == "both" else n)
    values, vectors = values.gather(1, index), vectors.mT.gather(1, index.unsqueeze(2).expand(-1, -1, q.shape[1]))
    return values, vectors, torch.tensor([max(r, default=0.0) for r in rest], dtype=q.dtype)


def check(pairs, q, n, which, atol=1e-9):
    """Values, residuals, orthonormal rows, the bound and the flag."""
    values, _, beyond = expected(q, n, which)
    scale = q.abs().amax().item() if q.numel() else 1.0
    torch.testing.assert_close(pairs.values, values, rtol=0, atol=atol * scale)
    torch.testing.assert_close(pairs.next_abs, beyond, rtol=0, atol=100 * atol * scale)
    left = pairs.vectors @ q - pairs.values.unsqueeze(2) * pairs.vectors
    torch.testing.assert_close(pairs.residuals, left.norm(dim=2), rtol=1e-3, atol=1e-12 * scale)
    gram = pairs.vectors @ pairs.vectors.mT
    torch.testing.assert_close(gram, torch.eye(gram.shape[1]).to(q).expand_as(gram), rtol=0, atol=1e-9)
    if pairs.vectors.numel():
        assert (pairs.vectors.gather(2, pairs.vectors.abs().argmax(2, keepdim=True)) > 0).all()
    assert pairs.converged.all()


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize(
    ("h", "d", "outputs"), [(7, 9, 3), (3, 9, 1), (4, 1, 2), (4, 5, 0), (0, 5, 2), (4, 0, 3), (2, 90, 3), (80, 60, 2)]
)
@pytest.mark.parametrize("method", ["auto", "dense", "iterative"])
def test_equals_dense(h, d, outputs, which, method):
    w, v, c = layer(d, h, outputs)
    q = matrices(w, v, c)
    most = d // 2 if which == "both" else d
    for n in sorted({0, min(1, most), min(3, most), most}):
        pairs = interaction_eigh(w, v, c, n, which=which, method=method, tol=1e-11)
        check(pairs, q, n, which)
    torch.testing.assert_close(interaction_eigh(w, v, c, which=which, method=method).values, pairs.values)


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("form", [True, False])
def test_lanczos(which, form, monkeypatch):
    """The iterative method itself, restarts included, by either kind of product."""
    w, v, c = layer(130, 90, 6)
    q = matrices(w, v, c)
    calls = []
    for kind in (Factored, Formed):
        monkeypatch.setattr(kind, "__call__", _counted(kind.__call__, calls))
    made = eigensolvers.plan
    monkeypatch.setattr(
        "bilinear_ops.analysis.eigen.spectra.plan", lambda *args: made("iterative", *args[1:])._replace(form=form)
    )
    check(interaction_eigh(w, v, c, 4, which=which, method="iterative", tol=1e-10), q, 4, which)
    assert set(calls) == {Formed if form else Factored} and len(calls) > 40


def _counted(call, calls):
    def counted(self, x):
        calls.append(type(self))
        return call(self, x)

    return counted


def spectrum(values, count=40):
    """Matrices with these eigenvalues in random directions."""
    z = torch.linalg.qr(randn(count, len(values), len(values), dtype=torch.float32))[0]
    q = (z * values) @ z.mT
    return (q + q.mT) / 2


def lead(values):
    order = values.abs().argsort(descending=True)
    return values[order].abs()


DECAY = (torch.arange(120) + 1.0).rsqrt() * torch.where(torch.arange(120) % 3 > 0, 1.0, -1.0)
SPECTRA = {
    "descending": DECAY,
    "double": torch.cat([torch.ones(2), DECAY[2:]]),
    "fivefold": torch.cat([torch.ones(5), DECAY[5:]]),
    "threefold within": torch.cat([DECAY[:2], DECAY[2].expand(3), DECAY[5:]]),
    "of both signs": torch.cat([torch.tensor([1.0, -1.0, 1.0, -1.0]), DECAY[4:]]),
    "identity": torch.ones(120),
    "plus and minus": torch.where(torch.arange(120) % 2 > 0, 1.0, -1.0),
    "rank 1": torch.eye(120)[0],
    "zero": torch.zeros(120),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("n", [1, 4])
def test_no_eigenvalue_is_missed(name, n):
    values = SPECTRA[name]
    q = spectrum(values)

    def order(found):
        return eigensolvers.extremes_first(found, n, "abs")

    pairs = krylov.lanczos(Formed(q), q, n, order, 1e-4)
    assert pairs.found.all()
    torch.testing.assert_close(pairs.values[:, :n].abs(), lead(values)[:n].expand(len(q), n), rtol=0, atol=4e-6)
    left = pairs.vectors @ q - pairs.values.unsqueeze(2) * pairs.vectors
    assert (left.norm(dim=2) <= 1.01e-4 * values.abs().max() + 1e-6).all()


def test_what_did_not_converge_says_so(monkeypatch):
    monkeypatch.setattr(krylov, "MOST_LOOKS", 1)
    w, v, c = layer(150, 150, 3)
    pairs = interaction_eigh(w, v, c, 2, method="iterative", tol=1e-8)
    assert not pairs.converged.any()
    single = [t.float() for t in layer(50, 20, 2)]
    assert not interaction_eigh(*single, 2, method="dense", tol=1e-12).converged.any()


def test_auto_refines_what_did_not_converge(monkeypatch):
    monkeypatch.setattr(krylov, "MOST_LOOKS", 1)
    made = eigensolvers.plan
    monkeypatch.setattr("bilinear_ops.analysis.eigen.spectra.plan", lambda method, *args: made("iterative", *args))
    w, v, c = layer(150, 150, 3)
    check(interaction_eigh(w, v, c, 2, tol=1e-8), matrices(w, v, c), 2, "abs")


def test_refining_keeps_the_budget(monkeypatch):
    """What the iterative method may hold of many directions is room for few dense ones."""
    monkeypatch.setattr(krylov, "MOST_LOOKS", 1)
    made, sizes, dense = eigensolvers.plan, [], eigensolvers._dense
    monkeypatch.setattr("bilinear_ops.analysis.eigen.spectra.plan", lambda method, *args: made("iterative", *args))
    monkeypatch.setattr(eigensolvers, "_dense", lambda q, *rest: sizes.append(q.nbytes) or dense(q, *rest))
    w, v, c = layer(150, 150, 20)
    budget = 1 << 21
    check(interaction_eigh(w, v, c, 1, tol=1e-8, chunk_bytes=budget), matrices(w, v, c), 1, "abs")
    assert len(sizes) > 1 and 4 * max(sizes) <= budget


def test_what_was_not_confirmed_says_so(monkeypatch):
    """However small its residuals are."""
    found = krylov.lanczos

    def unconfirmed(*args):
        pairs = found(*args)
        return pairs._replace(found=pairs.found & False)

    monkeypatch.setattr(eigensolvers, "lanczos", unconfirmed)
    pairs = interaction_eigh(*layer(150, 150, 3), 2, method="iterative")
    assert (pairs.residuals < 1e-4 * pairs.values[:, :1].abs()).all() and not pairs.converged.any()


def test_half_precision_is_widened():
    w, v, c = (t.bfloat16() for t in layer(60, 30, 3))
    pairs = interaction_eigh(w, v, c, 2)
    wide = interaction_eigh(w.float(), v.float(), c.float(), 2)
    assert [t.dtype for t in pairs] == [torch.bfloat16] * 3 + [torch.bool, torch.bfloat16]
    for got, exact in zip(pairs, wide, strict=True):
        assert torch.equal(got, exact.to(got.dtype))


@pytest.mark.parametrize("method", ["dense", "iterative"])
def test_chunks_change_nothing(method):
    w, v, c = layer(90, 70, 7)
    whole = interaction_eigh(w, v, c, 3, method=method)
    parts = interaction_eigh(w, v, c, 3, method=method, chunk_bytes=1)
    for got, exact in zip(parts, whole, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("method", ["dense", "iterative"])
@pytest.mark.parametrize(
    ("h", "d", "features", "n", "which"),
    [(30, 100, None, 3, "abs"), (120, 100, None, 2, "both"), (20, 12, None, 12, "abs"), (60, 90, 100, 2, "negative"),
     (9, 7, 60, 2, "abs")],
)  # fmt: skip
def test_gradients(h, d, features, n, which, method):
    """Through values and vectors, to every factor: autograd through the dense decomposition's."""
    shapes = [(h, d), (h, d), (3, 5), (5, h)] + ([] if features is None else [(d, features)])
    tensors = [randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    w, v, u, p, *basis = tensors
    pairs = interaction_eigh(
        w, v, bo.Directions(u, p), n, which=which, basis=basis[0] if basis else None, method=method, tol=1e-12
    )
    dvalues, dvectors = torch.randn_like(pairs.values), torch.randn_like(pairs.vectors)
    got = torch.autograd.grad([pairs.values, pairs.vectors], tensors, [dvalues, dvectors])
    values, vectors, _ = expected(matrices(w, v, u @ p, *basis), n, which)
    signs = (vectors * pairs.vectors).sum(2, keepdim=True).detach().sign()
    exact = torch.autograd.grad([values, signs * vectors], tensors, [dvalues, dvectors])
    for a, b in zip(got, exact, strict=True):
        assert (a - b).norm() <= 1e-9 * b.norm()


def test_gradient_under_autocast_is_not_cast():
    """Products in bfloat16 would never reach the solver's accuracy."""
    w, v, c = (t.float().requires_grad_() for t in layer(6, 9, 2))
    loss = interaction_eigh(w, v, c).vectors.pow(3).sum()
    with torch.autocast("cpu", torch.bfloat16):
        loss.backward()
    assert w.grad.isfinite().all()


def test_no_eigenpairs_have_no_gradient():
    w, v, c = (t.requires_grad_() for t in layer(6, 9, 2))
    interaction_eigh(w, v, c, 0).vectors.sum().backward()
    assert not w.grad.any()


def test_gradient_of_the_span_of_equal_eigenvalues():
    """A loss of the span alone: what autograd through the dense decomposition makes infinite."""
    w = torch.eye(6, dtype=torch.float64).requires_grad_()
    values = torch.tensor([[3.0, 3.0, 2.0, 1.0, 0.5, 0.1]], dtype=torch.float64)
    direction = randn(6, 6, dtype=torch.float64)
    shift = 1e-5

    def loss(w):
        vectors = interaction_eigh(w, w, values, 2).vectors[0]
        return ((vectors.t() @ vectors) * direction).sum()

    (gradient,) = torch.autograd.grad(loss(w), w)
    step = randn(6, 6, dtype=torch.float64)
    numeric = (loss(w.detach() + shift * step) - loss(w.detach() - shift * step)) / (2 * shift)
    torch.testing.assert_close((gradient * step).sum(), numeric, rtol=1e-6, atol=1e-8)


def test_gradient_that_does_not_exist_raises():
    w = torch.eye(5, dtype=torch.float64).requires_grad_()
    vectors = interaction_eigh(w, w, torch.ones(1, 5).double(), 2).vectors
    with pytest.raises(RuntimeError, match="nearly equals one found"):
        vectors.sum().backward()


def test_second_derivatives_are_refused():
    w, v, c = layer(5, 4, 2, grad=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(interaction_eigh(w, v, c, 2).values.sum(), w, create_graph=True)


def test_errors():
    w, v, c = layer(5, 4, 2)
    for options, message in (
        ({"which": "largest"}, "which must be one of abs"),
        ({"method": "qr"}, "method must be one of auto"),
        ({"n": 6}, "n must be from 0 to 5"),
        ({"n": -1}, "n must be from 0 to 5"),
        ({"n": 3, "which": "both"}, "n must be from 0 to 2"),
        ({"tol": 0.0}, "tol must be positive"),
        ({"tol": float("nan")}, "tol must be a number, got nan"),
        ({"chunk_bytes": 0}, "chunk_bytes must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            interaction_eigh(w, v, c, **options)
    with pytest.raises(RuntimeError, match=r"c must have shape \[K, h=4\]"):
        interaction_eigh(w, v, c[:, :3])
    with pytest.raises(RuntimeError, match=r"basis must have shape \[d=5, F\]"):
        interaction_eigh(w, v, c, basis=w)
    with pytest.raises(TypeError, match="w must be a torch.Tensor"):
        interaction_eigh(None, v, c)
    for n, kind in ((2.0, "float"), (True, "bool")):
        with pytest.raises(TypeError, match=f"n must be an int, got {kind}"):
            interaction_eigh(w, v, c, n)


@pytest.mark.parametrize("method", ["auto", "dense", "iterative"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("h", "d"), [(4, 5), (80, 90), (6, 90), (200, 300)])
def test_what_is_not_finite_stays_with_its_direction(h, d, method, bad):
    w, v, c = layer(d, h, 3)
    whole = interaction_eigh(w, v, c, 2, method=method)
    c[1, 2] = bad
    pairs = interaction_eigh(w, v, c, 2, method=method)
    assert pairs.converged.tolist() == [True, False, True]
    assert pairs.values[1].isnan().all() and pairs.vectors[1].isnan().all() and pairs.next_abs[1].isnan()
    torch.testing.assert_close(
        pairs.values[::2], whole.values[::2], rtol=0, atol=1e-6 * whole.values.abs().max().item()
    )
    w[3, 4] = bad
    assert not interaction_eigh(w, v, c, 2, method=method).converged.any()
