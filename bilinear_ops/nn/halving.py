"""Weights halved in place, each once, however often and under whatever shape a model uses their memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bilinear_ops._impl import PLAIN


@torch.no_grad()
def halve_(model: nn.Module, uses: Sequence[tuple[nn.Module, str]]) -> None:
    """Halve the parameters that these modules have under these names, each once.

    Raises ValueError, and changes nothing, where one of their elements is used elsewhere in the model, too.
    """
    halved: dict[int, list[Tensor]] = defaultdict(list)  # by memory
    for module, name in uses:
        t = getattr(module, name)
        if t is None or any(_is_same(t, other) for other in halved[_memory(t)]):
            continue
        if any(_overlap(t, other) for other in halved[_memory(t)]):
            raise ValueError(f"{name} shares elements with another weight that would be halved")
        halved[_memory(t)].append(t)
    for path, module in model.named_modules():
        for name, t in module._parameters.items():
            if t is None or (module, name) in uses:
                continue
            if any(_overlap(t, other) for other in halved.get(_memory(t), ())):
                raise ValueError(f"{path}.{name} is shared with a layer that it would be halved for")
    for weights in halved.values():
        for t in weights:
            t.mul_(0.5)


def _memory(t: Tensor) -> int:
    """The storage of a plain tensor; any other, and one without memory, stands for itself."""
    return t.untyped_storage().data_ptr() if _is_plain(t) else id(t)


def _is_plain(t: Tensor) -> bool:
    return type(t) in PLAIN and t.layout == torch.strided and not t.is_meta and t.numel() > 0


def _is_same(t: Tensor, other: Tensor) -> bool:
    if t is other:
        return True
    places = [(s.storage_offset(), s.shape, s.stride(), s.dtype) for s in (t, other)]
    return _is_plain(t) and places[0] == places[1]


def _overlap(t: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one storage have an element in common: the halves of a packed one have none."""
    if _is_same(t, other) or t.dtype != other.dtype:
        return True
    elements = t.untyped_storage().nbytes() // t.element_size()
    touched = torch.zeros(elements, dtype=torch.bool, device=t.device)
    touched.as_strided(t.shape, t.stride(), t.storage_offset()).fill_(True)
    return bool(touched.as_strided(other.shape, other.stride(), other.storage_offset()).any())
