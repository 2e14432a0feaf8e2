"""One input's outputs as sums of what each eigenvector contributes ([P] App. C)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from bilinear_ops import _op
from bilinear_ops._check import check, check_integers
from bilinear_ops.analysis.eigen.spectra import EigenPairs
from bilinear_ops.analysis.truncation import check_pairs
from bilinear_ops.interaction.forms import eigen_form
from bilinear_ops.results import Result


class Explanation(
    Result,
    NamedTuple(
        "Explanation",
        [
            ("contributions", Tensor),  # [..., K, n], by descending magnitude
            ("remainder", Tensor),  # [..., K]
        ],
    ),
):
    """logits = contributions.sum(-1) + remainder."""

    __slots__ = ()


@_op.without_autocast
def explain(x: Tensor, pairs: EigenPairs, n: int, *, logits: Tensor | None = None) -> Explanation:
    """The n largest terms lambda (u.x)^2 of each output at x, with their signs, and what they leave ([P] App. C).

    Which eigenvectors they belong to: `eigen_form(x, pairs.values, pairs.vectors, reduce="none")` has all terms in the
    order of the eigenvectors.

    Args:
        x: `[..., d]` inputs of the layer.
        pairs: eigenpairs of K outputs, all d of them unless logits are given.
        n: number of terms, at most that of the pairs.
        logits: `[..., K]`, the outputs to explain. What is no quadratic form of x is then in the remainder: biases, an
            activation, eigenvectors left out. By default the sum of all terms.

    Returns:
        `Explanation(contributions, remainder)`; contributions and remainder add up to the logits. Differentiable.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices.
        TypeError: an argument that is not a floating-point tensor, pairs that are not EigenPairs, or n not an int.
        ValueError: n out of range, or fewer than d pairs without logits.
    """
    check_pairs(pairs=pairs)
    sizes = check(
        x=(x, "... d"), values=(pairs.values, "K r"), vectors=(pairs.vectors, "K r d"), logits=(logits, "? ... K")
    )
    check_integers(n=n)
    if not 0 <= n <= sizes["r"]:
        raise ValueError(f"n must be from 0 to {sizes['r']}, the number of pairs, got {n}")
    if logits is None and sizes["r"] < sizes["d"]:
        raise ValueError(f"pairs must be all {sizes['d']} of each output, got {sizes['r']}: give logits, or all pairs")
    if logits is not None and logits.shape[:-1] != x.shape[:-1]:
        raise RuntimeError(f"logits must have shape {[*x.shape[:-1], sizes['K']]}, got {list(logits.shape)}")
    terms = eigen_form(x, pairs.values, pairs.vectors, reduce="none")  # [..., K, r]
    order = terms.detach().abs().argsort(dim=-1, descending=True, stable=True)
    shown = terms.gather(-1, order[..., :n])
    if logits is None:
        return Explanation(shown, terms.gather(-1, order[..., n:]).sum(-1))
    return Explanation(shown, logits - shown.sum(-1))
