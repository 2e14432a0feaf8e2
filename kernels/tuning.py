"""Tuning: the fastest candidate tile, measured at first use and kept in memory and on disk.

BILINEAR_OPS_TUNE=1 or `bilinear_ops.warmup(..., tune=True)` turns tuning on; otherwise the tables of config.py decide.
Each choice is one file, named by a hash of all that the choice depends on: nothing to merge or to migrate. If a file
cannot be read or is not ours, the tiles are measured again.
"""

import hashlib
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from bilinear_ops.kernels import config
from bilinear_ops.kernels.records import Choice

Key = tuple[tuple[str, object], ...]

ROUNDS = 10  # of timing; each runs every candidate once, so that a slow spell hits them all
REPEATS = 5  # of a comparison: what depends on the order of warps may be right once
FLUSH_BYTES = 256 << 20  # written before every timed run: more than any L2 cache holds

_chosen: dict[Key, Choice] = {}
_forced: dict[str, tuple[Choice, ...]] = {}
_open = 0  # `measuring` contexts


def preferred(
    kernel: str,
    like: Tensor,
    shape: tuple[int, ...],
    tiles: tuple[Choice, ...],
    run: Callable[[Choice], object],
    unproven: tuple[Choice, ...] = (),
) -> tuple[Choice, ...]:
    """The tile that was measured to be the fastest, if any, followed by `tiles`, those of the table.

    `run` launches a tile and must leave the same results however often it is called. `shape` holds everything else that
    the choice depends on; sizes that vary from call to call are rounded up by `bucket`. While a CUDA graph is captured,
    nothing is measured: only tiles that are already known are used. An `unproven` candidate, for which `run` must write
    to the same tensors at every call, is measured only if BILINEAR_OPS_TUNE_UNPROVEN=1 asks for it, as it could hang,
    and if it gives the same numbers as the others.
    """
    if kernel in _forced:
        return _forced[kernel]
    measuring = _measuring()
    if not (measuring or _chosen):
        return tiles
    unproven = unproven if _asked("BILINEAR_OPS_TUNE_UNPROVEN") else ()
    key = _key(kernel, like, shape) + ((("unproven", repr(unproven)),) if unproven else ())
    if key not in _chosen:
        candidates = config.candidates(kernel, config.architecture(like.device), like.dtype, tiles)
        if not measuring or _capturing(like) or len(candidates) + len(unproven) == 1:
            return tiles
        _chosen[key] = _known_or_measured(key, candidates, unproven, run, like.device)
    return (_chosen[key], *tiles)


def state(kernel: str, like: Tensor) -> tuple[object, ...]:
    """On which a choice of `preferred` depends beside its arguments; tiles once chosen stay."""
    measuring = _measuring() and not _capturing(like)
    return _forced.get(kernel), len(_chosen), measuring, measuring and _asked("BILINEAR_OPS_TUNE_UNPROVEN")


def _measuring() -> bool:
    return _open > 0 or _asked("BILINEAR_OPS_TUNE")


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on")


def bucket(n: int) -> int:
    """The next power of two: sizes that share it share a choice."""
    return 1 << (n - 1).bit_length() if n > 0 else 0


@contextmanager
def measuring() -> Iterator[None]:
    """Within, tiles are measured at first use whatever BILINEAR_OPS_TUNE says; the choices hold afterwards."""
    global _open
    _open += 1
    try:
        yield
    finally:
        _open -= 1


@contextmanager
def using(**tiles: Choice) -> Iterator[None]:
    """Within, the named choices are these tiles: for benches, tests and static checks."""
    before = dict(_forced)
    _forced.update({kernel: (tile,) for kernel, tile in tiles.items()})
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def folder() -> Path:
    """Where choices are kept: BILINEAR_OPS_CACHE_DIR, else bilinear_ops/ in the user's cache."""
    of_user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("BILINEAR_OPS_CACHE_DIR") or of_user / "bilinear_ops")


def seconds(runs: dict[Choice, Callable[[], object]], device: torch.device) -> dict[Choice, float]:
    """The median time of each warm run, taken in turn; on a GPU by CUDA events, with L2 flushed before each run."""
    clock = _gpu_clock(device) if device.type == "cuda" else _cpu_clock
    samples: dict[Choice, list[float]] = {tile: [] for tile in runs}
    for _ in range(ROUNDS if device.type == "cuda" else 1):  # interpreted, time says nothing
        for tile, run in runs.items():
            samples[tile].append(clock(run))
    return {tile: statistics.median(times) for tile, times in samples.items()}


def _gpu_clock(device: torch.device) -> Callable[[Callable[[], object]], float]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def clock(run: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()  # the host enqueues the run meanwhile
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return clock


def _cpu_clock(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _capturing(t: Tensor) -> bool:
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


def _key(kernel: str, like: Tensor, shape: tuple[int, ...]) -> Key:
    dtype = str(like.dtype).removeprefix("torch.")
    return (
        ("kernel", kernel),
        ("shape", shape),
        ("dtype", "tf32" if dtype == "float32" and config.tf32_allowed() else dtype),
        ("device", _device_name(like.device)),
        *_code(),
    )


@cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


@cache
def _code() -> Key:
    """Versions and a hash of the kernels: a choice holds for no others."""
    sources = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        sources.update(path.read_bytes())
    return (("torch", torch.__version__), ("triton", triton.__version__), ("kernels", sources.hexdigest()[:16]))


def _known_or_measured(
    key: Key,
    candidates: tuple[Choice, ...],
    unproven: tuple[Choice, ...],
    run: Callable[[Choice], object],
    device: torch.device,
) -> Choice:
    named = dict(key)
    digest = hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16]
    path = folder() / f"{named['kernel']}-{digest}.json"
    by_name = {repr(tile): tile for tile in (*candidates, *unproven)}
    name = _read(path, named)
    if name in by_name:
        return by_name[name]
    times = _measured(candidates, unproven, run, device)
    best = min(times, key=lambda tile: times[tile])
    _write(path, {"key": named, "tile": repr(best), "seconds": {repr(t): s for t, s in times.items()}})
    return best


def _measured(
    candidates: tuple[Choice, ...],
    unproven: tuple[Choice, ...],
    run: Callable[[Choice], object],
    device: torch.device,
) -> dict[Choice, float]:
    """Times of the candidates that run and of unproven ones that agree; raises the first error if no candidate runs."""
    runs: dict[Choice, Callable[[], object]] = {}
    errors: list[Exception] = []
    for tile in candidates:
        try:
            run(tile)  # compiles
            runs[tile] = partial(run, tile)
        except (TritonError, RuntimeError) as error:  # too large for the device, or for the compiler
            errors.append(error)
    if not runs:
        raise errors[0]
    first, proven = next(iter(runs.items()))
    for tile in unproven:
        try:
            if _agree(partial(run, tile), proven):
                runs[tile] = partial(run, tile)
            else:
                warnings.warn(f"{tile} is left out: it gives other numbers than {first}", stacklevel=2)
        except (TritonError, RuntimeError) as error:
            warnings.warn(f"{tile} is left out: {error}", stacklevel=2)
    return seconds(runs, device)


def _agree(run: Callable[[], object], proven: Callable[[], object]) -> bool:
    """Whether two launches give the same numbers, up to the rounding of an element or of one of typical size."""
    expected = [t.clone() for t in _tensors(proven())]
    for _ in range(REPEATS):
        for t in _tensors(run()):
            t.fill_(torch.nan)  # what the next run does not write is seen
        if not all(map(_alike, _tensors(run()), expected)):
            return False
    return True


def _alike(found: Tensor, expected: Tensor) -> bool:
    rounding = torch.finfo(expected.dtype).eps
    found, expected = found.float(), expected.float()
    typical = float(expected.nan_to_num(0, 0, 0).square().mean().sqrt())
    return torch.allclose(found, expected, rounding, rounding * typical, equal_nan=True)


def _tensors(found: Any) -> list[Tensor]:
    return [t for t in (found if isinstance(found, tuple) else (found,)) if t is not None]


def _read(path: Path, key: dict[str, Any]) -> str | None:
    """The name of the choice that was kept under exactly this key, or None."""
    try:
        found = json.loads(path.read_text())
        return str(found["tile"]) if found["key"] == json.loads(json.dumps(key)) else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):  # absent, truncated, or not ours
        return None


def _write(path: Path, found: dict[str, Any]) -> None:
    """Write the file atomically; if that fails, warn, and the next process measures again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(found, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(f"the choice of a tile could not be kept: {error}", stacklevel=2)
