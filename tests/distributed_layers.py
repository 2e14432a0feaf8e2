"""Layers under `parallel_plan`, FSDP2 and DDP: steps, what they send, and checkpoints."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from distributed_harness import DTYPES, Counted, R, case, compare_gradients, layers, line, on, randn, slab
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import bilinear_ops as bo
from bilinear_ops.integrations.distributed import GatedParallel, parallel_plan


@case(2, 4)
def tensor_parallel():
    """`parallel_plan`: values, gradients, collectives and the bytes they take; uneven hidden units."""
    mesh = line()
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


@case(2, 4)
def sequence_parallel():
    """Inputs and outputs sharded over the sequence; the first call compares the lengths of plain ones."""
    mesh, world = line(), dist.get_world_size()
    for dtype in DTYPES:
        part, whole = layers(dtype)
        parallelize_module(part, mesh, parallel_plan(part, sequence_dim=1))
        x, gradient = randn(3, 2 * world, 8, dtype=dtype), randn(3, 2 * world, 6, dtype=dtype)
        a = x.clone().requires_grad_()
        whole(a).backward(gradient)
        for lengths in (1, 0):
            b = slab(x, 1).requires_grad_()
            part.zero_grad()
            with Counted() as counted:
                y = part(b)
                y.backward(slab(gradient, 1))
            assert counted.calls == {"all_gather_into_tensor": 2 + lengths, "reduce_scatter_tensor": 2}, counted.calls
            both = (x.numel() + gradient.numel()) * x.itemsize
            gathered = both + lengths * 8 * world
            assert counted.bytes == {"all_gather_into_tensor": gathered, "reduce_scatter_tensor": both}
        assert_close(y, slab(whole(x), 1))
        assert_close(b.grad, slab(a.grad, 1))
        compare_gradients(part, whole)

        part, whole = layers(dtype)
        parallelize_module(part, mesh, parallel_plan(part, sequence_dim=1))
        x, gradient = randn(3, 2 * world + 1, 8, dtype=dtype), randn(3, 2 * world + 1, 6, dtype=dtype)
        a, b = x.clone().requires_grad_(), on(mesh, x, Shard(1)).requires_grad_()
        for _ in range(2):
            with pytest.raises(ValueError, match="tokens along dimension 1: pass DTensor.from_local"):
                part(b.to_local())
        whole(a).backward(gradient)
        y = part(b)
        y.backward(on(mesh, gradient, Shard(1)).to_local())
        assert_close(y, on(mesh, whole(x), Shard(1)).to_local())
        assert_close(b.grad.full_tensor(), a.grad)
        compare_gradients(part, whole)


@case(2, 4)
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
        y = DistributedDataParallel(part)
        with Counted() as counted:
            y(slab(x)).backward(slab(gradient))
        assert counted.calls == {"broadcast": 1, "allreduce": 1}, counted.calls
        assert counted.bytes == {"broadcast": 4, "allreduce": sum(t.numel() for t in whole.parameters()) * x.itemsize}
        compare_gradients(part, whole)

        part, whole = layers(dtype)
        groups = world // 2
        grid = init_device_mesh("cpu", (groups, 2), mesh_dim_names=("dp", "tp"))
        whole(x).backward(gradient / groups)
        parallelize_module(part, grid["tp"], parallel_plan(part))
        shards = [t.to_local().shape for t in part.parameters()]
        fully_shard(part, mesh=grid["dp"], reshard_after_forward=True)
        rank = grid["dp"].get_local_rank()
        a = x.chunk(groups)[rank].clone().requires_grad_()
        with Counted() as counted:
            y = part(a)
            y.backward(gradient.chunk(groups)[rank])
        padded = sum(groups * -(-shape[0] // groups) * (shape.numel() // shape[0]) for shape in shards)
        calls = {"all_reduce": 2}
        sent = {"all_reduce": (a.numel() + y.numel()) * x.itemsize}
        if groups > 1:
            calls |= {"allgather_base": 2, "reduce_scatter_base": 1}
            sent |= {name: calls[name] * padded * x.itemsize for name in ("allgather_base", "reduce_scatter_base")}
        assert counted.calls == calls and counted.bytes == sent, counted.bytes
        assert_close(y, whole(x).chunk(groups)[rank])
        compare_gradients(part, whole)


@case(2, 4)
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


@case(2, 4)
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


@case(2, 4)
def slopes():
    """The gradient of a plain slope beside DTensors is summed over the ranks, by the one collective of an op."""
    mesh = line()
    for dtype in DTYPES:
        slope = torch.nn.Parameter(torch.tensor(1.3, dtype=dtype))
        part = bo.nn.GatedMLP(8, 10, 6, activation="swish", beta=slope, dtype=dtype)
        x, gradient = randn(5, 8, dtype=dtype), randn(5, 6, dtype=dtype)
        placements = {"x": R, "w": Shard(0), "v": Shard(0), "p": Shard(1)}
        for tokens in (False, True):
            part.zero_grad()
            whole = copy.deepcopy(part)
            whole(x).backward(gradient)
            assert whole.beta.shape == (1,)
            one = {name: Shard(0) if name == "x" else R for name in placements} if tokens else placements
            w, v, p = (on(mesh, t, one[name]) for name, t in zip("wvp", (part.w, part.v, part.p), strict=True))
            for beta in (part.beta.detach().reshape(()).requires_grad_(), part.beta):
                out = bo.gated_mlp(on(mesh, x, one["x"]), w, v, p, activation="swish", beta=beta.reshape(()))
                with Counted() as counted:
                    out.backward(on(mesh, gradient, one["x"]))
                assert counted.calls == {"all_reduce": 1} and counted.bytes == {"all_reduce": beta.itemsize}
                assert_close(beta.grad, whole.beta.grad.reshape(beta.shape))


def checkpointed():
    """Layers sharded in both ways, as they are saved and loaded: built on the meta device, values to come."""
    with torch.device("meta"):
        tensor, data = layers(torch.float32)
    parallelize_module(tensor, line(), parallel_plan(tensor))
    fully_shard(data, mesh=line())
    for name, layer in (("tensor", tensor), ("data", data)):
        layer.to_empty(device="cpu").reset_parameters()
        assert layer.p.full_tensor().abs().max() <= 10**-0.5  # of the whole fan-in, not of a shard's
        yield Path(name), layer


@case(2, 4)
def checkpoints():
    """Saved by two processes; loaded by four, and by one in test_distributed.py."""
    for path, layer in checkpointed():
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


@case(2, 4)
def plans_refused():
    """A plan for what is no gated layer."""
    with pytest.raises(TypeError, match="GatedParallel shards a GatedMLP, got Linear"):
        parallelize_module(torch.nn.Linear(2, 2), line(), GatedParallel())
    with pytest.raises(ValueError, match="no GatedMLP in Linear"):
        parallel_plan(torch.nn.Linear(2, 2))
