"""Pickles of earlier versions load, although the modules that they name have moved."""

import gzip
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import bilinear_ops as bo
from bilinear_ops import analysis

# {type name: object} by pickle protocol 2, written at commit 42169b0, when results lived in `analysis.directions`,
# `analysis.layers`, `analysis.spectra` and `reference.interaction`.
FILE = Path(__file__).parent / "data" / "pickles.pkl.gz"
HOMES = {
    analysis: """
        BiasTerms CPDecomposition EigenPairs EvenOdd HOSVD QuadraticLayer Reexpression StrongestDirections
        TruncationCorrelation VirtualLayer
    """,
    bo: "ActiveInteractions Directions InteractionMoments TopInteractions",
    bo.nn: "GatedBilinear GatedMLP Rank1Embedding Rank1Linear",
}


@pytest.fixture(scope="module")
def loaded():
    return pickle.loads(gzip.decompress(FILE.read_bytes()))


def test_a_fresh_process_loads_them():
    """Where nothing of the package has been imported before."""
    code = """
        import gzip, pickle, sys

        for name, found in pickle.loads(gzip.decompress(open(sys.argv[1], "rb").read())).items():
            print(name, type(found).__name__)
    """
    env = {**os.environ, "PYTHONPATH": str(Path(bo.__file__).parents[1])}
    command = [sys.executable, "-c", textwrap.dedent(code), str(FILE)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert sorted(name for name, _ in lines) == sorted(" ".join(HOMES.values()).split())
    assert all(name == kind for name, kind in lines)


def test_types_are_those_of_today(loaded):
    for home, names in HOMES.items():
        for name in names.split():
            assert type(loaded[name]) is getattr(home, name)


def test_results_are_those_of_today(loaded):
    layer = loaded["BiasTerms"].interaction
    w, v, p = layer
    for name, again in {
        "BiasTerms": analysis.bias_terms(*layer),
        "EigenPairs": analysis.interaction_eigh(*layer, 1),
        "HOSVD": analysis.hosvd(*layer, 1),
        "CPDecomposition": analysis.cp_decompose(*layer, 1, steps=1),
        "QuadraticLayer": analysis.truncate(*layer, 1),
        "Reexpression": analysis.reexpress(*layer, torch.eye(2)),
        "StrongestDirections": analysis.strongest_directions(*layer, 1),
        "VirtualLayer": analysis.virtual_interactions(layer, layer),
        "Directions": bo.Directions(torch.eye(2), p),
        "InteractionMoments": bo.interaction_moments(*layer),
        "TopInteractions": bo.interaction_topk(*layer, 1),
    }.items():
        torch.testing.assert_close(loaded[name]._asdict(), again._asdict(), rtol=1e-5, atol=1e-5)


def test_modules_compute(loaded):
    x = torch.randn(5, 2)
    gated, mlp = loaded["GatedBilinear"], loaded["GatedMLP"]
    torch.testing.assert_close(gated(x), bo.reference.gated_bilinear(x, gated.w, gated.v, gated.b_w, gated.b_v))
    weights = mlp.w, mlp.v, mlp.p
    torch.testing.assert_close(mlp(x), bo.reference.gated_mlp(x, *weights, activation="swish", beta=0.5))
    linear, embedding = loaded["Rank1Linear"], loaded["Rank1Embedding"]
    torch.testing.assert_close(linear(x, delta=torch.ones(5)), x @ linear.target.t())
    torch.testing.assert_close(embedding(torch.arange(3)), embedding.read @ embedding.write)
