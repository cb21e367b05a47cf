"""Which experts a few tokens chose, each once, and which (token, slot) pairs each one serves. Plain XLA."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Slots(NamedTuple):
    """``P = T * K`` places for chosen experts, filled from the front in order of first appearance."""

    count: jax.Array  # i32[1]     slots in use
    experts: jax.Array  # i32[P]     expert of each slot; 0 in unused ones
    pair: jax.Array  # i32[P, T]  t * K + k of the pair that a slot serves for token t, -1 for none
    weight: jax.Array  # f32[P, T]  its weight; a repeated expert's weights added up
    live: jax.Array  # bool[T, K] pairs that some slot serves; the others contribute nothing


def slots_of(topk_ids: jax.Array, topk_weights: jax.Array, num_experts: int) -> Slots:
    """i32[T, K] ids (outside [0, E): contribute nothing), f32[T, K] weights."""
    tokens, top_k = topk_ids.shape
    pairs = tokens * top_k
    valid = (topk_ids >= 0) & (topk_ids < num_experts)
    if tokens == 1:
        return _one_token(topk_ids, topk_weights, valid)
    earlier = jnp.tril(jnp.ones((1, top_k, top_k), bool), -1)  # [k, j]: j before k
    repeats = jnp.any((topk_ids[:, :, None] == topk_ids[:, None, :]) & earlier, axis=2)
    live = valid & ~repeats  # bool[T, K]
    flat, place = topk_ids.reshape(pairs), jnp.arange(pairs, dtype=jnp.int32)
    # P is at most a few hundred: comparing all pairs is one small kernel, a sort is several.
    same = flat[:, None] == flat[None, :]
    leader = valid.reshape(pairs) & ~jnp.any(same & (place[None, :] < place[:, None]), axis=1)
    slot = jnp.sum(leader[None, :] & (place[None, :] < place[:, None]), axis=1, dtype=jnp.int32)
    chosen = leader[None, :] & (slot[None, :] == place[:, None])  # bool[P slots, P pairs]
    experts = jnp.sum(jnp.where(chosen, flat[None, :], 0), axis=1, dtype=jnp.int32)
    used = jnp.any(chosen, axis=1)
    serves = used[:, None, None] & (topk_ids[None] == experts[:, None, None])  # bool[P, T, K]
    pair = jnp.max(jnp.where(serves & live[None], place.reshape(1, tokens, top_k), -1), axis=2)
    weight = jnp.sum(jnp.where(serves, topk_weights[None], 0.0), axis=2)
    count = jnp.sum(leader, dtype=jnp.int32).reshape(1)
    return Slots(count, experts, pair, weight, live)


def _one_token(topk_ids: jax.Array, topk_weights: jax.Array, valid: jax.Array) -> Slots:
    """A slot a pair, with nothing to look up: an id that comes twice is read twice, one out of range as expert 0."""
    top_k = topk_ids.size
    pair = jnp.arange(top_k, dtype=jnp.int32).reshape(top_k, 1)
    experts = jnp.where(valid, topk_ids, 0).reshape(top_k)
    return Slots(jnp.full(1, top_k, jnp.int32), experts, pair, topk_weights.reshape(top_k, 1), valid)
