"""Rank-1 subcomponents against eager code: stochastic masks, sparse gates, accumulated weights, a whole step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, mse_loss

import bilinear_ops as bo
from bench.harness.workload import (
    Contender,
    Tensors,
    Workload,
    compiled,
    draw,
    forward,
    has_compiler,
    tiling,
    training_step,
)
from bilinear_ops.composite.rank1 import masked as composite

SHAPES = {  # (tokens, d_in, d_out, C)
    ("cpu", "tiny"): [(33, 24, 40, 48)],
    ("cpu", "quick"): [(128, 192, 768, 768)],
    ("cpu", "full"): [(512, 768, 3072, 3072), (512, 3072, 768, 3584)],
    ("cuda", "tiny"): [(256, 128, 256, 256)],
    ("cuda", "quick"): [(4096, 768, 3072, 3072)],
    ("cuda", "full"): [(m, *layer) for m in (4096, 32768) for layer in ((768, 3072, 3072), (3072, 768, 3584))],
}
SMALL = {  # where calls cost more than arithmetic, and one sample of few tokens
    "tiny": [(1024, 5, 2, 20)],
    "quick": [(1024, 5, 2, 20)],
    "full": [(1024, 5, 2, 20), (2048, 512, 512, 1024)],
}
SAMPLES = {"tiny": (2,), "quick": (4,), "full": (1, 4)}
DENSITIES = {"tiny": (0.05, 0.25), "quick": (0.01, 0.05), "full": (0.0025, 0.005, 0.01, 0.02, 0.05)}
ACCUMULATED = {  # (samples, rows, d_out, d_in, C)
    "tiny": (2, 33, 10, 12, 24),
    "quick": (4, 256, 94, 96, 192),
    "full": (4, 2209, 94, 96, 192),
}
GATES = {  # (tokens, C, hidden units of each gate network)
    ("cpu", "tiny"): (33, 24, 5),
    ("cpu", "quick"): (512, 768, 16),
    ("cpu", "full"): (4096, 768, 16),
    ("cuda", "tiny"): (33, 24, 5),
    ("cuda", "quick"): (4096, 768, 16),
    ("cuda", "full"): (32768, 3072, 16),
}
STEPS = {  # (tokens, sizes of the hidden states between the sites, C, samples, hidden units of a gate network)
    ("cpu", "tiny"): (33, (8, 24, 8, 12), 16, 2, 5),
    ("cpu", "quick"): (256, (64, 256, 64, 64), 128, 4, 16),
    ("cpu", "full"): (2048, (256, 1024, 256, 256), 512, 4, 16),
    ("cuda", "tiny"): (33, (8, 24, 8, 12), 16, 2, 5),
    ("cuda", "quick"): (2048, (256, 1024, 256, 256), 512, 4, 16),
    ("cuda", "full"): (16384, (768, 3072, 768, 768), 3072, 4, 16),
}
MINIMALITY = {"coefficient": 1e-3, "pnorm": 2.0}
SEED = 1
Drawn = tuple[Tensor, Tensor]  # uniforms of masks and deltas: [S, M, C] and [S, M]


def workloads(device: torch.device, size: str, impl: str = "auto") -> Iterator[Workload]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shapes = SHAPES[device.type, size]
    for shape in shapes:
        for samples in SAMPLES[size]:
            yield _stochastic(device, size, impl, dtype, *shape, samples)
    if device.type == "cpu" and impl != "triton":
        for shape in SMALL[size]:
            yield _masks_alone(device, dtype, *shape)
    for shape in shapes[:2]:
        for density in DENSITIES[size]:
            for backward in (False, True):
                yield _sparse(device, impl, dtype, *shape, density, backward)
    yield _accumulate(device, impl, *ACCUMULATED[size])
    yield _gates(device, impl, *GATES[device.type, size])
    yield _step(device, impl, *STEPS[device.type, size])


def _stochastic(
    device: torch.device, size: str, impl: str, dtype: torch.dtype, m: int, d_in: int, d_out: int, c: int, samples: int
) -> Workload:
    """A training step of read, write and gates; x and the original weight are constants."""

    def inputs(seed: int) -> Tensors:
        tensors = ((d_in, c), d_in**-0.5), ((c, d_out), c**-0.5), ((m, d_in), 1.0), ((d_out, d_in), d_in**-0.5)
        read, write, x, weight, dy = draw(device, dtype, *tensors, ((samples, m, d_out), 1.0))(seed)
        generator = torch.Generator(device).manual_seed(seed)
        return read, write, torch.rand(m, c, generator=generator, device=device), x, weight, dy

    def ours(read: Tensor, write: Tensor, gates: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return bo.stochastic_rank1_linear(
            x, read, write, gates, samples=samples, seed=SEED, weight=weight, delta="uniform", impl=impl
        )

    def reference(read: Tensor, write: Tensor, gates: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """One sample at a time, to save memory."""
        y = []
        for r, delta in zip(*_drawn_by_ours(gates, samples), strict=True):
            y.append(bo.reference.rank1_linear(x, read, write, gates + (1 - gates) * r, weight=weight, delta=delta))
        return torch.stack(y)

    baselines = {"eager": _first_drawn_by_ours(_eager, samples)}
    if samples > 1:
        baselines["delta once"] = _first_drawn_by_ours(_eager_delta_once, samples)
    if has_compiler(device) and size == "full":
        baselines["delta once, compiled"] = _first_drawn_by_ours(compiled(_eager_delta_once), samples)
    operands = m * d_in + d_in * c + c * d_out + d_out * d_in + 2 * samples * m * d_out + d_in * c + c * d_out
    return Workload(
        op="stochastic_rank1_linear",
        case="delta, step",
        shape={"m": m, "i": d_in, "o": d_out, "C": c, "S": samples},
        dtype=dtype,
        inputs=inputs,
        reference=training_step(reference, trained=3),
        ours=training_step(ours, trained=3),
        baselines=baselines,
        # the remainder is applied as x W^T - acts L; the samples' own products compute the second term
        flops=2 * m * (c * (2 * d_in + 3 * samples * d_out) + d_in * d_out),
        bytes=operands * dtype.itemsize + 2 * 4 * m * c,
    )


def _masks_alone(device: torch.device, dtype: torch.dtype, m: int, d_in: int, d_out: int, c: int) -> Workload:
    """A training step of read, write and gates under one sample of masks, without the original weight."""

    def inputs(seed: int) -> Tensors:
        tensors = ((d_in, c), d_in**-0.5), ((c, d_out), c**-0.5), ((m, d_in), 1.0), ((m, d_out), 1.0)
        read, write, x, dy = draw(device, dtype, *tensors)(seed)
        generator = torch.Generator(device).manual_seed(seed)
        return read, write, torch.rand(m, c, generator=generator, device=device), x, dy

    def under(op: Callable[..., Tensor]) -> Contender:
        return training_step(lambda read, write, gates, x: op(x, read, write, gates, seed=SEED)[0], trained=3)

    def eager(*tensors: Tensor) -> Callable[[], Tensors]:
        given = [bo.stochastic_mask(torch.zeros_like(tensors[2]), seed=SEED)[0]]  # of the first run, which is checked

        def fn(read: Tensor, write: Tensor, gates: Tensor, x: Tensor) -> Tensor:
            r = given.pop() if given else torch.rand_like(gates)
            return (x @ read * (gates + (1 - gates) * r)) @ write

        return training_step(fn, trained=3)(*tensors)

    return Workload(
        op="stochastic_rank1_linear",
        case="masks alone, step",
        shape={"m": m, "i": d_in, "o": d_out, "C": c, "S": 1},
        dtype=dtype,
        inputs=inputs,
        reference=under(bo.reference.stochastic_rank1_linear),
        ours=under(bo.stochastic_rank1_linear),
        baselines={"eager": eager},
        flops=2 * m * c * (2 * d_in + 3 * d_out),
        bytes=(m * d_in + 2 * c * (d_in + d_out) + 2 * m * d_out) * dtype.itemsize + 2 * 4 * m * c,
    )


def _drawn_by_ours(gates: Tensor, samples: int, seed: int = SEED) -> Drawn:
    r = bo.stochastic_mask(torch.zeros_like(gates), samples=samples, seed=seed, impl="torch")  # 0 + (1 - 0) r
    delta = bo.stochastic_delta(gates.shape[:1], samples=samples, seed=seed, device=gates.device, impl="torch")
    return r, delta.to(r.dtype)


def _first_drawn_by_ours(eager: Callable[..., Tensor], samples: int) -> Contender:
    """A training step of an eager version.

    The first run is the checked one and uses our masks, for equal results. Later runs (timing, memory) draw their own.
    """

    def build(*inputs: Tensor) -> Callable[[], Tensors]:
        given = [_drawn_by_ours(inputs[2], samples)]

        def fn(*operands: Tensor) -> Tensor:
            return eager(samples, given.pop() if given else None, *operands)

        return training_step(fn, trained=3)(*inputs)

    return build


def _eager(
    samples: int, given: Drawn | None, read: Tensor, write: Tensor, gates: Tensor, x: Tensor, weight: Tensor
) -> Tensor:
    """As published: each sample draws, masks and multiplies separately."""
    difference = weight - (read @ write).t()
    y = []
    for s in range(samples):
        r, delta = (given[0][s], given[1][s]) if given else (torch.rand_like(gates), torch.rand_like(gates[:, 0]))
        kept = (x @ read * (gates + (1 - gates) * r)).to(x.dtype) @ write
        y.append(kept + (delta[:, None] * (x @ difference.t())).to(x.dtype))
    return torch.stack(y)


def _eager_delta_once(
    samples: int, given: Drawn | None, read: Tensor, write: Tensor, gates: Tensor, x: Tensor, weight: Tensor
) -> Tensor:
    """The products shared by all samples are computed once."""
    acts = x @ read
    rest = x @ (weight - (read @ write).t()).t()
    y = []
    for s in range(samples):
        r, delta = (given[0][s], given[1][s]) if given else (torch.rand_like(gates), torch.rand_like(gates[:, 0]))
        kept = (acts * (gates + (1 - gates) * r)).to(x.dtype) @ write
        y.append(kept + (delta[:, None] * rest).to(x.dtype))
    return torch.stack(y)


def _sparse(
    device: torch.device, impl: str, dtype: torch.dtype, m: int, d_in: int, d_out: int, c: int, density: float,
    backward: bool,
) -> Workload:  # fmt: skip
    """Sparse against dense products at one density of active subcomponents."""
    k = max(1, round(density * c))

    def inputs(seed: int) -> Tensors:
        tensors = ((d_in, c), d_in**-0.5), ((c, d_out), c**-0.5), ((m, d_in), 1.0), ((m, d_out), 1.0)
        read, write, x, dy = draw(device, dtype, *tensors)(seed)
        generator = torch.Generator(device).manual_seed(seed)
        gates, indices = torch.rand(m, c, generator=generator, device=device).topk(k)
        return read, write, x, indices, gates, *([dy] if backward else [])

    def timed(fn: Callable[..., Tensor], pack: Callable[..., Tensors] | None = None) -> Contender:
        return training_step(fn, pack, trained=2) if backward else forward(fn, pack)

    def with_mask(read: Tensor, write: Tensor, x: Tensor, indices: Tensor, gates: Tensor) -> Tensors:
        return read, write, x, gates.new_zeros(m, c).scatter_(1, indices, gates)

    def dense(read: Tensor, write: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        return (x @ read * mask).to(x.dtype) @ write

    active = 2 * m * k * (d_in + d_out)
    moved = m * (d_in + d_out) + c * (d_in + d_out)
    if backward:
        moved += m * d_out + c * (d_in + d_out)  # reads dy; writes the gradients of read and write, not of x
    return Workload(
        op="rank1_sparse",
        case=f"{density:.2%} active, {'step' if backward else 'forward'}",
        shape={"m": m, "i": d_in, "o": d_out, "C": c},
        dtype=dtype,
        inputs=inputs,
        # the same sum with a dense mask: the sparse reference copies the vectors of every active subcomponent
        reference=timed(lambda r, w, x, mask: bo.reference.rank1_linear(x, r, w, mask), with_mask),
        ours=timed(lambda r, w, x, indices, gates: bo.rank1_sparse(x, r, w, indices, gates, impl=impl)),
        baselines={"eager": timed(dense, with_mask)},
        flops=active + (2 * m * k * (d_in + 2 * d_out) if backward else 0),
        bytes=moved * dtype.itemsize + (8 + 4) * m * k,
    )


def _accumulate(device: torch.device, impl: str, samples: int, rows: int, d_out: int, d_in: int, c: int) -> Workload:
    def inputs(seed: int) -> Tensors:
        read, write = draw(device, torch.float32, ((d_in, c), 1.0), ((c, d_out), c**-0.5))(seed)
        generator = torch.Generator(device).manual_seed(seed)
        return torch.rand(samples, rows, c, generator=generator, device=device), read, write

    def einsum(gates: Tensor, read: Tensor, write: Tensor) -> Tensor:
        return torch.einsum("sbc,ic,co->sboi", gates, read, write)

    return Workload(
        op="rank1_accumulate",
        case="gates",
        shape={"S": samples, "rows": rows, "o": d_out, "i": d_in, "C": c},
        dtype=torch.float32,
        inputs=inputs,
        reference=forward(bo.reference.rank1_accumulate),
        ours=forward(partial(bo.rank1_accumulate, impl=impl)),
        baselines={"eager": forward(einsum)},
        flops=2 * samples * rows * c * d_out * d_in,
        bytes=4 * (samples * rows * (c + d_out * d_in) + c * (d_in + d_out)),
    )


def _einsum_gates(acts: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    units = gelu(torch.einsum("mc,ch->mch", acts, w1) + b1)
    return torch.einsum("mch,ch->mc", units, w2) + b2


def _gates(device: torch.device, impl: str, m: int, c: int, hidden: int) -> Workload:
    weights = (((c, hidden), 1.0),) * 3
    return Workload(
        op="component_gates",
        case="step",
        shape={"m": m, "C": c, "H": hidden},
        dtype=torch.float32,
        inputs=draw(device, torch.float32, ((m, c), 1.0), *weights, ((c,), 1.0), ((m, c), 1.0)),
        # torch.compile's form of it sums the gradients too inaccurately to compare
        reference=training_step(_einsum_gates),
        ours=training_step(partial(bo.component_gates, impl=impl)),
        baselines={"eager": training_step(_einsum_gates)},
        flops=13 * m * c * hidden,
        bytes=4 * (4 * m * c + 6 * c * hidden + 2 * c),
    )


def _step(
    device: torch.device, impl: str, m: int, sizes: tuple[int, ...], c: int, samples: int, hidden: int
) -> Workload:
    """A step of a decomposition: gates of all sites, reconstruction with one site replaced at a time, both losses.

    The model is a chain of linear maps with gelu between them. Trained are read, write and gate network of each site.
    """
    shapes = tuple(itertools.pairwise(sizes))
    sites = len(shapes)

    def inputs(seed: int) -> Tensors:
        trained = [
            (shape, scale)
            for i, o in shapes
            for shape, scale in (
                ((i, c), i**-0.5), ((c, o), c**-0.5), ((c, hidden), 1.0), ((c, hidden), 1.0), ((c, hidden), 0.25),
                ((c,), 0.5),
            )
        ]  # fmt: skip
        frozen = [((m, sizes[0]), 1.0), *(((o, i), 2 * i**-0.5) for i, o in shapes)]
        return *draw(device, torch.float32, *trained, *frozen)(seed), torch.ones((), device=device)

    def loss(
        network: Callable[..., Tensor],
        site_outputs: Callable[..., Tensor],
        faithfulness: Callable[..., Tensor],
        *operands: Tensor,
    ) -> Tensor:
        x, *weights = operands[6 * sites :]
        components = [operands[6 * i : 6 * i + 6] for i in range(sites)]
        site_inputs = [x]
        for weight in weights[:-1]:
            site_inputs.append(gelu(linear(site_inputs[-1], weight)))
        target = linear(site_inputs[-1], weights[-1])
        total = faithfulness([(w, read, write) for w, (read, write, *_) in zip(weights, components, strict=True)])
        for i, (read, write, *net) in enumerate(components):
            acts = site_inputs[i] @ read
            logits = network(acts, *net)
            y = site_outputs(i, site_inputs[i], acts, read, write, bo.lower_leaky_hard_sigmoid(logits), weights[i])
            for weight in weights[i + 1 :]:
                y = linear(gelu(y), weight)
            importances = bo.upper_leaky_hard_sigmoid(logits)
            minimality = bo.importance_minimality(importances, pnorm=MINIMALITY["pnorm"]).sum()
            total = total + mse_loss(y, target.expand_as(y)) + MINIMALITY["coefficient"] * minimality
        return total

    def ours(*operands: Tensor) -> Tensor:
        def outputs(
            i: int, x: Tensor, acts: Tensor, read: Tensor, write: Tensor, gates: Tensor, weight: Tensor
        ) -> Tensor:
            return bo.stochastic_rank1_linear(
                x, read, write, gates, samples=samples, seed=SEED + i, acts=acts, weight=weight, delta="uniform",
                impl=impl,
            )  # fmt: skip

        network, faithfulness = (partial(f, impl=impl) for f in (bo.component_gates, bo.pooled_faithfulness_loss))
        return loss(network, outputs, faithfulness, *operands)

    def einsums(given: bool, *operands: Tensor) -> Tensor:
        def outputs(
            i: int, x: Tensor, acts: Tensor, read: Tensor, write: Tensor, gates: Tensor, weight: Tensor
        ) -> Tensor:
            if given:
                r, delta = _drawn_by_ours(gates, samples, SEED + i)
            else:
                r, delta = (torch.rand(samples, *t.shape, device=t.device) for t in (gates, gates[:, 0]))
            rest = x @ weight.t() - acts @ write
            kept = torch.einsum("smc,co->smo", acts * (gates + (1 - gates) * r), write)
            return kept + delta[..., None] * rest

        return loss(_einsum_gates, outputs, _einsum_faithfulness, *operands)

    def first_given(*inputs: Tensor) -> Callable[[], Tensors]:
        given = [True]
        return training_step(lambda *t: einsums(bool(given and given.pop()), *t), trained=6 * sites)(*inputs)

    flops = 0
    for n, (i, o) in enumerate(shapes):
        rest = sum(a * b for a, b in itertools.pairwise(sizes[n + 1 :]))  # from the site to the model's output
        # x W^T is the model's own; acts forward and read's gradient, then each sample forward and both its gradients
        flops += 2 * m * (i * o + 2 * i * c + samples * (3 * c * o + 2 * rest)) + 6 * i * c * o + 13 * m * c * hidden
    parameters = sum(c * (i + o + 3 * hidden + 1) for i, o in shapes)
    return Workload(
        op="decomposition_step",
        case=f"{sites} sites",
        shape={"m": m, "C": c, "S": samples, "H": hidden} | {f"d{n}": d for n, d in enumerate(sizes)},
        dtype=torch.float32,
        inputs=inputs,
        reference=training_step(lambda *t: einsums(True, *t), trained=6 * sites),
        ours=training_step(ours, trained=6 * sites),
        baselines={"eager": first_given},
        flops=flops,
        bytes=4 * (m * sizes[0] + sum(i * o for i, o in shapes) + 2 * parameters + 2),
    )


def _einsum_faithfulness(layers: list[Tensors]) -> Tensor:
    differences = [weight - torch.einsum("ic,co->oi", read, write) for weight, read, write in layers]
    return sum(d.square().sum() for d in differences) / sum(d.numel() for d in differences)  # type: ignore[return-value]


def tilings(device: torch.device, size: str) -> Iterator[Workload]:
    """The kernel that draws masks."""
    from bilinear_ops.kernels.rank1 import masked
    from bilinear_ops.results import Masks

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for m, _, d_out, c in SHAPES[device.type, size][:2]:
        s = SAMPLES[size][-1]
        seed = torch.tensor(SEED, device=device)

        def through(backend: ModuleType, s: int = s, seed: Tensor = seed) -> Callable[..., Tensor]:
            def apply(acts: Tensor, write: Tensor, gates: Tensor) -> Tensor:
                y = acts.new_empty(s, acts.shape[0], write.shape[1])
                masks = Masks(gates, None, None, None, seed, None, None, 0, s, "continuous")
                backend.masked_apply(y, acts, write, masks, 0.0)
                return y

            return apply

        inputs = draw(device, dtype, ((m, c), 1.0), ((c, d_out), c**-0.5), ((m, c), 1.0))
        yield tiling(
            "mask_kernel", {"m": m, "o": d_out, "C": c, "S": s}, dtype, inputs, through(composite), through(masked),
            device, 2 * s * m * c * d_out, dtype.itemsize * (m * c * (2 + s) + c * d_out + s * m * d_out),
        )  # fmt: skip
