"""The layer as one would first write it: gather the chosen experts, dequantise them, einsum."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jmoe import ExpertStack
from jmoe.stack import dense
from jmoe.synthetic import ModelShape


def moe_naive(stack: ExpertStack, x: jax.Array, topk_ids: jax.Array, topk_weights: jax.Array) -> jax.Array:
    """moe_forward's formula, with f32[T, K, O, D] weights in memory."""
    gate, up, down = (dense(projection[topk_ids]) for projection in (stack.gate, stack.up, stack.down))
    einsum = lambda *operands: jnp.einsum(*operands, precision=jax.lax.Precision.HIGHEST)  # noqa: E731
    wide = x.astype(jnp.float32)
    h = jax.nn.silu(einsum("th,tkih->tki", wide, gate)) * einsum("th,tkih->tki", wide, up)  # f32[T, K, I]
    return einsum("tki,tkhi,tk->th", h, down, topk_weights).astype(x.dtype)


def fits(model: ModelShape, tokens: int, limit: int = 1 << 30) -> bool:
    """Whether the dequantised experts of so many tokens take at most ``limit`` bytes."""
    return 4 * 3 * tokens * model.top_k * model.hidden_size * model.expert_intermediate <= limit
