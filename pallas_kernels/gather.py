"""The right operand of many_tokens.py: sorted pairs' rows of x, in bf16 terms, scaled and in the order of the codes.

    out[term, r, 16 s + p] = term of x[pair[r] // K, 16 s + order[p]] * X_SCALE       order: even before odd
    sums[r, 16 c + 8 i + b] = sum of x[pair[r] // K, 256 c + 32 b + 16 i + (0..15)] * X_SCALE

One launch at the speed of memory; XLA's gather alone copies two bytes a thread, at 1.8 TB/s. A thread has eight
neighbouring numbers of a row. Two threads have sixteen: the first stores the even ones of both, the other the odd ones,
and both their sum, in the order in which operands.py has what it is multiplied with.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp

from . import simt
from ._compat import arith, ir, llvm, mosaic_utils, vector
from .operands import bf16_terms, unpacked
from .simt import Float, Word
from .x_tiles import X_SCALE

WARPGROUPS = 2
THREADS = 128 * WARPGROUPS
PIECE = 8  # numbers that a thread has at a time
PIECES = 8  # that it has on their way
VECTOR = 16  # bytes


@functools.lru_cache
def gather_kernel(
    dtype: Any, terms: int, tokens: int, top_k: int, depth: int, rows: int, weighted: bool, sums: bool
) -> Any:
    """The kernel: ``(x dtype[T, D], pair i32[R], count of sorted_pairs.Tiles, weight f32[R] if weighted) ->
    [bf16[terms, R, D], bf16[R, D / 16] if sums]`` as far as pairs lead somewhere, not written behind them; D a multiple
    of 16, or of 256 with ``sums``. ``weighted``: each pair's row is its weight's times the token's."""
    dtype = jnp.dtype(dtype)
    pieces = depth // PIECE
    blocks = -(-rows * pieces // (THREADS * PIECES))

    def run(x_g, pair_g, count_g, *refs):
        first, stop = simt.block() * (THREADS * PIECES), simt.load_word(count_g, Word(1)) * pieces
        with mosaic_utils.when(first < stop):
            copy(first, stop, x_g, pair_g, *refs)

    def copy(first: Word, stop: Word, x_g, pair_g, *refs):
        refs = iter(refs)
        weight_g = next(refs) if weighted else None
        out_g, sums_g = next(refs), next(refs) if sums else None
        thread = simt.thread_in_block()
        # Past the end: the last two pieces again, the same bytes to the same place.
        last = stop - 2 + thread % 2
        items = [first + i * THREADS + thread for i in range(PIECES)]
        items = [item.where(item < stop, last) for item in items]
        places = [(item // pieces, item % pieces) for item in items]
        tokens_of = [simt.load_word(pair_g, row) // top_k for row, _ in places]
        words = [_load(x_g, token, piece, pieces, dtype) for token, (_, piece) in zip(tokens_of, places, strict=True)]
        for eight, (row, piece) in zip(words, places, strict=True):
            scale = Float(X_SCALE)
            if weighted:
                scale = simt.load_float(weight_g, row) * scale
            numbers = [number * scale for number in _numbers(eight, dtype)]
            evens, odds = ([bf16_terms(numbers[i : i + 3 : 2], terms) for i in (start, start + 4)] for start in (0, 1))
            for term in range(terms):
                four = _exchanged([pair[term] for pair in evens], [pair[term] for pair in odds], thread % 2)
                llvm.store(four, _pointer(out_g, term * rows * pieces, row, piece, pieces, PIECE * 2))
            if sums:
                total = functools.reduce(operator.add, numbers)
                total = total + total.from_lane(1)
                sixteen = piece // 2
                place = sixteen // 16 * 16 + sixteen % 16 // 2 + sixteen % 2 * 8
                # Both threads the same.
                simt.store(arith.truncf(ir.BF16Type.get(), total.value), sums_g, row, place)

    out_type = [jax.ShapeDtypeStruct((terms, rows, depth), jnp.bfloat16)]
    if sums:
        out_type.append(jax.ShapeDtypeStruct((rows, depth // 16), jnp.bfloat16))
    return simt.kernel(run, out_type=out_type, blocks=blocks, warpgroups=WARPGROUPS, name="moe_gather")


def _four_words() -> Any:
    return ir.VectorType.get((4,), ir.IntegerType.get_signless(32))


def _load(ref: Any, row: Word, piece: Word, pieces: int, dtype: Any) -> list:
    """A piece's words."""
    nbytes = PIECE * dtype.itemsize
    words = []
    for start in range(0, nbytes, VECTOR):
        four = llvm.load(_four_words(), _pointer(ref, 0, row, piece, pieces, nbytes, start))
        words += [vector.extract(four, [], [i]) for i in range(4)]
    return words


def _numbers(words: list, dtype: Any) -> list[Float]:
    f32 = ir.F32Type.get()
    if dtype == jnp.float32:
        return [Float(mosaic_utils.bitcast(word, f32)) for word in words]
    if dtype == jnp.bfloat16:
        return [Float(number) for word in words for number in unpacked(word)]
    pairs = [mosaic_utils.bitcast(word, ir.VectorType.get((2,), ir.F16Type.get())) for word in words]
    return [Float(arith.extf(f32, vector.extract(pair, [], [i]))) for pair in pairs for i in range(2)]


def _exchanged(evens: list, odds: list, odd: Word) -> Any:
    """Four words of even numbers, the other thread's behind this one's; of odd ones, before, where ``odd`` is 1."""
    is_even = odd.equals(0)
    kept = [Word(e).where(is_even, Word(o)) for e, o in zip(evens, odds, strict=True)]
    given = [Word(o).where(is_even, Word(e)).from_lane(1) for e, o in zip(evens, odds, strict=True)]
    words = [k.where(is_even, g) for k, g in zip(kept, given, strict=True)]
    words += [g.where(is_even, k) for k, g in zip(kept, given, strict=True)]
    return vector.from_elements(_four_words(), [word.value for word in words])


def _pointer(ref: Any, first: int, row: Word, piece: Word, pieces: int, nbytes: int, start: int = 0) -> Any:
    """Of a piece of ``nbytes``, in 64 bits: there may be more than 2^31 numbers."""
    offset = (simt.extended(row) * pieces + simt.extended(piece) + first) * nbytes + start
    return mosaic_utils.getelementptr(mosaic_utils.memref_ptr(ref), [offset.value], ir.IntegerType.get_signless(8))
