"""What the gate finds wrong today, by name and with its reason, until it is mended.

An exception whose kernels are right again fails the gate, so that none outlives its fault.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    """A kind of fault of every report whose name `pattern` matches from end to end."""

    kind: str
    pattern: str
    reason: str

    def covers(self, kind: str, name: str) -> bool:
        return kind == self.kind and re.fullmatch(self.pattern, name) is not None


KNOWN = (
    Known("spills", r"sm_80 gate_backward_kernel \[bfloat16 alone, gelu_tanh\]", "4 instructions, of the 64 x 64 tile"),
    Known(
        "stores",
        r"\S+ interaction_(direction|pairs)_kernel \[b?float16 K=\d+ full\]",
        "tiles on the diagonal alone: their mask i <= j differs from one element to the next",
    ),
    Known(
        "stores",
        r"\S+ sparse_dots_kernel \[b?float16\]",
        "a program stores eight numbers, of which the sum over lanes leaves one in each",
    ),
)
