"""Which units each block of the persistent grid takes, and in which order."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax


class Schedule:
    """A block's units, of ``num_slots * phase.units`` in each of two phases, slot after slot.

    The phase of larger units is dealt round. Blocks that got one less of them take ``extra`` units of the other phase
    first, as many as one large unit lasts; the others are dealt round, from those blocks on. A block takes all its
    units of phase 1 before those of phase 2, so that whoever waits for phase 1 waits for blocks that wait for nobody.
    """

    def __init__(self, phases: Any, num_slots: Any, block: Any, blocks: int):
        self.phases, self.block, self.blocks = phases, block, blocks
        self.large = int(phases[1].unit_bytes > phases[0].unit_bytes)
        large, small = phases[self.large], phases[1 - self.large]
        larger, smaller = num_slots * large.units, num_slots * small.units
        extra = round(large.unit_bytes / small.unit_bytes)
        one_more = lax.rem(larger, blocks)  # blocks from 0 on that got one more large unit
        self.rank = lax.rem(block - one_more + blocks, blocks)
        self.fewer = blocks - one_more
        self.head = extra * self.fewer  # small units for those that got fewer
        mine = jnp.clip(_dealt(smaller, self.rank, self.fewer), 0, extra)
        self.alone = jnp.where(self.rank < self.fewer, mine, 0)
        turns = (_dealt(larger, block, blocks), self.alone + _dealt(smaller - self.head, self.rank, blocks))
        self._turns = turns[::-1] if self.large else turns

    def turns(self, phase: int) -> Any:
        """How many units of a phase this block takes."""
        return self._turns[phase]

    def slot_and_unit(self, phase: int, turn: Any) -> tuple[Any, Any]:
        """Of the block's unit number ``turn`` in a phase."""
        if phase == self.large:
            place = self.block + turn * self.blocks
        else:
            later = self.head + self.rank + (turn - self.alone) * self.blocks
            place = jnp.where(turn < self.alone, turn * self.fewer + self.rank, later)
        units = self.phases[phase].units
        return lax.div(place, units), lax.rem(place, units)


def _dealt(count: Any, rank: Any, players: Any) -> Any:
    """How many of ``count`` come to ``rank`` (from 0) when they are dealt round; none where ``count`` is negative."""
    return lax.div(jnp.maximum(count - rank, 0) + (players - 1), players)
