"""What every rank of test_distributed.py runs: `python -m torch.distributed.run ... tests/distributed_worker.py DIR`.

A case compares sharded calls with the same call in this one process. Rank 0 writes the names of the cases that passed
to DIR; a case that fails ends its rank, and with it the launch.
"""

import copy
import datetime
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bilinear_ops as bo
from bilinear_ops.composite.limits import limits
from bilinear_ops.integrations.distributed import GatedParallel, parallel_plan

FOLDER = Path(sys.argv[1]) if __name__ == "__main__" else Path()
CASES = {}
FAILING = "failing"
DTYPES = (torch.float64, torch.float32)
R = Replicate()


def case(function):
    CASES[function.__name__] = function
    return function


class Counted(TorchDispatchMode):
    """Collectives, and the bytes of the whole tensors that they reduce, gather or scatter (V in docs/scale.md)."""

    def __init__(self):
        super().__init__()
        self.calls, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(t is DTensor for t in types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2].strip("_")
        if func.namespace in ("_c10d_functional", "c10d") and not name.startswith(("wait", "wrap")):
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            self.calls[name] += 1
            self.bytes[name] += max(t.numel() * t.itemsize for t in tensors)
        return out


def on(mesh, t, *placements):
    """A DTensor from what every rank has whole."""
    return distribute_tensor(t, mesh, placements, src_data_rank=None)


def agree(mesh, function, tensors, placements, expected, options=None):
    """Values and all gradients of a call on DTensors equal those on plain tensors, without a single collective."""
    options = options or {}
    whole = [t.clone().requires_grad_(t.is_floating_point()) for t in tensors]
    y = function(*whole, **options)
    parts = [
        on(mesh, t.detach(), placement).requires_grad_(t.is_floating_point())
        for t, placement in zip(tensors, placements, strict=True)
    ]
    with Counted() as counted:
        out = function(*parts, **options)
        assert out.placements == (expected,), out.placements
        gradient = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(3))
        placement = R if expected.is_partial() else expected
        out.backward(on(mesh, gradient, placement))
    assert not counted.calls, counted.calls
    y.backward(gradient)
    assert_close(out.full_tensor(), y)
    for part, t in zip(parts, whole, strict=True):
        if t.grad is not None:
            assert part.grad.shape == t.grad.shape
            assert_close(part.grad.full_tensor(), t.grad)


def randn(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


def line():
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))


@case
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


@case
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
        agree(mesh, bo.quadratic_form, (x, q), (R, Shard(0)), Shard(1))
        agree(mesh, bo.quadratic_form, (x, q), (Shard(0), R), Shard(0))
        agree(mesh, bo.neuron_gram, (w, v, w[:5] + 1, v[:5]), (R, R, Shard(0), Shard(0)), Shard(1))
        layers = (w, v, c, w[:5] + 1, v[:5], c[:, :5])
        agree(mesh, bo.layer_inner, layers, (Shard(0), Shard(0), Shard(1), R, R, R), Partial())
        diagonal = bo.interaction_diagonal(
            on(mesh, w, R), on(mesh, v, R), on(mesh, c, Shard(0)), basis=on(mesh, basis, R)
        )
        assert_close(diagonal.full_tensor(), bo.interaction_diagonal(w, v, c, basis=basis))


@case
def rankings():
    """Directions dealt to the ranks of a group: rankings to the bit, ties included, their gradients, and the rest."""
    group, world = dist.group.WORLD, dist.get_world_size()
    mesh = line()
    for dtype in DTYPES:
        w, v, c = (torch.randint(-2, 3, shape).to(dtype) for shape in ((9, 7), (9, 7), (6, 9)))
        u, p, basis = c[:, :3], c[:3], torch.randint(-1, 2, (7, 5)).to(dtype)
        weights = (
            None,
            randn(7, 7, dtype=dtype),
            randn(6, 7, 7, dtype=dtype),
            lambda k: torch.eye(7) * k + 1,
        )
        for scope in ("output", "global"):
            for score in ("cross", "self", "pair", "entry"):
                for weight in weights:
                    options = {"score": score, "scope": scope, "weight": weight}
                    with Counted() as counted:
                        mine = bo.interaction_topk(w, v, c, 6, **options, group=group)
                    item = 24 + c.itemsize  # a value and three indices; beside them a rank for the merge
                    padded = world * -(-6 // world)  # ranks hold as many directions, some of them void
                    expected = 6 * padded * item if scope == "output" else 6 * world * (item + c.itemsize)
                    assert set(counted.calls) == {"all_gather_into_tensor"} and counted.bytes.total() == expected
                    for one, other in zip(mine, bo.interaction_topk(w, v, c, 6, **options), strict=True):
                        assert torch.equal(one, other), (options, one, other)
            mine = bo.interaction_topk(w, v, bo.Directions(u, p), 4, scope=scope, basis=basis, group=group)
            alone = bo.interaction_topk(w, v, bo.Directions(u, p), 4, scope=scope, basis=basis)
            assert all(map(torch.equal, mine, alone))
            leaves = [[t.clone().requires_grad_() for t in (w, v, c)] for _ in range(2)]
            for (a, b, e), way in zip(leaves, (None, group), strict=True):
                bo.interaction_topk(a, b, e, 5, scope=scope, group=way).values.square().sum().backward()
            for one, other in zip(*leaves, strict=True):
                assert_close(one.grad, other.grad)
        sharded = bo.interaction_topk(on(mesh, w, R), on(mesh, v, R), on(mesh, c, Shard(0)), 3)
        assert sharded.k.placements == (Shard(0),)
        assert torch.equal(sharded.k.full_tensor(), bo.interaction_topk(w, v, c, 3).k)
        for one, other in zip(
            bo.interaction_moments(w, v, c, group=group), bo.interaction_moments(w, v, c), strict=True
        ):
            assert_close(one, other)
        w, v, c = randn(9, 7, dtype=dtype), randn(9, 7, dtype=dtype), randn(6, 9, dtype=dtype)
        for one, other in zip(
            bo.analysis.interaction_eigh(w, v, c, 3, group=group), bo.analysis.interaction_eigh(w, v, c, 3), strict=True
        ):
            assert_close(one, other, atol=1e-4, rtol=1e-4) if one.dtype == torch.float32 else assert_close(one, other)
        step = -(-6 // dist.get_world_size())
        seen = list(bo.iter_interaction_matrices(w, v, c, chunk_bytes=10**6, group=group))
        mine = [k for chunk, _ in seen for k in range(chunk.start, chunk.stop)]
        assert mine == list(range(6))[dist.get_rank() * step :][:step]
        for chunk, q in seen:
            assert_close(q, bo.interaction_matrices(w, v, c)[chunk])


@case
def resumable():
    """Chunks of directions dealt to the ranks: each is computed once, by one of them, and all are found in the end."""
    w, v, c = randn(9, 7), randn(9, 7), randn(7, 9)
    folder = FOLDER / f"run-{dist.get_world_size()}"
    computed, shown = [], []

    class Bar:
        def __init__(self, total, unit, disable):
            shown.append((total, unit, disable))

        def update(self, n=0):
            pass

        close = update

    def analyse(part):
        computed.append(part)
        return bo.interaction_moments(w, v, part)

    sys.modules["tqdm.auto"] = type("module", (), {"tqdm": Bar})
    for times in (1, 0):
        paths = bo.analysis.run_in_chunks(analyse, c, folder, chunk=2, group=dist.group.WORLD, progress=True)
        lengths = [None] * dist.get_world_size()
        dist.all_gather_object(lengths, len(computed))
        assert sum(lengths) == 4 * times and max(lengths) <= -(-4 // dist.get_world_size())
        assert shown.pop() == (len(computed), "chunk", dist.get_rank() > 0)
        computed.clear()
    for one, other in zip(bo.analysis.load_chunks(paths).values(), bo.interaction_moments(w, v, c), strict=True):
        assert_close(one, other)


def rank1_inputs(dtype):
    x, read, write = randn(3, 5, 7, dtype=dtype), randn(7, 9, dtype=dtype), randn(9, 6, dtype=dtype)
    gates, bias, weight = randn(3, 5, 9, dtype=dtype).sigmoid(), randn(6, dtype=dtype), randn(6, 7, dtype=dtype)
    return x, read, write, gates, bias, weight


@case
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


@case
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


def layers(dtype, **options):
    """Two equal layers, with biases; sizes that no world divides."""
    layer = bo.nn.GatedMLP(8, 10, 6, activation="swish", beta=1.3, bias=True, dtype=dtype, **options)
    return layer, copy.deepcopy(layer)


def compare_gradients(part, whole):
    for (name, one), other in zip(part.named_parameters(), whole.parameters(), strict=True):
        gradient = one.grad.full_tensor() if isinstance(one.grad, DTensor) else one.grad
        assert_close(gradient, other.grad, msg=lambda m, name=name: f"{name}: {m}")


def slab(t, dim=0):
    """This rank's share."""
    return t.chunk(dist.get_world_size(), dim)[dist.get_rank()].contiguous()


@case
def tensor_parallel():
    """`parallel_plan`: values, gradients, collectives and the bytes they take; uneven hidden units."""
    mesh, world = line(), dist.get_world_size()
    for dtype in DTYPES:
        for recompute in (False, True):
            part, whole = layers(dtype, recompute=recompute)
            parallelize_module(part, mesh, parallel_plan(part))
            x, gradient = randn(3, 4, 8, dtype=dtype), randn(3, 4, 6, dtype=dtype)
            a, b = (x.clone().requires_grad_() for _ in range(2))
            whole(a).backward(gradient)
            with Counted() as counted:
                y = part(b)
            assert counted.calls == {"all_reduce": 1}, counted.calls
            assert counted.bytes["all_reduce"] == y.numel() * y.itemsize, (counted.bytes, y.shape)
            with Counted() as counted:
                y.backward(gradient)
            assert counted.calls == {"all_reduce": 1}, counted.calls
            assert counted.bytes["all_reduce"] == x.numel() * x.itemsize, counted.bytes
            assert_close(y, whole(x))
            assert_close(b.grad, a.grad)
            compare_gradients(part, whole)

        part, whole = layers(dtype)
        parallelize_module(part, mesh, parallel_plan(part, sequence_dim=1))
        x, gradient = randn(3, 2 * world, 8, dtype=dtype), randn(3, 2 * world, 6, dtype=dtype)
        a, b = x.clone().requires_grad_(), slab(x, 1).requires_grad_()
        whole(a).backward(gradient)
        with Counted() as counted:
            y = part(b)
            y.backward(slab(gradient, 1))
        assert counted.calls == {"all_gather_into_tensor": 2, "reduce_scatter_tensor": 2}, counted.calls
        whole_bytes = (x.numel() + gradient.numel()) * x.itemsize
        assert counted.bytes == {"all_gather_into_tensor": whole_bytes, "reduce_scatter_tensor": whole_bytes}
        assert_close(y, slab(whole(x), 1))
        assert_close(b.grad, slab(a.grad, 1))
        compare_gradients(part, whole)


@case
def data_parallel():
    """FSDP2 and DDP, each rank with its tokens; FSDP2 also with recompute, and beside tensor parallelism."""
    world = dist.get_world_size()
    for dtype in DTYPES:
        x, gradient = randn(2 * world, 8, dtype=dtype), randn(2 * world, 6, dtype=dtype)
        for recompute in (False, True):
            part, whole = layers(dtype, recompute=recompute)
            whole(x).backward(gradient / world)  # both average over ranks
            fully_shard(part, mesh=line(), reshard_after_forward=recompute)
            with Counted() as counted:
                y = part(slab(x))
                y.backward(slab(gradient))
            padded = sum(world * -(-len(t) // world) * (t.numel() // len(t)) for t in whole.parameters())
            calls = {"allgather_base": 1 + recompute, "reduce_scatter_base": 1}
            assert counted.calls == calls, counted.calls
            assert counted.bytes == {name: n * padded * x.itemsize for name, n in calls.items()}
            assert_close(y, slab(whole(x)))
            compare_gradients(part, whole)

        part, whole = layers(dtype)
        whole(x).backward(gradient / world)
        y = torch.nn.parallel.DistributedDataParallel(part)
        y(slab(x)).backward(slab(gradient))
        compare_gradients(part, whole)

        part, whole = layers(dtype)
        grid = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
        whole(x).backward(gradient / (world // 2))
        parallelize_module(part, grid["tp"], parallel_plan(part))
        fully_shard(part, mesh=grid["dp"])
        rank = grid["dp"].get_local_rank()
        y = part(x.chunk(world // 2)[rank])
        y.backward(gradient.chunk(world // 2)[rank])
        assert_close(y, whole(x).chunk(world // 2)[rank])
        compare_gradients(part, whole)


@case
def mixed_precision():
    """FSDP2 in bfloat16 with sums over ranks in float32: what one process gets that casts at the same places."""
    world = dist.get_world_size()
    part, whole = layers(torch.float32)
    x, gradient = randn(2 * world, 8, dtype=torch.bfloat16), randn(2 * world, 6, dtype=torch.bfloat16)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(part, mesh=line(), mp_policy=policy)
    y = part(slab(x))
    y.backward(slab(gradient))
    assert y.dtype == torch.bfloat16
    half = copy.deepcopy(whole).bfloat16()
    for b_x, b_gradient in zip(x.chunk(world), gradient.chunk(world), strict=True):
        half.zero_grad()
        half(b_x).backward(b_gradient)
        for t, narrow in zip(whole.parameters(), half.parameters(), strict=True):
            t.grad = narrow.grad.float() / world + (0 if t.grad is None else t.grad)
    assert_close(y, slab(half(x)))
    compare_gradients(part, whole)


@case
def optimiser_step():
    """A step of AdamW on a tensor-parallel layer is that of one process, its trained slope included."""
    for dtype in DTYPES:
        slope = torch.nn.Parameter(torch.tensor(1.3, dtype=dtype))
        part = bo.nn.GatedMLP(8, 10, activation="swish", beta=slope, bias=True, dtype=dtype)
        whole = copy.deepcopy(part)
        parallelize_module(part, line(), parallel_plan(part))
        x = randn(5, 8, dtype=dtype)
        for layer in (part, whole):
            layer(x).square().sum().backward()
            torch.optim.AdamW(layer.parameters(), lr=0.1).step()
        for one, other in zip(part.parameters(), whole.parameters(), strict=True):
            assert_close(one.full_tensor(), other)


def checkpointed(folder):
    """Layers sharded in both ways, as they are saved and loaded: built on the meta device, values to come."""
    with torch.device("meta"):
        tensor, data = layers(torch.float32)
    parallelize_module(tensor, line(), parallel_plan(tensor))
    fully_shard(data, mesh=line())
    for name, layer in (("tensor", tensor), ("data", data)):
        layer.to_empty(device="cpu").reset_parameters()
        assert layer.p.full_tensor().abs().max() <= 10**-0.5  # of the whole fan-in, not of a shard's
        yield folder / name, layer


@case
def checkpoints():
    """Saved by two processes; loaded by four, and by one in test_distributed.py."""
    for path, layer in checkpointed(FOLDER):
        if dist.get_world_size() == 2:
            values = layers(torch.float32)[0].state_dict()
            layer.load_state_dict({k: distribute(values[k], t) for k, t in layer.state_dict().items()}, assign=True)
            checkpoint.save(layer.state_dict(), checkpoint_id=path)
            if dist.get_rank() == 0:
                torch.save(values, path.with_suffix(".pt"))
        else:
            values = torch.load(path.with_suffix(".pt"))
            state = layer.state_dict()
            checkpoint.load(state, checkpoint_id=path)
            layer.load_state_dict(state)
        for name, t in layer.state_dict().items():
            assert torch.equal(t.full_tensor() if isinstance(t, DTensor) else t, values[name]), name


def distribute(t, like):
    return on(like.device_mesh, t, *like.placements) if isinstance(like, DTensor) else t


@case
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
    with pytest.raises(RuntimeError, match="eigen_form cannot take these DTensors: there is no sharding rule"):
        bo.eigen_form(on(mesh, x, Shard(0)), randn(2, 3), randn(2, 3, 8))
    with pytest.raises(RuntimeError, match="v has 13 h, other tensors 12"):
        bo.gated_mlp(on(mesh, x, R), on(mesh, w, Shard(0)), on(mesh, randn(13, 8), Shard(0)), on(mesh, p, Shard(1)))
    with pytest.raises(TypeError, match="GatedParallel shards a GatedMLP, got Linear"):
        parallelize_module(torch.nn.Linear(2, 2), mesh, GatedParallel())
    with pytest.raises(ValueError, match="no GatedMLP in Linear"):
        parallel_plan(torch.nn.Linear(2, 2))


@case
def example():
    """examples/sharded.py finds what one process finds, to rounding."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from sharded import main

    assert max(main().values()) < 1e-5


def failing():
    """A rank that fails while another waits for it."""
    if dist.get_rank() == 1:
        raise ValueError("one rank fails")
    dist.barrier()


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    limits.small_on_cpu = -1  # the layers are small, and the ops are what is tested
    for name in names or CASES:
        torch.manual_seed(0)
        CASES[name]() if name in CASES else failing()
        if dist.get_rank() == 0:
            with open(FOLDER / f"passed-{dist.get_world_size()}", "a") as f:
                f.write(name + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[2:])
