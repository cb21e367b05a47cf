"""Tile choices, each with its measurement or derivation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax

from ._compat import plgpu

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


# Columns that the widths of many_tokens' tiles are apart: each width is a branch of the program.
WIDTH_STEP = 32
# Of one column and term: 256 of depth in bf16.
X_CHUNK_BYTES = 512
MAX_WIDTH = 256


class Pipeline(NamedTuple):
    """Stages of weights, of 256 of depth each, and chunks of x, of as much in four stages."""

    weights: int
    x_chunks: int


def pipeline(weight_bytes: int, x_chunk_bytes: int) -> Pipeline:
    """Two chunks of x where two stages of weights fit beside them, else one; weights in all that is left."""
    x_chunks = 2 if 2 * (x_chunk_bytes + weight_bytes) <= SMEM_BYTES else 1
    return Pipeline(min(MAX_STAGES, (SMEM_BYTES - x_chunks * x_chunk_bytes) // weight_bytes), x_chunks)


def widths(most: int) -> list[int]:
    return list(range(WIDTH_STEP, most + 1, WIDTH_STEP))


def tile(pairs: int, experts: int, terms: int, weight_bytes: int) -> tuple[int, int]:
    """(most columns of a tile, warpgroups that multiply), for ``weight_bytes`` of a stage of one warpgroup's weights.

    Groups as long as routing at random makes most of them fit one tile; narrow tiles leave registers for four
    warpgroups, whose work is then decoding.
    """
    mean = pairs / experts
    width = min(MAX_WIDTH // terms, -(-int(mean + 2 * mean**0.5 + 7) // WIDTH_STEP) * WIDTH_STEP)
    warpgroups = 4 if width * terms <= 64 else 2
    # Two stages of weights beside one chunk of x: dense weights take more.
    while 2 * warpgroups * weight_bytes + X_CHUNK_BYTES * width * terms > SMEM_BYTES:
        if width == WIDTH_STEP:
            warpgroups //= 2
        else:
            width -= WIDTH_STEP
    return width, warpgroups


def claim_registers(warpgroups: int, multiplies: bool) -> None:
    """168 a thread are what three warpgroups are launched with, 96 what five are, who need no more."""
    if warpgroups == 2:
        plgpu.set_max_registers(232 if multiplies else 40, action="increase" if multiplies else "decrease")
