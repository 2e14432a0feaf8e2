"""Truncation of layers to their leading eigenvectors, and how much of a layer remains ([P] 4.2, 5, App. I)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bilinear_ops._check import check, check_index
from bilinear_ops.analysis.composition import reexpress
from bilinear_ops.analysis.eigen.spectra import EigenPairs, interaction_eigh
from bilinear_ops.analysis.progress import progress_bar
from bilinear_ops.composite.blockwise import blocks
from bilinear_ops.interaction.forms import eigen_form
from bilinear_ops.interaction.gram import neuron_gram
from bilinear_ops.results import Directions, Result


class _QuadraticLayer(NamedTuple):
    values: Tensor  # [K, r]
    vectors: Tensor  # [K, r, d]
    outputs: Tensor | None = None  # [o, K]


class QuadraticLayer(Result, _QuadraticLayer):
    """y = sum_k outputs_k sum_i values_ki (vectors_ki . x)^2; without `outputs`, y_k is the inner sum."""

    __slots__ = ()

    def __call__(self, x: Tensor) -> Tensor:
        """x `[..., d]` to y `[..., o]`."""
        y = eigen_form(x, self.values, self.vectors)
        return y if self.outputs is None else y @ self.outputs.t()


def truncate(
    w: Tensor,
    v: Tensor,
    p: Tensor,
    n: int,
    *,
    directions: Tensor | None = None,
    which: str = "abs",
    refit: bool = False,
    basis: Tensor | None = None,
    progress: bool = False,
) -> QuadraticLayer:
    """Truncate a bilinear layer to n eigenvectors of each output direction ([P] eq. 3, App. I).

    Args:
        w, v, p: `[h, d]`, `[h, d]` and `[o, h]`, a layer without biases.
        n, which: number and choice of eigenvectors, as for `interaction_eigh`.
        directions: `[K, o]`, a direction in each row; None for the outputs themselves.
        refit: choose the output vectors of all eigenvectors by least squares on the layer's tensor, in place of
            eigenvalues times dual vectors of the directions. The error in Frobenius norm is never larger.
        basis: D `[d, F]`: truncates the layer of features f, with x = D f (or with an embedding folded in).
        progress: show a progress bar over the directions; needs tqdm.

    Returns:
        `QuadraticLayer` of K directions with n terms each; with refit, of K n directions with one term each. In a basis
        it takes features `[..., F]`.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices.
        TypeError: an argument that is not a floating-point tensor.
        ValueError: unknown which, n out of range; without refit, directions that `reexpress` refuses.
    """
    check(w=(w, "h d"), v=(v, "h d"), p=(p, "o h"), directions=(directions, "? K o"), basis=(basis, "? d F"))
    outputs = None if directions is None or refit else reexpress(w, v, p, directions).outputs.t().to(p.dtype)
    c = p if directions is None else Directions(directions, p)
    pairs = interaction_eigh(w, v, c, n, which=which, basis=basis, progress=progress)
    if refit:
        vectors = pairs.vectors.flatten(0, 1)
        return QuadraticLayer(
            vectors.new_ones(len(vectors), 1), vectors.unsqueeze(1), _nearest(w, v, p, vectors, basis)
        )
    return QuadraticLayer(pairs.values, pairs.vectors, outputs)


def _nearest(w: Tensor, v: Tensor, p: Tensor, vectors: Tensor, basis: Tensor | None) -> Tensor:
    """Output vectors [o, R] that minimise |B - sum_r outputs_r (x) v_r v_r^T| for unit vectors [R, d], or [R, F]."""
    dtype = p.dtype
    if not vectors.isfinite().all():  # LAPACK refuses their Gram matrix
        return p.new_full((len(p), len(vectors)), torch.nan)
    w, v, p, vectors = (t.double() for t in (w, v, p, vectors))
    inputs = vectors if basis is None else vectors @ basis.double().t()
    against = p @ neuron_gram(w, v, inputs, inputs)  # [o, R]: inner products of the terms with the layer's tensor
    gram = (vectors @ vectors.t()).square()
    inverse = torch.linalg.pinv(gram, hermitian=True)
    outputs = against @ inverse
    return (outputs + (against - outputs @ gram) @ inverse).to(dtype)  # refined: the Gram squares the condition


class TruncationCorrelation(
    Result,
    NamedTuple(
        "TruncationCorrelation",
        [
            ("corr", Tensor),  # [K, n]: of the first 1, ..., n eigenvectors; NaN if form or target is constant
            ("count", Tensor),  # [K], int64: number of tokens; hides tuple.count
        ],
    ),
):
    """Pearson correlations of truncated quadratic forms with their targets, by number of eigenvectors."""

    __slots__ = ()


@torch.no_grad()
def truncation_correlation(
    x: Tensor, eig: EigenPairs, indices: Tensor, acts: Tensor, *, progress: bool = False
) -> TruncationCorrelation:
    """Correlation of truncated quadratic forms with sparse activations, over the active tokens ([P] section 5).

    One pass for all numbers of eigenvectors, with running sums per output. Not differentiable.

    Args:
        x: `[T, d]` inputs of the layer.
        eig: eigenpairs of K output directions.
        indices, acts: `[T, b]`, the active directions of each token (int64) and their activations (SAE TopK layout).
        progress: show a progress bar over the pairs of tokens and directions; needs tqdm.

    Returns:
        `TruncationCorrelation(corr, count)`.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices.
        TypeError: an argument that is not a floating-point tensor, or indices that are not int64.
        IndexError: an index out of range.
    """
    check_pairs(eig=eig)
    sizes = check(x=(x, "T d"), values=(eig.values, "K n"), vectors=(eig.vectors, "K n d"), acts=(acts, "T b"))
    check_index("indices", indices, sizes["K"], tuple(acts.shape), x)
    k = indices.flatten()
    t = torch.arange(len(x), device=x.device).repeat_interleave(acts.shape[1])
    sums = _Sums(sizes["K"], sizes["n"], x.device)
    with progress_bar(len(k), "pair", progress) as advance:
        for a, b in blocks(len(k), sizes["n"]):
            forms = eigen_form(x, eig.values, eig.vectors, pairs=(t[a:b], k[a:b]), reduce="cumsum")
            sums.add(k[a:b], forms, acts.flatten()[a:b])
            advance(b - a)
    return sums.correlation(acts.dtype)


@torch.no_grad()
def truncation_curve(
    x: Tensor, eig: EigenPairs, target: Tensor, *, active_only: bool = False, progress: bool = False
) -> Tensor | TruncationCorrelation:
    """Accuracy or correlation of a layer truncated to its first 1, ..., n eigenvectors, in one pass ([P] 4.2, 5).

    Not differentiable.

    Args:
        x: `[T, d]` inputs of the layer.
        eig: eigenpairs of K output directions.
        target: `[T]` int64, the class of each token among the K outputs; or `[T, K]`, the values to correlate with.
        active_only: use the non-zero entries of a target `[T, K]` only.
        progress: show a progress bar over the tokens; needs tqdm.

    Returns:
        For classes, the accuracies `[n]` (float32) of the largest output as prediction; otherwise
        `TruncationCorrelation`.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices.
        TypeError: an argument that is not a floating-point tensor (a target: neither that nor int64).
        IndexError: a class out of range.
        ValueError: active_only with classes.
    """
    check_pairs(eig=eig)
    sizes = check(x=(x, "T d"), values=(eig.values, "K n"), vectors=(eig.vectors, "K n d"))
    outputs, n = sizes["K"], sizes["n"]
    classes = isinstance(target, Tensor) and target.dtype == torch.int64
    if classes:
        check_index("target", target, outputs, (len(x),), x)
        if active_only:
            raise ValueError("active_only needs a target [T, K], got classes")
    else:
        check(x=(x, "T d"), values=(eig.values, "K n"), target=(target, "T K"))
    right = torch.zeros(n, dtype=torch.int64, device=x.device)
    sums = _Sums(outputs, n, x.device)
    with progress_bar(len(x), "token", progress) as advance:
        for a, b in blocks(len(x), outputs * n):
            forms = eigen_form(x[a:b], eig.values, eig.vectors, reduce="cumsum")  # [t, K, n]
            if classes:
                right += (forms.argmax(1) == target[a:b, None]).sum(0)
            else:
                wanted = target[a:b] != 0 if active_only else torch.ones_like(target[a:b], dtype=torch.bool)
                sums.add(wanted.nonzero()[:, 1], forms[wanted], target[a:b][wanted])
            advance(b - a)
    return right / len(x) if classes else sums.correlation(target.dtype)


def check_pairs(**arguments: object) -> None:
    """Raise TypeError unless these are EigenPairs."""
    for name, pairs in arguments.items():
        if not isinstance(pairs, EigenPairs):
            raise TypeError(f"{name} must be EigenPairs, got {type(pairs).__name__}")


class _Sums:
    """First and second moments of pairs (form, act), per output and number of eigenvectors."""

    def __init__(self, outputs: int, n: int, device: torch.device) -> None:
        self.count = torch.zeros(outputs, dtype=torch.int64, device=device)
        self.act = torch.zeros(outputs, 2, dtype=torch.float64, device=device)  # a, a^2
        self.form = torch.zeros(outputs, n, 3, dtype=torch.float64, device=device)  # f, f^2, f a

    def add(self, k: Tensor, forms: Tensor, acts: Tensor) -> None:
        """Outputs k [N], forms [N, n] and acts [N]."""
        f, a = forms.double(), acts.double()
        # an accumulating put sums in one order on every device
        self.count.index_put_((k,), torch.ones_like(k), accumulate=True)
        self.act.index_put_((k,), torch.stack([a, a * a], 1), accumulate=True)
        self.form.index_put_((k,), torch.stack([f, f * f, f * a[:, None]], 2), accumulate=True)

    def correlation(self, dtype: torch.dtype) -> TruncationCorrelation:
        act, act2 = (self.act / self.count[:, None]).unsqueeze(1).unbind(2)  # [K, 1]
        form, form2, cross = (self.form / self.count[:, None, None]).unbind(2)
        spread = _variance(act, act2) * _variance(form, form2)
        return TruncationCorrelation(((cross - form * act) / spread.sqrt()).to(dtype), self.count)


def _variance(mean: Tensor, mean_square: Tensor) -> Tensor:
    """The variance, NaN where it is not above the rounding errors of its terms."""
    variance = mean_square - mean * mean
    return torch.where(variance > 1e-12 * mean_square, variance, torch.nan)
