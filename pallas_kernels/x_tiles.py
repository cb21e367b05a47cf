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

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._compat import arith, ir, llvm, mosaic_utils, plgpu, vector
from .registers import RHS, fragmented, i32, index, lane_in_warp
from .simt import Word, each, thread_in_block

GROUP = 32  # weights of depth
QUAD = 4  # lanes that share a group
STRIP = 32 // QUAD  # groups that a warp takes at once
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
    store, half, rows = _group_store(ref, place), depth // 16, tokens * parts
    for part in range(parts):
        term = column + part * tokens
        _, exact = _bf16_term(value)
        store([_scaled(exact)], term * GROUP + _place_in_column(depth))
        value = arith.subf(value, exact)
        total = _sum_of_lanes(exact, (1, 2, 4, 8))
        with mosaic_utils.when((depth % 16).equals(0)):
            for i, (rounded,) in enumerate(_terms_of_sums([total], parts)):
                store([rounded], (term + (rows * (GROUP // 2) + i * rows)) * 2 + half)


def load_eight(x_ref, token: Word, group: Word, lane: Word):
    """What lane ``lane`` of a group's four has of x [T, D] in global memory: four numbers of either half."""
    kind, depth = x_ref.type.element_type, x_ref.type.shape[1]
    four, base = ir.VectorType.get((4,), kind), mosaic_utils.memref_ptr(x_ref)
    first = token * depth + group * GROUP + lane * 4
    return [llvm.load(four, mosaic_utils.getelementptr(base, [(first + at).value], kind)) for at in (0, 16)]


def store_eight(eight, ref, place: tuple[Word, ...], column: Word, lane: Word, tokens: int, parts: int) -> None:
    """As :func:`store_value`, of lanes that each hold what :func:`load_eight` gives."""
    store, rows = _group_store(ref, place), tokens * parts
    values = [_f32(vector.extract(four, [], [i])) for four in eight for i in (0, 2, 1, 3)]
    for part in range(parts):
        term = column + part * tokens
        exact = [_bf16_term(value)[1] for value in values]
        store([_scaled(value) for value in exact], term * GROUP + lane * 8)
        values = [arith.subf(value, known) for value, known in zip(values, exact, strict=True)]
        halves = [functools.reduce(arith.addf, half) for half in (exact[:4], exact[4:])]
        totals = [_sum_of_lanes(half, (1, 2)) for half in halves]
        with mosaic_utils.when(lane.equals(0)):
            for i, rounded in enumerate(_terms_of_sums(totals, parts)):
                store(rounded, (term + (rows * (GROUP // 2) + i * rows)) * 2)


def _group_store(ref, place: tuple[Word, ...]):
    """``store(bf16s, at)`` to ``ref[*place]``, which is a group, from its ``at``-th on."""
    *_, groups, words = ref.type.shape
    base, bf16 = mosaic_utils.memref_ptr(ref), ir.BF16Type.get()
    group = place[-1] if len(place) == 1 else place[0] * groups + place[1]

    def store(values, at: Word) -> None:
        value = vector.from_elements(ir.VectorType.get((len(values),), bf16), values) if len(values) > 1 else values[0]
        llvm.store(value, mosaic_utils.getelementptr(base, [(group * (2 * words) + at).value], bf16))

    return store


def _scaled(value):
    return _bf16_term(arith.mulf(value, mosaic_utils.c(X_SCALE, ir.F32Type.get())))[0]


def _sum_of_lanes(value, distances: tuple[int, ...]):
    for distance in distances:
        value = arith.addf(value, mosaic_utils.shfl_bfly(value, distance))
    return value


def _terms_of_sums(sums, parts: int):
    """Their bf16 terms, times PRODUCT."""
    sums = [arith.mulf(total, mosaic_utils.c(PRODUCT, ir.F32Type.get())) for total in sums]
    for _ in range(sum_terms(parts)):
        terms = [_bf16_term(total) for total in sums]
        yield [rounded for rounded, _ in terms]
        sums = [arith.subf(total, exact) for total, (_, exact) in zip(sums, terms, strict=True)]


def _f32(value):
    return value if isinstance(value.type, ir.F32Type) else arith.extf(ir.F32Type.get(), value)


def make_resident(x_ref, target_ref, parts: int) -> None:
    """x [T, D] in global memory -> u32[groups, words] in shared memory, by one warpgroup: zeros past D."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 2)
    def run(_, x_ref, target_ref):
        tokens, depth = x_ref.type.shape
        groups, real = target_ref.type.shape[0], depth // GROUP
        strips_of_token = -(-groups // STRIP)
        strips = strips_of_token * tokens
        at_once = min(8, -(-strips // 4))
        thread = thread_in_block() % 128
        warp, of_group, lane = thread // 32, thread % 32 // QUAD, thread % QUAD

        def load(token: Word, group: Word):
            inside = group < real
            return [_where(inside, four) for four in load_eight(x_ref, token, group.where(inside), lane)]

        def several(first: Word) -> None:
            mine = [(first + (warp + 4 * i)).at_most(strips - 1) for i in range(at_once)]
            places = [(s // strips_of_token, s % strips_of_token * STRIP + of_group) for s in mine]
            places = [(token, group.at_most(groups - 1)) for token, group in places]
            for (token, group), eight in [(place, load(*place)) for place in places]:
                store_eight(eight, target_ref, (group,), token, lane, tokens, parts)

        each(Word(0), strips, 4 * at_once, several)

    run(x_ref, target_ref)


def _where(condition, four):
    """Four numbers, or zeros."""
    kind, zero = four.type.element_type, mosaic_utils.c(0.0, four.type.element_type)
    numbers = [arith.select(condition, vector.extract(four, [], [i]), zero) for i in range(4)]
    return vector.from_elements(ir.VectorType.get((4,), kind), numbers)


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
