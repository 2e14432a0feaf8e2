"""Sparse rank-1 subcomponents: row gathers where few are active, the library's GEMM and a gather of it elsewhere.

Same functions, same signatures, as `bilinear_ops.kernels.rank1.sparse`. Rows are the vectors of all subcomponents
[C, d], and indices [M, k] name those active for a token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from bilinear_ops.composite.blockwise import blocks
from bilinear_ops.composite.limits import limits

# Measured in fp32 on one AVX-512 core, against a multiply-add of the dense product: a gathered one costs 60 times as
# much, copying one element of the rows into order 160 times.
GATHER_COST = 60
COPY_COST = 160


def sparse_dots(x: Tensor, rows: Tensor, indices: Tensor) -> Tensor:
    """<x_t, rows_i> for the active rows i of each token: x [M, d] -> [M, k]."""
    tokens, k = indices.shape
    count, d = rows.shape
    copy = 0 if rows.is_contiguous() else COPY_COST * count
    if GATHER_COST * tokens * k + copy >= tokens * count:
        return (x @ rows.t()).gather(1, indices)
    rows = rows.contiguous()
    dots = x.new_empty(tokens, k)
    if k == 0:
        return dots
    for a, b in blocks(tokens, k * d, limits.active_rows):
        chunk = slice(a, b)
        active = rows.index_select(0, indices[chunk].flatten()).view(b - a, k, d)
        torch.bmm(active, x[chunk, :, None], out=dots[chunk, :, None])
    return dots


def sparse_sums(coefficients: Tensor, rows: Tensor, indices: Tensor) -> Tensor:
    """sum_j coefficients_tj rows_i(tj): [M, k] -> [M, d]."""
    if indices.numel() == 0:
        return rows.new_zeros(indices.shape[0], rows.shape[1])
    return embedding_bag(indices, rows, per_sample_weights=coefficients, mode="sum")


def sparse_outer(coefficients: Tensor, x: Tensor, indices: Tensor, count: int) -> Tensor:
    """The rows' gradient, for each row the sum of coefficients_tj x_t over the tokens where it is active: [count, d].

    Sorting the pairs by row fixes the order of every sum.
    """
    if indices.numel() == 0:
        return x.new_zeros(count, x.shape[1])
    active, order = indices.flatten().sort(stable=True)
    starts = torch.searchsorted(active, torch.arange(count, device=indices.device))
    tokens = order // indices.shape[1]
    return embedding_bag(tokens, x, starts, per_sample_weights=coefficients.flatten()[order], mode="sum")
