"""A whole layer on the GPU: y[t] = sum_k topk_weights[t, k] * down_e(silu(gate_e x[t]) * up_e x[t])."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from . import tiling
from .few_tokens import moe_kernel
from .phases import Phase
from .slots import slots_of
from .x_tiles import COLUMNS, gathered_x_tiles, x_parts, x_tiles


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

    columns = min(tokens, width)
    wide = _phase((gate.format, up.format), places, inner, hidden, columns, parts, slots.token is None)
    tall = _phase((down.format,), places, hidden, inner, columns, parts, False)
    tiles = x_tiles(x) if slots.token is None else gathered_x_tiles(x, slots.token)
    planes = [plane for projection in (gate, up, down) for plane in _flat(projection)]
    _, out = _kernel(wide, tall, tiling.num_sms())(slots.count, chosen, tiles, slots.pair, slots.weight, *planes)
    out = out.reshape(*topk_ids.shape, hidden)
    return jnp.sum(jnp.where(slots.live[:, :, None], out, 0.0), axis=1)


def _phase(formats: tuple[str, ...], slots: int, outputs: int, depth: int, tokens: int, parts: int, shared_x: bool):
    by_depth = Phase(formats, slots, outputs, depth, tokens, parts, shared_x, False)
    # Warpgroups that decode different formats cannot share a tile.
    different = len(set(formats)) > 1
    return by_depth._replace(by_rows=different or tiling.by_rows(slots * by_depth.units, by_depth.chunks))


# Cached, so that equal layers share one lowering.
_kernel = functools.lru_cache(moe_kernel)


def _flat(projection: Packed) -> list[jax.Array]:
    """Planes with layers and experts in one axis: a view, not a copy."""
    return [plane.reshape(-1, *plane.shape[-2:]) for plane in projection.planes]
