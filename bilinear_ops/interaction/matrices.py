"""Interaction matrices of a bilinear layer: the public functions, the op and its backward (docs/math.md 2)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from bilinear_ops import _impl, _op, reference
from bilinear_ops._check import check, check_integers, check_layer
from bilinear_ops._sharding import own_directions, refuse_sharded, sharded
from bilinear_ops.composite.interaction import matrices as composite
from bilinear_ops.results import LAYOUTS, Directions

# A branch without a kernel: what a launcher says of it begins so.
LEFT_TO_PYTORCH = "the table of tiles leaves these sizes to PyTorch"


@sharded("K", over="K h o", w="h d", v="h d", c="K h")
@_op.without_autocast
def interaction_matrices(
    w: Tensor, v: Tensor, c: Tensor | Directions, *, layout: str = "full", impl: str = "auto"
) -> Tensor:
    """Q_k = sum_h C_kh sym(w_h v_h^T), the symmetric interaction matrices of K output directions ([P] 3.1).

    x^T Q_k x is direction k of the bilinear layer's output. The tensor [h, d, d] is never formed.

    Args:
        w, v: `[h, d]` up-projections.
        c: `[K, h]` coefficients, directions times the down-projection; or `Directions(u, p)`, whose low rank is used.
        layout: "full", or "packed" for the entries i <= j row by row, not scaled off the diagonal.
        impl: "auto", "triton" or "torch".

    Returns:
        `[K, d, d]`, bitwise equal to its transpose, or `[K, d(d+1)/2]`; half precision is summed in float32.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices, or impl="triton" where it cannot run.
        TypeError: an argument that is not a floating-point tensor.
        ValueError: unknown layout or impl.
    """
    check_layer(w, v, c)
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    impl = _impl.resolve(impl, w)
    if _impl.needs_reference():
        return reference.interaction_matrices(w, v, c, layout=layout)
    return interaction_op(w, v, *factors(c), layout == "packed", impl)


def iter_interaction_matrices(
    w: Tensor,
    v: Tensor,
    c: Tensor | Directions,
    *,
    layout: str = "full",
    chunk_bytes: int,
    group: Any = None,
    impl: str = "auto",
) -> Iterator[tuple[slice, Tensor]]:
    """The matrices in chunks of directions, for a K whose `interaction_matrices` would not fit in memory.

    Args:
        w, v, c, layout, impl: as for `interaction_matrices`.
        chunk_bytes: what the tensors of a chunk, its workspace and the chunk before it, which the caller's loop may
            still hold, take together at most. Not counted are a library's own buffers (a few MB), and what tuning takes
            while it measures and by what it prefers.
        group: process group whose ranks all call with the same tensors: each yields its share of the directions.

    Yields:
        (slice of the directions, their matrices), in order; each chunk is a tensor of its own.

    Raises:
        as `interaction_matrices`; ValueError for a budget that does not hold one direction.
    """
    refuse_sharded("iter_interaction_matrices", (w, v, c), "pass plain tensors and group=")
    sizes = check_layer(w, v, c)
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    check_integers(chunk_bytes=chunk_bytes)
    impl = _impl.resolve(impl, w)
    step = _chunk(sizes["K"], sizes.get("o", 0), layout == "packed", w, chunk_bytes, impl)
    mine = range(sizes["K"]) if group is None else own_directions(group, sizes["K"])
    return _chunks(w, v, c, layout, mine, step, impl)


def _chunks(
    w: Tensor, v: Tensor, c: Tensor | Directions, layout: str, mine: range, step: int, impl: str
) -> Iterator[tuple[slice, Tensor]]:
    for start in range(mine.start, mine.stop, step):
        chunk = slice(start, min(start + step, mine.stop))
        part = Directions(c.u[chunk], c.p) if isinstance(c, Directions) else c[chunk]
        yield chunk, interaction_matrices(w, v, part, layout=layout, impl=impl)


def _chunk(directions: int, o: int, packed: bool, w: Tensor, chunk_bytes: int, impl: str) -> int:
    """The most directions whose workspace and two chunks of matrices fit the budget."""
    d, workspace = w.shape[1], (composite if impl == "torch" else launchers()).workspace

    def needed(outputs: int) -> int:
        result = outputs * (d * (d + 1) // 2 if packed else d * d) * w.itemsize
        return 2 * result + workspace(outputs, o, packed, w) * max(4, w.itemsize)

    if needed(1) > chunk_bytes:
        raise ValueError(f"chunk_bytes must be at least {needed(1)} for one direction at a time, got {chunk_bytes}")
    low, high = 1, max(1, directions)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needed(middle) <= chunk_bytes else (low, middle - 1)
    return low


@sharded("...", over="...", q="... i j")
def pack_symmetric(q: Tensor) -> Tensor:
    """The entries i <= j of symmetric matrices, row by row: `[..., d, d]` -> `[..., d(d+1)/2]`, as they are.

    Raises RuntimeError where the matrices are not square, TypeError for anything but a floating-point tensor.
    """
    sizes = check(q=(q, "... d e"))
    if sizes["d"] != sizes["e"]:
        raise RuntimeError(f"q must have shape [..., d, d], got {list(q.shape)}")
    return composite.pack_symmetric(q)


@sharded("...", over="...", t="... n")
def unpack_symmetric(t: Tensor, d: int) -> Tensor:
    """The symmetric matrices of a packed tensor: `[..., d(d+1)/2]` -> `[..., d, d]`, equal to their transposes.

    Raises RuntimeError where the packed length is not d(d+1)/2, TypeError for anything but a floating-point tensor.
    """
    check_integers(d=d)
    sizes = check(t=(t, "... n"))
    if sizes["n"] != d * (d + 1) // 2:
        raise RuntimeError(f"t must have shape [..., {d * (d + 1) // 2}] for d={d}, got {list(t.shape)}")
    return composite.unpack_symmetric(t, d)


def factors(c: Tensor | Directions) -> tuple[Tensor, Tensor | None]:
    """c as the registered ops take it: coefficients alone, or p and u."""
    return (c.p, c.u) if isinstance(c, Directions) else (c, None)


def launchers():
    """The kernels of this family, imported at the first launch."""
    from bilinear_ops.kernels.interaction import matrices

    return matrices


def forward(w: Tensor, v: Tensor, c: Tensor, u: Tensor | None, packed: bool, impl: str) -> Tensor:
    """The matrices by `impl`, where the table of tiles may choose PyTorch for "auto" but not for "triton"."""
    if impl == "torch":
        return composite.interaction_matrices(w, v, c, u, packed)
    return launchers().interaction_matrices(w, v, c, u, packed, library=impl == "auto")


def _forward_fake(w, v, c, u, packed, impl):
    outputs, d = (c if u is None else u).shape[0], w.shape[1]
    return w.new_empty(outputs, d * (d + 1) // 2) if packed else w.new_empty(outputs, d, d)


def _backward(
    dq: Tensor, w: Tensor, v: Tensor, c: Tensor, u: Tensor | None, packed: bool, need: list[bool], impl: str
) -> tuple[Tensor | None, ...]:
    """(dw, dv, dc, du) by `impl`, as `forward`."""
    if impl == "torch":
        return composite.interaction_matrices_backward(dq, w, v, c, u, need)
    from bilinear_ops.kernels.interaction import matrices_backward as kernels

    return kernels.interaction_matrices_backward(dq, w, v, c, u, need, library=impl == "auto")


def _formula(w: Tensor, v: Tensor, c: Tensor, u: Tensor | None, *, packed: bool) -> Tensor:
    return reference.interaction_matrices(
        w, v, c if u is None else Directions(u, c), layout="packed" if packed else "full"
    )


interaction_op, interaction_backward_op = _op.differentiable(
    "interaction(Tensor w, Tensor v, Tensor c, Tensor? u, bool packed, str impl) -> Tensor",
    forward,
    _forward_fake,
    _backward,
    _formula,
)
