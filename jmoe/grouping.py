"""(token, slot) pairs sorted by expert, cut into tiles that each belong to one expert.

A pair whose id is outside [0, E) goes to bucket E, which no tile covers: it contributes nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Groups(NamedTuple):
    """``P = T * K`` pairs; pair p is slot ``p % K`` of token ``p // K``."""

    order: jax.Array  # i32[P]    pairs by expert, in pair order within one
    sizes: jax.Array  # i32[E]    pairs of each expert
    starts: jax.Array  # i32[E]    where an expert's pairs begin in ``order``


class Tile(NamedTuple):
    """Up to B pairs of one expert."""

    expert: jax.Array  # i32[]
    pairs: jax.Array  # i32[B]    indices into the P pairs; a dead entry repeats some pair
    live: jax.Array  # bool[B]


def group_by_expert(topk_ids: jax.Array, num_experts: int) -> Groups:
    """``order = stable argsort of the ids``, sizes and starts; i32[T, K] ids may hold anything."""
    ids = topk_ids.reshape(-1)
    bucket = jnp.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    order = jnp.argsort(bucket, stable=True).astype(jnp.int32)
    counts = jnp.zeros(num_experts + 1, jnp.int32).at[bucket].add(1)[:num_experts]
    return Groups(order, counts, jnp.cumsum(counts, dtype=jnp.int32) - counts)


def max_tiles(pairs: int, num_experts: int, width: int) -> int:
    """The most tiles that any routing of ``pairs`` pairs needs: full ones, and one partial an expert."""
    return pairs // width + min(pairs, num_experts)


def num_tiles(groups: Groups, width: int) -> jax.Array:
    """i32[]: the tiles that this routing needs."""
    return jnp.sum(_tiles_per_expert(groups, width), dtype=jnp.int32)


def tile_at(groups: Groups, index: jax.Array, width: int) -> Tile:
    """Tile ``index`` of the routing, experts in ascending order. Past ``num_tiles``: expert E - 1, nothing live."""
    per_expert = _tiles_per_expert(groups, width)
    ends = jnp.cumsum(per_expert, dtype=jnp.int32)  # i32[E]
    # No binary search: comparing with all E ends is one fused pass, and E is a few hundred.
    expert = jnp.minimum(jnp.sum(ends <= index, dtype=jnp.int32), groups.sizes.shape[0] - 1)
    pick = lambda array: lax.dynamic_index_in_dim(array, expert, keepdims=False)  # noqa: E731
    first = (index - (pick(ends) - pick(per_expert))) * width
    offsets = first + lax.iota(jnp.int32, width)
    live = (offsets >= 0) & (offsets < pick(groups.sizes))
    positions = jnp.where(live, pick(groups.starts) + offsets, 0)
    return Tile(expert, groups.order.at[positions].get(mode="clip"), live)


def _tiles_per_expert(groups: Groups, width: int) -> jax.Array:
    return (groups.sizes + (width - 1)) // width
