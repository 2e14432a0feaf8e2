"""What the functions of `analysis` share."""

import pkgutil
from pathlib import Path

import numpy as np
import pytest
import torch
from analysis_inputs import close, layer

from bilinear_ops import analysis

HALF = (torch.bfloat16, torch.float16)


def test_every_module_has_a_test():
    rooms = [m.name for m in pkgutil.iter_modules(analysis.__path__)]
    assert len(rooms) == 21
    assert [m for m in rooms if not Path(__file__).with_name(f"test_analysis_{m}.py").exists()] == []


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
        lambda w, v, p: analysis.joint_diagonalise(w, v, p),
        lambda w, v, p: analysis.sparse_decompose(w, v, p, 3, steps=5, restarts=1),
    ):
        for got, expected in zip(fn(w, v, p), fn(*wide), strict=True):
            assert got.dtype == torch.float32
            close(got, expected.float(), 1e-6)


CALLS = {
    "hosvd": lambda w, v, p: analysis.hosvd(w, v, p, 2),
    "cp_decompose": lambda w, v, p: analysis.cp_decompose(w, v, p, 2),
    "reexpress": lambda w, v, p: analysis.reexpress(w, v, p, torch.eye(4).double()),
    "augment_biases": analysis.augment_biases,
    "bias_terms": analysis.bias_terms,
    "strongest_directions": lambda w, v, p: analysis.strongest_directions(w, v, p, 2),
    "best_quadratic": lambda w, v, p: analysis.best_quadratic(w, v, p, "silu"),
    "sparse_decompose": lambda w, v, p: analysis.sparse_decompose(w, v, p, 2, steps=1, restarts=1),
    "kept_strength": lambda w, v, p: analysis.kept_strength(torch.ones(3, 5).double(), w, v, p, "silu", p[0]),
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
        lambda: analysis.strongest_directions(*first, 2, activation="silu", radius=2.0),
        lambda: (analysis.kept_strength(first[0], *first, "silu", torch.ones(2)),),
        lambda: analysis.best_quadratic(*first, "silu"),
        lambda: analysis.explain(torch.ones(5), analysis.interaction_eigh(*first), 2),
        lambda: analysis.joint_diagonalise(*first),
        lambda: analysis.sparse_decompose(*first, 2, steps=2, restarts=1),
    )
    for call in calls:
        expected = call()
        with torch.autocast("cpu", torch.bfloat16):
            found = call()
        assert all(map(torch.equal, found, expected))


INTEGERS = {
    "hosvd": lambda w, v, p, n: analysis.hosvd(w, v, p, n),
    "cp_decompose": lambda w, v, p, n: analysis.cp_decompose(w, v, p, n, steps=n, inner_steps=n, restarts=n),
    "interaction_eigh": lambda w, v, p, n: analysis.interaction_eigh(w, v, p, n, chunk_bytes=n),
    "truncate": lambda w, v, p, n: analysis.truncate(w, v, p, n),
    "strongest_directions": lambda w, v, p, n: analysis.strongest_directions(w, v, p, n, steps=n),
    "interaction_clusters": lambda w, v, p, n: analysis.interaction_clusters(w.t() @ w, n),
    "joint_diagonalise": lambda w, v, p, n: analysis.joint_diagonalise(w, v, p, sweeps=n),
    "sparse_decompose": lambda w, v, p, n: analysis.sparse_decompose(w, v, p, n, steps=n, restarts=n),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_of_any_kind_and_nothing_else(name):
    inputs = layer(5, 8, 4)
    expected, found = (INTEGERS[name](*inputs, n) for n in (2, np.int64(2)))
    if name == "interaction_clusters":
        assert found == expected
    else:
        assert all(a is b or torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for bad in (2.0, np.float64(2), float("nan"), True, "2"):
        with pytest.raises(TypeError, match="must be an int, got"):
            INTEGERS[name](*inputs, bad)
