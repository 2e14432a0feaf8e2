"""The strongest interactions and moments over all of them, streamed: the public functions and their registered ops."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from bilinear_ops import _flops, _impl, _op, reference
from bilinear_ops._check import DTYPES, check, check_integers, check_layer, is_plain_like
from bilinear_ops._impl import PLAIN
from bilinear_ops._sharding import gathered, is_sharded, over_directions, refuse_sharded, sharded
from bilinear_ops.composite.blockwise import widen
from bilinear_ops.composite.interaction import ranking as composite
from bilinear_ops.composite.limits import limits
from bilinear_ops.interaction.entries import interaction_entries
from bilinear_ops.interaction.matrices import factors
from bilinear_ops.interaction.matrices import forward as interaction_matrices
from bilinear_ops.reference.interaction.matrices import in_basis
from bilinear_ops.results import (
    SCOPES,
    SCORES,
    Directions,
    InteractionMoments,
    TopInteractions,
)

# Branches without a kernel.
CALLED = "interaction_topk with a function as weight calls it for every output, which PyTorch's ranking does"
ONLY_DIAGONALS = 'interaction_topk with score="self" reads diagonals, which no kernel computes'
MOST_FEATURES = 1 << 16  # the kernels number i * F + j in 32 bits
MANY_FEATURES = (
    f"interaction_topk of more than {limits.loop_max} outputs of more than {MOST_FEATURES:,} inputs without a basis "
    "has no kernel: its keys number pairs in 32 bits"
)


@_op.without_autocast
def interaction_topk(
    w: Tensor,
    v: Tensor,
    c: Tensor | Directions,
    n: int,
    *,
    score: str = "cross",
    scope: str = "output",
    weight: Tensor | Callable[[int], Tensor] | None = None,
    basis: Tensor | None = None,
    group: Any = None,
    impl: str = "auto",
) -> TopInteractions:
    """The n strongest interactions by magnitude, of every output or of all together, with no [K, F, F] in memory.

    A strong interaction of two features that are rarely active together explains little of an output: the largest ones
    account for a feature's activation poorly unless `weight` has how often, or how strongly, pairs are active together.

    Args:
        w, v, c: as for `interaction_matrices`.
        n: how many; at most the number of scored pairs.
        score: "cross" 2 Q_ij of pairs i < j, "self" Q_ii, "pair" both ranked together, "entry" Q_ij of i <= j.
        scope: "output" ranks within every output, "global" over all of them.
        weight: multiplies the score for ranking only, as co-activation does: in w's dtype `[F, F]` (or `[d, d]` without
            a basis), `[K, F, F]`, or a function of the output's number that returns `[F, F]`; read at i <= j.
        basis: `[d, F]` directions of features.
        group: process group whose ranks all call with the same tensors: each does its share of the directions, and
            every one gets the whole result. Directions sharded as DTensors leave the result sharded.
        impl: as for `interaction_matrices`. The kernels keep the strongest pair of every tile of pairs, form no matrix
            and do not wait for the device. For few outputs, low rank, many features or an n that is large beside the
            number of pairs, "auto" forms the matrices by kernels and ranks them in PyTorch; for more than 48 outputs
            without a basis PyTorch computes and ranks tiles of pairs. A function as weight is for PyTorch always.

    Returns:
        `TopInteractions(values, k, i, j)` in descending rank, ties by (k, i, j): `[K, n]`, or `[n]` for scope "global".
        Values carry gradients, indices do not.

    Raises:
        RuntimeError, TypeError: as `interaction_matrices`; RuntimeError for impl="triton" with score "self", with a
            function as weight, or for more than 48 outputs of more than 65,536 inputs without a basis.
        ValueError: unknown score, scope or impl, or n out of range.
    """
    if group is None and weight is None and basis is None:
        small = _small_ranking(w, v, c, n, score, scope, impl)
        if small is not None:
            return small
    if group is not None:
        tensors = (w, v, c, basis, weight)
        refuse_sharded("interaction_topk", tensors, "group= deals plain tensors to the ranks; leave group out")
        check_layer(w, v, c, basis)
        whole, shared = over_directions(group, w)
        part = shared if isinstance(weight, Tensor) and weight.dim() == 3 else whole
        w, v, c, weight, basis = whole(w), whole(v), shared(c), part(weight), whole(basis)
        top = interaction_topk(w, v, c, n, score=score, scope=scope, weight=weight, basis=basis, impl=impl)
        return top if scope == "global" else gathered(top)
    if scope == "global" and is_sharded((w, v, c, basis)):
        return _merged(w, v, c, n, score, weight, basis, impl)
    return _interaction_topk(w, v, c, n, score, scope, weight, basis, impl)


def _small_ranking(
    w: Tensor, v: Tensor, c: Tensor | Directions, n: int, score: str, scope: str, impl: str
) -> TopInteractions | None:
    """The ranking of a small layer of plain tensors that nothing sees, by one sort: else None.

    None too for what the op's checks refuse: these comparisons are their own, and cost a small call less.
    """
    if not (
        impl in ("auto", "torch") and isinstance(c, Tensor)
        and type(n) is int and n > 0 and score in SCORES and scope in SCOPES
        and _impl.is_unwatched() and not _impl.needs_reference()
        and type(w) in PLAIN and w.is_cpu and all(is_plain_like(t, w) for t in (w, v, c))
    ):  # fmt: skip
        return None
    shape, rows = w.shape, c.shape
    if not (w.dtype in DTYPES and len(shape) == 2 and v.shape == shape and len(rows) == 2 and rows[1] == shape[0]):
        return None
    if torch.is_grad_enabled() and (w.requires_grad or v.requires_grad or c.requires_grad):
        return None
    found = composite.ranked_at_once(w, v, c, None, None, None, n, score, scope)
    return None if found is None else TopInteractions(*found)


@sharded("K n", over="K", numbers={"outputs": "K"}, w="h d", v="h d", c="K h", weight="K F F", basis="d F")
def _interaction_topk(
    w: Tensor,
    v: Tensor,
    c: Tensor | Directions,
    n: int,
    score: str,
    scope: str,
    weight: Tensor | Callable[[int], Tensor] | None,
    basis: Tensor | None,
    impl: str,
    outputs: Tensor | None = None,
) -> TopInteractions:
    """Of the directions with the numbers `outputs`, where these are some of many."""
    sizes = check_layer(w, v, c, basis)
    features = sizes["d"] if basis is None else sizes["F"]
    _check_ranking(n, score, scope, sizes["K"], features)
    if isinstance(weight, Tensor):
        check(w=(w, "h d"), weight=(weight, "K i j" if weight.dim() == 3 else "i j"))
        if weight.shape[-2:] != (features, features) or weight.dim() == 3 and weight.shape[0] != sizes["K"]:
            expected = f"[{features}, {features}] or [{sizes['K']}, {features}, {features}]"
            raise RuntimeError(f"weight must have shape {expected}, got {list(weight.shape)}")
    elif weight is not None and not callable(weight):
        raise TypeError(f"weight must be a torch.Tensor or a function, got {type(weight).__name__}")
    impl = _impl.resolve(impl, w)
    if _impl.needs_reference():
        return reference.interaction_topk(w, v, c, n, score=score, scope=scope, weight=weight, basis=basis)
    tensors = (w, v, *factors(c), basis)
    if isinstance(weight, Tensor):
        weight = weight.detach()
    elif weight is not None and outputs is not None:
        weight = _weight_of(outputs, weight)
    with torch.no_grad():
        top = TopInteractions(*_selected(*tensors, weight, n, score, scope, impl))
    numbered = top if outputs is None else top._replace(k=outputs[top.k])
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in tensors):
        return numbered
    k, i, j = (index.flatten() for index in top[1:])
    values = interaction_entries(w, v, c, k, i, j, basis=basis)
    if score in ("cross", "pair"):
        values = values * (1 + (i != j).long())  # a pair counts Q_ij and Q_ji
    return numbered._replace(values=values.view(top.k.shape))


def _selected(
    w: Tensor,
    v: Tensor,
    c: Tensor,
    u: Tensor | None,
    basis: Tensor | None,
    weight: composite.Weight,
    n: int,
    score: str,
    scope: str,
    impl: str,
) -> tuple[Tensor, ...]:
    """By one sort where the layer is small and nothing sees it, by the op else."""
    if impl == "torch" and _impl.is_unwatched():
        found = composite.ranked_at_once(w, v, c, u, basis, weight, n, score, scope)
        if found is not None:
            return found
    # a function cannot pass through a registered op
    select: Callable[..., tuple[Tensor, ...]] = topk_op if weight is None or isinstance(weight, Tensor) else _topk
    detached = [None if t is None else t.detach() for t in (w, v, c, u, basis)]
    return select(*detached, weight, n, score, scope, impl)


def _weight_of(outputs: Tensor, weight: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    """The weight as a function of a place among these outputs."""
    numbers = outputs.tolist()
    return lambda k: weight(numbers[k])


class _Candidates(NamedTuple):
    """What each rank has to offer for a ranking over all outputs `[ranks, n]`; rank is -1 past its last candidate."""

    values: Tensor
    rank: Tensor
    k: Tensor
    i: Tensor
    j: Tensor


def _merged(
    w: Tensor,
    v: Tensor,
    c: Tensor | Directions,
    n: int,
    score: str,
    weight: Tensor | Callable[[int], Tensor] | None,
    basis: Tensor | None,
    impl: str,
) -> TopInteractions:
    """The ranking over all outputs from those of the ranks' own: one gather of n candidates a rank, then a sort.

    The ranks' outputs and candidates are in order, so that a stable sort leaves ties in order of (k, i, j).
    """
    outputs = (c.u if isinstance(c, Directions) else c).shape[0]
    _check_ranking(n, score, "global", outputs, (w if basis is None else basis).shape[1])
    found = gathered(_interaction_topk_candidates(w, v, c, n, score, weight, basis, impl))
    best = found.rank.flatten().argsort(descending=True, stable=True)[:n]
    values, _, k, i, j = (t.flatten()[best] for t in found)
    return TopInteractions(values.to(w.dtype), k, i, j)


@sharded("ranks n", over="K", numbers={"outputs": "K"}, w="h d", v="h d", c="K h", weight="K F F", basis="d F")
def _interaction_topk_candidates(
    w: Tensor,
    v: Tensor,
    c: Tensor | Directions,
    n: int,
    score: str,
    weight: Tensor | Callable[[int], Tensor] | None,
    basis: Tensor | None,
    impl: str,
    outputs: Tensor | None = None,
) -> _Candidates:
    w, v, basis = widen(w, v, basis)  # what is ranked, before it is rounded to a half precision
    c = Directions(*widen(*c)) if isinstance(c, Directions) else widen(c)[0]
    weight = widen(weight)[0] if isinstance(weight, Tensor) else weight
    rows = (c.u if isinstance(c, Directions) else c).shape[0]
    most = min(n, _pairs(score, (w if basis is None else basis).shape[1]) * rows)
    if weight is not None and not isinstance(weight, Tensor) and outputs is not None:
        weight = _weight_of(outputs, weight)
    values, k, i, j = _interaction_topk(w, v, c, most, score, "global", weight, basis, impl)
    rank = values.detach().abs()
    if weight is not None:
        for output in k.unique().tolist():
            if isinstance(weight, Tensor):
                scale = weight if weight.dim() == 2 else weight[output]
            else:
                scale = weight(output)
            mine = k == output
            rank[mine] *= scale[i[mine], j[mine]].abs()
    if outputs is not None:
        k = outputs[k]
    short = (0, n - most)
    return _Candidates(
        pad(values, short)[None], pad(rank, short, value=-1.0)[None], *(pad(t, short)[None] for t in (k, i, j))
    )


@sharded("K", over="K", w="h d", v="h d", c="K h", basis="d F")
def interaction_moments(
    w: Tensor,
    v: Tensor,
    c: Tensor | Directions,
    *,
    basis: Tensor | None = None,
    group: Any = None,
    impl: str = "auto",
) -> InteractionMoments:
    """Power sums and the largest magnitude over each output's entries i <= j, streamed; not differentiable.

    The kernel sums over tiles of pairs and forms no matrix. Where the matrices are cheaper to form, for few directions,
    low rank or many features, the matrices' kernels form them and PyTorch sums over them.

    Args:
        w, v, c, impl: as for `interaction_matrices`.
        basis: `[d, F]` directions of features.
        group: as for `interaction_topk`.

    Returns:
        `InteractionMoments(sum, squares, cubes, fourths, max_abs)`, each `[K]`, in float32 or better.

    Raises:
        as `interaction_matrices`.
    """
    check_layer(w, v, c, basis)
    if group is not None:
        whole, shared = over_directions(group, w)
        return gathered(interaction_moments(whole(w), whole(v), shared(c), basis=whole(basis), impl=impl))
    impl = _impl.resolve(impl, w)
    if _impl.needs_reference():
        return reference.interaction_moments(w, v, c, basis=basis)
    tensors = [None if t is None else t.detach() for t in (w, v, *factors(c), basis)]
    return InteractionMoments(*moments_op(*tensors, impl))


def _pairs(score: str, features: int) -> int:
    """How many pairs of one output a score ranks."""
    return {"self": features, "cross": features * (features - 1) // 2}.get(score, features * (features + 1) // 2)


def _check_ranking(n: int, score: str, scope: str, outputs: int, features: int) -> None:
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}")
    check_integers(n=n)
    pairs = _pairs(score, features)
    most = pairs * outputs if scope == "global" else pairs
    if not 0 <= n <= most:
        raise ValueError(f"n must be from 0 to the number of scored pairs, {most}, got {n}")


def _topk(
    w: Tensor,
    v: Tensor,
    c: Tensor,
    u: Tensor | None,
    basis: Tensor | None,
    weight: composite.Weight,
    n: int,
    score: str,
    scope: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if weight is not None and not isinstance(weight, Tensor):
        _impl.refuse(impl, CALLED)
    else:
        _impl.refuse(impl, _why_no_kernel(w, c if u is None else u, basis, score))
        if impl != "torch" and score != "self":
            from bilinear_ops.kernels.interaction import ranking as kernels

            return kernels.interaction_topk(w, v, c, u, basis, weight, n, score, scope, library=impl == "auto")
    matrices = partial(interaction_matrices, impl=impl)
    return composite.interaction_topk(w, v, c, u, basis, weight, n, score, scope, matrices)


def _why_no_kernel(w: Tensor, rows: Tensor, basis: Tensor | None, score: str) -> str | None:
    """Why neither a ranking nor the matrices that it would form have kernels; None where one does or all is empty."""
    if w.numel() == 0 or rows.numel() == 0:
        return None
    if score == "self":
        return ONLY_DIAGONALS
    many = w.shape[1] > MOST_FEATURES and not composite.forms_matrices(rows.shape[0], basis, score)
    return MANY_FEATURES if many else None


def _topk_fake(w, v, c, u, basis, weight, n, score, scope, impl):
    shape = (n,) if scope == "global" else ((c if u is None else u).shape[0], n)
    return w.new_empty(shape), *(w.new_empty(shape, dtype=torch.int64) for _ in range(3))


def _moments(
    w: Tensor, v: Tensor, c: Tensor, u: Tensor | None, basis: Tensor | None, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if impl == "torch":
        return composite.interaction_moments(w, v, c, u, basis, partial(interaction_matrices, impl=impl))
    from bilinear_ops.kernels.interaction import ranking as kernels

    return kernels.interaction_moments(w, v, c, u, basis, library=impl == "auto")


def _moments_fake(w, v, c, u, basis, impl):
    wide = torch.promote_types(w.dtype, torch.float32)
    return tuple(w.new_empty((c if u is None else u).shape[0], dtype=wide) for _ in range(5))


def _matrices_of(w: Tensor, v: Tensor, c: Tensor, u: Tensor | None, basis: Tensor | None) -> Tensor:
    """What is ranked and summed, for a count of FLOPs."""
    return reference.interaction_matrices(*in_basis(w, v, basis), c if u is None else Directions(u, c))


topk_op = _op.register(
    "interaction_topk(Tensor w, Tensor v, Tensor c, Tensor? u, Tensor? basis, Tensor? weight, SymInt n, str score, "
    "str scope, str impl) -> (Tensor, Tensor, Tensor, Tensor)",
    _topk,
    _topk_fake,
    lambda w, v, c, u, basis, *_: _flops.of_call(_matrices_of, w, v, c, u, basis),
)
moments_op = _op.register(
    "interaction_moments(Tensor w, Tensor v, Tensor c, Tensor? u, Tensor? basis, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _moments,
    _moments_fake,
    lambda w, v, c, u, basis, _: _flops.of_call(_matrices_of, w, v, c, u, basis),
)
