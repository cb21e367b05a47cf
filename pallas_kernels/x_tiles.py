"""How the kernels read x (and h): groups of 32 weights' depth, all columns of a group together, with its sums.

A group is a row of words. First, for each column n, its 32 values in the order in which a lane wants them (lane q of
four takes eight: depths 4q, 4q+2, 4q+1, 4q+3 and the same past 16; registers.py tells why), then for each term and
column the sums over the group's two halves:

    word[n * 16 + q * 4 + 2 * half .. + 1]     bf16 x[n, 16 * half + 4q + (0, 2 | 1, 3)] * X_SCALE
    word[R * 16 + term * R + n]                bf16 (sum over half 0, sum over half 1) * PRODUCT

A column is a token, or one of the bf16 terms that a token's f32 or f16 x is split into: column = part * tokens + token.
The sums come in bf16 terms too, so that the tensor core can multiply them with sub-blocks' offsets.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._compat import arith, ir, llvm, memref, mosaic_utils, plgpu
from .registers import RHS, fragmented, i32, index, lane_in_warp, thread_in_warpgroup
from .simt import Word, each

GROUP = 32  # weights of depth
COLUMNS = 8  # of x in one call of the tensor core

# Codes enter the tensor core as the integers they are: bf16 numbers of the smallest exponent, multiples of 2^-133
# (decode.py). x is scaled up by a power of two, exactly, so that products stay normal: |x| may reach 2^56, and what a
# token holds below 2^-65 counts as zero.
CODE = 2.0**-133
X_SCALE = 2.0**72
PRODUCT = CODE * X_SCALE


def x_parts(dtype: Any) -> int:
    """bf16 terms whose sum is x to 16 bits: one for bf16, two for f16 (exact) and f32 (2^-17)."""
    return 1 if dtype == jnp.bfloat16 else 2


def sum_terms(parts: int) -> int:
    """bf16 terms that a sum is split into: 16 bits of it for bf16 x, 24 otherwise."""
    return 1 + parts


def group_words(rows: int, parts: int) -> int:
    """Words of a group of ``rows`` columns, padded to the copy engine's 16 bytes."""
    return -(-rows * (GROUP // 2 + sum_terms(parts)) // 4) * 4


def store_value(value, ref, place: tuple[Word, ...], column: Word, depth: Word, tokens: int, parts: int) -> None:
    """One f32 of a group, ``ref[*place]``, by a warp whose lanes hold ``depth`` 0 to 31 of a column:
    its terms, and those of the sums that the lanes make together. ``column`` is that of the first term."""
    bf16, f32 = ir.BF16Type.get(), ir.F32Type.get()
    *_, groups, words = ref.type.shape
    base = mosaic_utils.memref_ptr(ref)
    group = place[-1] if len(place) == 1 else place[0] * groups + place[1]
    half, rows = depth // 16, tokens * parts

    def store(term, at: Word) -> None:
        at = group * (2 * words) + at
        llvm.store(term, mosaic_utils.getelementptr(base, [at.value], bf16))

    for part in range(parts):
        term = column + part * tokens
        _, exact = _bf16_term(value)
        scaled, _ = _bf16_term(arith.mulf(exact, mosaic_utils.c(X_SCALE, f32)))
        store(scaled, term * GROUP + _place_in_column(depth))
        value = arith.subf(value, exact)
        total = exact
        for distance in (1, 2, 4, 8):
            total = arith.addf(total, mosaic_utils.shfl_bfly(total, distance))
        with mosaic_utils.when((depth % 16).equals(0)):
            total = arith.mulf(total, mosaic_utils.c(PRODUCT, f32))
            for i in range(sum_terms(parts)):
                rounded, exact = _bf16_term(total)
                store(rounded, (term + (rows * (GROUP // 2) + i * rows)) * 2 + half)
                total = arith.subf(total, exact)


def make_resident(x_ref, target_ref, parts: int) -> None:
    """One token's x [1, D] in global memory -> u32[groups, words] in shared memory, by one warpgroup: zeros past D."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 2)
    def run(_, x_ref, target_ref):
        f32 = ir.F32Type.get()
        groups, real = target_ref.type.shape[0], x_ref.type.shape[1] // GROUP
        thread = Word(arith.index_cast(ir.IntegerType.get_signless(32), thread_in_warpgroup()))
        depth, at_once = thread % 32, 8

        def load(group: Word):
            inside = group < real
            value = memref.load(x_ref, [Word(0).index, (group.where(inside) * GROUP + depth).index])
            value = value if isinstance(value.type, ir.F32Type) else arith.extf(f32, value)
            return arith.select(inside, value, mosaic_utils.c(0.0, f32))

        def several(first: Word) -> None:
            mine = [(first + (thread // 32 + 4 * i)).at_most(groups - 1) for i in range(at_once)]
            for group, value in [(group, load(group)) for group in mine]:
                store_value(value, target_ref, (group,), Word(0), depth, 1, parts)

        each(Word(0), groups, 4 * at_once, several)

    run(x_ref, target_ref)


def _place_in_column(depth: Word) -> Word:
    """Of lane q's eight: 4q, 4q+2, 4q+1, 4q+3, and the same past 16."""
    half, lane, inner = depth // 16, depth % 16 // 4, depth % 4
    return lane * 8 + half * 4 + (inner % 2) * 2 + inner // 2


def _bf16_term(value):
    """``value`` rounded to bf16, and that in f32."""
    term = arith.truncf(ir.BF16Type.get(), value)
    return term, arith.extf(ir.F32Type.get(), term)


def load_x(ref, rows: int) -> jax.Array:
    """Groups u32[G, words] in SMEM -> bf16[32 G, COLUMNS] in RHS layout.

    Column n reads column n % rows: columns beyond the rows repeat them, so none ever holds what was not written.
    """
    groups, words = ref.shape
    shape = (groups * GROUP, COLUMNS)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=RHS)
    )
    def load(_, ref):
        bf16 = ir.BF16Type.get()
        eight, pair = ir.VectorType.get((8,), bf16), ir.VectorType.get((2,), bf16)
        base, column, quad = _place_of_lane(ref, rows)
        offset = arith.addi(arith.muli(column, i32(GROUP)), arith.muli(quad, i32(8)))
        registers = np.empty((groups, 2, 2), object)  # group, half, pair
        for group in range(groups):
            at = arith.addi(offset, i32(2 * words * group))
            values = llvm.load(eight, mosaic_utils.getelementptr(base, [at], bf16))
            for half, which in np.ndindex(2, 2):
                first = 4 * half + 2 * which
                piece = mosaic_utils.vector_slice(values, slice(first, first + 2))
                registers[group, half, which] = mosaic_utils.bitcast(piece, pair)
        return fragmented(list(registers.flatten()), RHS, shape, jnp.bfloat16)

    return load(ref)


def load_sums(ref, rows: int, term: int) -> jax.Array:
    """One term of a chunk's sums, from groups u32[8, words] in SMEM -> bf16[16, COLUMNS] in RHS layout."""
    words = ref.shape[1]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((16, COLUMNS), jnp.bfloat16, layout=RHS)
    )
    def load(_, ref):
        bf16 = ir.BF16Type.get()
        pair = ir.VectorType.get((2,), bf16)
        base, column, quad = _place_of_lane(ref, rows)
        offset = arith.addi(arith.muli(column, i32(2)), arith.muli(quad, i32(2 * words)))
        registers = []
        for group in (0, 4):
            at = arith.addi(offset, i32(rows * GROUP + 2 * term * rows + 2 * words * group))
            registers.append(llvm.load(pair, mosaic_utils.getelementptr(base, [at], bf16)))
        return fragmented(registers, RHS, (16, COLUMNS), jnp.bfloat16)

    return load(ref)


def _place_of_lane(ref, rows: int):
    """(base pointer, the column that this lane reads, its place among the four lanes of a column)."""
    to_i32 = lambda value: arith.index_cast(ir.IntegerType.get_signless(32), value)  # noqa: E731
    lane = lane_in_warp()
    column = arith.remui(arith.divui(lane, index(4)), index(rows))
    return mosaic_utils.memref_ptr(ref), to_i32(column), to_i32(arith.remui(lane, index(4)))
