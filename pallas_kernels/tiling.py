"""Tile choices, each with its measurement or derivation."""

from __future__ import annotations

from typing import NamedTuple

# An H100 or H200 has 132 multiprocessors; a device with fewer runs the same persistent grid in more waves.
NUM_SMS = 132
# What a block may use of a multiprocessor's 228 KiB, less a KiB for barriers and the compiler's own scratch.
SMEM_BYTES = 227 * 1024 - 1024
MAX_STAGES = 8


class Config(NamedTuple):
    """``warpgroups`` compute warpgroups split the depth of a stage, one chunk each; ``stages`` in the ring."""

    warpgroups: int
    stages: int


# Registers a thread after setmaxnreg, the producer's 40 included in the block's launch allocation
# (65,536 / threads rounded down to 8): more would wait for registers that never come free.
REGISTERS = {1: 232, 2: 232, 3: 152, 4: 104}
PRODUCER_REGISTERS = 40


def few_tokens(depth_chunks: int, stage_bytes_per_chunk: int, fixed_bytes: int) -> Config:
    """The configuration of the few-token kernel: up to four warpgroups, as many stages as fit."""
    warpgroups = min(4, depth_chunks)
    stages = (SMEM_BYTES - fixed_bytes) // (stage_bytes_per_chunk * warpgroups)
    return Config(warpgroups, max(1, min(MAX_STAGES, stages)))
