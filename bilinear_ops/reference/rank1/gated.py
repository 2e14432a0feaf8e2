"""The gated layer as a sum of third-order rank-1 terms under stochastic masks ([B], [SPD])."""

from __future__ import annotations

from torch import Tensor

from bilinear_ops.reference.gated import gated_bilinear
from bilinear_ops.reference.rank1.masked import stochastic


def stochastic_gated_mlp(
    x: Tensor,
    w: Tensor,
    v: Tensor,
    p: Tensor,
    gates: Tensor,
    b_w: Tensor | None = None,
    b_v: Tensor | None = None,
    b_p: Tensor | None = None,
    *,
    activation: str = "identity",
    beta: float | Tensor = 1.0,
    samples: int = 1,
    seed: int | Tensor | None = None,
    sampling: str = "continuous",
    stream: int = 0,
    source: Tensor | None = None,
    target: Tensor | None = None,
    delta: Tensor | str | None = None,
    routing: Tensor | None = None,
    row_numbers: Tensor | None = None,
    column_numbers: Tensor | None = None,
) -> Tensor:
    """sum_i (m_i - delta) hid_i p_i + delta * target + b_p, m = g + (1 - g) r, or target + b_p where not routed."""
    hid = gated_bilinear(x, w, v, b_w, b_v, activation=activation, beta=beta)
    return stochastic(
        hid, p.mT, gates, b_p, target, samples=samples, seed=seed, sampling=sampling, delta=delta, routing=routing,
        stream=stream, source=source, row_numbers=row_numbers, column_numbers=column_numbers,
    )  # fmt: skip
