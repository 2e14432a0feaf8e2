"""Measures of vectors and of reconstructions, and adversarial masks ([P] 4.4, 5.1, App. D)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bilinear_ops._check import check, check_index
from bilinear_ops.composite.blockwise import widen


def effective_rank(t: Tensor) -> Tensor:
    """The participation ratio (L1 / L2)^2: the number of entries of equal magnitude with that ratio ([P] App. D).

    Args:
        t: `[..., n]`: the eigenvalues of a matrix for its effective rank, an eigenvector for its effective size.

    Returns:
        `[...]`, from 1 for a single non-zero entry to n for equal magnitudes; NaN where t is zero.

    Raises:
        TypeError: t is not a floating-point tensor.
    """
    check(t=(t, "... n"))
    return _l1_over_l2(t).square().to(t.dtype)


def hoyer(t: Tensor) -> Tensor:
    """Hoyer's sparsity (sqrt(n) - L1 / L2) / (sqrt(n) - 1): 0 for equal magnitudes, 1 for a single non-zero entry.

    Args:
        t: `[..., n]`, n > 1.

    Returns:
        `[...]`; NaN where t is zero.

    Raises:
        TypeError: t is not a floating-point tensor.
        RuntimeError: fewer than two entries, for which the measure is not defined.
    """
    n = check(t=(t, "... n"))["n"]
    if n < 2:
        raise RuntimeError(f"t must have at least 2 entries along its last dimension, got {list(t.shape)}")
    return ((n**0.5 - _l1_over_l2(t)) / (n**0.5 - 1)).to(t.dtype)


def _l1_over_l2(t: Tensor) -> Tensor:
    (t,) = widen(t)
    if t.shape[-1]:
        t = t / t.detach().abs().amax(-1, keepdim=True)  # squares could overflow or underflow
    return t.norm(p=1, dim=-1) / t.norm(dim=-1)


def adversarial_masks(vectors: Tensor) -> Tensor:
    """Input masks, each of which changes the activation of one eigenvector only: the rows of pinv(vectors)^T ([P] 4.4).

    Args:
        vectors: `[..., n, d]`, eigenvectors of one or of several outputs as rows.

    Returns:
        `[..., n, d]`: masks @ vectors^T is the identity if the vectors are independent. NaN where the vectors of an
        output are not finite.

    Raises:
        TypeError: vectors is not a floating-point tensor.
    """
    check(vectors=(vectors, "... n d"))
    (wide,) = widen(vectors)
    finite = wide.isfinite().all((-2, -1), keepdim=True)  # LAPACK refuses the others
    return torch.linalg.pinv(wide.where(finite, 0)).mT.where(finite, torch.nan).to(vectors.dtype)


def loss_added(logits: Tensor, reconstructed: Tensor, zeroed: Tensor, targets: Tensor) -> Tensor:
    """The cross entropy that a reconstruction of a layer's output adds, as a share of what zeroing it adds ([P] 5.1).

    Args:
        logits: `[..., C]` of the model as it is.
        reconstructed: `[..., C]`, with the layer's output replaced by its reconstruction.
        zeroed: `[..., C]`, with the layer's output replaced by zeros.
        targets: `[...]`, int64: the classes.

    Returns:
        0-dim, differentiable: 0 for a reconstruction that costs nothing, 1 for one no better than zeros; negative if it
        lowers the loss. float32 for half precision. NaN without targets.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices.
        TypeError: logits that are not floating-point tensors, or targets that are not int64.
        IndexError: a target out of range.
    """
    named = {"logits": logits, "reconstructed": reconstructed, "zeroed": zeroed}
    classes = check(**{name: (t, "... C") for name, t in named.items()})["C"]
    for name, t in named.items():
        if t.shape != logits.shape:
            raise RuntimeError(f"{name} must have shape {list(logits.shape)}, that of logits, got {list(t.shape)}")
    check_index("targets", targets, classes, tuple(logits.shape[:-1]), logits)
    clean, by_reconstruction, by_zeros = (
        cross_entropy(t.reshape(-1, classes), targets.reshape(-1)) for t in widen(*named.values())
    )
    return (by_reconstruction - clean) / (by_zeros - clean)
