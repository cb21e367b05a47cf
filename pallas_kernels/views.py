"""Planes' stages in shared memory as the kernels read them: in rows of each lane's own choice."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._compat import arith, ir, llvm, memref, mosaic_utils, plgpu, vector
from .matrices import ldmatrix
from .registers import LHS, LHS_BYTES, ROW, fragmented, i32, index, permuted, single
from .simt import Word, thread_in_block


class View:
    """A stage's plane, of which a lane reads two rows, for halves 0 and 1 of a tile's rows.

    ``ref``: a row plane [J, rows, n bytes], or of one piece [rows, n bytes], tiled with ``swizzle``, or a column plane
    [J, n, rows]. ``row_of(warp, group, half)``: (piece, row), of one piece (row,), of the ``half`` of a warp's lanes
    4 * group .. + 3. What was read once is not read again. With ``layout`` THREADS a column plane's entry is [128]:
    thread t's is of row t % 64 in the order (warp, half, group), and the threads from 64 on have entries of the later
    half of the tile.
    """

    def __init__(self, ref: Any, row_of: Callable[..., tuple], swizzle: int = 0, layout: Any = ROW):
        self.ref, self.row_of, self.swizzle, self.layout = ref, row_of, swizzle, layout
        self._read: dict[Any, jax.Array] = {}

    @property
    def at(self) -> _Entries:
        return _Entries(self)

    def bytes(self, width: int, parts: tuple[int, ...]) -> jax.Array:
        return self._once((width, parts), lambda: self._bytes(width, parts))

    def rows(self, entry: int) -> jax.Array:
        """[64] of a column plane's entry in ROW layout, or [128] in THREADS."""
        return self._once(entry, lambda: self._rows(entry))

    def _once(self, key: Any, read: Callable[[], jax.Array]) -> jax.Array:
        if key not in self._read:
            self._read[key] = read()
        return self._read[key]

    def _rows(self, entry: int) -> jax.Array:
        dtype, layout = self.ref.dtype, self.layout
        shape = (64,) if layout is ROW else (128,)

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=layout)
        )
        def load(_, ref):
            entries, thread = ref.type.shape[1], thread_in_block() % 128
            place = index(entry)
            if layout is ROW:
                rows = self._rows_of_lane()
            else:
                rows = [self.row_of(thread % 64 // 16, thread % 8, thread // 8 % 2)]
                if entries > 1:
                    place = arith.addi(place, (thread // 64 * (entries // 2)).index)
            registers = []
            for piece, row in rows:
                value = memref.load(ref, [_index(piece), place, row.index])
                registers.append(single(value))
            return fragmented(registers, layout, shape, dtype)

        return load(self.ref)

    def _rows_of_lane(self) -> list[tuple]:
        thread = thread_in_block() % 128
        return [self.row_of(thread // 32, thread % 32 // 4, half) for half in range(2)]

    def _bytes(self, width: int, parts: tuple[int, ...]) -> jax.Array:
        n, dtype = self.ref.shape[-1], self.ref.dtype
        starts = [p * width + i for p in parts for i in range(0, width, 32)] or list(range(0, n, 32))
        shape = (64, 32 * len(starts))

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(self._transforms),),
            return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=LHS_BYTES),
        )
        def load(_, ref):
            four_bytes = ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
            lane, warp = thread_in_block() % 32, thread_in_block() % 128 // 32
            # The lanes of matrix m say where its rows are: those of half 0, of half 1, then of the next 16 bytes.
            line, turn = self._line(ref, *self.row_of(warp, lane % 8, lane // 8 % 2))
            turn = turn ^ (lane // 16 * 16)
            registers = []
            for start in starts:
                words = ldmatrix(mosaic_utils.memref_ptr(ref), self._place(line, turn, start), 4, transposed=False)
                registers += [mosaic_utils.bitcast(word, four_bytes) for word in words]
            return fragmented(registers, LHS_BYTES, shape, dtype)

        return load(self.ref)

    def halves(self, parts: tuple[int, ...], per_part: int) -> jax.Array:
        """16-bit numbers [64, n] of a row plane's ``parts``, in LHS layout and in the order of four bytes' codes."""
        starts = [2 * (p * per_part + i) for p in parts for i in range(0, per_part, 16)]
        shape = (64, 16 * len(starts))

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(self._transforms),),
            return_type=plgpu.ShapeDtypeStruct(shape, self.ref.dtype, layout=LHS),
        )
        def load(_, ref):
            byte, word = (ir.IntegerType.get_signless(bits) for bits in (8, 32))
            pair, two_words = ir.VectorType.get((2,), ref.type.element_type), ir.VectorType.get((2,), word)
            base, mine = mosaic_utils.memref_ptr(ref), thread_in_block() % 4 * 8
            lines = [self._line(ref, *place) for place in self._rows_of_lane()]
            registers = []
            for start in starts:  # of sixteen numbers, of a row and of the row 8 below: 4q .. 4q + 3
                both = []
                for line, turn in lines:
                    place = self._place(line, turn ^ mine, start)
                    four = llvm.load(two_words, mosaic_utils.getelementptr(base, [place.value], byte))
                    both.append([vector.extract(four, [], [k]) for k in range(2)])
                # 4q and 4q + 2, then 4q + 1 and 4q + 3.
                for places in (0x5410, 0x7632):
                    registers += [mosaic_utils.bitcast(permuted(four[0], four[1], i32(places)), pair) for four in both]
            return fragmented(registers, LHS, shape, self.ref.dtype)

        return load(self.ref)

    @property
    def _transforms(self) -> tuple:
        entries = self.swizzle // jnp.dtype(self.ref.dtype).itemsize
        return plgpu.TilingTransform((8, entries)), plgpu.SwizzleTransform(self.swizzle)

    def _line(self, ref: Any, *place: Any) -> tuple[Word, Word]:
        """Where a row begins, and what its 16 bytes' places are to be xored with."""
        (*of_pieces, of_eight, _, _, _), _ = ref.type.get_strides_and_offset()
        size, (*pieces, row) = jnp.dtype(self.ref.dtype).itemsize, place
        inner = row % 8 * self.swizzle
        line = [Word(piece) * (step * size) for piece, step in zip(pieces, of_pieces, strict=True)]
        line += [row // 8 * (of_eight * size), inner]
        # The copy engine permutes a line's 16 bytes by the line's number among 128 bytes.
        return functools.reduce(operator.add, line), inner // 128 * 16

    def _place(self, line: Word, turn: Word, start: int) -> Word:
        """Of the row's byte ``start``."""
        column, within = divmod(start, self.swizzle)
        return line + (turn ^ within) + column * 8 * self.swizzle


def _index(piece: Any) -> Any:
    return piece.index if isinstance(piece, Word) else index(piece)


class _Entries(NamedTuple):
    view: View

    def __getitem__(self, index: tuple[slice, int]) -> Entry:
        return Entry(self.view, index[1])


class Entry(NamedTuple):
    """One entry of all rows of a column plane's view."""

    view: View
    entry: int

    def rows(self) -> jax.Array:
        return self.view.rows(self.entry)
