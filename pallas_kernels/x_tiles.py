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
from jax import lax

from ._compat import arith, ir, llvm, mosaic_utils, plgpu
from .registers import RHS, fragmented, i32, index, lane_in_warp

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


def split(values: jax.Array, terms: int) -> list[jax.Array]:
    """f32 -> f32 terms that are bf16 numbers, and whose sum is ``values`` to 8 bits a term."""
    found = []
    for _ in range(terms):
        # reduce_precision, not a cast there and back, which XLA may drop as excess precision.
        found.append(lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7))
        values = values - found[-1]
    return found


def x_tiles(x: jax.Array) -> jax.Array:
    """x [T, D] -> u32[1, D / 32, group_words], column t token t."""
    rows = x_parts(x.dtype) * x.shape[0]
    return _tiles(*_columns(x), jnp.arange(rows).reshape(1, rows), x_parts(x.dtype))


def gathered_x_tiles(x: jax.Array, token: jax.Array) -> jax.Array:
    """x [T, D], token i32[P, C] -> u32[P, D / 32, group_words], column c of slot s token[s, c]."""
    parts, tokens = x_parts(x.dtype), x.shape[0]
    rows = jnp.concatenate([token + part * tokens for part in range(parts)], axis=1)  # i32[P, R]
    # Columns are made once a token, not once a slot, which XLA would prefer.
    values, terms = lax.optimization_barrier(_columns(x))
    return _tiles(values, terms, rows, parts)


def _columns(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [T, D] -> words of values u32[R, D / 32, 16] and of the sums' terms u32[terms, R, D / 32].

    Elementwise throughout, so that XLA makes one kernel of it.
    """
    parts = x_parts(x.dtype)
    rows = jnp.concatenate(split(x.astype(jnp.float32), parts))  # f32[R, D]
    count, groups = rows.shape[0], rows.shape[1] // GROUP
    quads = (rows * X_SCALE).reshape(count, groups, 2, 4, 2, 2)  # column, group, half, lane, pair's element, pair
    values = jnp.swapaxes(_two_bf16(quads[..., 0, :], quads[..., 1, :]), 2, 3)  # u32[R, G, lane, half, pair]
    halves = rows.reshape(count, groups, 2, GROUP // 2)
    sums = functools.reduce(jnp.add, (halves[..., i] for i in range(GROUP // 2))) * PRODUCT  # f32[R, G, half]
    terms = jnp.stack([_two_bf16(term[..., 0], term[..., 1]) for term in split(sums, sum_terms(parts))])
    return values.reshape(count, groups, GROUP // 2), terms


def _tiles(values: jax.Array, terms: jax.Array, rows: jax.Array, parts: int) -> jax.Array:
    """The columns ``rows`` i32[P, R] of each slot, side by side in each group."""
    slots, groups = rows.shape[0], values.shape[1]
    words = jnp.swapaxes(values[rows], 1, 2).reshape(slots, groups, -1)  # of [P, G, R, 16]
    sums = jnp.transpose(terms[:, rows], (1, 3, 0, 2)).reshape(slots, groups, -1)  # of [P, G, terms, R]
    pad = group_words(rows.shape[1], parts) - words.shape[2] - sums.shape[2]
    return jnp.concatenate([words, sums, jnp.zeros((slots, groups, pad), jnp.uint32)], axis=2)


def _two_bf16(low: jax.Array, high: jax.Array) -> jax.Array:
    """Two f32 arrays of bf16 numbers in one array of words: of each f32 the upper half is the bf16."""
    low, high = (lax.bitcast_convert_type(array, jnp.uint32) for array in (low, high))
    return (low >> 16) | (high & jnp.uint32(0xFFFF0000))


def value_place(column, depth):
    """bf16 index within a group of a column's value; ``depth`` 0 to 31 as an MLIR index."""
    half, rest = arith.divui(depth, index(16)), arith.remui(depth, index(16))
    lane, inner = arith.divui(rest, index(4)), arith.remui(rest, index(4))
    # 0 1 2 3 -> 0 2 1 3
    inner = arith.ori(arith.shli(arith.andi(inner, index(1)), index(1)), arith.shrui(inner, index(1)))
    place = arith.addi(arith.muli(lane, index(8)), arith.addi(arith.muli(half, index(4)), inner))
    return arith.addi(arith.muli(column, index(GROUP)), place)


def sum_place(rows: int, term: int, column, half):
    """bf16 index within a group of one term of a column's sum over a half of the group."""
    word = arith.addi(column, index(rows * (GROUP // 2) + term * rows))
    return arith.addi(arith.muli(word, index(2)), half)


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
