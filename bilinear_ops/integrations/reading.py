"""What the MLPs of a patched model compute on their way, for those who read them, under torch.compile, too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from bilinear_ops.integrations.gate_forms import has_experts
from bilinear_ops.integrations.patches import READ, STATE
from bilinear_ops.results import Activations


@contextmanager
def read(model: nn.Module, names: Sequence[str] | None = None) -> Iterator[dict[str, Activations]]:
    """Within the context, keep a, z and hid of MLPs that `apply` patched, at every forward of the model.

        with read(model) as seen:
            model(ids)
        seen["model.layers.3.mlp"].z  # [batch, length, h]

    They are those of the latest forward, and a part of its graph: losses have gradients in them, and they keep its
    memory. Works under torch.compile, which compiles once more for the context. TransformerLens calls z `hook_pre`, a
    `hook_pre_linear` and hid `hook_post`.

    Args:
        model: a model after `apply`.
        names: of the MLPs to read; all that are patched unless given.

    Yields:
        `{name: Activations(a, z, hid)}`, empty before the first forward.

    Raises:
        ValueError: a name that is not a patched MLP's, or no patched MLP at all.
        RuntimeError: in a forward, from an MLP that runs its own, because something was attached to it: hooks on its
            Linears see the same there.
    """
    patched = {n: m for n, m in model.named_modules() if STATE in vars(m) and not has_experts(m)}
    wanted = list(patched) if names is None else list(names)
    strange = [n for n in wanted if n not in patched]
    if strange or not wanted:
        raise ValueError(
            f"names must be of patched MLPs, got {strange or 'none'} for {list(patched)}: call apply first"
        )
    seen: dict[str, Activations] = {}
    try:
        for name in wanted:
            vars(patched[name])[READ] = (name, seen)
        yield seen
    finally:
        for name in wanted:
            vars(patched[name]).pop(READ, None)
