"""What a router does to its experts, as pure functions of ``topk_ids``: under jit, vmap and scan, beside the layer.

Ids outside [0, E), empty slots, count for nothing.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from . import checks


def tokens_per_expert(topk_ids: Any, num_experts: int) -> jax.Array:
    """``n[e] = number of (t, k) with topk_ids[t, k] = e``: integer [T, K] -> i32[E], the group sizes of the layer.

    Raises AssertionError for what is no integer [T, K] array.
    """
    checks.check_ids(topk_ids)
    return jnp.sum(_one_hot(topk_ids, num_experts), axis=(0, 1), dtype=jnp.int32)


def load_imbalance(tokens_per_expert: Any) -> jax.Array:
    """``max_e n[e] / mean_e n[e]`` of counts: [E] -> f32, 1 for an even load, E where one expert has it all.

    1 where there are no tokens. The slowest of E devices with an expert each takes this many times as long as under an
    even load.
    """
    counts = jnp.asarray(tokens_per_expert).astype(jnp.float32)
    total = jnp.sum(counts)
    return jnp.where(total > 0, counts.size * jnp.max(counts) / jnp.maximum(total, 1.0), 1.0)


def co_activation(topk_ids: Any, num_experts: int) -> jax.Array:
    """``C[a, b] = number of tokens that chose both a and b``: integer [T, K] -> i32[E, E], symmetric.

    The diagonal holds how many tokens chose an expert; an id that a token repeats counts once. Takes T * E bytes.
    Raises as :func:`tokens_per_expert` does.
    """
    checks.check_ids(topk_ids)
    chosen = jnp.any(_one_hot(topk_ids, num_experts), axis=1).astype(jnp.int8)  # [T, E]
    return jax.lax.dot_general(chosen, chosen, (((0,), (0,)), ((), ())), preferred_element_type=jnp.int32)


def _one_hot(topk_ids: Any, num_experts: int) -> jax.Array:
    """bool[T, K, E]: compared, not narrowed, so that 2^32 + 1 is no expert."""
    ids = jnp.asarray(checks.narrow_ids(topk_ids, num_experts))
    return ids[:, :, None] == jnp.arange(num_experts, dtype=ids.dtype)[None, None, :]
