"""A workload: one op at one shape, with its inputs, reference and baselines.

Each file `bench_<family>.py` has `workloads(device, size, impl)`, and `tilings(device, size)` if the family's kernels
have tiles to choose from. Both are found by the file's name.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bilinear_ops._impl import why_not_triton

SIZES = ("tiny", "quick", "full")  # for tests; minutes on a CPU; for receipts

Tensors = tuple[Tensor, ...]
Run = Callable[[], Tensors]  # the timed work; returns results in the order of the reference
Contender = Callable[..., Run]  # builds a Run from the inputs; packing and compiling are not timed


@dataclass(frozen=True)
class Workload:
    """One op at one shape. `inputs(seed)` draws unit-scale tensors, shared by all contenders.

    `flops` and `bytes` are minima by the op's definition: each input read once, each result written once.
    """

    op: str
    case: str
    shape: dict[str, int]
    dtype: torch.dtype
    inputs: Callable[[int], Tensors]
    reference: Contender  # runs in float64 as the truth, and at `dtype` for the error of eager PyTorch
    ours: Contender
    baselines: dict[str, Contender]
    flops: int
    bytes: int
    variants: dict[str, Contender] = field(default_factory=dict)  # ours with other settings, never a baseline
    bounds: dict[str, Contender] = field(default_factory=dict)  # a part of the op: timed, never checked

    def __str__(self) -> str:
        sizes = " ".join(f"{k}={n}" for k, n in self.shape.items())
        return f"{self.op} [{self.case}] {sizes} {str(self.dtype).removeprefix('torch.')}"


def forward(fn: Callable[..., Tensor], pack: Callable[..., Tensors] | None = None) -> Contender:
    """y = fn(*inputs) without gradients; `pack` transforms the inputs beforehand, untimed."""

    def build(*inputs: Tensor) -> Run:
        operands = pack(*inputs) if pack else inputs

        def run() -> Tensors:
            with torch.no_grad():
                return (fn(*operands),)

        return run

    return build


def training_step(
    fn: Callable[..., Tensor],
    pack: Callable[..., Tensors] | None = None,
    unpack: Callable[..., Tensors] | None = None,
    trained: int | None = None,
) -> Contender:
    """y = fn(*inputs[:-1]) and the gradients of its first `trained` arguments (default: all); inputs[-1] is dy.

    `pack` transforms the arguments beforehand, untimed; `unpack` splits packed gradients.
    """

    def build(*inputs: Tensor) -> Run:
        *operands, dy = inputs
        if pack:
            operands = list(pack(*operands))
        leaves = [t.detach().requires_grad_() for t in operands[:trained]]
        constants = operands[len(leaves) :]

        def run() -> Tensors:
            y = fn(*leaves, *constants)
            gradients = torch.autograd.grad(y, leaves, dy)
            return y.detach(), *(unpack(*gradients) if unpack else gradients)

        return run

    return build


def tiling(
    kernel: str,
    shape: dict[str, int],
    dtype: torch.dtype,
    inputs: Callable[[int], Tensors],
    reference: Callable[..., Any],
    launcher: Callable[..., Any],
    device: torch.device,
    flops: int,
    bytes: int,
    unproven: bool = False,
) -> Workload:
    """A kernel with the table's tile as `ours` and all other candidates of tuning, or all unproven ones, as variants.

    `reference` and `launcher` take the inputs and return a tensor or a tuple.
    """
    from bilinear_ops.kernels import config, tuning

    def run_by(fn: Callable[..., Any], **forced: config.Choice) -> Contender:
        def build(*tensors: Tensor) -> Run:
            def run() -> Tensors:
                with tuning.using(**forced), torch.no_grad():
                    found = fn(*tensors)
                return found if isinstance(found, tuple) else (found,)

            return run

        return build

    arch = config.architecture(device)
    tiles = config.unproven(kernel, arch, dtype) if unproven else config.candidates(kernel, arch, dtype, ())
    return Workload(
        op=kernel,
        case="unproven tiles" if unproven else "tiles",
        shape=shape,
        dtype=dtype,
        inputs=inputs,
        reference=run_by(reference),
        ours=run_by(launcher),
        baselines={"library": run_by(launcher, **{kernel: config.LIBRARY})} if config.LIBRARY in tiles else {},
        flops=flops,
        bytes=bytes,
        variants={_tile_name(tile): run_by(launcher, **{kernel: tile}) for tile in tiles if tile is not None},
    )


def _tile_name(tile: Any) -> str:
    return f"{type(tile).__name__} {'x'.join(map(str, vars(tile).values()))}"


def draw(device: torch.device, dtype: torch.dtype, *tensors: tuple[Sequence[int], float]) -> Callable[[int], Tensors]:
    """A function of a seed that draws normal tensors of the given (shape, scale)."""

    def inputs(seed: int) -> Tensors:
        generator = torch.Generator(device).manual_seed(seed)
        drawn = (torch.randn(tuple(shape), generator=generator, device=device) * scale for shape, scale in tensors)
        return tuple(t.to(dtype) for t in drawn)

    return inputs


def compiled(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`fn` under torch.compile, compiled at its first call."""
    return torch.compile(fn, dynamic=False)


def has_compiler(device: torch.device) -> bool:
    """Whether torch.compile can generate code for `device`."""
    if device.type == "cpu":
        return shutil.which(os.environ.get("CXX", "g++")) is not None
    return has("triton")


def has(package: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def families() -> Iterator[ModuleType]:
    """The modules `bench.bench_<family>`."""
    for path in sorted(Path(__file__).parents[1].glob("bench_*.py")):
        yield importlib.import_module(f"bench.{path.stem}")


def workloads(device: torch.device, size: str, impl: str = "auto", only: str = "") -> list[Workload]:
    """The workloads of all families whose name contains `only`."""
    return [w for family in families() for w in family.workloads(device, size, impl) if only in str(w)]


def smallest(device: torch.device) -> list[Workload]:
    """Every kernel at its smallest shapes; empty if the kernels cannot run on `device`."""
    if why_not_triton(torch.empty(0, device=device)) is not None:
        return []
    from bench.static import smallest

    return smallest.workloads(device)


def tilings(device: torch.device, size: str, only: str = "") -> list[Workload]:
    """The tilings of all families whose name contains `only`; empty if the kernels cannot run on `device`."""
    if why_not_triton(torch.empty(0, device=device)) is not None:
        return []
    found = (family.tilings(device, size) for family in families() if hasattr(family, "tilings"))
    return [w for of_family in found for w in of_family if only in str(w)]
