"""One orthonormal basis in which all interaction matrices of a layer are as near to diagonal as they can be."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bilinear_ops import _op
from bilinear_ops._check import check_finite, check_integers, check_layer, check_reals
from bilinear_ops.analysis.progress import progress_bar
from bilinear_ops.analysis.singular import fix_signs
from bilinear_ops.interaction.matrices import interaction_matrices
from bilinear_ops.results import Directions, Result, coefficients


class JointDiagonalisation(
    Result,
    NamedTuple(
        "JointDiagonalisation",
        [
            ("vectors", Tensor),  # [d, d], orthonormal rows
            ("values", Tensor),  # [K, d]: the layer's outputs at the rows, z_i^T Q_k z_i
            ("share", Tensor),  # 0-dim: sum values^2 / sum |Q_k|^2, 1 if all Q_k are diagonal
        ],
    ),
):
    """Q_k is nearly sum_i values_ki z_i z_i^T, with the same vectors z_i for every output; strongest first."""

    __slots__ = ()


@_op.without_autocast
@torch.no_grad()
def joint_diagonalise(
    w: Tensor, v: Tensor, c: Tensor | Directions, *, sweeps: int = 50, tol: float = 1e-9, progress: bool = False
) -> JointDiagonalisation:
    """Eigenvectors that all outputs share, as far as they can: orthonormal Z with the largest sum_k |diag Z Q_k Z^T|^2.

    By Jacobi rotations, each the best of its plane (Cardoso and Souloumiac 1996), from the input directions of `hosvd`;
    no sweep lowers the sum. A local optimum; exact, up to order and signs, if the matrices commute. K d^2 numbers are
    formed, in float64. Not differentiable.

    Args:
        w, v, c: as for `interaction_matrices`.
        sweeps: maximal number of sweeps over all planes.
        tol: end once a sweep raises the share by less than this.
        progress: show a progress bar over the sweeps; needs tqdm.

    Returns:
        `JointDiagonalisation(vectors, values, share)` in w's dtype, float32 for half precision. The largest component
        of a vector is positive. The share is NaN for a layer of zeros.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices.
        TypeError: an argument that is not a floating-point tensor, or sweeps not an int.
        ValueError: negative sweeps or tol; weights that are not finite.
        ModuleNotFoundError: progress without tqdm.
    """
    sizes = check_layer(w, v, c)
    check_integers(sweeps=sweeps)
    check_reals(tol=tol)
    if sweeps < 0 or not tol >= 0:
        raise ValueError(f"sweeps and tol must not be negative, got {sweeps} and {tol}")
    weights = coefficients(Directions(c.u.double(), c.p.double()) if isinstance(c, Directions) else c.double())
    check_finite(w=w, v=v, c=weights)
    dtype = torch.promote_types(w.dtype, torch.float32)
    q = interaction_matrices(w.double(), v.double(), weights)
    whole = q.square().sum()
    z = torch.linalg.eigh((q @ q).sum(0)).eigenvectors.t() if sizes["d"] else w.new_zeros(0, 0).double()
    q = z @ q @ z.t()
    share = _diagonal(q).square().sum() / whole
    with progress_bar(sweeps, "sweep", progress) as advance:
        left = sweeps
        while left:
            left -= 1
            advance(1)
            for first, second in _rounds(sizes["d"], w.device):
                z, q = _rotate(z, q, first, second)
            before, share = share, _diagonal(q).square().sum() / whole
            if not share - before > tol:
                break
        advance(left)
    values = _diagonal(q)
    order = values.square().sum(0).argsort(descending=True, stable=True)
    return JointDiagonalisation(fix_signs(z[order]).to(dtype), values[:, order].to(dtype), share.to(dtype))


def _diagonal(q: Tensor) -> Tensor:
    return q.diagonal(dim1=1, dim2=2)


def _rounds(d: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """All pairs of 0 to d - 1 in rounds of disjoint ones, as in a tournament: one stays, the others go round."""
    players = list(range(d + d % 2))
    rounds = []
    for _ in range(len(players) - 1):
        half = len(players) // 2
        pairs = [p for p in zip(players[:half], reversed(players[half:]), strict=True) if max(p) < d]
        rounds.append(tuple(torch.tensor(side, dtype=torch.int64, device=device) for side in zip(*pairs, strict=True)))
        players = [players[0], players[-1], *players[1:-1]]
    return [(pair[0], pair[1]) for pair in rounds if pair]


def _rotate(z: Tensor, q: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate each of these disjoint planes by the angle that leaves most on the diagonals."""
    spread, twice = _diagonal(q)[:, first] - _diagonal(q)[:, second], 2 * q[:, first, second]
    on, off = (spread.square() - twice.square()).sum(0), 2 * (spread * twice).sum(0)
    angle = 0.5 * torch.atan2(off, on + torch.hypot(on, off))
    cos, sin = angle.cos(), angle.sin()
    z = _mixed(z, first, second, cos[:, None], sin[:, None])
    q = _mixed(q.transpose(0, 1), first, second, cos[:, None, None], sin[:, None, None]).transpose(0, 1)
    return z, _mixed(q.permute(2, 0, 1), first, second, cos[:, None, None], sin[:, None, None]).permute(1, 2, 0)


def _mixed(rows: Tensor, first: Tensor, second: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    mixed = rows.clone()
    mixed[first] = cos * rows[first] + sin * rows[second]
    mixed[second] = cos * rows[second] - sin * rows[first]
    return mixed
