"""Factors of weights in shared memory (operands.py): made by a warpgroup's threads together, read by its lanes.

A scale is wanted by four lanes of a warp, each for a quarter of its weights: made by each of them it would cost as much
as the weights do. Here a thread makes those of one row and half a chunk, and a lane reads two or four words of a row
and a part in one load. Of a tile and a chunk, in words of 32 bits:

    factors[part, j, place, size]   place of a row in its tile: 16 * warp + 8 * half + group of the warp's lanes
    rests[place, quad, n]           where scales are whole and there are mins: each of a group's lanes has its own
    units[place, 2]                 where scales are whole: unit and inverse

Rows of a warp's lanes lie side by side, so that a load has no bank twice. A warpgroup has one table: it waits for its
warps before it writes the next chunk's, and after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from . import operands
from ._compat import ir, llvm, mosaic_utils, plgpu, vector
from .decode import CHUNK, PART, TILE_FORMATS
from .registers import ROW, THREADS, as_bf16, fragmented, single
from .simt import Word, thread_in_block

ROWS = 64  # of a tile
PARTS = CHUNK // PART
FOUR = 4
BYTES = 4


class Table(NamedTuple):
    """The table of a format's tiles, ``whole`` where they are :func:`operands.whole_part`'s."""

    format: str
    whole: bool

    @property
    def per_part(self) -> int:
        """Words of a row and part."""
        return operands.stored_factors(self.format, self.whole)

    @property
    def size(self) -> int:
        """Words that a lane loads at once."""
        return min(FOUR, self.per_part)

    @property
    def loads(self) -> int:
        """Of a row and part."""
        return self.per_part // self.size

    @property
    def rests(self) -> int:
        """Words of a lane."""
        return 32 // TILE_FORMATS[self.format].weights if self.whole and operands.has_mins(self.format) else 0

    @property
    def words(self) -> int:
        """Of a tile."""
        return ROWS * (PARTS * self.per_part + 4 * self.rests + 2 * self.whole)

    def scratch(self, tiles: int) -> Any:
        return plgpu.SMEM((tiles, self.words), jnp.uint32)

    def nbytes(self, tiles: int) -> int:
        return tiles * self.words * BYTES

    def write(self, table: Any, planes: Sequence[Any]) -> None:
        """By each thread what its half of a row's chunk needs; ``planes`` give f32[128] in THREADS layout."""
        half = range(PARTS // 2)
        if self.whole:
            found = operands.whole_factors(self.format, planes, half)
            arrays = [*found.words, *found.rests, found.unit, found.inverse]
        else:
            arrays = operands.factors(self.format, planes, half)

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *(THREADS,) * len(arrays)))
        def store(_, ref, *arrays):
            words = [_word(vector.extract(array.registers.item(), [], [0])) for array in arrays]
            thread = thread_in_block()
            tile, place, later = thread // 128, thread % ROWS, thread % 128 // ROWS
            for part in half:
                for j in range(self.loads):
                    mine, words = words[: self.size], words[self.size :]
                    self._store(ref, tile, self._factors(later * len(half) + part, j, place), mine)
            if self.rests:
                mine, words = words[: 2 * self.rests], words[2 * self.rests :]
                self._store(ref, tile, self._rests(place, later * 2), mine)
            if self.whole:
                self._store(ref, tile, self._units(place), words)

        store(table, *arrays)

    def read(self, table: Any, part: int) -> list[jax.Array]:
        """A part's factors, f32[64] or u32[64] each in ROW layout, of this warpgroup's tile."""
        dtype = jnp.uint32 if self.whole else jnp.float32
        places = [lambda place, j=j: self._factors(Word(part), j, place) for j in range(self.loads)]
        return self._read_rows(table, places, self.size, dtype)

    def read_units(self, table: Any) -> tuple[jax.Array, jax.Array]:
        unit, inverse = self._read_rows(table, [self._units], 2, jnp.float32)
        return unit, inverse

    def read_rests(self, table: Any) -> jax.Array:
        """bf16[64, 16], the left operand that sums of x (x_rows.py) are multiplied with."""
        shape = (ROWS, 16)

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=operands.A)
        )
        def load(_, ref):
            thread = thread_in_block()
            of_half = [
                self._load(ref, thread // 128, self._rests(place, thread % 4), self.rests) for place in _places(thread)
            ]
            # In the order (pair, half of the rows).
            words = [words[pair % self.rests] for pair in range(2) for words in of_half]
            return fragmented([as_bf16(word) for word in words], operands.A, shape, jnp.bfloat16)

        return load(table)

    def _read_rows(self, table: Any, places: Sequence[Any], size: int, dtype: Any) -> list[jax.Array]:
        row = plgpu.ShapeDtypeStruct((ROWS,), dtype, layout=ROW)

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=[row] * (len(places) * size))
        def load(_, ref):
            thread = thread_in_block()
            halves = [
                [word for at in places for word in self._load(ref, thread // 128, at(place), size)]
                for place in _places(thread)
            ]
            kind = ir.F32Type.get() if dtype == jnp.float32 else ir.IntegerType.get_signless(32)
            found = []
            for both in zip(*halves, strict=True):
                registers = [single(mosaic_utils.bitcast(word, kind)) for word in both]
                found.append(fragmented(registers, ROW, (ROWS,), dtype))
            return found

        return load(table)

    # Places of words in a tile's table.

    def _factors(self, part: Word, j: int, place: Word) -> Word:
        return ((part * self.loads + j) * ROWS + place) * self.size

    def _rests(self, place: Word, quad: Word) -> Word:
        return (place * 4 + quad) * self.rests + PARTS * self.per_part * ROWS

    def _units(self, place: Word) -> Word:
        return place * 2 + (PARTS * self.per_part + 4 * self.rests) * ROWS

    def _pointer(self, ref: Any, tile: Word, at: Word) -> Any:
        offset = (tile * self.words + at) * BYTES
        return mosaic_utils.getelementptr(mosaic_utils.memref_ptr(ref), [offset.value], ir.IntegerType.get_signless(8))

    def _store(self, ref: Any, tile: Word, at: Word, words: list) -> None:
        llvm.store(vector.from_elements(_vector(len(words)), words), self._pointer(ref, tile, at))

    def _load(self, ref: Any, tile: Word, at: Word, count: int) -> list:
        words = llvm.load(_vector(count), self._pointer(ref, tile, at))
        return [vector.extract(words, [], [i]) for i in range(count)]


def barrier() -> None:
    """What a warpgroup's threads wrote before it they read after it, and write again after the next one."""

    @plgpu.inline_mgpu()
    def wait(_):
        mosaic_utils.warpgroup_barrier()

    wait()


def _places(thread: Word) -> list[Word]:
    """Of a lane's rows."""
    first = thread % 128 // 32 * 16 + thread % 32 // 4
    return [first, first + 8]


def _vector(count: int) -> Any:
    return ir.VectorType.get((count,), ir.IntegerType.get_signless(32))


def _word(number: Any) -> Any:
    return mosaic_utils.bitcast(number, ir.IntegerType.get_signless(32))
