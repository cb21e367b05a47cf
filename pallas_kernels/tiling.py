"""Tile choices, each with its measurement or derivation."""

from __future__ import annotations

from collections.abc import Sequence

import jax

# An H100 SXM, H200 or GH200 has 132 multiprocessors. More blocks than the device has would wait for ever on each other.
NUM_SMS = 132
# What a block may use of a multiprocessor's 228 KiB, less a KiB for barriers and the compiler's own scratch.
SMEM_BYTES = 227 * 1024 - 1024
MAX_STAGES = 8
# Registers a thread after setmaxnreg: 65,536 over 512 threads, rounded down to 8, is what the block is launched with;
# more than 512 * 128 in all would wait for registers that never come free.
COMPUTE_REGISTERS, OTHER_REGISTERS = 160, 96


def num_sms() -> int:
    """Blocks of a persistent grid: the default device's multiprocessors, or an H200's where jax runs on no GPU."""
    device = jax.devices()[0]
    return min(NUM_SMS, device.core_count) if device.platform == "gpu" else NUM_SMS


def stages(stage_bytes: Sequence[int], fixed_bytes: int) -> list[int]:
    """Stages of each phase's ring: as many as fit, the fewest first."""
    left = SMEM_BYTES - fixed_bytes - sum(stage_bytes)
    found = [1] * len(stage_bytes)
    while True:
        order = sorted(range(len(found)), key=lambda i: found[i])
        fitting = [i for i in order if stage_bytes[i] <= left and found[i] < MAX_STAGES]
        if not fitting:
            return found
        found[fitting[0]] += 1
        left -= stage_bytes[fitting[0]]


def by_rows(units: int, chunks: int) -> bool:
    """Whether lanes share a stage by rows: half the traffic of x, but half the units to deal to the blocks.

    Measured at T = 8: Qwen3-30B-A3B (8 and 3 chunks of depth) 49.0 us a layer by rows, 55.7 by depth; Mixtral-8x7B
    (16 and 56) 251.9 and 249.0.
    """
    return units >= 4 * NUM_SMS and chunks <= 8
