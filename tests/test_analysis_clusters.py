"""Clusters find the blocks planted in a matrix."""

import itertools

import pytest
import torch

from bilinear_ops.analysis import interaction_clusters
from bilinear_ops.testing import randn


def planted(sizes):
    """A matrix whose rows come in blocks of these sizes, shuffled; the block of each row."""
    block = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[torch.randperm(sum(sizes))]
    strength = randn(len(sizes), len(sizes))
    noise = 0.05 * randn(len(block), len(block))
    return (strength + strength.mT)[block][:, block] + noise + noise.mT, block


def test_what_is_not_finite_has_no_clusters():
    q = torch.eye(3)
    q[0, 1] = torch.nan
    with pytest.raises(ValueError, match="q must be finite"):
        interaction_clusters(q, 2)


def test_clusters_lie_beside_what_they_resemble():
    """Cut finely, the groups of one coarse cluster are neighbours."""
    q, block = planted((4, 6, 5))
    order = [i for group in interaction_clusters(q, len(q)) for i in group]
    assert len(list(itertools.groupby(block[order].tolist()))) == 3


@pytest.mark.parametrize("sizes", [(1,), (3, 4), (2, 5, 1, 4)])
def test_planted_blocks_are_found(sizes):
    q, block = planted(sizes)
    groups = interaction_clusters(q, len(sizes))
    assert sorted(i for group in groups for i in group) == list(range(len(q)))
    assert len(groups) == len(sizes)
    assert all(len(set(block[group].tolist())) == 1 for group in groups), "no block is torn or mixed"


def test_errors():
    q = torch.eye(3)
    for clusters in (0, 4):
        with pytest.raises(ValueError, match=f"clusters must be from 1 to 3, got {clusters}"):
            interaction_clusters(q, clusters)
    with pytest.raises(TypeError, match="clusters must be an int, got float"):
        interaction_clusters(q, 2.0)
    with pytest.raises(RuntimeError, match="q must have shape"):
        interaction_clusters(q[:2], 2)
