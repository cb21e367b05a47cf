"""A tile's planes read as matrices of 8 x 8 halfwords (ldmatrix): a lane gets all scales of its two rows at once.

A byte a lane and load, four lanes the same, is what shared memory does worst. Of a column plane a halfword is a scale
of two neighbouring rows, and transposed matrices hand each lane one such pair of every sub-block. So a lane's two rows,
of its warp's 16, are neighbours 2g and 2g + 1 instead of g and g + 8: in this order where g < 4, in the other where
not, for then the first rows of all lanes differ modulo 8, which a swizzled row plane wants.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._compat import arith, ir, llvm, mosaic_utils, nvvm, plgpu
from .decode import TILE_FORMATS
from .registers import LHS, ROW, as_bf16, fragmented, shifted, single, thread_in_warpgroup
from .simt import Word

TILE = 64


def readable(name: str) -> bool:
    """Whether a format gains: where its scales are bytes."""
    return any(not plane.by_row and jnp.dtype(plane.dtype).itemsize == 1 for plane in TILE_FORMATS[name].planes)


def place_of_row(row: Any) -> Any:
    """The row of the tensor core's result that holds a row of the tile; also of NumPy integers."""
    lane = row % 16 // 2
    return row // 16 * 16 + lane + ((row % 2 + lane // 4) % 2) * 8


def row_of(warp: Word, group: Word, half: Word) -> tuple[Word]:
    """Row of the tile that is the ``half`` of a warp's lanes 4 * group .. + 3 (views.py)."""
    return (warp * 16 + group * 2 + (group // 4 + half) % 2,)


class ColumnMatrix:
    """A column plane [J, n, 64 / J] in SMEM of bytes or halfwords, J pieces of the tile's rows that lie apart."""

    def __init__(self, ref: Any):
        self.ref, self._rows = ref, None

    @property
    def at(self) -> ColumnMatrix:
        return self

    def __getitem__(self, place: tuple[slice, int]) -> Column:
        return Column(self, place[1])

    def rows(self) -> list[jax.Array]:
        """[64] in ROW layout of each entry: i32, or halfwords."""
        if self._rows is None:
            self._rows = self._halfwords() if self.ref.dtype.itemsize == 2 else self._bytes()
        return self._rows

    def _bytes(self) -> list[jax.Array]:
        entries = self.ref.shape[1]
        of_rows = plgpu.ShapeDtypeStruct((TILE,), jnp.int32, layout=ROW)

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=[of_rows] * entries)
        def load(_, ref):
            lane, _ = _lane_and_warp()
            found = []
            for first in range(0, entries, 8):
                entry = ((lane // 8) * 2 + lane % 2 + first).at_most(entries - 1)
                words = self._matrices(ref, entry, 4)
                for b in range(first, min(first + 8, entries)):
                    word = words[(b - first) // 2]
                    values = [single(self._byte(word, b % 2, half)) for half in range(2)]
                    found.append(fragmented(values, ROW, (TILE,), jnp.int32))
            return found

        return load(self.ref)

    def _halfwords(self) -> list[jax.Array]:
        _, entries, height = self.ref.shape
        dtype = self.ref.dtype

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(),),
            return_type=[plgpu.ShapeDtypeStruct((TILE,), dtype, layout=ROW)] * entries,
        )
        def load(_, ref):
            (of_piece, of_entry, _), _ = ref.type.get_strides_and_offset()
            lane, warp = _lane_and_warp()
            row = warp * 16 + lane // 4 * 2
            found = []
            for entry in range(entries):
                place = row // height * of_piece + row % height + entry * of_entry
                pointer = mosaic_utils.getelementptr(mosaic_utils.memref_ptr(ref), [place.value], ref.type.element_type)
                pair = Word(llvm.load(ir.IntegerType.get_signless(32), pointer))
                values = []
                for half in range(2):
                    shift = (lane // 16 + half) % 2 * 16
                    value = arith.trunci(ref.type.element_type, arith.shrui(pair.value, shift.value))
                    values.append(single(value))
                found.append(fragmented(values, ROW, (TILE,), dtype))
            return found

        return load(self.ref)

    def factors(self, per: int, shift: int) -> jax.Array:
        """As registers.load_factors: bf16[64, 16] in LHS layout, each of a chunk's 16 sixteens' factor."""

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((TILE, 16), jnp.bfloat16, layout=LHS)
        )
        def load(_, ref):
            lane, _ = _lane_and_warp()
            if per == 32:  # lane q of four wants entries q and q + 4, each for two sixteens
                words = self._matrices(ref, lane % 8 // 2 + lane % 2 * 4, 1)
                pairs = [(words[0], 0, 0), (words[0], 1, 1)]
            else:  # entries 2q, 2q + 1 and 2q + 8, 2q + 9
                words = self._matrices(ref, lane % 16, 2)
                pairs = [(word, 0, 1) for word in words]
            registers = []
            for word, low, high in pairs:
                for half in range(2):
                    entries = [shifted(self._byte(word, which, half), shift) for which in (low, high)]
                    bits = [self._float_bits(entry) for entry in entries]
                    # The upper halves of two small integers' f32 bits are their bf16 bits.
                    both = mosaic_utils.inline_ptx(
                        "prmt.b32 $0, $1, $2, 0x7632;", *bits, result_types=ir.IntegerType.get_signless(32)
                    )
                    registers.append(as_bf16(both))
            return fragmented(registers, LHS, (TILE, 16), jnp.bfloat16)

        return load(self.ref)

    def _matrices(self, ref, entry: Word, count: int) -> list:
        """Words of two entries times two rows: lane q of four gets those in rows 2q and 2q + 1 of each matrix, where
        ``entry`` is what this lane's row of the matrices holds."""
        height = ref.type.shape[2]
        (of_piece, of_entry, _), _ = ref.type.get_strides_and_offset()
        _, warp = _lane_and_warp()
        place = warp * 16 // height * of_piece + warp * 16 % height + entry * of_entry
        return ldmatrix(mosaic_utils.memref_ptr(ref), place, count, transposed=True)

    def _byte(self, word, which: int, half: int):
        """Of a lane's ``half`` of the rows, entry ``which`` of two."""
        lane, _ = _lane_and_warp()
        byte = (lane // 16 + half) % 2 + 2 * which
        # Bytes 4 and up are those of a zero; 8 more repeats a byte's sign.
        selector = (byte + 8) * 0x1110 + byte if jnp.issubdtype(self.ref.dtype, jnp.signedinteger) else byte + 0x4440
        return mosaic_utils.inline_ptx("prmt.b32 $0, $1, 0, $2;", word, selector.value, result_types=word.type)

    def _float_bits(self, value):
        return mosaic_utils.bitcast(arith.sitofp(ir.F32Type.get(), value), value.type)


class Column(NamedTuple):
    """One entry of all rows."""

    matrix: ColumnMatrix
    entry: int

    def rows(self) -> jax.Array:
        return self.matrix.rows()[self.entry]


def _lane_and_warp() -> tuple[Word, Word]:
    thread = Word(arith.index_cast(ir.IntegerType.get_signless(32), thread_in_warpgroup()))
    return thread % 32, thread // 32


def ldmatrix(base, place: Word, count: int, transposed: bool) -> list:
    """``count`` words a lane; ``place`` in bytes is that of this lane's row."""
    word = ir.IntegerType.get_signless(32)
    pointer = mosaic_utils.getelementptr(base, [place.value], ir.IntegerType.get_signless(8))
    found = nvvm.ldmatrix(
        pointer,
        layout=nvvm.MMALayout.col if transposed else nvvm.MMALayout.row,
        num=count,
        shape=ir.Attribute.parse("#nvvm.ld_st_matrix_shape<m=8, n=8>"),
        elt_type=nvvm.LdStMatrixEltType.B16,
    )
    return [llvm.extractvalue(word, found, [i]) for i in range(count)] if count > 1 else [found]
