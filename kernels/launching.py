"""What the launchers share: operands as descriptors or pointers, program counts, the launch on the right device, and
plans of launches, which spare the host all that it found out before."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from bilinear_ops.kernels import config, tuning
from bilinear_ops.kernels.records import Choice, RowTile, SplitTile, Tile
from bilinear_ops.kernels.tile import INTERPRET

T = TypeVar("T")
Key: TypeAlias = tuple[object, ...]

HERE = nullcontext()
MOST_PLANS = 1024  # then all are forgotten: callers whose shapes never repeat must not fill the memory


def on_device_of(t: Tensor) -> AbstractContextManager[object]:
    """Make the device of `t` current: Triton launches on the current device, wherever the tensors are."""
    if not t.is_cuda or t.get_device() == torch.cuda.current_device():
        return HERE
    return torch.cuda.device(t.device)


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


def tiles(tile: Tile | RowTile, m: int, n: int) -> int:
    """Tiles of an [m, n] output."""
    rows, columns = (tile.block_m, tile.block_n) if isinstance(tile, Tile) else (tile.rows, tile.columns)
    return -(-m // rows) * -(-n // columns)


def programs(tile: Tile, m: int, n: int, device: torch.device) -> int:
    """Programs of a kernel that loops over the tiles of an [m, n] output."""
    count = tiles(tile, m, n)
    return min(count, config.processors(device) * tile.blocks_per_sm) if tile.blocks_per_sm else count


class Plan:
    """A launch of a compiled kernel with everything settled but the tensors.

    A launch needs no binding of arguments, no choice of a tile and no check of descriptors. The descriptors of a plan
    hold no tensor: each launch makes its own, for its own pointers.
    """

    def __init__(self, tile: Any, compiled: Any, grid: tuple[int, ...], arguments: Sequence[object]):
        self.tile = tile
        self.start = compiled[(*grid, 1, 1)[:3]]
        self.arguments = list(arguments)
        self.slots: list[tuple[int, Any]] = []  # of a tensor, None, or of a descriptor of one
        for i, argument in enumerate(arguments):
            if isinstance(argument, Tensor) or hasattr(argument, "base"):
                self.slots.append((i, None if isinstance(argument, Tensor) else _descriptor(argument, None)))
                self.arguments[i] = None

    def launch(self, *tensors: Any) -> None:
        """Launch on these tensors, in the order of the kernel's arguments; those that are None are no argument."""
        arguments = self.arguments.copy()
        slots = iter(self.slots)
        for t in tensors:
            if t is not None:
                i, descriptor = next(slots)
                arguments[i] = t if descriptor is None else _descriptor(descriptor, t)
        with on_device_of(tensors[0]):
            self.start(*arguments)


def _descriptor(like: Any, t: Tensor | None) -> Any:
    """A descriptor of `t` with the fields of one that was validated: Triton's, or Gluon's, which has a layout too."""
    descriptor = object.__new__(type(like))
    descriptor.__dict__.update(like.__dict__)
    descriptor.base = t
    return descriptor


_plans: dict[Key, Plan | SplitTile | None] = {}
UNPLANNED = "unplanned"


def plan_key(choice: str, like: Tensor, options: Key, *tensors: Tensor | None) -> Key:
    """All that a launch on the inputs `tensors` depends on; `options` say what is computed, saved and needed.

    What a launcher allocates is aligned, and its layout follows from the inputs'.
    """
    # kernels are compiled for bases that are aligned to 16 bytes, or for any
    layouts = [t if t is None else (t.dtype, t.shape, t.stride(), t.data_ptr() % 16 == 0) for t in tensors]
    return choice, like.device, options, tuning.state(choice, like), config.switches(like), *layouts


def planned(key: Key) -> Plan | SplitTile | str | None:
    """The plan of a launch with this key, LIBRARY if it is left to PyTorch, UNPLANNED before the first launch.

    A SplitTile where the launch is one of several, each with a plan of its own.
    """
    return _plans.get(key, UNPLANNED)


def keep(key: Key, plan: Plan | SplitTile | None) -> None:
    """Let later launches with this key follow the plan, or run PyTorch.

    Not in the interpreter or of meta tensors, whose tables tests and static checks exchange.
    """
    if INTERPRET or key[1].type == "meta":
        return
    if len(_plans) >= MOST_PLANS:
        _plans.clear()
    _plans[key] = plan


def forget_plans() -> None:
    """Settle every launch anew, as after a change that no key holds."""
    _plans.clear()


def start(key: Key, tile: Any, kernel: Any, grid: tuple[int, ...], *arguments: object, **constants: Any) -> None:
    """Launch kernel[grid](*arguments, **constants) with the options of `tile`, and keep the plan of it."""
    compiled = kernel[grid](*arguments, **constants, **tile.launch())
    if compiled is not None:  # interpreted
        rest = (constants[name] for name in kernel.arg_names[len(arguments) :])
        keep(key, Plan(tile, compiled, grid, (*arguments, *rest)))


def launch(
    choice: str,
    like: Tensor,
    shape: tuple[int, ...],
    tiles: tuple[Choice, ...],
    run: Callable[[Any], T],
    *,
    library: bool = True,
    unproven: tuple[Choice, ...] = (),
) -> T:
    """Return run(tile) on the device of `like`, with the tuned tile if there is one, else the first tile that fits.

    `choice` is the name of a kernel, or of a launcher that chooses between kernels. `choice` and `shape` are the key of
    the tuned tile; `unproven` are further candidates. `run` may be called more than once: see `tuning.preferred`.
    Raises RuntimeError if only the library is left and `library` forbids it.
    """
    with on_device_of(like):
        chosen = tuning.preferred(choice, like, shape, tiles, run, unproven)
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
