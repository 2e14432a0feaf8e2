"""What the launchers share: operands as descriptors or pointers, program counts, the launch on the right device."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from bilinear_ops.kernels import config, tuning
from bilinear_ops.kernels.records import Choice, Tile

T = TypeVar("T")


def on_device_of(t: Tensor) -> AbstractContextManager[object]:
    """Make the device of `t` current: Triton launches on the current device, wherever the tensors are."""
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()


def describable(*tensors: Tensor) -> bool:
    """Whether descriptors can address all of these matrices: 16-byte aligned rows, unit last stride, not empty."""
    return all(
        t.stride(1) == 1
        and t.stride(0) >= t.shape[1] > 0
        and t.stride(0) * t.itemsize % 16 == 0
        and t.data_ptr() % 16 == 0
        for t in tensors
    )


def described(t: Tensor | None, block: Sequence[int], descriptor: bool) -> Tensor | TensorDescriptor | None:
    """A descriptor of `t` with blocks of shape `block`, or `t` itself if `descriptor` is false."""
    if t is None or not descriptor:
        return t
    return TensorDescriptor(t, list(t.shape), list(t.stride()), list(block))


def precision(dtype: torch.dtype) -> str:
    """The `input_precision` of a `tl.dot`: fp32 products stay fp32-accurate unless the user opted in to TF32."""
    return "tf32" if dtype == torch.float32 and config.tf32_allowed() else "ieee"


def accurate_precision(t: Tensor) -> str:
    """As `precision`, with fp32 products that stay fp32-accurate on tensor cores."""
    accurate = t.dtype == torch.float32 and not config.tf32_allowed()
    return config.accurate_precision(config.architecture(t.device)) if accurate else precision(t.dtype)


def scalar(t: Tensor | None) -> Tensor | None:
    """A run-time number in fp32, which kernels read through a pointer."""
    return None if t is None else t.to(torch.float32)


def programs(tile: Tile, m: int, n: int, device: torch.device) -> int:
    """Programs of a kernel that loops over the tiles of an [m, n] output."""
    tiles = triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n)
    return min(tiles, config.processors(device) * tile.blocks_per_sm) if tile.blocks_per_sm else tiles


def launch(
    choice: str,
    like: Tensor,
    shape: tuple[int, ...],
    tiles: tuple[Choice, ...],
    run: Callable[[Any], T],
    *,
    library: bool = True,
) -> T:
    """Return run(tile) on the device of `like`, with the tuned tile if there is one, else the first tile that fits.

    `choice` is the name of a kernel, or of a launcher that chooses between kernels. `choice` and `shape` are the key of
    the tuned tile. `run` may be called more than once: see `tuning.preferred`. Raises RuntimeError if only the library
    is left and `library` forbids it.
    """
    with on_device_of(like):
        chosen = tuning.preferred(choice, like, shape, tiles, run)
        if not library:
            chosen = tuple(tile for tile in chosen if tile is not config.LIBRARY)
        if not chosen:
            reason = f"the table of tiles leaves these sizes to PyTorch: {choice} at {shape}"
            raise RuntimeError(f'impl="triton" cannot run: {reason}')
        return first_that_fits(chosen, run)


def first_that_fits(tiles: Sequence[Choice], run: Callable[[Any], T]) -> T:
    """Run the best tile; step down to the next when the device runs out of registers or shared memory."""
    *better, last = tiles
    for tile in better:
        try:
            return run(tile)
        except OutOfResources:
            continue
    return run(last)
