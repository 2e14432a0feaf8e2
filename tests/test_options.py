"""Numbers that are options: the same kinds are taken and refused everywhere; and sizes of zero."""

from functools import partial

import numpy as np
import pytest
import torch

import bilinear_ops as bo
from bilinear_ops.composite.rank1 import sparse
from bilinear_ops.testing import gradients, randn

X, W, V, C = randn(5, 4), randn(6, 4), randn(6, 4), randn(3, 6)
READ, WRITE, GATES = randn(4, 6), randn(6, 2), torch.rand(5, 6)
INTEGERS = {
    "topk n": lambda n: bo.interaction_topk(W, V, C, n),
    "unpack_symmetric d": lambda n: bo.unpack_symmetric(randn(2, 3), n),
    "chunk_bytes": lambda n: list(bo.iter_interaction_matrices(W, V, C, chunk_bytes=n + 10_000 if n == 2 else n)),
    "stochastic_mask samples": lambda n: bo.stochastic_mask(GATES, samples=n, seed=1),
    "stochastic_mask seed": lambda n: bo.stochastic_mask(GATES, seed=n),
    "stochastic_mask stream": lambda n: bo.stochastic_mask(GATES, seed=1, stream=n),
    "stochastic_delta samples": lambda n: bo.stochastic_delta((3,), samples=n, seed=1),
    "stochastic_delta stream": lambda n: bo.stochastic_delta((3,), seed=1, stream=n),
    "subset_routing sites": lambda n: bo.subset_routing(n, (3,), seed=1),
    "subset_routing stream": lambda n: bo.subset_routing(2, (3,), seed=1, stream=n),
    "stochastic_rank1_linear samples": lambda n: bo.stochastic_rank1_linear(X, READ, WRITE, GATES, samples=n, seed=1),
    "stochastic_rank1_linear stream": lambda n: bo.stochastic_rank1_linear(X, READ, WRITE, GATES, seed=1, stream=n),
    "stochastic_gated_mlp stream": lambda n: bo.stochastic_gated_mlp(X, W, V, C, GATES, seed=1, stream=n),
}
NUMBERS = {
    "pnorm": lambda n: bo.importance_minimality(GATES, pnorm=n),
    "eps": lambda n: bo.importance_minimality(GATES, pnorm=0.5, eps=n),
    "gamma": lambda n: bo.smooth_l0(GATES, gamma=n),
    "scale": lambda n: bo.frequency_penalty(GATES[0], scale=n),
    "lower alpha": lambda n: bo.lower_leaky_hard_sigmoid(GATES, n),
    "upper alpha": lambda n: bo.upper_leaky_hard_sigmoid(GATES, n),
}


@pytest.mark.parametrize("call", INTEGERS.values(), ids=INTEGERS)
def test_integers(call):
    call(2)
    call(np.int64(2))
    for wrong in (2.5, 2.0, float("nan"), True, np.float32(2), np.bool_(True), "2"):
        name = type(wrong).__name__
        with pytest.raises(TypeError, match=f"must be an int.*, got {name}"):
            call(wrong)


def test_symbolic_integers():
    """A size that torch.compile keeps symbolic."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def top(w, v, c, x):
        return bo.interaction_topk(w, v, c, x.shape[0]).values

    for n in (2, 3, 4, 5):
        assert torch.equal(top(W, V, C, X[:n]), bo.interaction_topk(W, V, C, n).values)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("call", NUMBERS.values(), ids=NUMBERS)
def test_numbers(call):
    torch.testing.assert_close(call(np.float32(0.5)), call(0.5))
    torch.testing.assert_close(call(torch.tensor(0.5)), call(0.5))
    for wrong in (True, None, "1", 1j, torch.tensor(1)):
        with pytest.raises(TypeError, match="must be a"):
            call(wrong)
    with pytest.raises(ValueError, match="must be a number, got nan"):
        call(float("nan"))
    with pytest.raises(RuntimeError, match=r"must be a number or have shape \[\], got \[2\]"):
        call(torch.ones(2))


def test_a_threshold_is_above_zero():
    with pytest.raises(ValueError, match="gamma must be above 0, got 0"):
        bo.smooth_l0(GATES, gamma=0)


def assert_as_the_reference(f, tensors):
    dy = torch.randn_like(f(bo.reference, *tensors))
    for got, expected in zip(*(gradients(partial(f, m), tensors, dy) for m in (bo, bo.reference)), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("reduce", ("sum", "cumsum", "none"))
@pytest.mark.parametrize(("r", "d"), [(0, 4), (3, 0), (0, 0)])
def test_eigen_form_of_pairs_with_nothing_in_them(r, d, reduce):
    pairs = torch.tensor([0, 1, 1]), torch.tensor([1, 0, 0])
    tensors = [randn(2, d), randn(2, r), randn(2, r, d)]
    assert_as_the_reference(lambda m, *t: m.eigen_form(*t, pairs=pairs, reduce=reduce), tensors)


@pytest.mark.parametrize(("d_in", "d_out"), [(0, 3), (4, 0), (0, 0)])
def test_rank1_sparse_without_inputs_or_outputs(d_in, d_out, monkeypatch):
    """Rows gathered, in the forward pass and in backward."""
    monkeypatch.setattr(sparse, "GATHER_COST", 0)
    monkeypatch.setattr(sparse, "COPY_COST", 0)
    indices = torch.tensor([[0, 2], [1, 1], [2, 0]])
    tensors = [randn(3, d_in), randn(d_in, 4), randn(4, d_out), torch.rand(3, 2)]
    assert_as_the_reference(lambda m, x, r, w, g: m.rank1_sparse(x, r, w, indices, g), tensors)
