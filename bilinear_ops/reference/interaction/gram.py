"""Inner products of neurons and of layers, as symmetric matrices (docs/math.md 2)."""

from __future__ import annotations

from torch import Tensor


def neuron_gram(w: Tensor, v: Tensor, w2: Tensor | None = None, v2: Tensor | None = None) -> Tensor:
    """Frobenius inner products of the neurons' matrices sym(w_h v_h^T): 1/2 [(W W2^T)(V V2^T) + (W V2^T)(V W2^T)]."""
    w2, v2 = w if w2 is None else w2, v if v2 is None else v2
    return 0.5 * ((w @ w2.t()) * (v @ v2.t()) + (w @ v2.t()) * (v @ w2.t()))


def layer_inner(w1: Tensor, v1: Tensor, p1: Tensor, w2: Tensor, v2: Tensor, p2: Tensor) -> Tensor:
    """<B1, B2> = sum (P1^T P2) * neuron_gram: a 0-dim tensor."""
    return ((p1.t() @ p2) * neuron_gram(w1, v1, w2, v2)).sum()
