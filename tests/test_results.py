"""What results have in common: they move, detach, are saved and loaded, and stay named tuples."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from analysis_inputs import doubles, layer
from torch import Tensor

import bilinear_ops as bo
from bilinear_ops import analysis
from bilinear_ops.results import Result


def results():
    """One of each kind."""
    w, v, p = (t.requires_grad_() for t in layer(4, 6, 4))
    x = doubles((7, 4))[0]
    pairs = analysis.interaction_eigh(w, v, p, 2)
    index = torch.zeros(7, 1, dtype=torch.int64)
    return [
        bo.Directions(torch.eye(4).double(), p),
        bo.interaction_topk(w, v, p, 2),
        bo.interaction_moments(w, v, p),
        bo.active_interactions(w, v, p, torch.eye(4).double(), index, x[:, :1], index),
        pairs,
        analysis.truncate(w, v, p, 1),
        analysis.truncation_correlation(x, pairs, index, x[:, :1]),
        analysis.bias_terms(w, v, p, w[:, 0], v[:, 0], p[:, 0]),
        analysis.hosvd(w, v, p, 2),
        analysis.cp_decompose(w, v, p, 2, steps=1),
        analysis.strongest_directions(w, v, p, 1),
        analysis.virtual_interactions((w, v, p), (w, v, p)),
        analysis.reexpress(w, v, p, torch.eye(4).double()),
        analysis.best_quadratic(w, v, p, "gelu"),
        analysis.explain(x, pairs, 1, logits=x),
        analysis.joint_diagonalise(w, v, p),
        analysis.sparse_decompose(w, v, p, 2, steps=2, restarts=1),
        analysis.even_odd_split(lambda x: x @ w.t(), x),
    ]


def tensors(found):
    if isinstance(found, Tensor):
        return [found]
    return [t for part in found if part is not None for t in tensors(part)]


def test_every_public_result_is_tried():
    public = {t for home in (bo, analysis) for t in vars(home).values() if isinstance(t, type) and issubclass(t, tuple)}
    assert {type(r) for r in results()} == public


@pytest.mark.parametrize("found", results(), ids=lambda r: type(r).__name__)
def test_to_and_detach(found):
    assert isinstance(found, Result) and not hasattr(found, "__dict__")
    for moved in (found.to("meta", torch.float32), found.to(dtype=torch.float32).to(device="meta")):
        assert type(moved) is type(found) and moved._fields == found._fields
        for t, was in zip(tensors(moved), tensors(found), strict=True):
            assert t.is_meta and t.shape == was.shape
            assert t.dtype == (torch.float32 if was.is_floating_point() else was.dtype)
    free = found.detach()
    assert type(free) is type(found)
    assert not any(t.requires_grad for t in tensors(free))
    for t, was in zip(tensors(free), tensors(found), strict=True):
        torch.testing.assert_close(t, was, rtol=0, atol=0, equal_nan=True)


def test_a_graph_is_kept_by_to():
    w, v, p = layer(4, 6, 4, grad=True)
    found = analysis.interaction_eigh(w, v, p, 1).to(torch.float32)
    found.values.sum().backward()
    assert w.grad.abs().sum() > 0 and found.values.dtype == torch.float32 and found.converged.dtype == torch.bool


def test_a_fresh_process_loads_them_by_default(tmp_path):
    """`torch.load` refuses classes that nobody has declared safe; importing the package declares its results."""
    saved = [r.detach() for r in results()]
    torch.save(saved, tmp_path / "results.pt")
    code = """
        import sys, torch, bilinear_ops

        for found in torch.load(sys.argv[1]):
            print(type(found).__name__, len(found))
    """
    env = {**os.environ, "PYTHONPATH": str(Path(bo.__file__).parents[1])}
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "results.pt")]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{type(r).__name__} {len(r)}" for r in saved]


def test_trees_and_compiled_functions_know_them():
    found = bo.Directions(torch.ones(2, 3), torch.ones(3, 4))
    doubled = torch.utils._pytree.tree_map(lambda t: 2 * t, found)
    assert type(doubled) is bo.Directions and doubled.u[0, 0] == 2
    compiled = torch.compile(lambda c: bo.Directions(c.u, 2 * c.p), backend="eager", fullgraph=True)(found)
    assert type(compiled) is bo.Directions and compiled.p[0, 0] == 2
