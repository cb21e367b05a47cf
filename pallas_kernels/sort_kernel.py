"""Pairs sorted by expert in one launch, for up to ``MAX_EXPERTS``; sorted_pairs.py says what comes of it.

A counting sort, stable. Each block has ``THREADS`` pairs, one a thread, and gives them their places; one block more
writes what there is once. No block waits for another: each counts the pairs of all, which lie in the second-level
cache, by adding in shared memory in whatever order, since sums of integers are the same in every order. A pair's place
is then the number of pairs of earlier experts, and of its own expert the pairs of earlier blocks, of earlier warps and
of earlier lanes. Lanes with the same expert find each other by ``match``; the first of them keeps the warp's count.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from . import simt, sorted_pairs
from ._compat import gpu, memref, mosaic_utils, plgpu
from .simt import Word, both
from .sorted_pairs import ALIGN, SortedPairs, Tiles
from .x_rows import TokenRows, token_rows

WARPS = 32
THREADS = 32 * WARPS
# An expert a thread; counts of each warp and expert lie in shared memory.
MAX_EXPERTS = THREADS
# All blocks count all pairs, work that grows with their square: up to here a multiprocessor has two blocks to run.
MAX_PAIRS = 256 * THREADS
# Ids that a thread waits for together.
LOADS = 16


def sort_pairs(topk_ids: jax.Array, topk_weights: jax.Array, experts: int, layer: jax.Array, width: int) -> SortedPairs:
    """As sorted_pairs.sort_pairs, which serves more experts or pairs; see :func:`sort_kernel`."""
    return sort_pairs_beside(None, None, topk_ids, topk_weights, experts, layer, width)[0]


def sort_pairs_beside(
    rows: TokenRows | None,
    x: jax.Array | None,
    topk_ids: jax.Array,
    topk_weights: jax.Array,
    experts: int,
    layer: jax.Array,
    width: int,
) -> tuple[SortedPairs, list[jax.Array]]:
    """And the tokens' rows, in the same launch."""
    if experts > MAX_EXPERTS or topk_ids.size > MAX_PAIRS:
        found = sorted_pairs.sort_pairs(topk_ids, topk_weights, experts, layer, width)
        return found, token_rows(rows)(x) if rows else []
    kernel = sort_kernel(topk_ids.size, experts, width, rows)
    inputs = [topk_ids.reshape(-1), topk_weights.reshape(-1), layer.reshape(1), *([x] if rows else [])]
    pair, weight, place, count, table, *made = kernel(*inputs)
    return SortedPairs(pair, weight, place.reshape(topk_ids.shape), Tiles(count, table)), made


@functools.lru_cache
def sort_kernel(pairs: int, experts: int, width: int, beside: TokenRows | None = None) -> Any:
    """The kernel: ``(ids i32[P], weights f32[P], layer i32[1], x if beside) -> (pair i32[R], weight f32[R],
    place i32[P], count i32[2], table i32[tiles, 5], *beside's)``. Where no pair comes to, ``pair`` is 0, ``weight`` and
    ``table`` not written. The blocks of ``beside`` do their work while the others sort.
    """
    rows, tiles = sorted_pairs.rounded_up(pairs), sorted_pairs.most_tiles(pairs, experts, width)
    chunks, whole_chunks = -(-pairs // THREADS), pairs // THREADS
    padded = -(-experts // 32) * 32
    # The experts, and one more for pairs that lead nowhere.
    groups = experts + 1

    def run(ids_g, weights_g, layer_g, *refs):
        x_g, refs = (refs[:1], refs[1:]) if beside else ((), refs)
        outputs, scratch = refs[: len(out_type)], refs[len(out_type) :]
        with mosaic_utils.when(simt.block() < chunks + 1):
            sort(ids_g, weights_g, layer_g, *outputs[:5], *scratch)
        if beside:
            with mosaic_utils.when(simt.block() >= chunks + 1):
                beside.write(simt.block() - (chunks + 1), THREADS, *x_g, *outputs[5:])

    def sort(ids_g, weights_g, layer_g, pair_g, weight_g, place_g, count_g, table_g, *scratch):
        chunks_s, counts_s, sums_s, firsts_s, tiles_s = scratch
        block, thread = simt.block(), simt.thread_in_block()
        warp, lane = thread // 32, thread % 32

        # Read before all others, and used after them.
        pair = block * THREADS + thread
        inside = pair < pairs
        expert = simt.load_word(ids_g, pair.where(inside))
        weight = memref.load(weights_g, [pair.where(inside).index])
        first_expert = simt.load_word(layer_g, Word(0)) * experts

        for item in simt.items(WARPS * padded, THREADS):
            simt.store(Word(0), counts_s, item // padded, item % padded)
        for item in simt.items(2 * groups, THREADS):
            simt.store(Word(0), chunks_s, item)
        gpu.barrier()

        def count(start: int | Word, chunks: int) -> None:
            """The pairs of some chunks, to those before this block's or to the others."""
            first = Word(start) * THREADS + thread
            found = [simt.load_word(ids_g, first + THREADS * i) for i in range(chunks)]
            for i, other in enumerate(found):
                to = Word(groups).where(Word(start) + i >= block)
                simt.increment(chunks_s, other.at_most(experts) + to)

        @mosaic_utils.fori(Word(whole_chunks // LOADS).value, [])
        def _(i, _):
            count(Word(i) * LOADS, LOADS)
            return []

        count(whole_chunks // LOADS * LOADS, whole_chunks % LOADS)
        with mosaic_utils.when(thread < pairs % THREADS):
            count(whole_chunks, 1)

        group = expert.at_most(experts).where(inside, experts)
        live, expert = group < experts, group.at_most(experts - 1)
        fellows = group.fellows()
        earlier_fellows = (fellows & ((Word(1) << lane) - 1)).ones()
        with mosaic_utils.when(both(live, earlier_fellows.equals(0))):
            simt.store(fellows.ones(), counts_s, warp, expert)
        gpu.barrier()

        # From here on a thread has an expert too.
        before, others = (simt.load_word(chunks_s, thread.at_most(experts) + i * groups) for i in range(2))
        total = (before + others).where(thread < experts)
        first = simt.sums_before(total, sums_s)
        with mosaic_utils.when(thread < padded):
            # From each warp's count to where its pairs begin.
            start = first + before
            for other in range(WARPS):
                in_warp = simt.load_word(counts_s, Word(other), thread)
                simt.store(start, counts_s, Word(other), thread)
                start = start + in_warp
        gpu.barrier()

        spot = simt.load_word(counts_s, warp, expert) + earlier_fellows
        with mosaic_utils.when(inside):
            simt.store(spot.where(live, -1), place_g, pair)
        with mosaic_utils.when(live):
            simt.store(pair, pair_g, spot)
            simt.store(weight, weight_g, spot)

        def write_table() -> None:
            span = total + first % ALIGN
            own_tiles = ((span + (width - 1)) // width).where(total >= 1)
            first_tile = simt.sums_before(own_tiles, sums_s)
            with mosaic_utils.when(thread < padded):
                for ref, start, size in ((firsts_s, first, total), (tiles_s, first_tile, own_tiles)):
                    simt.store(start, ref, thread)
                    # Two threads write the same, but for the last place.
                    simt.store(start + size, ref, thread + 1)
            gpu.barrier()
            all_tiles = simt.load_word(tiles_s, Word(padded))
            all_pairs = simt.load_word(firsts_s, Word(padded))
            simt.store(all_tiles, count_g, Word(0))
            simt.store(all_pairs, count_g, Word(1))

            def write(tile: Word) -> None:
                group = _group(tiles_s, padded, tile)
                (first, last), (first_tile, end) = _edges(firsts_s, group), _edges(tiles_s, group)
                row = (group + first_expert, first, last, first_tile, end - first_tile)
                for i, word in enumerate(row):
                    simt.store(word, table_g, tile, Word(i))

            simt.each(thread, all_tiles, THREADS, write)
            simt.each(all_pairs + thread, rows, THREADS, lambda row: simt.store(Word(0), pair_g, row))

        with mosaic_utils.when(block.equals(chunks)):
            write_table()

    out_type = (
        simt.words(rows),
        jax.ShapeDtypeStruct((rows,), jnp.float32),
        simt.words(pairs),
        simt.words(2),
        simt.words(tiles, sorted_pairs.TABLE_COLUMNS),
        *(beside.out_types if beside else []),
    )
    return simt.kernel(
        run,
        out_type=out_type,
        blocks=chunks + 1 + (beside.blocks(THREADS) if beside else 0),
        warpgroups=THREADS // 128,
        name="moe_sort",
        scratch=[
            plgpu.SMEM((2 * groups,), jnp.int32),
            plgpu.SMEM((WARPS, padded), jnp.int32),
            plgpu.SMEM((WARPS,), jnp.int32),
            plgpu.SMEM((padded + 1,), jnp.int32),
            plgpu.SMEM((padded + 1,), jnp.int32),
        ],
    )


def _group(tiles_s: Any, groups: int, tile: Word) -> Word:
    """The one that has the tile: the last to begin no later. ``tiles_s[groups]``, the number of tiles, is more."""
    group = Word(0)
    for bit in reversed(range((groups - 1).bit_length())):
        later = (group + (1 << bit)).at_most(groups)
        group = later.where(tile >= simt.load_word(tiles_s, later), group)
    return group


def _edges(ref: Any, i: Word) -> tuple[Word, Word]:
    return simt.load_word(ref, i), simt.load_word(ref, i + 1)
