"""Which units each block of the persistent grid takes, and in which order."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax


class Schedule:
    """A block's units, of ``num_slots * phase.units`` in each of two phases, slot after slot.

    Phase 1's are dealt round. Blocks that got one less take ``extra`` units of phase 2 first, as many as one unit of
    phase 1 lasts; the others are dealt round, from those blocks on. A block takes all its units of phase 1 before those
    of phase 2, so that whoever waits for phase 1 waits for blocks that wait for nobody.
    """

    def __init__(self, phases: Any, num_slots: Any, block: Any, blocks: int):
        self.phases, self.block, self.blocks = phases, block, blocks
        wide, tall = (num_slots * phase.units for phase in phases)
        extra = phases[0].unit_bytes // phases[1].unit_bytes
        one_more = lax.rem(wide, blocks)  # blocks from 0 on that got one more unit of phase 1
        self.rank = lax.rem(block - one_more + blocks, blocks)
        self.fewer = blocks - one_more
        self.head = extra * self.fewer  # units of phase 2 for those that got fewer
        mine = jnp.clip(_dealt(tall, self.rank, self.fewer), 0, extra)
        self.alone = jnp.where(self.rank < self.fewer, mine, 0)
        self._turns = (_dealt(wide, block, blocks), self.alone + _dealt(tall - self.head, self.rank, blocks))

    def turns(self, phase: int) -> Any:
        """How many units of a phase this block takes."""
        return self._turns[phase]

    def slot_and_unit(self, phase: int, turn: Any) -> tuple[Any, Any]:
        """Of the block's unit number ``turn`` in a phase."""
        if phase == 0:
            place = self.block + turn * self.blocks
        else:
            later = self.head + self.rank + (turn - self.alone) * self.blocks
            place = jnp.where(turn < self.alone, turn * self.fewer + self.rank, later)
        units = self.phases[phase].units
        return lax.div(place, units), lax.rem(place, units)


def _dealt(count: Any, rank: Any, players: Any) -> Any:
    """How many of ``count`` come to ``rank`` (from 0) when they are dealt round; none where ``count`` is negative."""
    return lax.div(jnp.maximum(count - rank, 0) + (players - 1), players)
