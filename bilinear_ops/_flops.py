"""FLOP formulas of the registered ops, for `torch.utils.flop_counter`: what the reference multiplies.

The reference runs on the meta device, where it costs no arithmetic and no memory. Its count is that of an eager layer;
what a backward computes again to save memory is not in it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

import torch
from torch import Tensor

COUNTER = "torch.utils.flop_counter"
Formula = Callable[..., int]
_waiting: dict[Any, Formula] = {}


def add(op: Any, formula: Formula) -> None:
    """Give the op `formula`, a function of the op's arguments."""
    packet = op.overloadpacket
    if COUNTER in sys.modules:
        _register(packet, formula)
    else:
        _waiting[packet] = formula


class _AfterImport:
    """Registers the formulas when the counter is imported, which imports Triton and numpy: too much for our import."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == COUNTER else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            if cls in sys.meta_path:
                sys.meta_path.remove(cls)
            for packet, formula in _waiting.items():
                _register(packet, formula)
            _waiting.clear()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if COUNTER not in sys.modules:
    sys.meta_path.insert(0, _AfterImport)


def _register(packet: Any, formula: Formula) -> None:
    sys.modules[COUNTER].register_flop_formula(packet, get_raw=True)(lambda *args, out_val=None: formula(*args))


def of_call(f: Callable[..., Any], *args: Any, **options: Any) -> int:
    """FLOPs of f(*args, **options)."""
    with torch.inference_mode(False), torch.no_grad(), _counter() as counter:
        f(*map(_meta, args), **{name: _meta(value) for name, value in options.items()})
    return counter.get_total_flops()


def of_gradients(
    f: Callable[..., Tensor], tensors: Sequence[Tensor | None], need: Sequence[bool], **options: Any
) -> int:
    """FLOPs of the needed gradients of f(*tensors, **options), without those of f."""
    options = {name: _meta(value) for name, value in options.items()}
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [_meta(t) for t in tensors]
        wanted = [t.requires_grad_() for t, needed in zip(leaves, need, strict=True) if needed and t is not None]
        y = f(*leaves, **options)
        if not wanted or not y.requires_grad:
            return 0
        with _counter() as counter:
            torch.autograd.grad(y, wanted, torch.empty_like(y), allow_unused=True)
    return counter.get_total_flops()


def _counter() -> Any:
    return sys.modules[COUNTER].FlopCounterMode(display=False)


def _meta(t: Any) -> Any:
    return torch.empty(t.shape, dtype=t.dtype, device="meta") if isinstance(t, Tensor) else t
