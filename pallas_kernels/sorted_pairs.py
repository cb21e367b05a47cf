"""(token, expert) pairs sorted by expert, and the tiles that their groups are cut into.

A tile is some columns of one expert's group: rows ``begin .. begin + width`` of the sorted x, ``begin`` a multiple of
eight because the copy engine counts so. What of them belongs to other groups is computed with them and not stored:
nothing is padded in memory. All tiles of a group are about equally wide, or as many as can be of one product.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

ALIGN = 8  # rows that a tile's begin is a multiple of
MOST_COLUMNS = 256  # of one product, and rows of one copy


TABLE_COLUMNS = 5


class Tiles(NamedTuple):
    """Row t of ``table`` is of tile t's group: (row of the expert in the planes, first and last + 1 of its sorted
    pairs, the group's first tile, its number of tiles)."""

    count: Any  # i32[2]: tiles, and sorted pairs that lead somewhere
    table: Any  # i32[most_tiles, 5]


class SortedPairs(NamedTuple):
    pair: Any  # i32[R]: t * K + k of each sorted place, R = P rounded up; those that lead nowhere last
    weight: Any  # f32[R]: its weight
    place: Any  # i32[T, K]: the sorted place of each pair; -1 for those that lead nowhere
    tiles: Tiles


def rounded_up(rows: Any) -> Any:
    """To a multiple of ``ALIGN``; of P pairs R, the rows of their arrays."""
    return (rows + (ALIGN - 1)) // ALIGN * ALIGN


def most_tiles(pairs: int, experts: int, width: int) -> int:
    """Tiles that P pairs can need: a group reaches at most seven rows back, and its last tile may be nearly empty."""
    groups = min(pairs, experts)
    return groups + (pairs + (ALIGN - 1) * groups) // width


def sort_pairs(topk_ids: jax.Array, topk_weights: jax.Array, experts: int, layer: jax.Array, width: int) -> SortedPairs:
    """``topk_ids`` i32[T, K] and their weights; ids outside [0, E) lead nowhere; ``layer`` i32[], whose experts lie
    together."""
    pairs = topk_ids.size
    ids = topk_ids.reshape(-1)
    live = (ids >= 0) & (ids < experts)
    key = jnp.where(live, ids, experts)
    number = lax.iota(jnp.int32, pairs)
    sorted_key, pair = lax.sort((key, number), num_keys=1, is_stable=True)
    place = jnp.zeros(pairs, jnp.int32).at[pair].set(number, unique_indices=True, mode="promise_in_bounds")
    edges = jnp.searchsorted(sorted_key, lax.iota(jnp.int32, experts + 1), method="scan_unrolled").astype(jnp.int32)
    pair = jnp.pad(pair, (0, rounded_up(pairs) - pairs))
    return SortedPairs(
        pair,
        topk_weights.reshape(-1)[pair],
        jnp.where(live, place, -1).reshape(topk_ids.shape),
        cut(edges[:-1], edges[1:], layer * experts, most_tiles(pairs, experts, width), width),
    )


def cut(first: jax.Array, last: jax.Array, first_expert: jax.Array, most: int, width: int) -> Tiles:
    """``first`` and ``last`` i32[E]: each group's first sorted place, and its last one plus 1."""
    experts = first.shape[0]
    span = last - aligned(first)
    tiles = jnp.where(last > first, (span + (width - 1)) // width, 0)  # i32[E]
    ends = jnp.cumsum(tiles, dtype=jnp.int32)
    group = jnp.searchsorted(ends, lax.iota(jnp.int32, most), side="right", method="compare_all").astype(jnp.int32)
    group = jnp.minimum(group, experts - 1)
    columns = (group + first_expert, first[group], last[group], (ends - tiles)[group], tiles[group])
    return Tiles(jnp.stack([ends[-1], last[-1]]), jnp.stack(columns, axis=1))


def aligned(row: Any) -> Any:
    return row - row % ALIGN


def bounds(first: Any, last: Any, tiles: Any, i: Any, width: int) -> tuple[Any, Any]:
    """``(begin, columns)`` of tile ``i`` of a group's ``tiles``, of at most ``width``: equal shares; where these would
    take two products each, one product's, and the first tiles what is left over. In the kernel too: integers."""
    begin = aligned(first)
    span = last - begin
    share = jnp.minimum(rounded_up((span + tiles - 1) // tiles), MOST_COLUMNS)
    left = jnp.maximum(rounded_up(span) - tiles * MOST_COLUMNS, 0)

    def start(i: Any) -> Any:
        return begin + i * share + jnp.minimum(left, i * max(width - MOST_COLUMNS, 0))

    return start(i), jnp.minimum(start(i + 1), last) - start(i)
