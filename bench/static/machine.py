"""The constants of the performance model, in one place and with their sources.

A datasheet's dense bf16 peak and its clock give FLOP per clock; where one of the two is missing, the row says so. What
has no source is an assumption and is called one. Every estimate is a range: all of these hold within SPREAD.
"""

from __future__ import annotations

from dataclasses import dataclass

SPREAD = 0.25


@dataclass(frozen=True)
class Machine:
    """One GPU.

    Attributes:
        processors: multiprocessors.
        clock: hertz.
        tensor: dense bf16 FLOP of one multiprocessor's tensor cores per clock.
        l2: bytes per clock from L2 to all multiprocessors.
        l2_bytes: size of L2.
        hbm: bytes per second of its memory.
    """

    name: str
    processors: int
    clock: float
    tensor: int
    l2: float
    l2_bytes: int
    hbm: float


# A100: NVIDIA A100 whitepaper, tables 1 and 4: 312 TFLOP/s at 1.41 GHz, 40 MB and 5120 bytes per clock of L2; the 80 GB
#   board's 2.039 TB/s from its datasheet.
# RTX 4090: NVIDIA Ada whitepaper, appendix A: 165.2 TFLOP/s with fp32 accumulation at 2.52 GHz, 72 MB, 1.008 TB/s.
# H100 SXM: NVIDIA H100 whitepaper and datasheet: 989.4 TFLOP/s, 132 multiprocessors, 50 MB, 3.35 TB/s; 4096 FLOP per
#   clock of each, twice A100's, makes the clock 1.83 GHz.
# B200: NVIDIA Blackwell datasheet: 2.25 PFLOP/s, 8 TB/s; 148 multiprocessors of 8192 FLOP per clock make the clock
#   1.855 GHz; 126 MB of L2 as its driver reports.
# L2 bytes per clock: A100's for all, an assumption: no whitepaper gives another.
MACHINES = {
    "sm_80": Machine("A100", 108, 1.41e9, 2_048, 5_120, 40 << 20, 2.039e12),
    "sm_89": Machine("RTX 4090", 128, 2.52e9, 512, 5_120, 72 << 20, 1.008e12),
    "sm_90": Machine("H100 SXM", 132, 1.83e9, 4_096, 5_120, 50 << 20, 3.35e12),
    "sm_100": Machine("B200", 148, 1.855e9, 8_192, 5_120, 126 << 20, 8.0e12),
}

# Of one multiprocessor, per clock. CUDA C++ programming guide, arithmetic instructions and shared memory: four
# schedulers of one warp instruction each, 16 special-function lanes, 32 banks of 4 bytes. A store or load instruction
# takes a clock for each line of 128 bytes that it touches: an assumption.
SCHEDULERS = 4
SPECIAL_LANES = 16
SHARED_BYTES = 128
LINE = 128
SECTOR = 32

# Clocks. Assumptions, from published microbenchmarks of loads from L2 and memory (250 to 800 clocks on all four).
LOAD = 800  # a load that nothing overlaps, from its issue to its data
STORE = 200  # a wait until a copy engine has read a buffer of shared memory
BARRIER = 30  # a barrier of the block

CALIBRATION = "uncalibrated: no published table of times was reproduced, so that shares and ratios are leads alone"
