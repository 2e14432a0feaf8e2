"""What the gate finds wrong today, by name and with its reason, until it is mended.

An exception whose kernels are right again fails the gate, so that none outlives its fault.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import triton


@dataclass(frozen=True)
class Known:
    """A kind of fault of every report whose name `pattern` matches from end to end.

    `version`: of Triton, if one version alone has the fault.
    """

    kind: str
    pattern: str
    reason: str
    version: str = ""

    def covers(self, kind: str, name: str) -> bool:
        here = self.version in ("", triton.__version__)
        return here and kind == self.kind and re.fullmatch(self.pattern, name) is not None


KNOWN = (
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
    Known(
        "spills",
        r"sm_(90|120) interaction_direction_kernel \[bfloat16 K=8 packed\]",
        "18 and 2 of them, in the packed epilogue; 3.9 has none",
        "3.6.0",
    ),
    Known(
        "spills",
        r"sm_80 gated_backward_kernel \[float32 128x128x32 (un)?aligned\]",
        "82 and 78 of them, in the epilogue, with TF32 opted in to; 3.9 has none",
        "3.6.0",
    ),
    Known(
        "spills",
        r"sm_100 gated_backward_kernel \[b?float16 128x128x64 aligned\]",
        "2 of them, in the epilogue, which 3.6 compiles without warps of its own",
        "3.6.0",
    ),
    Known(
        "spills",
        r"sm_120 gated_split_kernel \[bfloat16 64x2x64x64 aligned\]",
        "2 of them, outside the main loop; 3.9 has none",
        "3.6.0",
    ),
)
