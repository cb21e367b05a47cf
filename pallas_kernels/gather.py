"""Rows of x for each sorted pair, at the speed of memory: XLA's own gather copies two bytes a thread, at 1.8 TB/s."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from . import simt
from ._compat import ir, llvm, mosaic_utils
from .simt import Word

WARPGROUPS = 2
THREADS = 128 * WARPGROUPS
PIECE = 8  # bf16 numbers that a thread copies at a time
PIECES = 8  # that it has on their way


@functools.lru_cache
def gather_kernel(terms: int, tokens: int, depth: int, rows: int) -> Any:
    """The kernel: ``(x bf16[terms, T, D], token i32[R], count of sorted_pairs.Tiles) -> bf16[terms, R, D]``, which is
    ``x[:, token]`` as far as pairs lead somewhere, and not written behind them; D a multiple of 8."""
    pieces = depth // PIECE
    blocks = -(-rows * pieces // (THREADS * PIECES))

    def run(x_g, token_g, count_g, out_g):
        first, stop = simt.block() * (THREADS * PIECES), simt.load_word(count_g, Word(1)) * pieces
        with mosaic_utils.when(first < stop):
            copy(first + simt.thread_in_block(), stop, x_g, token_g, out_g)

    def copy(first: Word, stop: Word, x_g, token_g, out_g):
        # Past the end: the last piece again, the same bytes to the same place.
        items = [(first + i * THREADS).at_most(stop - 1) for i in range(PIECES)]
        places = [(item // pieces, item % pieces) for item in items]
        tokens_of = [simt.load_word(token_g, row) for row, _ in places]
        sixteen_bytes = ir.VectorType.get((4,), ir.IntegerType.get_signless(32))
        for term in range(terms):
            values = [
                llvm.load(sixteen_bytes, _pointer(x_g, term * tokens * pieces, token, piece, pieces))
                for token, (_, piece) in zip(tokens_of, places, strict=True)
            ]
            for value, (row, piece) in zip(values, places, strict=True):
                llvm.store(value, _pointer(out_g, term * rows * pieces, row, piece, pieces))

    out_type = jax.ShapeDtypeStruct((terms, rows, depth), jnp.bfloat16)
    return simt.kernel(run, out_type=out_type, blocks=blocks, warpgroups=WARPGROUPS, name="moe_gather")


def _pointer(ref: Any, first: int, row: Word, piece: Word, pieces: int) -> Any:
    """Of a piece, in 64 bits: there may be more than 2^31 numbers."""
    offset = (simt.extended(row) * pieces + simt.extended(piece) + first) * (PIECE * 2)
    return mosaic_utils.getelementptr(mosaic_utils.memref_ptr(ref), [offset.value], ir.IntegerType.get_signless(8))
