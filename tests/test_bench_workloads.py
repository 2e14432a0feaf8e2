"""FLOPs and bytes that workloads state, against products counted by PyTorch and sizes of tensors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import bilinear_ops as bo
from bench import bench_analysis, bench_gated, bench_interaction
from bench.harness.workload import Workload, workloads

WORKLOADS = {str(w): w for w in workloads(torch.device("cpu"), "tiny")}


def counted(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def by(name: str) -> Callable[[Workload], int]:
    """The products of a baseline that does no more than the definition asks for."""
    return lambda workload: counted(workload.baselines[name](*workload.inputs(0)))


def ours(workload: Workload) -> int:
    return counted(workload.ours(*workload.inputs(0)))


class WithNeurons(TorchDispatchMode):
    """Counts the products of matrices that have `h` rows or columns."""

    def __init__(self, h: int):
        super().__init__()
        self.h, self.flops = h, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default:
            (m, k), (_, n) = (t.shape for t in args)
            self.flops += 2 * m * k * n * (self.h in (m, k, n))
        return func(*args, **(kwargs or {}))


def with_neurons(workload: Workload) -> int:
    run = workload.ours(*workload.inputs(0))
    with WithNeurons(workload.shape["h"]) as counter:
        run()
    return counter.flops


def directions(workload: Workload) -> int:
    """The d matrices of p, then K combinations of their upper triangles."""
    w, v, u, p = workload.inputs(0)
    d = p.shape[0]
    triangles = torch.zeros(d, d * (d + 1) // 2)
    return counted(lambda: bench_interaction._flat(w, v, p)) + counted(lambda: u @ triangles)


def ranking(workload: Workload) -> int:
    """Per output its matrix, then the basis on both sides of it, half of which is the other half's mirror image; or
    the product of w's and v's features, which has no symmetry."""
    if "small" in workload.case:
        return by("eager")(workload)
    w, v, c, basis = workload.inputs(0)
    fw, fv = w @ basis, v @ basis
    square, wide = w.t() @ v, basis.t() @ (w.t() @ v)
    of_matrix = counted(lambda: w.t() @ v) + counted(lambda: basis.t() @ square) + counted(lambda: wide @ basis) // 2
    return len(c) * min(of_matrix, counted(lambda: fw.t() @ fv))


def spectrum(workload: Workload) -> int:
    """Every eigenvector u: W^T (c * V u) + V^T (c * W u)."""
    w, v, c = workload.inputs(0)
    pairs = len(c) * int(workload.case.split()[0])
    u, hidden = torch.zeros(w.shape[1], pairs), torch.zeros(len(w), pairs)
    return counted(lambda: [v @ u, w @ u, w.t() @ hidden, v.t() @ hidden])


def stochastic(workload: Workload) -> int:
    """Forward: acts, x W^T and a product per sample. Backward: d acts, d write per sample, and d read."""
    if "alone" in workload.case:
        return by("eager")(workload)
    read, write, gates, x, weight, dy = workload.inputs(0)
    acts, y = x @ read, dy[0]

    def samples() -> None:
        for _ in dy:
            acts @ write
            y @ write.t()
            acts.t() @ y

    return counted(samples) + counted(lambda: [x @ read, x @ weight.t(), x.t() @ acts])


def sparse(workload: Workload) -> int:
    """The active part of the dense products."""
    read, _, _, indices, *_ = workload.inputs(0)
    return by("eager")(workload) * indices.shape[1] // read.shape[1]


def networks(workload: Workload) -> int:
    """Products and sums of both layers, which the counter of eager PyTorch does not see as matrix products."""
    m, c, hidden = workload.shape.values()
    forward = {"acts w1": 1, "+ b1": 1, "units w2, summed": 2}
    backward = {"dunits": 1, "dw2": 2, "gelu'": 1, "dw1": 2, "db1": 1, "dacts": 2}
    return m * c * hidden * (sum(forward.values()) + sum(backward.values()))


def llama(workload: Workload) -> int:
    """PyTorch does not count the attention of CPUs: two products forward and four backward, half of each masked."""
    m, d, _, layers = workload.shape.values()
    return by("eager")(workload) + layers * 6 * m * m * d


FLOPS: dict[str, Callable[[Workload], int]] = {
    "gated_mlp": by("eager"),
    "GatedMLP": by("eager"),
    "interaction_matrices [coefficients]": by("eager"),
    "interaction_matrices [directions]": directions,
    "interaction_topk": ranking,
    "eigen_form": by("gathered bmm"),
    "interaction_eigh": spectrum,
    "layer_inner": ours,
    "hosvd": ours,
    "cp_decompose": with_neurons,
    "stochastic_rank1_linear": stochastic,
    "rank1_sparse": sparse,
    "rank1_accumulate": by("eager"),
    "component_gates": networks,
    "llama": llama,
}


@pytest.mark.parametrize("name", WORKLOADS)
def test_flops_are_those_of_the_definition(name: str) -> None:
    (count,) = (count for start, count in FLOPS.items() if name.startswith(start))
    assert WORKLOADS[name].flops == count(WORKLOADS[name])


def results(workload: Workload) -> tuple[Tensor, ...]:
    """What the op returns; the workload compares less of it where rounding changes the rest."""
    inputs = workload.inputs(0)
    if workload.op == "hosvd":
        rank = workload.shape["o" if workload.case == "output" else "d"]
        return tuple(bo.analysis.hosvd(*inputs, rank, mode=workload.case))
    if workload.op == "cp_decompose":
        fit = bo.analysis.cp_decompose(*inputs[:3], bench_analysis.RANK, steps=1)
        return fit.w, fit.v, fit.p
    if workload.op == "interaction_topk" and "small" in workload.case:
        return tuple(bo.interaction_topk(*inputs, bench_interaction.SMALL_STRONGEST))
    if workload.op == "interaction_topk":
        w, v, c, basis = inputs
        return tuple(bo.interaction_topk(w, v, c, bench_interaction.STRONGEST, scope="global", basis=basis))
    if workload.op == "interaction_eigh":
        found = bo.analysis.interaction_eigh(*inputs, int(workload.case.split()[0]))
        return found.values, found.vectors
    return workload.baselines["eager"](*inputs)()


@pytest.mark.parametrize("name", WORKLOADS)
def test_bytes_are_those_of_inputs_and_results(name: str) -> None:
    workload = WORKLOADS[name]
    read = workload.inputs(0)[: 3 if workload.op == "cp_decompose" else None]  # the rest evaluates the fit
    assert workload.bytes == sum(t.nbytes for t in (*read, *results(workload)))


@pytest.mark.parametrize(
    ("pack", "unpack", "start"),
    (
        (bench_gated._pack, bench_gated._unpack, ("v0", "v1")),
        (bench_gated._pack_rows, bench_gated._unpack_rows, ("v0", "w0")),
    ),
    ids=("one after the other", "row by row"),
)
def test_packed_weights_come_back(pack: Callable[..., Any], unpack: Callable[..., Any], start: tuple[str, str]) -> None:
    """As peers take them: the gated weight first."""
    rows = {f"{name}{i}": torch.randn(4) for name in "wv" for i in range(3)}
    x, dy = torch.randn(2, 4), torch.randn(2, 5)
    w, v = (torch.stack([rows[f"{name}{i}"] for i in range(3)]) for name in "wv")
    _, packed, *_ = pack(x, w, v, dy)
    assert torch.equal(packed[:2], torch.stack([rows[name] for name in start]))
    for found, given in zip(unpack(x, packed, dy), (x, w, v, dy), strict=True):
        assert torch.equal(found, given)
