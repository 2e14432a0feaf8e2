"""A tensor-parallel training step and the sharded analysis of one layer, each beside the same in one process.

    torchrun --nproc-per-node 2 examples/sharded.py

Uses nccl where every process has a GPU of its own, else gloo; nothing else changes. The ops take DTensors as they are:
`parallel_plan` says which weights are cut where, and `group=` deals the directions of an analysis to the ranks.
"""

from __future__ import annotations

import copy
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

import bilinear_ops as bo
from bilinear_ops.integrations.distributed import parallel_plan

DIM, HIDDEN, TOKENS = 48, 128, 64
DIRECTIONS, TOP = 30, 5


def step(layer: bo.nn.GatedMLP, x: Tensor, target: Tensor) -> Tensor:
    """The loss before one step of gradient descent."""
    optimiser = torch.optim.SGD(layer.parameters(), lr=1.0)
    loss = (layer(x) - target).square().mean()
    loss.backward()
    optimiser.step()
    return loss.detach()


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((one - other).abs().max() / other.abs().max()).item()


def train(device: str) -> dict[str, float]:
    """One step of a layer whose hidden units are dealt to the ranks, and of the same layer in each of them."""
    alone = bo.nn.GatedMLP(DIM, HIDDEN, activation="silu", bias=True, device=device)
    layer = copy.deepcopy(alone)
    x, target = torch.randn(2, TOKENS, DIM, device=device)
    mesh = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("tp",))
    parallelize_module(layer, mesh, parallel_plan(layer))
    losses = step(layer, x, target), step(alone, x, target)
    parameters = [difference(whole(a), b) for a, b in zip(layer.parameters(), alone.parameters(), strict=True)]
    return {"loss": difference(*losses), "parameters after the step": max(parameters)}


def analyse(device: str) -> dict[str, float]:
    """The eigenvalues and the strongest interactions of some directions, dealt to the ranks, and by each of them."""
    layer = bo.nn.GatedMLP(DIM, HIDDEN, device=device).requires_grad_(False)
    c = bo.Directions(torch.randn(DIRECTIONS, DIM, device=device), layer.p)
    spectra, strongest = [], []
    for group in (dist.group.WORLD, None):
        spectra.append(bo.analysis.interaction_eigh(layer.w, layer.v, c, TOP, group=group).values)
        strongest.append(bo.interaction_topk(layer.w, layer.v, c, TOP, scope="global", group=group).values)
    return {"eigenvalues": difference(*spectra), "strongest interactions": difference(*strongest)}


def main() -> dict[str, float]:
    """Prints, on rank 0, how far the sharded results are from those of one process, and returns it."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    torch.manual_seed(0)  # the same layer and batch on every rank
    differences = {**train(device), **analyse(device)}
    if rank == 0:
        print(f"{ranks} ranks against one process, largest relative difference:")
        for name, value in differences.items():
            print(f"  {name:25} {value:.1e}")
    return differences


if __name__ == "__main__":
    if "LOCAL_WORLD_SIZE" not in os.environ:
        sys.exit("start with torchrun --nproc-per-node 2 examples/sharded.py")
    gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if gpus else "gloo", timeout=timedelta(minutes=5))
    main()
    dist.destroy_process_group()
