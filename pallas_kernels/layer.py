"""A whole layer on the GPU: y[t] = sum_k topk_weights[t, k] * down_e(silu(gate_e x[t]) * up_e x[t])."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .epilogues import swiglu_epilogue, weighted_epilogue
from .few_tokens import Group, Problem, expert_matmul
from .slots import slots_of
from .x_tiles import COLUMNS, x_parts, x_tiles


class Packed(NamedTuple):
    """A packed projection: the format's name and its planes, [E, ...] or [L, E, ...]."""

    format: str
    planes: tuple[Any, ...]


def moe_few_tokens(
    gate: Packed, up: Packed, down: Packed, x: jax.Array, topk_ids: jax.Array, topk_weights: jax.Array, layer: Any
) -> jax.Array:
    """f32[T, H]; x [T, H] in bf16, f16 or f32, any T from 1."""
    tokens, hidden = x.shape
    inner = up.planes[0].shape[-2]
    experts = up.planes[0].shape[-3]
    places = topk_ids.size
    parts = x_parts(x.dtype)
    width = COLUMNS // parts
    slots = slots_of(topk_ids, topk_weights, experts, width)
    chosen = slots.experts if layer is None else slots.experts + layer * experts

    groups = (Group(gate.format, 2),) if gate.format == up.format else (Group(gate.format, 1), Group(up.format, 1))
    width = min(tokens, width)
    wide = Problem(groups, places, inner, hidden, width, parts, slots.token is None)
    tall = Problem((Group(down.format, 1),), places, hidden, inner, width, parts, False)
    tiles = x_tiles(x)[None] if slots.token is None else jax.vmap(x_tiles)(x[slots.token])
    h = gate_up_kernel(wide, tall)(slots.count, chosen, tiles, *_flat(gate), *_flat(up))
    out = down_kernel(tall)(slots.count, chosen, h, *_flat(down), slots.pair, slots.weight)
    out = out.reshape(*topk_ids.shape, hidden)
    return jnp.sum(jnp.where(slots.live[:, :, None], out, 0.0), axis=1)


@functools.lru_cache
def gate_up_kernel(wide: Problem, tall: Problem, **options: Any) -> Any:
    """x -> h, as the down kernel reads it. Cached, so that equal layers share one lowering."""
    h_type = jax.ShapeDtypeStruct(tall.x_shape, jnp.uint32)
    return expert_matmul(wide, swiglu_epilogue(wide), h_type, "moe_gate_up", **options)


@functools.lru_cache
def down_kernel(tall: Problem, **options: Any) -> Any:
    """h -> f32[T * K, H], a row a pair that some slot serves; the other rows are not written."""
    # A slot serves a token at most once: P slots, P pairs.
    out_type = jax.ShapeDtypeStruct((tall.slots, tall.outputs), jnp.float32)
    return expert_matmul(tall, weighted_epilogue(tall), out_type, "moe_down", **options)


def _flat(projection: Packed) -> list[jax.Array]:
    """Planes with layers and experts in one axis: a view, not a copy."""
    return [plane.reshape(-1, *plane.shape[-2:]) for plane in projection.planes]
