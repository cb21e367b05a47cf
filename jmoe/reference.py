"""The jnp backend: dequantise an expert, multiply its tokens, add what they give. What runs where no kernel does.

    y[t] = sum_k topk_weights[t, k] * (down_e(silu(gate_e x[t]) * up_e x[t]) * down_scale_e),   e = topk_ids[t, k]

One tile of tokens of one expert at a time, so no more than one expert is ever held in float.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .grouping import group_by_expert, max_tiles, num_tiles, tile_at
from .stack import ExpertStack, Projection, dense, take


def moe_jnp(
    stack: ExpertStack,
    x: jax.Array,  # float[T, H]
    topk_ids: jax.Array,  # i32[T, K]
    topk_weights: jax.Array,  # f32[T, K]
    *,
    activation: str,
    layer: Any = None,
) -> jax.Array:
    """f32[T, H] of the formula above, summed in ascending order of expert."""
    tokens, top_k = topk_ids.shape
    pairs = tokens * top_k
    y = jnp.zeros((tokens, stack.hidden_size), jnp.float32)
    if pairs == 0:
        return y
    width = tile_width(pairs, stack.num_experts)
    groups = group_by_expert(topk_ids, stack.num_experts)
    needed = num_tiles(groups, width)
    weights = topk_weights.astype(jnp.float32).reshape(-1)

    @jax.checkpoint  # the backward pass dequantises again: saving a tile's weights would save all experts in float
    def add_tile(y: jax.Array, index: jax.Array) -> jax.Array:
        tile = tile_at(groups, index, width)
        token = tile.pairs // top_k
        out = expert_forward(stack, tile.expert, x[token].astype(jnp.float32), activation, layer)
        # where, not a product with zero: a dead entry may hold NaN.
        out = jnp.where(tile.live[:, None], out * weights[tile.pairs][:, None], 0.0)
        return y.at[token].add(out)

    def step(y: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
        return lax.cond(index < needed, add_tile, lambda y, _: y, y, index), None

    # A scan over the most tiles there can be, not a while over those there are: a while has no reverse mode.
    return lax.scan(step, y, jnp.arange(max_tiles(pairs, stack.num_experts, width), dtype=jnp.int32))[0]


def expert_forward(stack: ExpertStack, expert: jax.Array, x: jax.Array, activation: str, layer: Any) -> jax.Array:
    """``down_e(act(gate_e x) * up_e x)`` of one expert with its biases and scale, f32[B, H] -> f32[B, H]."""
    pick = lambda leaf: take(leaf, expert, layer)  # noqa: E731
    g = affine(x, pick(stack.gate), pick(stack.gate_bias))  # f32[B, I]
    u = affine(x, pick(stack.up), pick(stack.up_bias))  # f32[B, I]
    h = activate(g, u, activation)  # f32[B, I]
    y = affine(h, pick(stack.down), pick(stack.down_bias))  # f32[B, H]
    return y if stack.down_scale is None else y * pick(stack.down_scale)


def affine(x: jax.Array, weight: Projection, bias: jax.Array | None) -> jax.Array:
    """``x @ weight.T + bias``, f32[B, D] and [O, D] -> f32[B, O]; never TF32."""
    y = lax.dot_general(
        x, dense(weight), (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    return y if bias is None else y + bias.astype(jnp.float32)


def activate(gate: jax.Array, up: jax.Array, activation: str) -> jax.Array:
    """``silu(gate) * up``."""
    del activation  # checks.ACTIVATIONS knows one so far
    return jax.nn.silu(gate) * up


def tile_width(pairs: int, num_experts: int) -> int:
    """Tokens a tile: the power of two that a balanced routing fills about once, within [1, 256]."""
    mean = -(-pairs // num_experts)
    return min(256, 1 << max(0, mean - 1).bit_length())
