"""Pairs sorted by expert in one launch, for up to ``MAX_EXPERTS``; sorted_pairs.py says what comes of it.

A counting sort in one block, stable and without atomics, so that results are equal from run to run. Each warp has a
run of pairs and goes through it twice, 32 at a time: it counts its pairs of each expert, and once it is known what the
warps and the experts before it have, gives each pair its place. Lanes with the same expert find each other by
``match``; the first of them keeps the count.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from . import simt, sorted_pairs
from ._compat import gpu, memref, mosaic_utils, plgpu
from .simt import Word, both
from .sorted_pairs import ALIGN, SortedPairs, Tiles

WARPS = 32
THREADS = 32 * WARPS
# Counts of each warp and expert lie in shared memory.
MAX_EXPERTS = 1024


class _Pair(NamedTuple):
    number: Word
    inside: Any  # whether it is one: the last warps' lanes may be past the end
    token: Word
    k: Word
    expert: Word
    live: Any  # whether it leads somewhere
    fellows: Word  # the warp's lanes with the same expert
    leads: Any  # whether it is the first of them


def sort_pairs(topk_ids: jax.Array, topk_weights: jax.Array, experts: int, layer: jax.Array, width: int) -> SortedPairs:
    """As sorted_pairs.sort_pairs."""
    kernel = sort_kernel(*topk_ids.shape, experts, width)
    pair, weight, place, *tiles = kernel(topk_ids, topk_weights, layer.reshape(1))
    return SortedPairs(pair, weight, place, Tiles(*tiles))


@functools.lru_cache
def sort_kernel(tokens: int, top_k: int, experts: int, width: int) -> Any:
    """The kernel: ``(ids i32[T, K], weights f32[T, K], layer i32[1]) -> (pair i32[R], weight f32[R], place i32[T, K],
    count i32[1], table i32[tiles, 5])``. Where no pair comes to, ``pair`` is 0, ``weight`` and ``table`` not written.
    """
    pairs = tokens * top_k
    rows, tiles = sorted_pairs.rounded_up(pairs), sorted_pairs.most_tiles(pairs, experts, width)
    rounds = -(-pairs // THREADS)  # of 32 pairs, that a warp takes
    padded = -(-experts // 32) * 32

    def body(*refs):
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
        def run(_, ids_g, weights_g, layer_g, pair_g, weight_g, place_g, count_g, table_g, counts_s, firsts_s, tiles_s):
            thread = simt.thread_in_block()
            warp, lane = thread // 32, thread % 32
            earlier_lanes = (Word(1) << lane) - 1
            first_expert = simt.load_word(layer_g, Word(0)) * experts

            def each_round(visit):
                @mosaic_utils.fori(Word(rounds).value, [])
                def _(i, _):
                    pair = (warp * rounds + Word(i)) * 32 + lane
                    inside = pair < pairs
                    pair = pair.where(inside)
                    token, k = pair // top_k, pair % top_k
                    expert = simt.load_word(ids_g, token, k)
                    live = both(inside, expert >= 0, expert < experts)
                    # Those that lead nowhere are one group more.
                    expert = expert.where(live, experts)
                    fellows = expert.fellows()
                    first = (fellows & earlier_lanes).equals(0)
                    visit(_Pair(pair, inside, token, k, expert, live, fellows, both(live, first)))
                    return []

            def count(pair: _Pair) -> None:
                with mosaic_utils.when(pair.leads):
                    before = simt.load_word(counts_s, warp, pair.expert)
                    simt.store(before + pair.fellows.ones(), counts_s, warp, pair.expert)

            def place(pair: _Pair) -> None:
                expert = pair.expert.where(pair.live)
                start = simt.load_word(firsts_s, expert) + simt.load_word(counts_s, warp, expert)
                spot = start + (pair.fellows & earlier_lanes).ones()
                # All lanes have read the count before the first of them raises it.
                mosaic_utils.warp_barrier()
                count(pair)
                mosaic_utils.warp_barrier()
                with mosaic_utils.when(pair.inside):
                    simt.store(spot.where(pair.live, -1), place_g, pair.token, pair.k)
                with mosaic_utils.when(pair.live):
                    simt.store(pair.number, pair_g, spot)
                    simt.store(memref.load(weights_g, [pair.token.index, pair.k.index]), weight_g, spot)

            for item in simt.items(WARPS * padded, THREADS):
                simt.store(Word(0), counts_s, item // padded, item % padded)
            for item in simt.items(rows, THREADS):
                simt.store(Word(0), pair_g, item)
            gpu.barrier()
            each_round(count)
            gpu.barrier()

            def over_warps(expert: Word):
                """From each warp's count to that of the warps before it; the experts' own to ``firsts_s``."""
                total = Word(0)
                for other in range(WARPS):
                    mine = simt.load_word(counts_s, Word(other), expert)
                    simt.store(total, counts_s, Word(other), expert)
                    total = total + mine
                simt.store(total, firsts_s, expert)

            simt.each(thread, padded, THREADS, over_warps)
            gpu.barrier()
            with mosaic_utils.when(warp.equals(0)):
                _scan(firsts_s, padded, lane)
                mosaic_utils.warp_barrier()

                def tiles_of(group: Word) -> Word:
                    first, last = _edges(firsts_s, group)
                    span = last - (first - first % ALIGN)
                    return ((span + (width - 1)) // width).where(first < last)

                def store_tiles(group: Word):
                    simt.store(tiles_of(group), tiles_s, group)

                simt.each(lane, padded, 32, store_tiles)
                mosaic_utils.warp_barrier()
                _scan(tiles_s, padded, lane)
            gpu.barrier()
            simt.store(simt.load_word(tiles_s, Word(padded)), count_g, Word(0))
            each_round(place)

            def write_table(expert: Word):
                (first, last), (first_tile, end) = _edges(firsts_s, expert), _edges(tiles_s, expert)

                def write(tile: Word):
                    row = (expert + first_expert, first, last, first_tile, end - first_tile)
                    for i, word in enumerate(row):
                        simt.store(word, table_g, tile, Word(i))

                simt.each(first_tile, end, 1, write)

            simt.each(thread, experts, THREADS, write_table)

        run(*refs)

    def i32(*shape: int):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    return plgpu.kernel(
        body,
        out_type=(
            i32(rows),
            jax.ShapeDtypeStruct((rows,), jnp.float32),
            i32(tokens, top_k),
            i32(1),
            i32(tiles, sorted_pairs.TABLE_COLUMNS),
        ),
        grid=(1,),
        grid_names=("block",),
        num_threads=THREADS // 128,
        thread_name="warpgroup",
        kernel_name="moe_sort",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        scratch_types=[
            plgpu.SMEM((WARPS, padded), jnp.int32),
            plgpu.SMEM((padded + 1,), jnp.int32),
            plgpu.SMEM((padded + 1,), jnp.int32),
        ],
    )


def _scan(ref: Any, count: int, lane: Word) -> None:
    """By one warp: from ``count`` numbers to the sums of those before each; ``ref[count]`` becomes that of all."""

    @mosaic_utils.fori(Word(count // 32).value, [Word(0).value])
    def loop(i, sums):
        [before] = map(Word, sums)
        place = Word(i) * 32 + lane
        mine = total = simt.load_word(ref, place)
        for distance in (1, 2, 4, 8, 16):
            total = total + total.from_before(distance).where(lane >= distance)
        simt.store(before + total - mine, ref, place)
        return [(before + total.of_lane(31)).value]

    with mosaic_utils.when(lane.equals(0)):
        simt.store(Word(loop.results[0]), ref, Word(count))


def _edges(ref: Any, i: Word) -> tuple[Word, Word]:
    return simt.load_word(ref, i), simt.load_word(ref, i + 1)
