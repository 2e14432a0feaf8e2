"""Ops on DTensors: values and all gradients are those of one process, and nothing is sent."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from distributed_harness import DTYPES, R, agree, case, line, on, randn
from torch.distributed.tensor import Partial, Shard
from torch.testing import assert_close

import bilinear_ops as bo


@case(2, 4)
def gated_layers():
    """Sharded over hidden units, each of the tokens' dimensions and outputs; sizes that no world divides."""
    mesh = line()
    for dtype in DTYPES:
        x = randn(3, 5, 7, dtype=dtype)
        w, v, p = randn(9, 7, dtype=dtype), randn(9, 7, dtype=dtype), randn(6, 9, dtype=dtype)
        b_w, b_v, b_p = randn(9, dtype=dtype), randn(9, dtype=dtype), randn(6, dtype=dtype)
        beta = torch.tensor(1.3, dtype=dtype)

        def mlp(x, w, v, p, b_w, b_v, b_p, beta, **options):
            return bo.gated_mlp(x, w, v, p, b_w, b_v, b_p, activation="swish", beta=beta, **options)

        tensors = (x, w, v, p, b_w, b_v, b_p, beta)
        for recompute in (False, True):
            options = {"recompute": recompute}
            hidden = (R, Shard(0), Shard(0), Shard(1), Shard(0), Shard(0), R, R)
            agree(mesh, mlp, tensors, hidden, Partial(), options)
        for dim in (0, 1):
            agree(mesh, mlp, tensors, (Shard(dim), *[R] * 7), Shard(dim))

        def masked(x, w, v, p, mask):
            return bo.gated_mlp(x, w, v, p, mask=mask)

        agree(mesh, masked, (x, w, v, p, b_w), (R, Shard(0), Shard(0), Shard(1), Shard(0)), Partial())
        agree(mesh, mlp, tensors, (R, R, R, Shard(0), R, R, Shard(0), R), Shard(2))
        agree(mesh, bo.gated_bilinear, (x, w, v), (R, Shard(0), Shard(0)), Shard(2))
        agree(mesh, bo.gated_bilinear, (x, w, v), (Shard(1), R, R), Shard(1))


@case(2, 4)
def interactions():
    """Matrices and what is read off them, over directions (fewer than some worlds divide) and over hidden units."""
    mesh = line()
    for dtype in DTYPES:
        w, v, c, x = (
            randn(9, 7, dtype=dtype),
            randn(9, 7, dtype=dtype),
            randn(6, 9, dtype=dtype),
            randn(4, 7, dtype=dtype),
        )
        u, basis = randn(6, 3, dtype=dtype), randn(7, 5, dtype=dtype)
        k, i, j = torch.tensor([[0, 5, 5], [1, 6, 0], [1, 2, 3]])

        def low_rank(w, v, u, p):
            return bo.interaction_matrices(w, v, bo.Directions(u, p), layout="packed")

        directions, hidden = (R, R, Shard(0)), (Shard(0), Shard(0), Shard(1))
        for function in (bo.interaction_matrices, bo.interaction_diagonal):
            agree(mesh, function, (w, v, c), directions, Shard(0))
            agree(mesh, function, (w, v, c), hidden, Partial())
        agree(mesh, bo.interaction_entries, (w, v, c, k, i, j), (*hidden, R, R, R), Partial())
        agree(mesh, bo.interaction_entries, (w, v, c, k, i, j), (R, R, R, *[Shard(0)] * 3), Shard(0))
        agree(mesh, low_rank, (w, v, u, c[:3]), (R, R, Shard(0), R), Shard(0))
        agree(mesh, low_rank, (w, v, u, c[:3]), (Shard(0), Shard(0), R, Shard(1)), Partial())
        agree(mesh, low_rank, (w, v, u, c[:3]), (R, R, Shard(1), Shard(0)), Partial())
        q = bo.interaction_matrices(w, v, c)
        packed = bo.pack_symmetric(q)
        agree(mesh, bo.pack_symmetric, (q,), (Shard(0),), Shard(0))
        agree(mesh, partial(bo.unpack_symmetric, d=7), (packed,), (Shard(0),), Shard(0))
        agree(mesh, bo.quadratic_form, (x, q), (R, Shard(0)), Shard(1))
        agree(mesh, bo.quadratic_form, (x, q), (Shard(0), R), Shard(0))
        values, vectors = randn(6, 3, dtype=dtype), randn(6, 3, 7, dtype=dtype)
        for reduce in ("sum", "cumsum", "none"):
            form = partial(bo.eigen_form, reduce=reduce)
            agree(mesh, form, (x, values, vectors), (R, Shard(0), Shard(0)), Shard(1))
            agree(mesh, form, (x[:, None], values, vectors), (Shard(0), R, R), Shard(0))

            def pairs(x, values, vectors, t, k, form=form):
                return form(x, values, vectors, pairs=(t, k))

            agree(mesh, pairs, (x, values, vectors, i % 4, k), (R, R, R, Shard(0), Shard(0)), Shard(0))
        agree(mesh, bo.neuron_gram, (w, v, w[:5] + 1, v[:5]), (R, R, Shard(0), Shard(0)), Shard(1))
        layers = (w, v, c, w[:5] + 1, v[:5], c[:, :5])
        agree(mesh, bo.layer_inner, layers, (Shard(0), Shard(0), Shard(1), R, R, R), Partial())
        diagonal = bo.interaction_diagonal(
            on(mesh, w, R), on(mesh, v, R), on(mesh, c, Shard(0)), basis=on(mesh, basis, R)
        )
        assert_close(diagonal.full_tensor(), bo.interaction_diagonal(w, v, c, basis=basis))


def rank1_inputs(dtype):
    x, read, write = randn(3, 5, 7, dtype=dtype), randn(7, 9, dtype=dtype), randn(9, 6, dtype=dtype)
    gates, bias, weight = randn(3, 5, 9, dtype=dtype).sigmoid(), randn(6, dtype=dtype), randn(6, 7, dtype=dtype)
    return x, read, write, gates, bias, weight


@case(2, 4)
def rank1():
    """Subcomponents sharded over components, tokens and outputs, with everything that enters once beside them."""
    mesh = line()
    for dtype in DTYPES:
        x, read, write, gates, bias, weight = tensors = rank1_inputs(dtype)
        delta, routing = randn(3, 5, dtype=dtype).sigmoid(), randn(3, 5) > -0.5

        def linear(x, read, write, mask, bias, weight, delta, routing):
            return bo.rank1_linear(x, read, write, mask, bias, weight=weight, delta=delta, routing=routing)

        components = (R, Shard(1), Shard(0), Shard(2), R, R)
        agree(mesh, linear, (*tensors, delta, routing), (*components, R, R), Partial())
        agree(mesh, linear, (*tensors, delta, routing), (Shard(1), R, R, Shard(1), R, R, Shard(1), Shard(1)), Shard(1))
        outputs = (R, R, Shard(1), R, Shard(0), Shard(0), R, R)
        agree(mesh, linear, (*tensors, delta, routing), outputs, Shard(2))
        hidden = [randn(9, 4, dtype=dtype) for _ in range(3)]
        logits = (gates, *hidden, gates[0, 0])
        agree(mesh, bo.component_gates, logits, (Shard(2), *[Shard(0)] * 4), Shard(2))
        agree(mesh, bo.component_gates, logits, (Shard(1), *[R] * 4), Shard(1))
        few, on_few = gates[..., :3], torch.randint(0, 9, (3, 5, 3))
        agree(
            mesh,
            lambda x, read, write, i, g, b: bo.rank1_sparse(x, read, write, i, g, b),
            (x, read, write, on_few, few, bias),
            (Shard(0), R, R, Shard(0), Shard(0), R),
            Shard(0),
        )
        accumulate = (gates, read, write, weight)
        agree(
            mesh,
            lambda gates, read, write, base: bo.rank1_accumulate(gates, read, write, base=base),
            accumulate,
            (Shard(2), Shard(1), Shard(0), R),
            Partial(),
        )
        agree(mesh, bo.faithfulness_loss, (weight, read, write), (Shard(0), R, Shard(1)), Partial())
        agree(mesh, bo.faithfulness_loss, (weight, read, write), (Shard(1), Shard(0), R), Partial())


@case(2, 4)
def masks():
    """Draws depend on global rows and columns alone: masks to the bit, whatever is sharded and wherever it is cut."""
    mesh = line()
    for dtype in DTYPES:
        x, read, write, gates, bias, weight = tensors = rank1_inputs(dtype)
        for sampling in ("continuous", "binomial"):
            options = {"samples": 2, "seed": 5, "sampling": sampling}
            whole = bo.stochastic_mask(gates, **options)
            for dim in range(3):
                part = bo.stochastic_mask(on(mesh, gates, Shard(dim)), **options)
                assert part.placements == (Shard(dim + 1),) and torch.equal(part.full_tensor(), whole)

            def layer(x, read, write, gates, bias, weight, options=options):
                return bo.stochastic_rank1_linear(
                    x, read, write, gates, bias, weight=weight, delta="uniform", **options
                )

            agree(mesh, layer, tensors, (R, Shard(1), Shard(0), Shard(2), R, R), Partial())
            agree(mesh, layer, tensors, (Shard(1), R, R, Shard(1), R, R), Shard(2))
            agree(mesh, layer, tensors, (Shard(0), R, R, Shard(0), R, R), Shard(1))

            def gated(x, w, v, p, gates, b_p, target, options=options):
                return bo.stochastic_gated_mlp(
                    x, w, v, p, gates, b_p=b_p, target=target, delta="uniform", activation="silu", **options
                )

            target = randn(3, 5, 6, dtype=dtype)
            gate = (x, read.mT.contiguous(), randn(9, 7, dtype=dtype), write.mT.contiguous(), gates, bias, target)
            agree(mesh, gated, gate, (R, Shard(0), Shard(0), Shard(1), Shard(2), R, R), Partial())
            agree(mesh, gated, gate, (Shard(1), R, R, R, Shard(1), R, Shard(1)), Shard(2))
        seed = torch.tensor(5)  # plain and 0-dim, as a training loop has it
        part = bo.stochastic_mask(on(mesh, gates, Shard(1)), seed=seed)
        assert torch.equal(part.full_tensor(), bo.stochastic_mask(gates, seed=5))


@case(2, 4)
def refusals():
    """Placements without a rule, on every rank alike, before any work."""
    mesh = line()
    x, w, v, p = randn(3, 8), randn(12, 8), randn(12, 8), randn(8, 12)

    def refused(error, *placements, plain=()):
        tensors = [
            t if n in plain else on(mesh, t, placement)
            for n, (t, placement) in enumerate(zip((x, w, v, p), placements, strict=True))
        ]
        with pytest.raises(RuntimeError, match=error):
            bo.gated_mlp(*tensors)

    refused("w is S.1., over d; a rule exists for Replicate and for tokens, h, o", R, Shard(1), R, R)
    refused("w is sharded over h, v must be Shard.0. too", R, Shard(0), R, Shard(1))
    refused("it shards x over tokens and w over h", Shard(0), Shard(0), Shard(0), Shard(1))
    refused("x is a plain tensor beside the DTensor w: pass DTensor.from_local", R, R, R, R, plain=(0,))
    refused("mesh dimension tp: x is P", Partial(), R, R, R)
    sharded_c, group = on(mesh, randn(6, 12), Shard(0)), dist.group.WORLD
    for analyse in (bo.interaction_moments, bo.analysis.interaction_eigh, partial(bo.interaction_topk, n=2)):
        with pytest.raises(RuntimeError, match="group= deals plain tensors"):
            analyse(on(mesh, w, R), on(mesh, v, R), sharded_c, group=group)
    with pytest.raises(RuntimeError, match="iter_interaction_matrices cannot take these DTensors"):
        bo.iter_interaction_matrices(w, v, sharded_c, chunk_bytes=1 << 20)
    with pytest.raises(RuntimeError, match="v has 13 h, other tensors 12"):
        bo.gated_mlp(on(mesh, x, R), on(mesh, w, Shard(0)), on(mesh, randn(13, 8), Shard(0)), on(mesh, p, Shard(1)))
    slope = torch.ones(1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="beta is a plain tensor beside the DTensor x"):
        bo.gated_mlp(*(on(mesh, t, R) for t in (x, w, v, p)), activation="swish", beta=slope)
    with pytest.raises(RuntimeError, match="eigen_form: no sharding rule on mesh dimension tp: x is S.1."):
        bo.eigen_form(on(mesh, x, Shard(1)), on(mesh, randn(2, 3), R), on(mesh, randn(2, 3, 8), R))
