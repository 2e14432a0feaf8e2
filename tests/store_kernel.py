"""The kernels' store of a tile by itself, for test_precision.py."""

import triton
import triton.language as tl

from bilinear_ops.kernels.tile import store_tile


@triton.jit
def store(src_ptr, out_ptr):
    offsets = tl.arange(0, 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    store_tile(out_ptr, 4, 0, 0, 4, 4, tl.load(src_ptr + offsets), False)
