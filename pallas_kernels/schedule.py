"""Which units each block of the persistent grid takes, and in which order."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax


class Schedule:
    """A block's units, of ``num_slots * phase.units`` in each of two phases, slot after slot.

    One phase is dealt round. Blocks that got one less of it take ``extra`` units of the other phase first, as many as
    one unit of the first lasts; the others are dealt round, from those blocks on. Where they are left with one round of
    phase 1 or none they take no units early: h comes no sooner than another round would end. A block takes all its
    units of phase 1 before those of phase 2, so that whoever waits for phase 1 waits for blocks that wait for nobody.

    Phase 2 comes first where its units are the larger ones and go round at least once: otherwise the blocks that got
    none would be at phase 1 to the end, and the others wait for them.
    """

    def __init__(self, phases: Any, num_slots: Any, block: Any, blocks: int):
        self.phases = phases
        self.down_first: Any = False
        if phases[1].unit_bytes > phases[0].unit_bytes:
            self.down_first = num_slots * phases[1].units >= blocks
        self.deals = [_Deal(phases, first, num_slots, block, blocks) for first in range(2)]

    def turns(self, phase: int) -> Any:
        """How many units of a phase this block takes."""
        return self._either(lambda deal: deal.turns(phase))

    def slot_and_unit(self, phase: int, turn: Any) -> tuple[Any, Any]:
        """Of the block's unit number ``turn`` in a phase."""
        place, units = self._either(lambda deal: deal.place(phase, turn)), self.phases[phase].units
        return lax.div(place, units), lax.rem(place, units)

    def _either(self, value: Any) -> Any:
        if self.down_first is False:
            return value(self.deals[0])
        return jnp.where(self.down_first, value(self.deals[1]), value(self.deals[0]))


class _Deal:
    """Phase ``first`` dealt round, then the other."""

    def __init__(self, phases: Any, first: int, num_slots: Any, block: Any, blocks: int):
        self.first, self.block, self.blocks = first, block, blocks
        counts = [num_slots * phase.units for phase in phases]
        extra: Any = round(phases[first].unit_bytes / phases[1 - first].unit_bytes)
        if first == 0:
            extra = jnp.where(counts[0] < 2 * blocks, 0, extra)
        one_more = lax.rem(counts[first], blocks)  # blocks from 0 on that got one more of the first
        self.rank = lax.rem(block - one_more + blocks, blocks)
        self.fewer = blocks - one_more
        self.head = extra * self.fewer  # units of the other phase for those that got fewer
        mine = jnp.clip(_dealt(counts[1 - first], self.rank, self.fewer), 0, extra)
        self.alone = jnp.where(self.rank < self.fewer, mine, 0)
        others = self.alone + _dealt(counts[1 - first] - self.head, self.rank, blocks)
        self._turns = (_dealt(counts[first], block, blocks), others)

    def turns(self, phase: int) -> Any:
        return self._turns[phase != self.first]

    def place(self, phase: int, turn: Any) -> Any:
        if phase == self.first:
            return self.block + turn * self.blocks
        later = self.head + self.rank + (turn - self.alone) * self.blocks
        return jnp.where(turn < self.alone, turn * self.fewer + self.rank, later)


def _dealt(count: Any, rank: Any, players: Any) -> Any:
    """How many of ``count`` come to ``rank`` (from 0) when they are dealt round; none where ``count`` is negative."""
    return lax.div(jnp.maximum(count - rank, 0) + (players - 1), players)
