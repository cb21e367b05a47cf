"""Slots (prepare.py) of few pairs, found by each block of the layer's kernel for itself, which spares a launch.

A thread a pair compares its expert with those of all: up to ``MAX_PAIRS`` are bits of two words. All warps wait for the
slots' experts; which pairs a slot serves is for those to find that finish units.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from . import simt
from ._compat import arith, gpu, memref, mosaic_utils, plgpu
from .simt import Float, Word, both

BITS = 32  # of a word of a mask
MAX_PAIRS = 2 * BITS
WARPGROUP = 128  # threads


class Slots(NamedTuple):
    """In shared memory."""

    pair: Any  # i32[P, C], as prepare.Prepared's
    weight: Any  # f32[P, C]
    table: Any  # i32[..] of Places

    @property
    def alone(self) -> bool:
        """A lone token's pairs have a slot each, whatever their experts: nothing is to be found. What leads nowhere
        has the first expert's weights."""
        return self.pair.shape[1] == 1

    @property
    def count(self) -> Any:
        return self.pair.shape[0] if self.alone else self.table[self._places.count]

    def expert(self, slot: Any) -> Any:
        """Its row in the planes."""
        return self.table[self._places.experts + slot]

    @property
    def _places(self) -> Places:
        return Places(self.pair.shape[0])


class Places(NamedTuple):
    """In the table of so many pairs."""

    pairs: int

    @property
    def count(self) -> int:
        """Where there is the number of slots; before it the ids of the pairs."""
        return -(-self.pairs // 4) * 4

    @property
    def row(self) -> int:
        """Of the layer's first expert in the planes."""
        return self.count + 1

    @property
    def firsts(self) -> int:
        """A mask: pairs that have their expert first."""
        return self.row + 1

    @property
    def experts(self) -> int:
        """By slot."""
        return self.firsts + words(self.pairs)

    @property
    def slots(self) -> int:
        """By pair; of one that leads somewhere."""
        return self.experts + self.pairs

    @property
    def size(self) -> int:
        return self.slots + self.pairs


def scratch(pairs: int, tokens: int) -> list[Any]:
    shapes = (pairs, tokens), (pairs, tokens), (Places(pairs).size,)
    return [plgpu.SMEM(s, dtype) for s, dtype in zip(shapes, (jnp.int32, jnp.float32, jnp.int32), strict=True)]


def scratch_bytes(pairs: int, tokens: int) -> int:
    """Each array begins on a KiB."""
    return sum(-(-math.prod(s.shape) * 4 // 1024) * 1024 for s in scratch(pairs, tokens))


def fetch(slots: Slots, ids_g: Any, layer_g: Any, experts: int) -> None:
    """What all threads may read after the block's next barrier."""
    tokens, top_k = ids_g.shape
    at = Places(tokens * top_k)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 3)
    def run(_, table_s, ids_g, layer_g):
        pair = simt.thread_in_block()
        with mosaic_utils.when(pair < WARPGROUP):
            # Both asked for before either is waited for.
            last = pair.at_most(at.pairs - 1)
            row, expert = simt.load_word(layer_g, Word(0)) * experts, simt.load_word(ids_g, last // top_k, last % top_k)
            simt.store(expert, table_s, last)
            if slots.alone:
                simt.store(expert.where(_leads_to(expert, experts)) + row, table_s, last + at.experts)
            else:
                simt.store(row, table_s, Word(at.row))

    run(slots.table, ids_g, layer_g)


def find(slots: Slots, experts: int) -> None:
    """How many there are and their experts, by all threads of the block. An id outside [0, E), and an id that its token
    already has, lead nowhere."""
    if slots.alone:
        return
    pairs = slots.pair.shape[0]
    at = Places(pairs)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def run(_, table_s):
        thread = simt.thread_in_block()

        def rank() -> None:
            # The last pair again for threads that have none.
            pair = thread.at_most(pairs - 1)
            expert = simt.load_word(table_s, pair)
            same = [Word(0)] * words(pairs)
            for first in range(0, pairs, 4):
                for i, other in enumerate(simt.load_four(table_s, Word(first))):
                    word, bit = divmod(first + i, BITS)
                    same[word] = same[word] | (Word(1) << bit).where(other.equals(expert))
            is_valid = both(thread < pairs, _leads_to(expert, experts))
            is_first = both(is_valid, ones_before(same, pair).equals(0))
            # A bit a lane: their sum.
            firsts = [(Word(1) << thread % BITS).where(is_first).sum_of_lanes()]
            if len(same) > 1:
                with mosaic_utils.when(thread < len(same) * BITS):
                    simt.store(firsts[0], table_s, thread // BITS + at.firsts)
                mosaic_utils.warpgroup_barrier()
                firsts = [simt.load_word(table_s, Word(i + at.firsts)) for i in range(len(same))]
            slot = ones([f & below for f, below in zip(firsts, below_lowest(same), strict=True)])
            with mosaic_utils.when(is_valid):
                simt.store(slot, table_s, pair + at.slots)
            with mosaic_utils.when(is_first):
                simt.store(expert + simt.load_word(table_s, Word(at.row)), table_s, slot + at.experts)
            with mosaic_utils.when(thread.equals(0)):
                simt.store(ones(firsts), table_s, Word(at.count))

        # One warp where it has all pairs: it need not wait for another.
        with mosaic_utils.when(thread < (BITS if pairs <= BITS else WARPGROUP)):
            rank()
        gpu.barrier()

    run(slots.table)


def assign(slots: Slots, weights_g: Any, live_g: Any, experts: int) -> None:
    """Pairs and weights of each slot, by one warpgroup, and ``live`` by the first block's."""
    tokens, top_k = weights_g.shape
    pairs = tokens * top_k
    at = Places(pairs)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 5)
    def run(_, pair_s, weight_s, table_s, weights_g, live_g):
        def id_of(pair: Word) -> Word:
            return simt.load_word(table_s, pair)

        def weight_of(pair: Word) -> Any:
            return memref.load(weights_g, [(pair // top_k).index, (pair % top_k).index])

        thread = simt.thread_in_block() % WARPGROUP
        for first in range(0, pairs * tokens, WARPGROUP):
            item = (thread + first).at_most(pairs * tokens - 1)
            simt.store(Word(-1), pair_s, item // tokens, item % tokens)
        mosaic_utils.warpgroup_barrier()
        with mosaic_utils.when(thread < pairs):
            token, k = thread // top_k, thread % top_k
            expert = simt.load_word(table_s, thread)
            is_live = _leads_to(expert, experts)
            if slots.alone:
                slot, total = thread, weight_of(thread)
            else:
                slot = simt.load_word(table_s, thread + at.slots)
                first, total = first_and_weight(id_of, weight_of, top_k, expert, token)
                is_live = both(is_live, first.equals(thread))
            with mosaic_utils.when(is_live):
                simt.store(thread, pair_s, slot, token)
                simt.store(total, weight_s, slot, token)
            with mosaic_utils.when(simt.block().equals(0)):
                simt.store(Word(1).where(is_live), live_g, token, k)
        mosaic_utils.warpgroup_barrier()

    run(*slots, weights_g, live_g)


def _leads_to(expert: Word, experts: int) -> Any:
    return both(expert >= 0, expert < experts)


def first_and_weight(
    id_of: Callable[[Word], Word], weight_of: Callable[[Word], Any], top_k: int, expert: Word, token: Word
) -> tuple[Word, Any]:
    """The first of a token's pairs with an expert, one that it has, and the weight of all of them."""
    first, total = token * top_k + (top_k - 1), Float(0.0)
    for k in range(top_k):
        pair = token * top_k + k
        same = id_of(pair).equals(expert)
        first = pair.where(same, first).at_most(first)
        total = total + Float(arith.select(same, weight_of(pair), Float(0.0).value))
    return first, total.value


def words(bits: int) -> int:
    """Of a mask of so many bits."""
    return -(-bits // BITS)


def ones(mask: list[Word]) -> Word:
    return sum((word.ones() for word in mask[1:]), mask[0].ones())


def ones_before(mask: list[Word], place: Word) -> Word:
    """How many bits of a mask are set before a place."""
    found = []
    for i, word in enumerate(mask):
        bit = place - i * BITS
        before = (Word(1) << bit.where(both(bit >= 0, bit < BITS))) - 1
        found.append(word & before.where(bit < BITS, -1))
    return ones(found)


def below_lowest(mask: list[Word]) -> list[Word]:
    """All bits below the lowest that is set."""
    found, none_yet = [], None
    for word in mask:
        below = (word - 1) & (word ^ -1)
        found.append(below if none_yet is None else below.where(none_yet))
        none_yet = word.equals(0) if none_yet is None else both(none_yet, word.equals(0))
    return found
