"""All that the layer's kernel must know before it begins, in one small launch: slots, x's tiles, counters at zero.

Of few pairs it finds them itself (slots.py).

    slot s: an expert that some token chose, and up to C columns of x that its weights multiply

``P = T * K`` places for slots are filled from the front in the experts' order. A slot has C columns: all T tokens where
T <= width, column t token t; else up to ``width`` tokens that chose its expert, and an expert that more chose takes
several slots. Where x's tiles depend on the slots, every block finds them for itself: quicker than to wait for another.

Nothing is compared with all: bits of the chosen experts, set in shared memory in whatever order, rank an expert among
them, so that tables have a place for each pair and not for each expert, of which a population has thousands. Bits of
the tokens that chose it then tell how many slots it takes, and which column is a token's.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from . import simt, tiling
from ._compat import gpu, memref, mosaic_utils, plgpu
from .simt import Word, both
from .slots import BITS, first_and_weight, ones, ones_before, words
from .x_tiles import COLUMNS, GROUP, QUAD, STRIP, group_words, load_eight, store_eight, x_parts

WARPGROUPS = 4
THREADS = 128 * WARPGROUPS
WARPS = THREADS // 32
LOADS = 4  # strips that it waits for together


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
    strips_of_row = -(-groups // STRIP)
    strips = strips_of_row * (columns if sizes.shared else pairs)
    blocks = first_of_x + min(tiling.NUM_SMS, -(-strips // WARPS))
    warps = WARPS * (blocks - first_of_x)
    loads = min(LOADS, -(-strips // warps))
    # Each thread adds up as many of a table as the others.
    chosen_words, ranks = (-(-n // THREADS) * THREADS for n in (words(sizes.experts), pairs))
    masks = range(words(sizes.tokens))

    def run(ids_g, weights_g, layer_g, x_g, *refs):
        out, (ids_s, weights_s, places_s, chosen_s, ranks_s, masks_s, slots_s, sums_s) = Prepared(*refs[:7]), refs[7:]
        thread, block = simt.thread_in_block(), simt.block()
        is_first = block.equals(0)
        first_row = simt.load_word(layer_g, Word(0)) * sizes.experts

        def find_slots():
            # Read before all others, and used after them.
            mine = list(simt.items(pairs, THREADS))
            routed = [[(pair // sizes.top_k).index, (pair % sizes.top_k).index] for pair in mine]
            ids, weights = ([memref.load(ref, place) for place in routed] for ref in (ids_g, weights_g))
            for ref, size in ((chosen_s, chosen_words), (masks_s, len(masks) * ranks)):
                for item in simt.items(size, THREADS):
                    simt.store(Word(0), ref, item)
            with mosaic_utils.when(is_first):
                for item in simt.items(pairs * columns, THREADS):
                    simt.store(Word(-1), out.pair, item // columns, item % columns)
                for item in simt.items(pairs, THREADS):
                    simt.store(Word(0), out.live, item // sizes.top_k, item % sizes.top_k)
                for item in simt.items(pairs + 1, THREADS):
                    simt.store(Word(0), out.ready, item)
            for pair, expert, weight in zip(mine, ids, weights, strict=True):
                simt.store(expert, ids_s, pair)
                simt.store(weight, weights_s, pair)
                simt.store(Word(-1), places_s, pair)
            gpu.barrier()
            each_pair(lambda pair, expert: simt.set_bits(chosen_s, expert // BITS, Word(1) << expert % BITS))
            gpu.barrier()
            count = sum_up(lambda i: simt.load_word(chosen_s, i).ones(), chosen_words, ranks_s)
            if not sizes.shared:
                each_pair(choose)
                gpu.barrier()
                count = sum_up(slots_of, ranks, slots_s)
            each_pair(place)
            with mosaic_utils.when(both(is_first, thread.equals(THREADS - 1))):
                simt.store(count, out.count, Word(0))
            gpu.barrier()

        def each_pair(visit):
            """``visit(pair, expert)``, of those whose id is an expert's."""

            def of_expert(pair: Word):
                expert = simt.load_word(ids_s, pair)
                with mosaic_utils.when(both(expert >= 0, expert < sizes.experts)):
                    visit(pair, expert)

            simt.each(thread, pairs, THREADS, of_expert)

        def sum_up(count, size: int, ref) -> Word:
            """To ``ref[i]`` the sum of ``count(j)`` of all j < i; all of them for the last thread."""
            mine = [thread * (size // THREADS) + i for i in range(size // THREADS)]
            counts = [count(i) for i in mine]
            before = simt.sums_before(sum(counts[1:], counts[0]), sums_s)
            for i, own in zip(mine, counts, strict=True):
                simt.store(before, ref, i)
                before = before + own
            gpu.barrier()
            return before

        def rank_of(expert: Word) -> Word:
            """How many experts before it some token chose."""
            word, bit = expert // BITS, expert % BITS
            before = simt.load_word(chosen_s, word) & ((Word(1) << bit) - 1)
            return simt.load_word(ranks_s, word) + before.ones()

        def choose(pair: Word, expert: Word):
            """The token's bit in the mask of its expert."""
            token, rank = pair // sizes.top_k, rank_of(expert)
            simt.set_bits(masks_s, token // BITS * ranks + rank, Word(1) << token % BITS)

        def mask_of(rank: Word) -> list[Word]:
            return [simt.load_word(masks_s, rank + i * ranks) for i in masks]

        def slots_of(rank: Word) -> Word:
            return (ones(mask_of(rank)) + (sizes.width - 1)) // sizes.width

        def place(pair: Word, expert: Word):
            """A pair's slot and column, and what the first block writes of it."""
            token, rank = pair // sizes.top_k, rank_of(expert)
            slot, column = rank, token
            if not sizes.shared:
                earlier = ones_before(mask_of(rank), token)
                slot = simt.load_word(slots_s, rank) + earlier // sizes.width
                column = earlier % sizes.width
            # An id that its token already has comes to the same place, with the same x.
            simt.store(slot * columns + column, places_s, pair)
            with mosaic_utils.when(is_first):
                simt.store(expert + first_row, out.experts, slot)
                first, weight = first_and_weight(
                    lambda pair: simt.load_word(ids_s, pair),
                    lambda pair: memref.load(weights_s, [pair.index]),
                    sizes.top_k,
                    expert,
                    token,
                )
                with mosaic_utils.when(first.equals(pair)):
                    simt.store(Word(1), out.live, token, pair % sizes.top_k)
                    simt.store(pair, out.pair, slot, column)
                    simt.store(weight, out.weight, slot, column)

        def load_strips(first: Word):
            """(token or pair, a lane's group, its eight of it), of several strips; past the end the last again."""
            found = []
            for i in range(loads):
                strip = (first + warps * i).at_most(strips - 1)
                row, group = strip // strips_of_row, strip % strips_of_row * STRIP + thread % 32 // QUAD
                token, group = row if sizes.shared else row // sizes.top_k, group.at_most(groups - 1)
                found.append((row, group, load_eight(x_g, token, group, lane)))
            return found

        def store_strips(found):
            for row, group, eight in found:
                served = row if sizes.shared else simt.load_word(places_s, row)
                with mosaic_utils.when(served >= 0):
                    place = (served // columns, group)
                    store_eight(eight, out.x, place, served % columns, lane, columns, sizes.parts)

        # Asked for before the slots are known.
        lane, start = thread % QUAD, (block - first_of_x) * WARPS + thread // 32
        first_strips = load_strips(start)
        if sizes.shared:
            with mosaic_utils.when(is_first):
                find_slots()
        else:
            find_slots()
        with mosaic_utils.when(block >= first_of_x):
            store_strips(first_strips)
            step = warps * loads
            simt.each(start + step, strips, step, lambda first: store_strips(load_strips(first)))

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
    table = functools.partial(plgpu.SMEM, dtype=jnp.int32)
    return simt.kernel(
        run,
        out_type=tuple(out_type),
        blocks=blocks,
        warpgroups=WARPGROUPS,
        name="moe_prepare",
        scratch=[
            table((pairs,)),
            plgpu.SMEM((pairs,), jnp.float32),
            table((pairs,)),
            table((chosen_words,)),
            table((chosen_words,)),
            table((len(masks) * ranks,)),
            table((ranks,)),
            table((32,)),
        ],
    )
