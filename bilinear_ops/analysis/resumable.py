"""Analyses of many directions that survive being killed: one file a chunk of directions, each written once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilinear_ops._check import check_integers
from bilinear_ops.analysis.progress import progress_bar, rank
from bilinear_ops.results import Directions

PLAN = "plan.json"


def run_in_chunks(
    analyse: Callable[[Any], Any],
    c: Tensor | Directions,
    folder: str | Path,
    *,
    chunk: int,
    description: str = "",
    group: Any = None,
    progress: bool = False,
) -> list[Path]:
    """Run `analyse` on a chunk of directions at a time and keep each result in a file; what is there already is kept.

    A run that was killed goes on where it was when it is started again: only the chunk that was cut is computed again.

    Args:
        analyse: of some directions (rows of c), returns a tensor, or a named tuple or dict of tensors, whose first
            dimension is the directions: `lambda part: bo.analysis.interaction_eigh(w, v, part, 4)`.
        c: `[K, h]` coefficients or `Directions`.
        folder: of this run alone, on a file system that all ranks share; made if there is none.
        chunk: directions a file.
        description: says what is run, so that another run does not go on with this one's files.
        group: process group over which the chunks are dealt in turn; the call ends when all ranks are done.
        progress: show a progress bar over the chunks of the first rank; needs tqdm.

    Returns:
        the files of all chunks in order, for `load_chunks`; they are read with `torch.load` too.

    The values of c are part of what names a run. The tensors that `analyse` closes over are not: name them in
    description.

    Raises:
        TypeError: chunk not an int.
        ValueError: chunk below 1, or a folder that holds the files of another run.
    """
    check_integers(chunk=chunk)
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    rows = c.u if isinstance(c, Directions) else c
    count = rows.shape[0]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plan = {"directions": count, "chunk": chunk, "dtype": str(rows.dtype), "description": description, "c": _digest(c)}
    _agree_on(plan, folder)
    paths = [folder / f"{start:012d}.pt" for start in range(0, count, chunk)]
    mine = _dealt([i for i, path in enumerate(paths) if not path.exists()], group)
    with progress_bar(len(mine), "chunk", progress) as advance:
        for i in mine:
            part = slice(i * chunk, (i + 1) * chunk)
            result = analyse(Directions(c.u[part], c.p) if isinstance(c, Directions) else c[part])
            _write(paths[i], partial(torch.save, _named(result)))
            advance(1)
    if group is not None:
        torch.distributed.barrier(group)
    return paths


def _digest(c: Tensor | Directions) -> str:
    """Of the values of the directions: other ones are another run."""
    found = hashlib.sha256()
    for t in c if isinstance(c, Directions) else (c,):
        found.update(t.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def load_chunks(paths: list[Path]) -> dict[str, Tensor]:
    """The results of `run_in_chunks` over all directions, by the names of their fields; "0" for a lone tensor.

    Files of a few chunks may be given, where the whole would not fit in memory.

    Raises TypeError for anything but a list of paths.
    """
    if not isinstance(paths, list | tuple) or not all(isinstance(path, str | Path) for path in paths):
        raise TypeError(f"paths must be a list of paths, got {paths!r}")
    parts = [torch.load(path, map_location="cpu", weights_only=True) for path in paths]
    return {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else {})}


def _named(result: Any) -> dict[str, Tensor]:
    if isinstance(result, Tensor):
        result = {"0": result}
    elif not isinstance(result, dict):
        result = result._asdict()
    return {name: t.detach().cpu() for name, t in result.items()}


def _agree_on(plan: dict[str, Any], folder: Path) -> None:
    """Write the plan of a new run; raise ValueError where the folder has another."""
    path = folder / PLAN
    if not path.exists():
        _write(path, lambda f: f.write(json.dumps(plan).encode()))
    found = json.loads(path.read_text())
    if found != plan:
        raise ValueError(f"{folder} holds the files of another run, {found}, not of {plan}: give another folder")


def _dealt(missing: list[int], group: Any) -> list[int]:
    """This rank's share of the missing chunks, as the first rank of the group found them."""
    if group is None:
        return missing
    found = [missing]
    torch.distributed.broadcast_object_list(found, group=group, group_src=0)
    return found[0][torch.distributed.get_rank(group) :: torch.distributed.get_world_size(group)]


def _write(path: Path, write: Callable[[Any], Any]) -> None:
    """All of a file or none of it, even where the process is killed."""
    unfinished = path.with_name(f".{path.name}.{rank()}")  # a later run writes over one that was left behind
    with open(unfinished, "wb") as f:
        write(f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(unfinished, path)
