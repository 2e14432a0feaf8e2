"""Gate networks of rank-1 subcomponents: public function, op and backward (docs/math.md 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from bilinear_ops import _impl, _op, reference
from bilinear_ops._check import check, check_beside
from bilinear_ops._sharding import sharded
from bilinear_ops.composite.rank1 import gates as composite


@sharded("... C", over="... C", acts="... C", w1="C H", b1="C H", w2="C H", b2="C")
@_op.without_autocast
def component_gates(acts: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *, impl: str = "auto") -> Tensor:
    """sum_j w2_cj gelu(acts_c w1_cj + b1_cj) + b2_c: a small MLP for each subcomponent, of its activation ([SPD]).

    The logits of causal importances; `lower_leaky_hard_sigmoid` and `upper_leaky_hard_sigmoid` come after. Keeps acts
    alone for backward, where the einsum form keeps `[..., C, H]` several times. Not cast by autocast.

    Args:
        acts: `[..., C]` activations x R of the subcomponents, in any floating dtype.
        w1, b1, w2: `[C, H]` weights and biases of the H hidden units of every subcomponent.
        b2: `[C]`.
        impl: "auto", "triton" or "torch".

    Returns:
        `[..., C]`, contiguous, in the wider of the dtypes of acts and w1, computed in float32 or better.

    Raises:
        RuntimeError: mismatched shapes, dtypes or devices, or impl="triton" where it cannot run.
        TypeError: an argument that is not a floating-point tensor.
        ValueError: unknown impl.
    """
    sizes = check(w1=(w1, "C H"), b1=(b1, "C H"), w2=(w2, "C H"), b2=(b2, "C"))
    check(acts=(acts, "... C"))
    if acts.shape[-1] != sizes["C"]:
        raise RuntimeError(f"acts must have shape [..., C={sizes['C']}], got {list(acts.shape)}")
    check_beside(w1, acts=(acts, tuple(acts.shape)))
    impl = _impl.resolve(impl, acts if acts.dtype == torch.float64 else w1)
    if _impl.needs_reference():
        return reference.component_gates(acts, w1, b1, w2, b2)
    return gates_op(acts.reshape(acts.shape[:-1].numel(), sizes["C"]), w1, b1, w2, b2, impl).view(acts.shape)


def launchers():
    """The kernels of this family, imported at the first launch."""
    from bilinear_ops.kernels.rank1 import gates

    return gates


def _forward(acts: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, impl: str) -> Tensor:
    return (composite if impl == "torch" else launchers()).component_gates(acts, w1, b1, w2, b2)


def _forward_fake(acts, w1, b1, w2, b2, impl):
    return acts.new_empty(acts.shape, dtype=torch.promote_types(acts.dtype, w1.dtype))


def _backward(
    dlogits: Tensor, acts: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, need: list[bool], impl: str
) -> tuple[Tensor | None, ...]:
    """Gradients of the five tensors, each None unless needed."""
    return (composite if impl == "torch" else launchers()).component_gates_backward(dlogits, acts, w1, b1, w2, need)


def _formula(acts: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return reference.component_gates(acts, w1, b1, w2, b2)


gates_op, gates_backward_op = _op.differentiable(
    "component_gates(Tensor acts, Tensor w1, Tensor b1, Tensor w2, Tensor b2, str impl) -> Tensor",
    _forward,
    _forward_fake,
    _backward,
    _formula,
)
