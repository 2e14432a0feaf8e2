"""Gated layers under `torch.distributed`: plans for `parallelize_module`. The ops themselves take DTensors as they are.

Import it by name: `from bilinear_ops.integrations.distributed import parallel_plan`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from bilinear_ops.nn import GatedMLP

PLACEMENTS: dict[str, Placement] = {"w": Shard(0), "v": Shard(0), "b_w": Shard(0), "b_v": Shard(0), "p": Shard(1)}


class GatedParallel(ParallelStyle):
    """A `GatedMLP` sharded over its hidden units: w and v by rows, p by columns, b_p and beta whole on every rank.

    Its forward runs one collective on the output, its backward one on the gradient of the input; with `sequence_dim`,
    where inputs and outputs are sharded over tokens, both run an all-gather and a reduce-scatter instead.

    Args:
        sequence_dim: the dimension of inputs and outputs over which they are sharded; None where they are replicated.
            A plain input must be as long on every rank, for PyTorch's all-gather aborts or hangs otherwise: the first
            call compares the lengths, outside of torch.compile, by a gather of one integer a rank, and raises
            ValueError. Shards of other lengths are passed as a DTensor.
        use_local_output: return this rank's plain tensor rather than a DTensor.
    """

    def __init__(self, *, sequence_dim: int | None = None, use_local_output: bool = True):
        self.layout: Placement = Replicate() if sequence_dim is None else Shard(sequence_dim)
        self.use_local_output = use_local_output
        self.compared = False

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, GatedMLP):
            raise TypeError(f"GatedParallel shards a GatedMLP, got {type(module).__name__}")
        return distribute_module(module, device_mesh, self._partition, self._enter, self._leave)  # type: ignore[arg-type]

    def _partition(self, name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for key, t in module.named_parameters(recurse=False):
            placements = [PLACEMENTS.get(key, Replicate())]
            part = distribute_tensor(t, mesh, placements, src_data_rank=self.src_data_rank)
            module.register_parameter(key, nn.Parameter(part, requires_grad=t.requires_grad))

    def _enter(self, module: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> tuple[Any, ...]:
        if not inputs:
            raise TypeError("a layer under parallel_plan takes x by position, as layer(x)")
        x, *others = inputs
        if not isinstance(x, DTensor):
            self._compare_lengths(x, mesh)
            x = DTensor.from_local(x, mesh, [self.layout], run_check=False)
        return x.redistribute(placements=[Replicate()]), *others

    def _compare_lengths(self, x: Tensor, mesh: DeviceMesh) -> None:
        """Once: lengths that change later would be compared by some of the ranks only, which would hang."""
        if self.compared or not isinstance(self.layout, Shard) or torch.compiler.is_compiling():
            return
        length = torch.tensor([x.shape[self.layout.dim]], device=x.device)
        lengths = DTensor.from_local(length, mesh, [Shard(0)], run_check=False).full_tensor().tolist()
        if len(set(lengths)) > 1:
            raise ValueError(
                f"the ranks hold {lengths} tokens along dimension {self.layout.dim}: pass DTensor.from_local(x, mesh, "
                f"[Shard({self.layout.dim})], shape=..., stride=...) with those of the whole"
            )
        self.compared = True

    def _leave(self, module: nn.Module, output: DTensor, mesh: DeviceMesh) -> Any:
        output = output.redistribute(placements=[self.layout])
        return output.to_local() if self.use_local_output else output


def parallel_plan(module: nn.Module, *, sequence_dim: int | None = None) -> dict[str, ParallelStyle]:
    """The tensor-parallel plan of every `GatedMLP` in a module, itself included, for `parallelize_module`.

    Args:
        module: a `GatedMLP` or a model that holds some.
        sequence_dim: as for `GatedParallel`; 1 for `[B, S, d]` sharded over the sequence.

    Returns:
        `{path: GatedParallel}`, to be merged with the plan of the other modules.

    Layers built on the meta device are sharded before they have values; then `to_empty` and `reset_parameters`. On CPU
    meshes PyTorch draws the same numbers for the shards of ranks with one seed: load values there instead.

    Raises:
        ValueError: no `GatedMLP` in the module.
    """
    paths = [path for path, m in module.named_modules() if isinstance(m, GatedMLP)]
    if not paths:
        raise ValueError(f"there is no GatedMLP in {type(module).__name__}")
    return {path: GatedParallel(sequence_dim=sequence_dim) for path in paths}
