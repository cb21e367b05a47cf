"""The few pairs of a decoding step at once: no loop, no branch, no scatter, which a GPU driven by its host pays for.

    y[t] = sum_k topk_weights[t, k] * down_e(act(gate_e x[t], up_e x[t])),   e = topk_ids[t, k]

or with topk_weights on x[t] instead.

Each pair has its chosen expert's planes gathered; those without a product are decoded, and only those.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .activations import Activation
from .reference import NO_PRODUCTS, Product, decode, expert_forward
from .stack import ExpertStack, QuantTensor

# What the chosen experts may take beside the stack. A token of DeepSeek-V3 with down in Q6_K, the largest of the models
# that the tests know, takes 646 MB: eight experts' gate and up in mlx4, and down decoded.
GATHERED_BYTES = 1 << 30


def moe_gathered(
    stack: ExpertStack,
    x: jax.Array,  # float[T, H]
    topk_ids: jax.Array,  # i32[T, K]
    topk_weights: jax.Array,  # f32[T, K]
    *,
    activation: Activation,
    weight_on: str = "output",
    layer: Any = None,
    products: Mapping[str, Product] = NO_PRODUCTS,
) -> jax.Array:
    """f32[T, H] of the formula above, summed in slot order; ``products`` as for ``moe_jnp``."""
    tokens, top_k = topk_ids.shape

    def of_pair(expert: jax.Array, row: jax.Array) -> jax.Array:
        decoded = decode(stack, expert, layer, products=products)
        return expert_forward(decoded, row[:, None], activation, products)[:, 0]

    live = (topk_ids >= 0) & (topk_ids < stack.num_experts)
    experts = jnp.where(live, topk_ids, 0).reshape(-1)
    rows = jnp.repeat(x.astype(jnp.float32), top_k, axis=0)  # f32[P, H]
    if weight_on == "input":
        rows, topk_weights = rows * topk_weights.reshape(-1, 1), jnp.ones_like(topk_weights)
    out = jax.vmap(of_pair)(experts, rows)  # f32[P, H]
    weighted = topk_weights[..., None] * out.reshape(tokens, top_k, stack.hidden_size)
    return jnp.sum(jnp.where(live[..., None], weighted, 0), axis=1)


def can_gather(stack: ExpertStack, pairs: int, products: Mapping[str, Product] = NO_PRODUCTS) -> bool:
    """Whether to gather the experts of ``pairs`` pairs: no more than the stack has, and within ``GATHERED_BYTES``."""
    nbytes = sum(
        _expert_bytes(projection, products)
        for projection in (stack.gate, stack.up, stack.down)
        if projection is not None
    )
    return 0 < pairs <= stack.num_experts and pairs * nbytes <= GATHERED_BYTES


def _expert_bytes(projection: Any, products: Mapping[str, Product]) -> int:
    *lead, rows, depth = projection.shape
    if isinstance(projection, QuantTensor) and projection.format in products:
        return projection.nbytes // math.prod(lead)
    return 4 * rows * depth
