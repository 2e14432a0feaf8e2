"""CP: every step against dense least squares, its descent, its start and its end."""

import pytest
import torch
from analysis_inputs import close, doubles, layer, tensor

from bilinear_ops import analysis
from bilinear_ops.analysis import cp


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


@pytest.mark.parametrize(("d", "h", "o"), [(0, 4, 3), (3, 0, 2), (3, 4, 0), (0, 0, 0)])
def test_empty_sizes(d, h, o):
    for rank in {0, h}:
        found = analysis.cp_decompose(*layer(d, h, o), rank)
        assert [t.shape for t in found[:3]] == [(rank, d), (rank, d), (o, rank)]
        assert found.errors.isnan().all()


def test_errors():
    w, v, p = layer(5, 8, 4)
    with pytest.raises(ValueError, match="rank must be between 0 and h=8, got 9"):
        analysis.cp_decompose(w, v, p, 9)
    with pytest.raises(ValueError, match="rank must be 3, the rows of init, got 2"):
        analysis.cp_decompose(w, v, p, 2, init=(w[:3], v[:3]))
    with pytest.raises(RuntimeError, match=r"v0 must have shape \[r=3, d=5\], got \[2, 5\]"):
        analysis.cp_decompose(w, v, p, 3, init=(w[:3], v[:2]))
    with pytest.raises(TypeError, match="rank must be an int, got float"):
        analysis.cp_decompose(w, v, p, 2.0)
    with pytest.raises(ValueError, match="must not be negative, got -1, 10, 0 and"):
        analysis.cp_decompose(w, v, p, 2, steps=-1)


def test_restarts_keep_the_best():
    better = 0
    for seed in range(3):
        torch.manual_seed(seed)
        w, v, p = layer(6, 14, 6)
        fits = [analysis.cp_decompose(w, v, p, 3, restarts=n) for n in (0, 2, 2, 4)]
        assert torch.equal(fits[1].w, fits[2].w), "the same in every call"
        errors = [fit.errors[-1] for fit in fits]
        assert errors == sorted(errors, reverse=True)
        better += int(errors[3] < 0.999 * errors[0])
        b = tensor(w, v, p)
        close((b - tensor(*fits[3][:3])).norm() / b.norm(), errors[3], 1e-7)
    assert better


def test_restarts_pass_over_dead_neurons():
    w, v, p = layer(6, 12, 5)
    p[:, 4:] = 0
    a, _ = cp._random_neurons(w, v, p, 4, 0)
    assert sorted(a[:, 0].tolist()) == sorted(w[:4, 0].tolist())


def test_what_cannot_be_fitted_is_refused():
    w, v, p = layer(6, 12, 5)
    with pytest.raises(ValueError, match="v must be finite"):
        analysis.cp_decompose(w, torch.nan * v, p, 2)
    with pytest.raises(ValueError, match="tol must be a number, got nan"):
        analysis.cp_decompose(w, v, p, 2, tol=float("nan"))
    with pytest.raises(ValueError, match="must not be negative, got 100, 10, -1"):
        analysis.cp_decompose(w, v, p, 2, restarts=-1)
    with pytest.raises(ValueError, match="rank must be at most h=12 with restarts, got 13"):
        analysis.cp_decompose(w, v, p, 13, init=doubles((13, 6), (13, 6)), restarts=1)
    for restarts in (1.0, True, float("nan")):
        with pytest.raises(TypeError, match="restarts must be an int"):
            analysis.cp_decompose(w, v, p, 2, restarts=restarts)
