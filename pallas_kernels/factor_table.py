"""Factors of weights in shared memory (operands.py): made by a warpgroup's threads together, read by its lanes.

A scale is wanted by four lanes of a warp, each for a quarter of its weights: made by each of them it would cost as much
as the weights do. Here a thread makes those of one row and half a chunk, and a lane reads four numbers of a row and a
part in one load:

    table[tile, part, j, place, 4]      place of a row in its tile: 16 * warp + 8 * half + group of the warp's lanes

Rows of a warp's lanes lie side by side, so that a load has no bank twice. There are two tables, for one chunk and the
next: what a warp still reads is two chunks old when it is written again, and a barrier is between.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from . import operands
from ._compat import ir, llvm, mosaic_utils, plgpu, vector
from .decode import CHUNK, PART
from .registers import ROW, THREADS, fragmented
from .simt import Word, thread_in_block

ROWS = 64  # of a tile
FOUR = 4
BYTES = 4


def scratch(name: str, tiles: int) -> Any:
    """Shared memory for two tables of so many tiles."""
    fours = operands.stored_factors(name) // FOUR
    return plgpu.SMEM((2, tiles, CHUNK // PART, fours, ROWS, FOUR), jnp.float32)


def nbytes(name: str, tiles: int) -> int:
    return 2 * tiles * (CHUNK // PART) * operands.stored_factors(name) * ROWS * BYTES


def write(table: Any, factors: list[list[jax.Array]]) -> None:
    """``factors`` by part of a thread's half of the chunk, f32[128] in THREADS layout. Waits for the warpgroup."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *(THREADS,) * (len(factors) * len(factors[0]))))
    def store(_, ref, *arrays):
        thread = thread_in_block()
        numbers = [vector.extract(array.registers.item(), [], [0]) for array in arrays]
        _, _, fours, _, _ = ref.type.shape
        for i in range(0, len(numbers), FOUR):
            part, j = divmod(i // FOUR, fours)
            half = thread % 128 // ROWS
            pointer = _pointer(ref, thread // 128, half * len(factors) + part, j, thread % ROWS)
            llvm.store(vector.from_elements(_four(), numbers[i : i + FOUR]), pointer)
        mosaic_utils.warpgroup_barrier()

    store(table, *(number for of_part in factors for number in of_part))


def read(table: Any, part: int) -> list[jax.Array]:
    """f32[64] each in ROW layout, of this warpgroup's tile."""
    *_, fours, _, _ = table.shape
    row = plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, layout=ROW)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=[row] * (fours * FOUR))
    def load(_, ref):
        thread = thread_in_block()
        tile, warp, group = thread // 128, thread % 128 // 32, thread % 32 // 4
        halves = [
            [llvm.load(_four(), _pointer(ref, tile, Word(part), j, warp * 16 + group + 8 * half)) for j in range(fours)]
            for half in range(2)
        ]
        found = []
        for j in range(fours):
            for i in range(FOUR):
                numbers = [vector.extract(of_half[j], [], [i]) for of_half in halves]
                registers = [vector.broadcast(ir.VectorType.get((1,), n.type), n) for n in numbers]
                found.append(fragmented(registers, ROW, (ROWS,), jnp.float32))
        return found

    return load(table)


def _four() -> Any:
    return ir.VectorType.get((FOUR,), ir.F32Type.get())


def _pointer(ref: Any, tile: Word, part: Word, j: int, place: Word) -> Any:
    _, parts, fours, _, _ = ref.type.shape
    row = (tile * (parts * fours) + part * fours + j) * ROWS + place
    offset = row * (FOUR * BYTES)
    return mosaic_utils.getelementptr(mosaic_utils.memref_ptr(ref), [offset.value], ir.IntegerType.get_signless(8))
