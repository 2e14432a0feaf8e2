"""Joint diagonalisation: planted bases are found, rotations never lose, results are the layer's own outputs."""

import pytest
import torch
from analysis_inputs import close, doubles, layer

import bilinear_ops as bo
from bilinear_ops import analysis
from bilinear_ops.analysis import joint


def planted(d, k, noise=0.0):
    """Matrices that share the eigenvectors z, as a layer, and z."""
    z = torch.linalg.qr(doubles((d, d))[0]).Q.t()
    values, rest_w, rest_v, rest_c = doubles((k, d), (d, d), (d, d), (k, d))
    return torch.cat([z, rest_w]), torch.cat([z, rest_v]), torch.cat([values, noise * rest_c], 1), z


@pytest.mark.parametrize("d", [1, 2, 5, 12])
def test_matrices_that_commute_are_diagonal(d):
    w, v, c, z = planted(d, 3)
    found = analysis.joint_diagonalise(w, v, c)
    close(found.share, torch.tensor(1.0).double())
    close((found.vectors @ z.t()).abs().amax(1), torch.ones(d).double(), 1e-9)
    q = bo.interaction_matrices(w, v, c)
    close(torch.einsum("ki,ia,ib->kab", found.values, found.vectors, found.vectors), q, 1e-9)


def test_repeated_eigenvalues_of_one_output_are_told_apart_by_others():
    w, v, c, z = planted(6, 2)
    c[0, :6] = 1  # the first matrix is the identity
    found = analysis.joint_diagonalise(w, v, c)
    close((found.vectors @ z.t()).abs().amax(1), torch.ones(6).double(), 1e-8)


def test_planted_vectors_are_found_in_noise():
    w, v, c, z = planted(8, 10, noise=0.02)
    found = analysis.joint_diagonalise(w, v, c)
    assert found.share < 0.9999
    assert ((found.vectors @ z.t()).abs().amax(1) > 0.99).all()


@pytest.mark.parametrize("d", [5, 6])
def test_any_layer(d):
    w, v, c = layer(d, 9, 4)
    vectors, values, share = analysis.joint_diagonalise(w, v, c)
    close(vectors @ vectors.t(), torch.eye(d).double())
    close(values, bo.gated_mlp(vectors, w, v, c).t())
    close(share, values.square().sum() / bo.interaction_matrices(w, v, c).square().sum())
    assert (values.square().sum(0).diff() <= 0).all()
    assert (vectors.gather(1, vectors.abs().argmax(1, keepdim=True)) > 0).all()
    for i in range(d):  # no plane's rotation gains
        for j in range(i):
            for angle in (0.02, -0.02, 0.5):
                turned = vectors.clone()
                s, co = torch.tensor(angle).sin(), torch.tensor(angle).cos()
                turned[i], turned[j] = co * vectors[i] + s * vectors[j], co * vectors[j] - s * vectors[i]
                assert bo.gated_mlp(turned, w, v, c).square().sum() <= values.square().sum() * (1 + 1e-9)


def test_sweeps_never_lose():
    w, v, c = layer(7, 20, 5)
    shares = [analysis.joint_diagonalise(w, v, c, sweeps=n, tol=0.0).share for n in range(8)]
    assert all(b >= a * (1 - 1e-14) for a, b in zip(shares, shares[1:], strict=False))
    assert shares[-1] > 1.02 * shares[0]


@pytest.mark.parametrize("d", range(6))
def test_rounds_are_all_pairs_once(d):
    rounds = joint._rounds(d, torch.device("cpu"))
    pairs = [tuple(sorted(p)) for a, b in rounds for p in zip(a.tolist(), b.tolist(), strict=True)]
    assert sorted(pairs) == [(i, j) for i in range(d) for j in range(i + 1, d)]
    assert all(len({*a.tolist(), *b.tolist()}) == 2 * len(a) for a, b in rounds)


def test_directions_and_dtypes():
    w, v, p = layer(5, 9, 4)
    u = doubles((3, 4))[0]
    expected = analysis.joint_diagonalise(w, v, u @ p)
    for got, exact in zip(analysis.joint_diagonalise(w, v, bo.Directions(u, p)), expected, strict=True):
        close(got, exact, 1e-9)
    assert {t.dtype for t in analysis.joint_diagonalise(w.bfloat16(), v.bfloat16(), p.bfloat16())} == {torch.float32}


@pytest.mark.parametrize(("d", "h", "k"), [(0, 4, 3), (3, 0, 2), (3, 4, 0)])
def test_empty(d, h, k):
    found = analysis.joint_diagonalise(*layer(d, h, k))
    assert found.vectors.shape == (d, d) and found.values.shape == (k, d) and found.share.isnan()


def test_errors():
    w, v, c = layer(5, 9, 4)
    for options in ({"sweeps": -1}, {"tol": -1.0}):
        with pytest.raises(ValueError, match="sweeps and tol must not be negative"):
            analysis.joint_diagonalise(w, v, c, **options)
    for name, bad in (("w", (w * torch.nan, v, c)), ("c", (w, v, c / 0))):
        with pytest.raises(ValueError, match=f"{name} must be finite"):
            analysis.joint_diagonalise(*bad)
    with pytest.raises(RuntimeError, match=r"c must have shape \[K, h=9\], got \[4, 8\]"):
        analysis.joint_diagonalise(w, v, c[:, :8])


def test_one_rotation_is_the_best_of_a_plane():
    w, v, c = layer(2, 9, 4)
    found = analysis.joint_diagonalise(w, v, c, sweeps=1)
    angle = torch.linspace(0, torch.pi, 20_001, dtype=torch.float64)
    turned = torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    best = bo.gated_mlp(turned, w, v, c).square().sum((1, 2)).max()
    close(found.values.square().sum(), best, 1e-7)
