"""Which implementation of an op runs: Triton kernels, PyTorch, or the reference under transforms."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# Why a branch that every op has runs PyTorch.
TRANSFORMS = "torch.func transforms, forward-mode AD and torch.jit.trace take the reference"
WRAPPERS = "jagged tensors and other wrappers take PyTorch's ops"

PLAIN = frozenset((Tensor, torch.nn.Parameter))
_has_dispatch_mode = torch._C._len_torch_dispatch_stack
_has_function_mode = torch._C._is_torch_function_mode_enabled
_has_autocast = torch._C._is_any_autocast_enabled
is_batched = torch._C._functorch.is_legacy_batchedtensor  # as `is_grads_batched` hands gradients to a backward

HAS_TRITON = importlib.util.find_spec("triton") is not None


def resolve(impl: str, t: Tensor) -> str:
    """What a registered op is called with: "torch", "triton" or "auto".

    "triton" stands for at least one kernel or an error, raised here where no kernel can run on `t` at all and by the op
    where a branch has none. "auto" stands for kernels where they are the better choice and is returned only where they
    can run: on CUDA and HIP tensors.
    """
    if impl == "torch":
        return impl
    if impl not in ("auto", "triton"):
        raise ValueError(f'impl must be "auto", "triton" or "torch", got {impl!r}')
    if impl == "auto":
        return "torch" if t.device.type != "cuda" or why_not_triton(t) else "auto"
    refuse(impl, why_not_triton(t) or (TRANSFORMS if needs_reference() else None))
    return impl


def refuse(impl: str, reason: str | None) -> bool:
    """Whether there is a reason to run PyTorch in place of kernels; RuntimeError where they were asked for."""
    if reason is not None and impl == "triton":
        raise RuntimeError(f'impl="triton" cannot run: {reason}')
    return reason is not None


def why_not_triton(t: Tensor) -> str | None:
    """Why the Triton kernels cannot run on `t`, or None where they can."""
    if t.dtype == torch.float64:
        return "float64 has no kernels"
    if not HAS_TRITON:
        return "triton is not installed"
    if t.device.type == "cpu":
        return None if _interpreted() else "CPU tensors need TRITON_INTERPRET=1"
    if t.device.type != "cuda":
        return f"no kernels for device {t.device.type}"
    # a call in eager mode is short beside its properties; torch.compile folds them into its graph
    return _why_not_device(t.device) if is_compiling() else _known_why_not(t.device)


def _why_not_device(device: torch.device) -> str | None:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is None:
        return None if properties.major >= 8 else "the kernels need compute capability 8.0 or newer"
    if not properties.gcnArchName.startswith("gfx942"):
        return f"the kernels are built for gfx942, not {properties.gcnArchName}"
    return None


_known_why_not = functools.cache(_why_not_device)


def _interpreted() -> bool:
    """Whether Triton would interpret a kernel that is defined now: its reading of the variable, which torch.compile
    cannot trace."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def needs_reference() -> bool:
    """True inside torch.func transforms and forward-mode AD, which see a registered op's tangent as zero, and
    `torch.jit.trace`, which cannot keep one that is written in Python."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or torch.jit.is_tracing()


def is_unwatched() -> bool:
    """Whether no compiler, mode or autocast sees or rewrites the calls that follow.

    Only then may a small call leave its op for eager PyTorch: whatever is done with a call, small and large are alike.
    Where `needs_reference` holds they are alike without it: the reference is eager PyTorch at every size.
    """
    return not (is_compiling() or _has_dispatch_mode() or _has_function_mode() or _has_autocast())


def are_plain(*tensors: Tensor | None) -> bool:
    """Whether a kernel can read all of these: on a CPU or GPU, no subclasses, not lazily negated or zero."""
    for t in tensors:
        if t is not None and not (
            type(t) in PLAIN and (t.is_cuda or t.is_cpu) and not t.is_neg() and not t._is_zerotensor()
        ):
            return False
    return True


def needs_formula(*tensors: Tensor | None, impl: str) -> bool:
    """`needs_reference`, or for a wrapper of tensors, jagged or quantised, that knows PyTorch's ops and not ours.

    RuntimeError for such a wrapper where kernels were asked for.
    """
    for t in tensors:
        if type(t) not in PLAIN and t is not None and is_traceable_wrapper_subclass(t):
            # a tensor that a collective has not sent yet is none: it waits for itself
            return not hasattr(t, "trigger_wait") and refuse(impl, WRAPPERS) or needs_reference()
    return needs_reference()
