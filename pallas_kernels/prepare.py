"""All that the layer's kernel must know before it begins, in one small launch: slots, x's tiles, counters at zero.

    slot s: an expert that some token chose, and up to C columns of x that its weights multiply

``P = T * K`` places for slots are filled from the front in the experts' order. A slot has C columns: all T tokens where
T <= width, column t token t; else up to ``width`` tokens that chose its expert, and an expert that more chose takes
several slots. Where x's tiles depend on the slots, every block finds them for itself: quicker than to wait for another.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from . import simt, tiling
from ._compat import arith, gpu, ir, memref, mosaic_utils, plgpu
from .simt import Word, both
from .x_tiles import COLUMNS, GROUP, group_words, store_value, x_parts

WARPGROUPS = 4
THREADS = 128 * WARPGROUPS
QUAD = 4  # threads that look for a pair's fellows together
BITS = 32  # tokens of a mask's word


class Prepared(NamedTuple):
    count: Any  # i32[1]     slots in use
    experts: Any  # i32[P]     row of each slot's expert in the planes
    pair: Any  # i32[P, C]  t * K + k of the pair that a column serves, -1 for none
    weight: Any  # f32[P, C]  its weight; a repeated expert's weights added up; not written where pair is -1
    live: Any  # i32[T, K]  1 for pairs that some slot serves; the others contribute nothing
    ready: Any  # i32[P + 1] counters of the layer's kernel, all zero
    x: Any  # u32[1 or P, D / 32, words]  x as x_tiles.py says: of all slots, or each one's columns


class Sizes(NamedTuple):
    tokens: int
    top_k: int
    experts: int
    hidden: int
    dtype: str

    @property
    def pairs(self) -> int:
        return self.tokens * self.top_k

    @property
    def parts(self) -> int:
        return x_parts(jnp.dtype(self.dtype))

    @property
    def width(self) -> int:
        """Tokens that a tile of the tensor core has columns for."""
        return COLUMNS // self.parts

    @property
    def shared(self) -> bool:
        return self.tokens <= self.width

    @property
    def columns(self) -> int:
        return min(self.tokens, self.width)


@functools.lru_cache
def prepare_kernel(sizes: Sizes) -> Any:
    """The kernel: ``(ids i32[T, K], weights f32[T, K], layer i32[1], x [T, D]) -> Prepared``.

    An id outside [0, E), and an id that its token already has, lead nowhere.
    """
    pairs, columns, groups = sizes.pairs, sizes.columns, sizes.hidden // GROUP
    # The first block finds the slots; where x does not depend on them, others are at work on it meanwhile.
    first_of_x = int(sizes.shared)
    vectors = groups * (columns if sizes.shared else pairs)
    blocks = first_of_x + min(tiling.NUM_SMS, -(-vectors // (THREADS // 32)))
    padded = -(-sizes.tokens // QUAD) * QUAD * sizes.top_k
    masks = range(-(-sizes.tokens // BITS))
    most_slots = 1 if sizes.shared else -(-sizes.tokens // sizes.width)  # of an expert

    def run(ids_g, weights_g, layer_g, x_g, *refs):
        out, (ids_s, weights_s, masks_s, leads_s, places_s) = Prepared(*refs[:7]), refs[7:]
        thread, block = simt.thread_in_block(), simt.block()
        is_first = block.equals(0)
        first_row = simt.load_word(layer_g, Word(0)) * sizes.experts

        def find_slots():
            for pair in simt.items(padded, THREADS):
                inside = pair < pairs
                token, k = (p.where(inside) for p in (pair // sizes.top_k, pair % sizes.top_k))
                simt.store(simt.load_word(ids_g, token, k).where(inside, -1), ids_s, pair)
                simt.store(memref.load(weights_g, [token.index, k.index]), weights_s, pair)
                simt.store(Word(0), leads_s, pair)
            with mosaic_utils.when(is_first):
                for item in simt.items(pairs * columns, THREADS):
                    simt.store(Word(-1), out.pair, item // columns, item % columns)
                for item in simt.items(pairs + 1, THREADS):
                    simt.store(Word(0), out.ready, item)
            gpu.barrier()
            # Threads of a quad keep together past the end too: they exchange what they find.
            for item in simt.rounds(QUAD * pairs, THREADS):
                find_fellows((item // QUAD).at_most(pairs - 1), item % QUAD)
            gpu.barrier()
            for item in simt.rounds(QUAD * pairs, THREADS):
                place((item // QUAD).at_most(pairs - 1), item % QUAD)
            gpu.barrier()

        def find_fellows(pair: Word, part: Word):
            """The tokens that chose a pair's expert, a bit each; 0 for a pair that leads nowhere. And how many
            slots its expert takes, if the pair is the first of its expert."""
            expert, token, k = simt.load_word(ids_s, pair), pair // sizes.top_k, pair % sizes.top_k
            mask = [Word(0) for _ in masks]
            for first in range(0, sizes.tokens, QUAD):
                word, bit = first // BITS, Word(1) << (part + first % BITS)
                for k_other in range(sizes.top_k):
                    same = simt.load_word(ids_s, (part + first) * sizes.top_k + k_other).equals(expert)
                    mask[word] = mask[word] | bit.where(same)
            for distance in (1, 2):
                mask = [word | word.from_lane(distance) for word in mask]
            live = both(expert >= 0, expert < sizes.experts)
            for k_other in range(sizes.top_k - 1):
                same = simt.load_word(ids_s, token * sizes.top_k + k_other).equals(expert)
                live = both(live, simt.negated(both(same, Word(k_other) < k)))
            leads = both(live, earlier(mask, token).equals(0))
            slots = Word(1) if sizes.shared else (ones(mask) + (sizes.width - 1)) // sizes.width
            for i, word in enumerate(mask):
                simt.store(word.where(live), masks_s, Word(i), pair)
            simt.store(slots.where(leads), leads_s, pair)

        def place(pair: Word, part: Word):
            """A pair's slot and column, and what the first block writes of it."""
            expert, token = simt.load_word(ids_s, pair), pair // sizes.top_k
            mask = [simt.load_word(masks_s, Word(i), pair) for i in masks]

            def eight(i, sums):
                base, total = map(Word, sums)
                for j in range(8):
                    other = Word(i) * (8 * QUAD) + (part + j * QUAD)
                    known = other < padded
                    other = other.where(known)
                    slots = simt.load_word(leads_s, other).where(known)
                    base = base + slots.where(simt.load_word(ids_s, other) < expert)
                    total = total + slots
                return [base.value, total.value]

            loop = mosaic_utils.fori(Word(-(-padded // (8 * QUAD))).value, [Word(0).value] * 2)(eight)
            base, total = map(Word, loop.results)
            for distance in (1, 2):
                base, total = base + base.from_lane(distance), total + total.from_lane(distance)
            rank = earlier(mask, token)
            slot = base if sizes.shared else base + rank // sizes.width
            column = token if sizes.shared else rank % sizes.width
            live = simt.negated(ones(mask).equals(0))
            simt.store((slot * columns + column).where(live, -1), places_s, pair)
            with mosaic_utils.when(is_first):
                simt.store(total, out.count, Word(0))
                row, leads = expert + first_row, simt.load_word(leads_s, pair)
                for i in range(most_slots):
                    with mosaic_utils.when(Word(i) < leads):
                        simt.store(row, out.experts, base + i)
                simt.store(Word(1).where(live), out.live, token, pair % sizes.top_k)
                with mosaic_utils.when(live):
                    simt.store(pair, out.pair, slot, column)
                    simt.store(weight_of(expert, token), out.weight, slot, column)

        def weight_of(expert: Word, token: Word):
            total = zero = mosaic_utils.c(0.0, ir.F32Type.get())
            for k in range(sizes.top_k):
                at = token * sizes.top_k + k
                same = simt.load_word(ids_s, at).equals(expert)
                total = arith.addf(total, arith.select(same, memref.load(weights_s, [at.index]), zero))
            return total

        def tile(slot: Word, column: Word, token: Word, group: Word):
            """A warp's part of x: a column's values of one group, one a lane."""
            depth = thread % 32
            value = memref.load(x_g, [token.index, (group * GROUP + depth).index])
            if not isinstance(value.type, ir.F32Type):
                value = arith.extf(ir.F32Type.get(), value)
            store_value(value, out.x, (slot, group), column, depth, columns, sizes.parts)

        def vector(item: Word):
            group = item % groups
            if sizes.shared:
                token = item // groups
                tile(Word(0), token, token, group)
                return
            pair = item // groups
            served = simt.load_word(places_s, pair)
            with mosaic_utils.when(served >= 0):
                tile(served // columns, served % columns, pair // sizes.top_k, group)

        if sizes.shared:
            with mosaic_utils.when(is_first):
                find_slots()
        else:
            find_slots()
        warps = THREADS // 32
        with mosaic_utils.when(block >= first_of_x):
            start = (block - first_of_x) * warps + thread // 32
            simt.each(start, vectors, (blocks - first_of_x) * warps, vector)

    tiles = (1 if sizes.shared else pairs, groups, group_words(columns * sizes.parts, sizes.parts))
    out_type = Prepared(
        simt.words(1),
        simt.words(pairs),
        simt.words(pairs, columns),
        jax.ShapeDtypeStruct((pairs, columns), jnp.float32),
        simt.words(sizes.tokens, sizes.top_k),
        simt.words(pairs + 1),
        jax.ShapeDtypeStruct(tiles, jnp.uint32),
    )
    words = plgpu.SMEM((padded,), jnp.int32)
    return simt.kernel(
        run,
        out_type=tuple(out_type),
        blocks=blocks,
        warpgroups=WARPGROUPS,
        name="moe_prepare",
        scratch=[
            words,
            plgpu.SMEM((padded,), jnp.float32),
            plgpu.SMEM((len(masks), padded), jnp.int32),
            words,
            words,
        ],
    )


def ones(mask: list[Word]) -> Word:
    return sum((word.ones() for word in mask[1:]), mask[0].ones())


def earlier(mask: list[Word], token: Word) -> Word:
    """How many tokens of a mask there are before a token."""
    words = []
    for i, word in enumerate(mask):
        bit = token - i * BITS
        before = (Word(1) << bit.where(both(bit >= 0, bit < BITS))) - 1
        words.append(word & before.where(bit < BITS, -1))
    return ones(words)
