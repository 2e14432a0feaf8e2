"""Clusters of features with similar interactions, to order a heat map."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import normalize

from bilinear_ops._check import check, check_integers, check_values
from bilinear_ops.analysis.progress import progress_bar


def interaction_clusters(q: Tensor, clusters: int, *, progress: bool = False) -> list[list[int]]:
    """Group the rows of a symmetric matrix by average linkage of their cosines.

    Args:
        q: `[F, F]`.
        clusters: number of groups, from 1 to F.
        progress: show a progress bar over the joined rows; needs tqdm.

    Returns:
        The row indices of each group, in the order of the linkage tree: similar groups are neighbours.

    Raises:
        RuntimeError: q is not square.
        TypeError: q is not a floating-point tensor.
        ValueError: clusters out of range, or q not finite.
    """
    size = check(q=(q, "F F"))["F"]
    check_integers(clusters=clusters)
    if not 1 <= clusters <= size:
        raise ValueError(f"clusters must be from 1 to {size}, got {clusters}")
    check_values(q=q)
    if not q.isfinite().all():
        raise ValueError("q must be finite to be clustered")
    rows = normalize(q.detach().double(), dim=1)
    similarity = (rows @ rows.t()).fill_diagonal_(-math.inf)
    groups = {i: [i] for i in range(size)}
    found = [*groups.values()]
    with progress_bar(size - 1, "row", progress) as advance:
        while len(groups) > 1:
            a, b = divmod(int(similarity.argmax()), size)
            joined = (len(groups[a]) * similarity[a] + len(groups[b]) * similarity[b]) / len(groups[a] + groups[b])
            similarity[a] = similarity[:, a] = joined
            similarity[a, a] = similarity[b] = similarity[:, b] = -math.inf
            groups[a] = groups[a] + groups.pop(b)
            if len(groups) == clusters:
                found = [*groups.values()]
            advance(1)
    (order,) = groups.values()
    return sorted(found, key=lambda group: order.index(group[0]))
