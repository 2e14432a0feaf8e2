"""HOSVD against singular values of the tensor formed in full."""

import pytest
import torch
from analysis_inputs import close, doubles, layer, tensor

import bilinear_ops as bo
from bilinear_ops import analysis
from bilinear_ops.analysis import singular
from bilinear_ops.composite.limits import limits


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
    monkeypatch.setattr(limits, "gram_neurons", tile)
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


@pytest.mark.parametrize(("decades", "repeated"), [(3, True), (5, True), (3, False), (8, False)])
def test_hosvd_keeps_small_singular_values(decades, repeated):
    w, v, p = graded(16, 60, 12, decades)
    if repeated:
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
    monkeypatch.setattr(limits, "gram_neurons", 4)
    monkeypatch.setattr(singular, "CONDITION", condition)

    def invariant(w, v, p):
        found = analysis.hosvd(w, v, p, 2, mode=mode)
        return found.S, found.U @ found.U.t(), found.norm

    tensors = [t.requires_grad_() for t in graded(3, 5, 2, 1)]
    assert torch.autograd.gradcheck(invariant, tensors, fast_mode=True)


@pytest.mark.parametrize(("d", "h", "o"), [(0, 4, 3), (3, 0, 2), (3, 4, 0), (0, 0, 0)])
def test_empty_sizes(d, h, o):
    w, v, p = layer(d, h, o)
    for mode, most in (("output", min(o, h)), ("input", d)):
        for rank in {0, most}:
            found = analysis.hosvd(w, v, p, rank, mode=mode)
            assert found.U.shape == (o if mode == "output" else d, rank)
            assert not found.S.any() and found.norm == 0


def test_errors():
    w, v, p = layer(5, 8, 4)
    with pytest.raises(ValueError, match="mode must be one of output, input, got 'both'"):
        analysis.hosvd(w, v, p, 2, mode="both")
    for rank, mode, most in ((5, "output", 4), (-1, "output", 4), (6, "input", 5)):
        with pytest.raises(ValueError, match=f"rank must be between 0 and {most} in {mode} mode, got {rank}"):
            analysis.hosvd(w, v, p, rank, mode=mode)
    with pytest.raises(TypeError, match="rank must be an int, got float"):
        analysis.hosvd(w, v, p, 2.0)


@pytest.mark.parametrize("mode", ("output", "input"))
@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_weights_that_are_not_finite_give_nan(mode, bad):
    w, v, p = layer(4, 6, 5)
    v[2, 1] = bad
    found = analysis.hosvd(w, v, p, 3, mode=mode)
    assert [t.shape for t in found] == [t.shape for t in analysis.hosvd(w, w, p, 3, mode=mode)]
    assert all(t.isnan().all() for t in found)
