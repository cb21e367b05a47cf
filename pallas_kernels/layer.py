"""A whole layer on the GPU: y[t] = sum_k topk_weights[t, k] * down_e(silu(gate_e x[t]) * up_e x[t])."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from . import tiling
from .few_tokens import moe_kernel
from .phases import Phase
from .prepare import Sizes, prepare_kernel


class Packed(NamedTuple):
    """A packed projection: the format's name and its planes, [E, ...] or [L, E, ...]."""

    format: str
    planes: tuple[Any, ...]


def moe_few_tokens(
    gate: Packed, up: Packed, down: Packed, x: jax.Array, topk_ids: jax.Array, topk_weights: jax.Array, layer: Any
) -> jax.Array:
    """f32[T, H]; x [T, H] in bf16, f16 or f32, any T from 1."""
    experts, inner, _ = up.planes[0].shape[-3:]
    sizes = Sizes(*topk_ids.shape, experts, x.shape[1], x.dtype.name)
    layer = jnp.reshape(jnp.asarray(0 if layer is None else layer, jnp.int32), 1)
    planes = [plane for projection in (gate, up, down) for plane in _flat(projection)]
    count, chosen, pair, weight, live, ready, tiles = prepare_kernel(sizes)(topk_ids, topk_weights, layer, x)

    wide = phase_of((gate.format, up.format), sizes, inner, sizes.hidden, sizes.shared)
    tall = phase_of((down.format,), sizes, sizes.hidden, inner, False)
    _, out = _kernel(wide, tall, tiling.num_sms())(count, chosen, tiles, pair, weight, ready, *planes)
    out = out.reshape(*topk_ids.shape, sizes.hidden)
    return jnp.sum(jnp.where(live[:, :, None] != 0, out, 0.0), axis=1)


def phase_of(formats: tuple[str, ...], sizes: Sizes, outputs: int, depth: int, shared_x: bool) -> Phase:
    slots = sizes.pairs
    by_depth = Phase(formats, slots, outputs, depth, sizes.columns, sizes.parts, shared_x, False)
    # Warpgroups that decode different formats cannot share a tile.
    different = len(set(formats)) > 1
    return by_depth._replace(by_rows=different or tiling.by_rows(slots * by_depth.units, by_depth.chunks))


# Cached, so that equal layers share one lowering.
_kernel = functools.lru_cache(moe_kernel)


def _flat(projection: Packed) -> list[jax.Array]:
    """Planes with layers and experts in one axis: a view, not a copy."""
    return [plane.reshape(-1, *plane.shape[-2:]) for plane in projection.planes]
