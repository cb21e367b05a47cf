"""Tile choices, each with its measurement or derivation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from . import row_copies, sorted_pairs
from ._compat import plgpu

# An H100 SXM, H200 or GH200 has 132 multiprocessors. More blocks than the device has would wait for ever on each other.
NUM_SMS = 132
# What a block may use of a multiprocessor's 228 KiB, less a KiB for barriers and the compiler's own scratch.
SMEM_BYTES = 227 * 1024 - 1024
MAX_STAGES = 8
MAX_X_STAGES = 16
LEAST_X_STAGES = 8  # two chunks
RESIDENT_BYTES = 40 * 1024  # of x for few tokens, all of it in shared memory beside the stages
ENDS_BYTES = 4 * 1024  # that may be lost between arrays, and for barriers and units (free_bytes)
IN_FLIGHT_BYTES = 48 * 1024  # of weights for few tokens, at least: whole stages
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


def in_flight(stage_bytes: int, stages: int) -> int:
    """Of a ring's stages of weights, how many a block asks of memory at a time: what keeps memory busy. More only makes
    each answer take longer, and h on its way from block to block waits among them.

    Measured on an H100, Qwen3-30B-A3B T = 1: 13.8 us with 48 KiB, 14.4 with 64, 14.6 with 96; T = 2 21.4, and 22.0 with
    a stage less of each phase than 48 KiB are.
    """
    return min(stages, -(-IN_FLIGHT_BYTES // stage_bytes))


def by_rows(units: int, chunks: int) -> bool:
    """Whether lanes share a stage by rows: half the traffic of x, but half the units to deal to the blocks.

    Measured at T = 8: Qwen3-30B-A3B (8 and 3 chunks of depth) 49.0 us a layer by rows, 55.7 by depth; Mixtral-8x7B
    (16 and 56) 251.9 and 249.0.
    """
    return units >= 4 * NUM_SMS and chunks <= 8


def is_read_once(tokens: int, columns: int, experts: int, live_share: float = 1.0) -> bool:
    """Whether few_tokens.py's slots of eight columns hold most experts' pairs, where routing is random and
    ``live_share`` of the columns lead to these experts.

    Measured on Qwen3-30B-A3B, us a layer: T = 32 125, 64 164; by many_tokens.py 187 and 203.
    """
    return tokens <= 64 and columns * live_share <= 4 * experts and columns <= 1024


def free_bytes(arrays: Sequence[jax.ShapeDtypeStruct]) -> int:
    """Of a block's shared memory beside these arrays, each on a KiB of its own, and two more for barriers and units."""
    kib = [-(-math.prod(a.shape) * jnp.dtype(a.dtype).itemsize // 1024) for a in arrays]
    return SMEM_BYTES - (sum(kib) + 2) * 1024


class Pipeline(NamedTuple):
    """Stages of weights, of 256 of depth each, and of x, of 64; those of x in rows of ``side``, which are copied and
    waited for one by one or, where they are ``whole_chunks``, together."""

    weights: int
    x: int
    side: int
    whole_chunks: bool = False

    @property
    def rows(self) -> int:
        return self.x // self.side

    @property
    def lead(self) -> int:
        """Stages of x that one half of the warpgroups is ahead of the other, which has freed nothing so far: all must
        be in shared memory, and their weights, of which there may be two chunks."""
        return 0 if self.whole_chunks else min(4, self.x // 2)

    @property
    def span(self) -> int:
        """Stages of x that are copied at once."""
        return self.side if self.whole_chunks else 1


def pipeline(weight_bytes: int, x_bytes: int, fixed_bytes: int, narrow: bool) -> Pipeline:
    """Weights as many as leave two chunks of x, but at least two; x all that is left. Where two chunks' fit, x has a
    row of four stages a chunk: their places are then known but for the row's."""
    left = SMEM_BYTES - fixed_bytes
    weights = min(MAX_STAGES, max(2, (left - LEAST_X_STAGES * x_bytes) // weight_bytes))
    x = min(MAX_X_STAGES, (left - weights * weight_bytes) // x_bytes)
    return Pipeline(weights, x // 4 * 4, 4, narrow) if x >= LEAST_X_STAGES else Pipeline(weights, x, 1)


# (most columns of a tile, warpgroups that multiply): what the registers hold. The widest are two products of one
# operand, which cost the tensor core more than one: only where they spare a third of the decoding. A tile that has no
# more than WIDE's columns is multiplied once: Mixtral-8x7B T = 1024 1,401 to 1,351 us a layer and 1,330 to 1,310,
# forms in turns on H100s; Qwen3-30B-A3B T = 4096 nothing.
NARROW, WIDE, WIDEST = (96, 4), (256, 2), (288, 2)


def is_narrow(warpgroups: int) -> bool:
    """Whether so many multiply a narrow tile."""
    return warpgroups == NARROW[1]


class Tile(NamedTuple):
    """``widths``: columns, or two numbers of them, of which a tile takes the lower one where that holds it."""

    widths: tuple[int, ...]
    warpgroups: int  # that multiply

    @property
    def width(self) -> int:
        return self.widths[0]


def tile(pairs: float, experts: int, terms: int, weight_bytes: int) -> Tile:
    """For ``weight_bytes`` of a stage of one warpgroup's weights and as many pairs as to expect to lead to the experts.

    As few tiles as hold most groups where routing is random, equally wide. Narrow ones only where one holds a
    group, widest ones where they are a third fewer. Measured, us a layer narrow and wide: Qwen3-30B-A3B T = 1024
    308, 320, T = 2048 573, 448, T = 4096 927, 865, T = 8192 1786, 1606; Mixtral-8x7B T = 512 1088, 818, T = 1024
    1789, 1625, T = 4096 6327, 5085. On an H100 wide and widest: Qwen3-30B-A3B T = 4096 868, 749, Mixtral-8x7B T =
    1024 1570, 1385. On an H200, three and two tiles a group: Mixtral-8x7B T = 2048 2471, 2332, Qwen3-30B-A3B T =
    8192 1265, 1243; but five and four: Mixtral-8x7B T = 4096 4457, 4543. One width and two: Qwen3-30B-A3B T = 2048
    456, 426, Mixtral-8x7B T = 512 851 with either.
    """
    mean = pairs / experts
    spread = mean**0.5
    span = mean + 1.5 * spread + sorted_pairs.ALIGN - 1

    def has_room(columns: int, warpgroups: int) -> bool:
        # Two stages of weights beside four of x, 64 of depth in bf16, a table of factors, and rows on their way.
        return warpgroups * (2 * weight_bytes + 4096) + 4 * 128 * columns + row_copies.LEAST_BYTES <= SMEM_BYTES

    def tiles_of(columns: int) -> int:
        return math.ceil(span * terms / columns)

    forms = [form for form in (NARROW, WIDE) if tiles_of(form[0]) == 1 and has_room(*form)]
    most, warpgroups = forms[0] if forms else WIDE
    spares_a_third = tiles_of(WIDEST[0]) * 3 <= tiles_of(WIDE[0]) * 2
    if terms == 1 and spares_a_third and has_room(*WIDEST):
        most, warpgroups = WIDEST
    tiles = tiles_of(most)
    width, lower = (
        math.ceil(columns / tiles / 8) * 8 for columns in (span, mean + spread / 4 + sorted_pairs.ALIGN / 2)
    )
    # With more columns, or fewer registers, the assembler serialises the products of a kernel that has both.
    both = lower < width <= WIDE[0] and warpgroups == WIDE[1] and terms == 1
    return Tile((width, lower) if both else (width,), warpgroups)


def keeps_f32(pairs: int, outputs: int) -> bool:
    """Whether down's results stay in f32 until they are added up: where L2 holds them that costs nothing."""
    return pairs * outputs * 4 <= 32 * 2**20


def claim_registers(warpgroups: int, multiplies: bool) -> None:
    """168 a thread are what three warpgroups are launched with, 96 what five are."""
    multiplying, copying = (232, 40) if warpgroups == 2 else (112, 32)
    plgpu.set_max_registers(multiplying if multiplies else copying, action="increase" if multiplies else "decrease")
