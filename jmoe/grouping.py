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


class Tiles(NamedTuple):
    """N tiles of up to B pairs of one expert, experts ascending; the tiles that a routing does not need have size 0."""

    expert: jax.Array  # i32[N]
    start: jax.Array  # i32[N]    where the tile's pairs begin in ``Groups.order``
    size: jax.Array  # i32[N]    0..B


def group_by_expert(topk_ids: jax.Array, num_experts: int) -> Groups:
    """``order = stable argsort of the ids``, sizes and starts; i32[T, K] ids may hold anything."""
    ids = topk_ids.reshape(-1)
    bucket = jnp.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    order = jnp.argsort(bucket, stable=True).astype(jnp.int32)
    counts = jnp.zeros(num_experts + 1, jnp.int32).at[bucket].add(1, mode="promise_in_bounds")[:num_experts]
    return Groups(order, counts, jnp.cumsum(counts, dtype=jnp.int32) - counts)


def cut(groups: Groups, width: int) -> Tiles:
    """Tiles of ``width`` pairs and a last one of fewer for each expert that has pairs."""
    pairs, num_experts = groups.order.shape[0], groups.sizes.shape[0]
    # The most that any routing needs: as many experts as can be have a pair, and one of them all the others.
    active = min(pairs, num_experts)
    index = lax.iota(jnp.int32, active + (pairs - active) // width)
    counts = (groups.sizes + (width - 1)) // width  # i32[E] tiles of each expert
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    # No binary search: comparing with all E ends is one fused pass, and E is a few hundred.
    expert = jnp.sum(ends[None, :] <= index[:, None], axis=1, dtype=jnp.int32)
    pick = lambda array: array.at[expert].get(mode="fill", fill_value=0)  # noqa: E731
    skipped = (index - (pick(ends) - pick(counts))) * width
    size = jnp.clip(pick(groups.sizes) - skipped, 0, width)
    return Tiles(jnp.minimum(expert, num_experts - 1), pick(groups.starts) + skipped, size)
