"""How long a layer takes: distinct layers chained through the residual inside one jit, routed anew at every call."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .moe import moe_forward
from .stack import ExpertStack

Layer = Callable[[ExpertStack, jax.Array, jax.Array, jax.Array], jax.Array]


class Routing(NamedTuple):
    """Of L chained layers."""

    topk_ids: jax.Array  # i32[L, T, K]
    topk_weights: jax.Array  # f32[L, T, K]


def random_routing(rng: np.random.Generator, layers: int, tokens: int, num_experts: int, top_k: int) -> Routing:
    """Distinct random experts for each token and layer; weights that sum to 1."""
    ids = rng.random((layers, tokens, num_experts)).argsort(axis=-1)[..., :top_k]
    weights = rng.dirichlet([9.0] * top_k, (layers, tokens))
    return Routing(jnp.asarray(ids, jnp.int32), jnp.asarray(weights, jnp.float32))


def chained(layer: Layer = moe_forward) -> Any:
    """The jitted ``x = x + layer(stack, x, ids, weights)`` over a sequence of stacks."""

    @jax.jit
    def run(stacks: Sequence[ExpertStack], x: jax.Array, routing: Routing) -> jax.Array:
        for index, stack in enumerate(stacks):
            x = x + layer(stack, x, routing.topk_ids[index], routing.topk_weights[index])
        return x

    return run


def layer_seconds(
    run: Any, stacks: Sequence[ExpertStack], x: jax.Array, rng: np.random.Generator, top_k: int, repeats: int
) -> list[float]:
    """Wall time per layer of each of ``repeats`` calls of a :func:`chained` function, after two that do not count.

    Decoding reads each layer's experts from memory and not from a cache, as in a model: choose stacks larger than it.
    """
    # Eight in turn: a cache that held one call's experts has long lost them when they come again.
    distinct = range(min(repeats + 2, 8))
    routings = [random_routing(rng, len(stacks), x.shape[0], stacks[0].num_experts, top_k) for _ in distinct]
    jax.block_until_ready(routings)
    seconds = []
    for call in range(repeats + 2):
        start = time.perf_counter()
        jax.block_until_ready(run(stacks, x, routings[call % len(routings)]))
        seconds.append((time.perf_counter() - start) / len(stacks))
    return seconds[2:]
