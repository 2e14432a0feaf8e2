"""Which implementation of an op runs: Triton kernels, PyTorch, or the reference under transforms."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor
from torch.autograd import forward_ad

HAS_TRITON = importlib.util.find_spec("triton") is not None


def resolve(impl: str, t: Tensor) -> str:
    """The implementation, "triton" or "torch", that `impl` stands for on `t`.

    "auto" is Triton on CUDA and HIP tensors where it can run, else the composite; an explicit "triton" runs or raises.
    """
    if impl == "torch":
        return impl
    if impl not in ("auto", "triton"):
        raise ValueError(f'impl must be "auto", "triton" or "torch", got {impl!r}')
    if impl == "auto" and t.device.type != "cuda":
        return "torch"
    reason = why_not_triton(t)
    if reason is None:
        return "triton"
    if impl == "triton":
        raise RuntimeError(f'impl="triton" cannot run: {reason}')
    return "torch"


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
    properties = torch.cuda.get_device_properties(t.device)
    if torch.version.hip is None:
        return None if properties.major >= 8 else "the kernels need compute capability 8.0 or newer"
    if not properties.gcnArchName.startswith("gfx942"):
        return f"the kernels are built for gfx942, not {properties.gcnArchName}"
    return None


def _interpreted() -> bool:
    """Whether Triton would interpret a kernel that is defined now: its reading of the variable, which torch.compile
    cannot trace."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def needs_reference() -> bool:
    """True inside torch.func transforms and forward-mode AD, which see a registered op's tangent as zero."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
