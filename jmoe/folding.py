"""A vmapped layer as one flat call: a batch of tokens is more tokens, a population of stacks is more experts.

[B, T, ...] tokens      -> [B * T, ...]
[P, L, E, ...] leaves   -> [P * L * E, ...], a view; expert e of layer l of stack p is (p * L + l) * E + e
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def fold(axis_size: int, in_batched: tuple[Any, ...], *operands: Any) -> tuple[Any, ...]:
    """``(stack, x, topk_ids, topk_weights, layer)`` of one call for the whole batch, layer None where it was folded in.

    ``in_batched``: for each leaf whether it has a leading axis of ``axis_size``. Where some leaves of a stack are
    batched, the others are repeated: a kernel finds all projections of an expert under one index.
    """
    stack, x, topk_ids, topk_weights, layer = operands
    stack_batched, x_batched, ids_batched, weights_batched, layer_batched = in_batched
    x = _repeated(x, x_batched, axis_size)
    topk_ids = _repeated(topk_ids, ids_batched, axis_size)
    topk_weights = _repeated(topk_weights, weights_batched, axis_size)

    population = any(jax.tree.leaves(stack_batched))
    if population or layer_batched:
        num_experts = stack.num_experts
        members = lax.iota(jnp.int32, axis_size) if population else jnp.zeros(axis_size, jnp.int32)
        if population:
            stack = jax.tree.map(lambda leaf, batched: _repeated(leaf, batched, axis_size), stack, stack_batched)
        if layer is not None:
            layers = stack.up.shape[-4]
            # Clipped, as a slice is: a layer outside must not be another member's.
            members = members * layers + jnp.clip(jnp.asarray(layer, jnp.int32), 0, layers - 1)
        # An id outside stays outside: added to, it would be an expert of a neighbour's.
        inside = (topk_ids >= 0) & (topk_ids < num_experts)
        topk_ids = jnp.where(inside, topk_ids + members[:, None, None] * num_experts, -1)
        lead = 1 + population + (layer is not None)
        stack = jax.tree.map(lambda leaf: _merged(leaf, lead), stack)
        layer = None
    return stack, _merged(x, 2), _merged(topk_ids, 2), _merged(topk_weights, 2), layer


def _merged(array: jax.Array, lead: int) -> jax.Array:
    """The first ``lead`` axes as one."""
    return array.reshape(math.prod(array.shape[:lead]), *array.shape[lead:])


def _repeated(array: jax.Array, batched: bool, axis_size: int) -> jax.Array:
    return array if batched else jnp.broadcast_to(array, (axis_size, *array.shape))
