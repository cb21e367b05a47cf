"""Which experts the tokens chose, and which (token, slot) pairs each serves. Plain XLA."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Slots(NamedTuple):
    """``P = T * K`` places for chosen experts, filled from the front in the experts' order.

    A slot has C columns: all T tokens where T <= width, else up to ``width`` tokens that chose its expert (an expert
    that more tokens chose takes several slots).
    """

    count: jax.Array  # i32[1]     slots in use
    experts: jax.Array  # i32[P]     expert of each slot; 0 in unused ones
    token: jax.Array | None  # i32[P, C]  token of a column, 0 in unused ones; None: column t is token t
    pair: jax.Array  # i32[P, C]  t * K + k of the pair that a column serves, -1 for none
    weight: jax.Array  # f32[P, C]  its weight; a repeated expert's weights added up
    live: jax.Array  # bool[T, K] pairs that some slot serves; the others contribute nothing


def slots_of(topk_ids: jax.Array, topk_weights: jax.Array, num_experts: int, width: int) -> Slots:
    """i32[T, K] ids (outside [0, E): contribute nothing), f32[T, K] weights."""
    tokens, top_k = topk_ids.shape
    pairs = tokens * top_k
    valid = (topk_ids >= 0) & (topk_ids < num_experts)
    if tokens == 1:
        return _one_token(topk_ids, topk_weights, valid)
    # P is at most a few hundred: comparing all pairs with all is one small kernel, a sort is several. Three of them
    # follow each other here: ranks, slots, tables.
    same = topk_ids[:, :, None] == topk_ids[:, None, :]  # bool[T, K, K]: within a token
    earlier = jnp.tril(jnp.ones((1, top_k, top_k), bool), -1)  # [k, j]: j before k
    live = valid & ~jnp.any(same & earlier, axis=2)  # bool[T, K]
    weight = jnp.sum(jnp.where(same, topk_weights[:, None, :], 0.0), axis=2).reshape(pairs)

    ids, place = topk_ids.reshape(pairs), jnp.arange(pairs, dtype=jnp.int32)
    before = (ids[:, None] == ids[None, :]) & (place[None, :] < place[:, None])
    rank = jnp.sum(before, axis=1, dtype=jnp.int32)  # of a pair among those of its expert
    shared = tokens <= width
    first = jnp.zeros_like(rank) if shared else rank - rank % width  # rank of the first pair in the same slot
    column = place // top_k if shared else rank % width
    leader = valid.reshape(pairs) & (rank == first)
    lower = (ids[None, :] < ids[:, None]) | ((ids[None, :] == ids[:, None]) & (rank[None, :] < first[:, None]))
    slot = jnp.sum(leader[None, :] & lower, axis=1, dtype=jnp.int32)

    mine = valid.reshape(1, pairs) & (slot[None, :] == place[:, None])  # bool[P slots, P pairs]
    experts = jnp.max(jnp.where(mine, ids[None, :], 0), axis=1)
    columns = jnp.arange(min(tokens, width), dtype=jnp.int32)
    here = (mine & live.reshape(1, pairs))[:, None, :] & (column[None, None, :] == columns[None, :, None])
    pair = jnp.max(jnp.where(here, place[None, None, :], -1), axis=2)  # of bool[P, C, P]
    weights = jnp.sum(jnp.where(here, weight[None, None, :], 0.0), axis=2)
    count = jnp.sum(leader, dtype=jnp.int32).reshape(1)
    return Slots(count, experts, None if shared else jnp.maximum(pair, 0) // top_k, pair, weights, live)


def _one_token(topk_ids: jax.Array, topk_weights: jax.Array, valid: jax.Array) -> Slots:
    """A slot a pair, with nothing to look up: an id that comes twice is read twice, one out of range as expert 0."""
    top_k = topk_ids.size
    pair = jnp.arange(top_k, dtype=jnp.int32).reshape(top_k, 1)
    experts = jnp.where(valid, topk_ids, 0).reshape(top_k)
    return Slots(jnp.full(1, top_k, jnp.int32), experts, None, pair, topk_weights.reshape(top_k, 1), valid)
