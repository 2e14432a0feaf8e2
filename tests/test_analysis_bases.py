"""Decompositions in a basis of features are those of the layer with the basis folded into its weights."""

import pytest
import torch
from analysis_inputs import close, doubles, layer, tensor

import bilinear_ops as bo
from bilinear_ops import analysis
from bilinear_ops.analysis.bases import fold

FEATURES = [1, 3, 5, 12]  # fewer than, as many as, and more than the five dimensions


def folded(features, grad=False):
    """A layer, a basis, and the layer of features."""
    w, v, p = layer(5, 8, 4, grad=grad)
    (basis,) = doubles((5, features), grad=grad)
    return (w, v, p), basis, (w @ basis, v @ basis, p)


@pytest.mark.parametrize("features", FEATURES)
def test_fold_keeps_inner_products(features):
    rows, basis = doubles((7, 5), (5, features))
    lift, (inside,) = fold(basis, rows)
    expected = rows @ basis
    assert inside.shape[1] == min(5, features)
    close(inside @ inside.t(), expected @ expected.t())
    close(inside if lift is None else inside @ lift.t(), expected)
    assert fold(None, rows) == (None, (rows,))


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("directions", [False, True])
@pytest.mark.parametrize("refit", [False, True])
def test_truncate(features, directions, refit):
    whole, basis, inside = folded(features)
    u = doubles((4, 4))[0] if directions else None
    n = min(2, features)
    found = analysis.truncate(*whole, n, directions=u, refit=refit, basis=basis)
    expected = analysis.truncate(*inside, n, directions=u, refit=refit)
    f = doubles((6, features))[0]
    assert found.vectors.shape[-1] == features
    close(found(f), expected(f), 1e-8)
    everything = analysis.truncate(*whole, features, directions=u, basis=basis)
    close(everything(f), bo.gated_mlp(f @ basis.t(), *whole), 1e-8)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("mode", ["output", "input"])
def test_hosvd(features, mode):
    whole, basis, inside = folded(features)
    rank = min(3, features)
    found = analysis.hosvd(*whole, rank, mode=mode, basis=basis)
    b = tensor(*inside)
    flat = b.flatten(1) if mode == "output" else b.transpose(0, 1).flatten(1)
    u, s, _ = torch.linalg.svd(flat, full_matrices=False)
    kept = min(rank, len(s))
    close(found.S[:kept], s[:kept], 1e-6)
    close((found.U * found.S) @ found.U.t(), (u[:, :rank] * s[:rank]) @ u[:, :rank].t(), 1e-6)
    close(found.norm, b.norm())
    assert (found.U.gather(0, found.U.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("measure", ["frobenius", "gaussian"])
def test_layer_similarity(features, measure):
    first, basis, inside = folded(features)
    second, _, _ = folded(features)
    of_second = second[0] @ basis, second[1] @ basis, second[2]
    affine = {}, {}
    if measure == "gaussian":
        l1, l2, c1 = doubles((4, 5), (4, 5), (4,))
        affine = (
            {"affine1": (l1, c1), "affine2": (l2, None)},
            {
                "affine1": (l1 @ basis, c1),
                "affine2": (l2 @ basis, None),
            },
        )
    found = analysis.layer_similarity(*first, *second, measure=measure, basis=basis, **affine[0])
    close(found, analysis.layer_similarity(*inside, *of_second, measure=measure, **affine[1]))
    assert (found - analysis.layer_similarity(*first, *second, measure=measure, **affine[0])).abs() > 1e-3


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("options", [{}, {"restarts": 2}, {"init": True}])
def test_cp_decompose(features, options):
    whole, basis, inside = folded(features)
    if options.get("init"):
        options = {"init": (inside[0][:2], inside[1][2:4])}
    found = analysis.cp_decompose(*whole, 2, basis=basis, **options)
    expected = analysis.cp_decompose(*inside, 2, **options)
    assert found.w.shape == found.v.shape == (2, features)
    close(found.errors, expected.errors, 1e-6)
    close(tensor(*found[:3]), tensor(*expected[:3]), 1e-4)
    b = tensor(*inside)
    close((b - tensor(*found[:3])).norm() / b.norm(), found.errors[-1], 1e-6)


CALLS = {
    "truncate": lambda w, v, p, basis: analysis.truncate(w, v, p, 2, basis=basis),
    "hosvd": lambda w, v, p, basis: analysis.hosvd(w, v, p, 2, mode="input", basis=basis),
    "cp_decompose": lambda w, v, p, basis: analysis.cp_decompose(w, v, p, 2, basis=basis),
    "layer_similarity": lambda w, v, p, basis: analysis.layer_similarity(w, v, p, v, v, p, basis=basis),
}


@pytest.mark.parametrize("name", CALLS)
def test_bases_are_checked(name):
    w, v, p = layer(5, 8, 4)
    with pytest.raises(RuntimeError, match=r"basis must have shape \[d=5, F\], got \[6, 3\]"):
        CALLS[name](w, v, p, torch.ones(6, 3).double())
    with pytest.raises(RuntimeError, match="basis must have the dtype of w"):
        CALLS[name](w, v, p, torch.ones(5, 3))
    with pytest.raises(TypeError, match=r"basis must be a torch\.Tensor, got list"):
        CALLS[name](w, v, p, [1.0])


def test_ranks_are_limited_by_the_basis():
    whole, basis, _ = folded(3)
    with pytest.raises(ValueError, match="rank must be between 0 and 3 in input mode, got 4"):
        analysis.hosvd(*whole, 4, mode="input", basis=basis)
    with pytest.raises(ValueError, match='n must be from 0 to 3 for 3 dimensions and which="abs", got 4'):
        analysis.truncate(*whole, 4, basis=basis)


@pytest.mark.parametrize("features", [3, 12])
def test_gradients_reach_the_basis(features):
    whole, basis, _ = folded(features, grad=True)
    other = layer(5, 8, 4)
    assert torch.autograd.gradcheck(lambda b, *t: analysis.layer_similarity(*t, *other, basis=b), (basis, *whole))
    assert torch.autograd.gradcheck(
        lambda b, *t: analysis.hosvd(*t, 2, mode="input", basis=b).S, (basis, *whole), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("features", [3, 12])
def test_hosvd_of_weights_that_are_not_finite(features):
    whole, basis, _ = folded(features)
    found = analysis.hosvd(whole[0] * torch.nan, *whole[1:], 2, mode="input", basis=basis)
    assert found.U.shape == (features, 2) and all(t.isnan().all() for t in found)
    with pytest.raises(ValueError, match="basis must be finite"):
        analysis.cp_decompose(*whole, 2, basis=basis * torch.nan)
