"""A small float64 case of every op of three families: (function of a module and the tensors, tensors)."""

from functools import partial

import torch

from bilinear_ops.results import Directions
from bilinear_ops.testing import randn

double = partial(randn, dtype=torch.float64)


def layer(outputs=7, d=5, h=6, factors=None):
    w, v = double(h, d), double(h, d)
    c = (double(outputs, h),) if factors is None else (double(outputs, factors), double(factors, h))
    return [w, v, *c]


def as_directions(c):
    return c[0] if len(c) == 1 else Directions(*c)


def matrices(module, w, v, *c, **options):
    return module.interaction_matrices(w, v, as_directions(c), **options)


def topk(module, w, v, *c, basis=None, **options):
    return module.interaction_topk(w, v, as_directions(c), 4, basis=basis, **options).values


def diagonal(module, w, v, basis, *c):
    return module.interaction_diagonal(w, v, as_directions(c), basis=basis)


OUTPUTS, ROWS, COLUMNS = (
    torch.tensor([0, 1, 6, 6, 3, 2, 0]),
    torch.tensor([0, 4, 3, 3, 2, 1, 4]),
    torch.tensor([4, 0, 2, 2, 1, 1, 4]),
)
ACTIVE = torch.tensor([[0, 2], [1, 4], [3, 3], [2, 0]])
PAIRS = (torch.tensor([0, 1, 1, 0, 3, 2]), torch.tensor([3, 0, 3, 3, 2, 1]))


def active(module, w, v, c, basis, acts):
    return module.active_interactions(w, v, c, basis, ACTIVE, acts, ACTIVE).values


def gated(module, *tensors, activation, beta=1.0):
    return module.gated_mlp(*tensors, activation=activation, beta=beta)


def swish(module, *tensors):
    return module.gated_mlp(*tensors[:-1], activation="swish", beta=tensors[-1])


def mlp(rows=11, d=4, h=6, o=3):
    return [double(rows, d), double(h, d), double(h, d), double(o, h), double(h), double(h), double(o)]


def rank1(tokens=11, d=4, c=6, o=3):
    return [double(tokens, d), double(d, c), double(c, o), torch.rand(tokens, c, dtype=torch.float64), double(o)]


def stochastic(module, x, read, write, gates, bias, weight, *source, **options):
    source = source[0] if source else None
    return module.stochastic_rank1_linear(
        x,
        read,
        write,
        gates,
        bias,
        weight=weight,
        samples=2,
        seed=3,
        stream=5,
        delta="uniform",
        source=source,
        **options,
    )


def stochastic_gated(module, x, w, v, p, b_w, b_v, b_p, target, gates):
    return module.stochastic_gated_mlp(
        x, w, v, p, gates, b_w, b_v, b_p, activation="silu", samples=2, seed=3, stream=5, target=target, delta="uniform"
    )


def sparse(module, *tensors):
    """So many subcomponents that gathering those active is cheaper than the dense product."""
    x, read, write, gates, bias = tensors
    return module.rank1_sparse(x, read, write, torch.arange(11)[:, None] * 17, gates, bias)


def accumulated(module, gates, read, write, base):
    return module.rank1_accumulate(gates, read, write, base=base)


CASES = {
    "gated": (partial(gated, activation="silu"), mlp()),
    "gated, swish": (swish, [*mlp(), torch.tensor(0.7, dtype=torch.float64)]),
    "matrices one by one": (matrices, layer(outputs=3)),
    "matrices one by one, packed": (partial(matrices, layout="packed"), layer(outputs=3)),
    "matrices by pairs": (matrices, layer()),
    "matrices by pairs, packed": (partial(matrices, layout="packed"), layer()),
    "matrices in two stages": (matrices, layer(outputs=9, factors=2)),
    "matrices in two stages, packed": (partial(matrices, layout="packed"), layer(outputs=9, factors=2)),
    "entries": (lambda m, w, v, c: m.interaction_entries(w, v, c, OUTPUTS, ROWS, COLUMNS), layer()),
    "diagonal": (diagonal, [*layer()[:2], double(5, 8), layer()[2]]),
    "active": (active, [*layer(), double(5, 7), double(4, 2)]),
    "topk through matrices": (topk, layer(outputs=3)),
    "topk in a basis": (lambda m, w, v, c, b: topk(m, w, v, c, basis=b), [*layer(), double(5, 7)]),
    "topk over shared tiles": (topk, layer()),
    "topk over shared tiles, global": (partial(topk, scope="global"), layer()),
    "topk of diagonals": (partial(topk, score="self"), layer()),
    "quadratic form": (lambda m, x, q: m.quadratic_form(x, q + q.mT), [double(5, 4), double(6, 4, 4)]),
    "eigen form": (lambda m, *t: m.eigen_form(*t), [double(5, 4), double(6, 3), double(6, 3, 4)]),
    "eigen form of pairs": (lambda m, *t: m.eigen_form(*t, pairs=PAIRS), [double(5, 4), double(6, 3), double(6, 3, 4)]),
    "neuron gram": (lambda m, *t: m.neuron_gram(*t), [double(7, 4), double(7, 4), double(5, 4), double(5, 4)]),
    "layer inner": (lambda m, *t: m.layer_inner(*t), [*layer()[:2], double(3, 6), *layer()[:2], double(3, 6)]),
    "faithfulness": (lambda m, *t: m.faithfulness_loss(*t), [double(7, 5), double(5, 6), double(6, 7)]),
    "stochastic": (stochastic, [*rank1(), double(3, 4)]),
    "stochastic, gates that repeat": (
        lambda m, x, *t: stochastic(m, x.view(2, 11, 4), *t),
        [double(22, 4), *rank1()[1:], double(3, 4)],
    ),
    "stochastic, source": (stochastic, [*rank1(), double(3, 4), torch.rand(2, 11, 6, dtype=torch.float64)]),
    "given masks": (
        lambda m, x, r, w, g, b, weight: m.rank1_linear(x, r, w, g, b, weight=weight, delta=x[:, 0].tanh()),
        [*rank1(), double(3, 4)],
    ),
    "gated under masks": (stochastic_gated, [*mlp(), double(11, 3), torch.rand(11, 6, dtype=torch.float64)]),
    "component gates": (
        lambda m, *t: m.component_gates(*t),
        [double(11, 6), double(6, 3), double(6, 3), double(6, 3), double(6)],
    ),
    "accumulated": (accumulated, [double(3, 6), double(4, 6), double(6, 5), double(5, 4)]),
    "sparse": (sparse, [double(11, 4), double(200, 4).t(), double(200, 3), double(11, 1), double(3)]),
}
