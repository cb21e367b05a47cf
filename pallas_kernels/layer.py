"""A whole layer on the GPU: y[t] = sum_k topk_weights[t, k] * down_e(silu(gate_e x[t]) * up_e x[t])."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .epilogues import swiglu_epilogue, weighted_epilogue
from .few_tokens import Group, Problem, expert_matmul, sum_rows
from .slots import slots_of

MAX_ROWS = 16  # rows of x that a call of the few-token kernels takes


class Packed(NamedTuple):
    """A packed projection: the format's name and its planes, [E, ...] or [L, E, ...]."""

    format: str
    planes: tuple[Any, ...]


def moe_few_tokens(
    gate: Packed, up: Packed, down: Packed, x: jax.Array, topk_ids: jax.Array, topk_weights: jax.Array, layer: Any
) -> jax.Array:
    """f32[T, H]; x [T, H] in bf16, f16 or f32, any T from 1: MAX_ROWS rows of x at a time."""
    at_a_time = MAX_ROWS // x_parts(x.dtype)
    if x.shape[0] > at_a_time:
        cuts = range(0, x.shape[0], at_a_time)
        pieces = (tuple(a[i : i + at_a_time] for a in (x, topk_ids, topk_weights)) for i in cuts)
        return jnp.concatenate([moe_few_tokens(gate, up, down, a, ids, w, layer) for a, ids, w in pieces])
    tokens, hidden = x.shape
    inner = up.planes[0].shape[-2]
    experts = up.planes[0].shape[-3]
    slots = slots_of(topk_ids, topk_weights, experts)
    places = topk_ids.size
    parts = x_parts(x.dtype)
    chosen = slots.experts if layer is None else slots.experts + layer * experts

    groups = (Group(gate.format, 2),) if gate.format == up.format else (Group(gate.format, 1), Group(up.format, 1))
    wide = Problem(groups, places, inner, hidden, tokens, parts, True)
    tall = Problem((Group(down.format, 1),), places, hidden, inner, tokens, parts, False)
    h = gate_up_kernel(wide, tall)(slots.count, chosen, *sixteens(x, wide), *_flat(gate), *_flat(up))
    out = down_kernel(tall)(slots.count, chosen, *h, *_flat(down), slots.pair, slots.weight)
    out = out.reshape(*topk_ids.shape, hidden)
    return jnp.sum(jnp.where(slots.live[:, :, None], out, 0.0), axis=1)


@functools.lru_cache
def gate_up_kernel(wide: Problem, tall: Problem, **options: Any) -> Any:
    """x -> h and its sums, as the down kernel reads them. Cached, so that equal layers share one lowering."""
    h_type = (
        jax.ShapeDtypeStruct((wide.slots, tall.depth // 16, wide.rows * 16), jnp.bfloat16),
        jax.ShapeDtypeStruct((wide.slots, tall.depth // tall.sum_weights, sum_rows(wide.rows)), jnp.float32),
    )
    return expert_matmul(wide, swiglu_epilogue(wide, tall), h_type, "moe_gate_up", **options)


@functools.lru_cache
def down_kernel(tall: Problem, **options: Any) -> Any:
    """h -> f32[T * K, H], a row a pair that some slot serves; the other rows are not written."""
    # A slot serves a token at most once: P slots, P pairs.
    out_type = jax.ShapeDtypeStruct((tall.slots, tall.outputs), jnp.float32)
    return expert_matmul(tall, weighted_epilogue(tall), out_type, "moe_down", **options)


def x_parts(dtype: Any) -> int:
    """bf16 terms whose sum is x to 16 bits: one for bf16, two for f16 (exact) and f32 (2^-17)."""
    return 1 if dtype == jnp.bfloat16 else 2


def sixteens(x: jax.Array, problem: Problem) -> tuple[jax.Array, jax.Array]:
    """x [T, D] as the kernels read it: bf16[1, D/16, R * 16] and the sums f32[1, D/sum_weights, sum_rows(R)]."""
    rows = x.astype(jnp.float32)
    if problem.parts == 2:
        # reduce_precision, not a cast there and back, which XLA may drop as excess precision.
        high = lax.reduce_precision(rows, exponent_bits=8, mantissa_bits=7)
        rows = jnp.concatenate([high, lax.reduce_precision(rows - high, exponent_bits=8, mantissa_bits=7)])
    count, depth = rows.shape
    quads = rows.astype(jnp.bfloat16).reshape(count, depth // 16, 4, 2, 2)
    tiles = jnp.transpose(quads, (1, 0, 2, 4, 3))  # registers.py: weights 0 2 1 3 of each four
    # Padded before the sum, not after it: the pad then fuses into the reduction's kernel.
    padded = jnp.pad(rows, ((0, sum_rows(count) - count), (0, 0)))
    sums = jnp.sum(padded.reshape(-1, depth // problem.sum_weights, problem.sum_weights), axis=2).T
    return tiles.reshape(1, depth // 16, count * 16), (sums * problem.sums_factor)[None]


def _flat(projection: Packed) -> list[jax.Array]:
    """Planes with layers and experts in one axis: a view, not a copy."""
    return [plane.reshape(-1, *plane.shape[-2:]) for plane in projection.planes]
