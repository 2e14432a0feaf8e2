"""How many blocks of a kernel one multiprocessor holds at once: what its registers, shared memory and threads allow.

The limits are the CUDA C++ programming guide's technical specifications per compute capability, and for gfx942 those
of the CDNA3 instruction set's guide and LLVM's AMDGPU page.
"""

from __future__ import annotations

from dataclasses import dataclass

REGISTERS = 65_536  # of 32 bits, of an NVIDIA multiprocessor, a quarter of them for each of its schedulers
RESERVED = 1_024  # bytes of shared memory that CUDA takes of each block
TENSOR_MEMORY = 512  # columns, of an sm_100 multiprocessor


@dataclass(frozen=True)
class Limits:
    """Of one multiprocessor: bytes of shared memory, threads and blocks."""

    shared: int
    threads: int
    blocks: int


NVIDIA = {
    "sm_80": Limits(167_936, 2_048, 32),
    "sm_89": Limits(102_400, 1_536, 24),
    "sm_90": Limits(233_472, 2_048, 32),
    "sm_100": Limits(233_472, 2_048, 32),
    "sm_120": Limits(102_400, 1_536, 24),
}


def resident_blocks(arch: str, registers: int, shared: int, warps: int, tensor_memory: int = 0) -> int:
    """Blocks of `warps` warps at `registers` a thread, `shared` bytes and `tensor_memory` columns; 0 if none fits."""
    if arch.startswith("gfx"):
        return _resident_on_amd(registers, shared, warps)
    limits = NVIDIA[arch]
    a_warp = max(1, _round_up(registers * 32, 256))
    by_registers = REGISTERS // 4 // a_warp * 4 // warps
    by_shared = limits.shared // (_round_up(shared, 128) + RESERVED)
    by_tensor_memory = TENSOR_MEMORY // tensor_memory if tensor_memory else limits.blocks
    return min(by_registers, by_shared, limits.threads // (32 * warps), limits.blocks, by_tensor_memory)


def _resident_on_amd(registers: int, shared: int, warps: int) -> int:
    """Each of a compute unit's four SIMDs has 512 registers a lane, accumulators among them, and holds 8 waves."""
    waves = 4 * min(8, 512 // max(1, _round_up(registers, 8)))
    by_shared = 65_536 // _round_up(shared, 512) if shared else waves
    return min(waves // warps, by_shared)


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit
