"""The right operand of many_tokens.py: rows of x in bf16 terms, scaled and in the order of the codes.

    rows[term, t, 16 s + p] = term of x[t, 16 s + order[p]] * X_SCALE       order: even before odd
    sums[t, 16 c + 8 i + b] = sum of x[t, 256 c + 32 b + 16 i + (0..15)] * X_SCALE

Of each token, whose row is then copied to its pairs' places (row_copies.py), or of each sorted pair where its weight is
on the input. One launch at the speed of memory. A thread has eight neighbouring numbers of a row. Two threads have
sixteen: the first stores the even ones of both, the other the odd ones, and both their sum, in the order in which
operands.py has what it is multiplied with.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

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
PIECES = 4  # that it has on their way
VECTOR = 16  # bytes


class TokenRows(NamedTuple):
    """Some blocks of a launch: ``x dtype[T, D] -> [bf16[terms, T, D], bf16[T, D / 16] if sums, i32[counters] of
    zeros]``; D a multiple of 16, or of 256 with ``sums``."""

    dtype: str
    terms: int
    tokens: int
    depth: int
    sums: bool
    counters: int

    @property
    def out_types(self) -> list[jax.ShapeDtypeStruct]:
        return [*_out_types(self.terms, self.tokens, self.depth, self.sums), simt.words(self.counters)]

    def blocks(self, threads: int) -> int:
        return _blocks(self.tokens, self.depth, threads)

    def write(self, block: Word, threads: int, x_g: Any, *outputs_g: Any) -> None:
        """The share of a block, one of as many of ``threads``."""
        *rows_g, zeros_g = outputs_g
        first, all_threads = block * threads + simt.thread_in_block(), self.blocks(threads) * threads
        simt.each(first, self.counters, all_threads, lambda place: simt.store(Word(0), zeros_g, place))
        stop = Word(self.tokens * (self.depth // PIECE))
        _write(block, threads, x_g, self.dtype, stop, lambda row: row, lambda row: Float(X_SCALE), *rows_g)


@functools.lru_cache
def token_rows(rows: TokenRows) -> Any:
    """A launch of its own for them."""

    def run(*refs):
        rows.write(simt.block(), THREADS, *refs)

    blocks = rows.blocks(THREADS)
    return simt.kernel(run, out_type=rows.out_types, blocks=blocks, warpgroups=WARPGROUPS, name="moe_rows")


@functools.lru_cache
def pair_rows(dtype: Any, terms: int, top_k: int, depth: int, rows: int, sums: bool) -> Any:
    """The kernel: ``(x dtype[T, D], pair i32[R], count of sorted_pairs.Tiles, weight f32[R]) ->
    [bf16[terms, R, D], bf16[R, D / 16] if sums]`` of each pair's weight times its token's row, as far as pairs lead
    somewhere, not written behind them."""

    def run(x_g, pair_g, count_g, weight_g, *outputs):
        stop = simt.load_word(count_g, Word(1)) * (depth // PIECE)
        block = simt.block()
        with mosaic_utils.when(block * (THREADS * PIECES) < stop):

            def token_of(row: Word) -> Word:
                return simt.load_word(pair_g, row) // top_k

            def scale_of(row: Word) -> Float:
                return simt.load_float(weight_g, row) * Float(X_SCALE)

            _write(block, THREADS, x_g, dtype, stop, token_of, scale_of, *outputs)

    out_type = _out_types(terms, rows, depth, sums)
    return simt.kernel(
        run, out_type=out_type, blocks=_blocks(rows, depth, THREADS), warpgroups=WARPGROUPS, name="moe_gather"
    )


def _blocks(rows: int, depth: int, threads: int) -> int:
    return -(-rows * (depth // PIECE) // (threads * PIECES))


def _out_types(terms: int, rows: int, depth: int, sums: bool) -> list[jax.ShapeDtypeStruct]:
    found = [jax.ShapeDtypeStruct((terms, rows, depth), jnp.bfloat16)]
    return found + [jax.ShapeDtypeStruct((rows, depth // 16), jnp.bfloat16)] * sums


def _write(
    block: Word,
    threads: int,
    x_g: Any,
    dtype: str,
    stop: Word,
    token_of: Callable[[Word], Word],
    scale_of: Callable[[Word], Float],
    out_g: Any,
    sums_g: Any = None,
) -> None:
    """The block's pieces below ``stop``, of which it has one or more."""
    terms, rows, depth = out_g.type.shape
    pieces, thread = depth // PIECE, simt.thread_in_block()
    # Past the end: the last two pieces again, the same bytes to the same place.
    last = stop - 2 + thread % 2
    items = [block * (threads * PIECES) + i * threads + thread for i in range(PIECES)]
    items = [item.where(item < stop, last) for item in items]
    places = [(item // pieces, item % pieces) for item in items]
    tokens = [token_of(row) for row, _ in places]
    words = [
        _load(x_g, token, piece, pieces, jnp.dtype(dtype)) for token, (_, piece) in zip(tokens, places, strict=True)
    ]
    for eight, (row, piece) in zip(words, places, strict=True):
        scale = scale_of(row)
        numbers = [number * scale for number in _numbers(eight, jnp.dtype(dtype))]
        evens, odds = ([bf16_terms(numbers[i : i + 3 : 2], terms) for i in (start, start + 4)] for start in (0, 1))
        for term in range(terms):
            four = _exchanged([pair[term] for pair in evens], [pair[term] for pair in odds], thread % 2)
            llvm.store(four, _pointer(out_g, term * rows * pieces, row, piece, pieces, PIECE * 2))
        if sums_g is not None:
            total = functools.reduce(operator.add, numbers)
            total = total + total.from_lane(1)
            sixteen = piece // 2
            place = sixteen // 16 * 16 + sixteen % 16 // 2 + sixteen % 2 * 8
            # Both threads the same.
            simt.store(arith.truncf(ir.BF16Type.get(), total.value), sums_g, row, place)


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
