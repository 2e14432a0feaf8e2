"""Higher-order SVD of a bilinear layer's tensor, from inner products of its neurons (docs/math.md 2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bilinear_ops._check import check, check_integers
from bilinear_ops.analysis.bases import fold
from bilinear_ops.analysis.progress import progress_bar
from bilinear_ops.composite.blockwise import recompute
from bilinear_ops.composite.interaction.gram import neuron_tiles
from bilinear_ops.composite.limits import limits
from bilinear_ops.interaction.gram import neuron_gram
from bilinear_ops.results import Result

MODES = ("output", "input")
CONDITION = 1e-4  # ratio of singular values below which their squares lose too many digits of float64


class HOSVD(
    Result,
    NamedTuple(
        "HOSVD",
        [
            ("U", Tensor),  # [o, rank], or [d, rank] in input mode ([F, rank] in a basis)
            ("S", Tensor),  # [rank]
            ("norm", Tensor),  # 0-dim: |B|; 1 - sum S^2 / norm^2 is the share of |B|^2 left out
        ],
    ),
):
    """The strongest output (or input) directions of B as columns, with their singular values, descending."""

    __slots__ = ()


def hosvd(
    w: Tensor,
    v: Tensor,
    p: Tensor,
    rank: int,
    *,
    mode: str = "output",
    basis: Tensor | None = None,
    progress: bool = False,
) -> HOSVD:
    """The leading singular vectors of B flattened to `[o, d^2]`, or in input mode to `[d, o d]` ([P] 3.3).

    In output mode, the matrices `interaction_matrices(w, v, U.T @ p)` are mutually orthogonal and have norms S. B is
    never formed; the cost is about 3 h^2 d multiplications in float64.

    Singular values have a relative error of at most 1e-6 down to 1e-8 of the largest in output mode; down to 1e-5 of
    the largest in input mode, or if some neurons are zero or copies of each other.

    Args:
        w, v, p: `[h, d]`, `[h, d]` and `[o, h]`.
        rank: number of singular vectors, at most min(o, h), or in input mode d, in a basis min(d, F).
        mode: "output" or "input".
        basis: D `[d, F]`: of the tensor in the feature basis, whose matrices are D^T Q_k D.
        progress: show a progress bar over tiles of neurons; needs tqdm.

    Returns:
        `HOSVD(U, S, norm)` in w's dtype, float32 for half precision. The largest component of a column of U is
        positive. Differentiable if the singular values are distinct. NaN for weights that are not finite.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices.
        TypeError: an argument that is not a floating-point tensor.
        ValueError: unknown mode, or a rank out of range.
        ModuleNotFoundError: progress without tqdm.
    """
    sizes = check(w=(w, "h d"), v=(v, "h d"), p=(p, "o h"), basis=(basis, "? d F"))
    check_integers(rank=rank)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    most = min(sizes["o"], sizes["h"]) if mode == "output" else min(sizes["d"], sizes.get("F", sizes["d"]))
    if not 0 <= rank <= most:
        raise ValueError(f"rank must be between 0 and {most} in {mode} mode, got {rank}")
    dtype = torch.promote_types(w.dtype, torch.float32)
    p = p.double()
    lift, (w, v) = fold(None if basis is None else basis.double(), w.double(), v.double())
    lift = lift if mode == "input" else None
    gram = _output_gram(w, v, p, progress) if mode == "output" else _input_gram(w, v, p, progress)
    if not gram.isfinite().all():  # LAPACK refuses it
        u, s = p.new_full((len(gram) if lift is None else len(lift), rank), torch.nan), p.new_full((rank,), torch.nan)
        return HOSVD(*(t.to(dtype) for t in (u, s, p.new_full((), torch.nan))))
    squares, vectors = torch.linalg.eigh(gram)
    u, s = vectors.flip(1)[:, :rank], squares.flip(0)[:rank].clamp_min(0).sqrt()
    if mode == "output" and rank and s[-1] < CONDITION * s[0]:
        factor, failed = torch.linalg.cholesky_ex(neuron_gram(w, v))
        if not failed:  # Gram matrices of zero or equal neurons have no Cholesky factor
            u, s, _ = torch.linalg.svd(p @ factor, full_matrices=False)
            u, s = u[:, :rank], s[:rank]
    u = u if lift is None else lift @ u
    norm = gram.diagonal().sum().sqrt()
    return HOSVD(fix_signs(u.mT).mT.to(dtype), s.to(dtype), norm.to(dtype))


def fix_signs(vectors: Tensor) -> Tensor:
    """Flip vectors `[..., d]` so that the component of largest magnitude is positive."""
    if not vectors.numel():
        return vectors
    largest = vectors.gather(-1, vectors.abs().argmax(-1, keepdim=True))
    return torch.where(largest < 0, -vectors, vectors)


def _output_gram(w: Tensor, v: Tensor, p: Tensor, progress: bool) -> Tensor:
    """P Kern P^T [o, o] with Kern the neurons' Gram matrix, by pairs of tiles; Kern is symmetric."""
    tiles = list(neuron_tiles(w, v, p, limits.gram_neurons))
    gram = p.new_zeros(p.shape[0], p.shape[0])
    with progress_bar(len(tiles) * (len(tiles) + 1) // 2, "tile", progress) as advance:
        for i, (w1, v1, p1) in enumerate(tiles):
            gram = gram + recompute(_output_tile, w1, v1, p1, w1, v1, p1)
            advance(1)
            for w2, v2, p2 in tiles[:i]:
                tile = recompute(_output_tile, w1, v1, p1, w2, v2, p2)
                gram = gram + tile + tile.t()
                advance(1)
    return gram


def _output_tile(w1: Tensor, v1: Tensor, p1: Tensor, w2: Tensor, v2: Tensor, p2: Tensor) -> Tensor:
    return p1 @ neuron_gram(w1, v1, w2, v2) @ p2.t()


def _input_gram(w: Tensor, v: Tensor, p: Tensor, progress: bool) -> Tensor:
    """sum_oj B_oij B_oi'j [d, d], a tile of neurons against all neurons at a time."""
    gram = w.new_zeros(w.shape[1], w.shape[1])
    tiles = list(neuron_tiles(w, v, p, limits.gram_neurons))
    with progress_bar(len(tiles), "tile", progress) as advance:
        for w1, v1, p1 in tiles:
            gram = gram + recompute(_input_tile, w1, v1, p1, w, v, p)
            advance(1)
    return gram


def _input_tile(w1: Tensor, v1: Tensor, p1: Tensor, w: Tensor, v: Tensor, p: Tensor) -> Tensor:
    """1/4 {W1^T [(N * V1 V^T) W + (N * V1 W^T) V] + V1^T [(N * W1 W^T) V + (N * W1 V^T) W]} with N = P1^T P."""
    n = 0.25 * (p1.t() @ p)
    of_w = (n * (v1 @ v.t())) @ w + (n * (v1 @ w.t())) @ v
    of_v = (n * (w1 @ w.t())) @ v + (n * (w1 @ v.t())) @ w
    return w1.t() @ of_w + v1.t() @ of_v
