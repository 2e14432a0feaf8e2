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


GRIDS = "the table gives one blocks_per_sm for all dtypes and targets of a tile, and what fits is known once compiled"
KNOWN = (
    Known("spills", r"sm_80 gate_backward_kernel \[bfloat16 alone, gelu_tanh\]", "4 instructions, of the 64 x 64 tile"),
    Known("blocks", r"\S+ gated_forward_kernel \[\w+ 64x2x64x32 (un)?aligned\]", GRIDS),
    Known("blocks", r"sm_80 gated_forward_kernel \[\w+ 128x2x64x32 aligned\]", GRIDS),
    Known("blocks", r"gfx942 gated_(forward|backward)_kernel \[\w+ 128x(2x)?64x32 (un)?aligned\]", GRIDS),
    Known("blocks", r"\S+ gated_backward_kernel \[\w+ 64x64x32 (un)?aligned\]", GRIDS),
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
