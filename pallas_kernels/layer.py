"""A whole layer on the GPU: y[t] = sum_k topk_weights[t, k] * down_e(act(gate_e x[t], up_e x[t]))."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from . import operands, row_copies, slots, sort_kernel, sorted_pairs, takes_few, tiling
from .few_tokens import moe_kernel
from .many_tokens import grouped_matmul
from .phases import Phase
from .prepare import Sizes, prepare_kernel
from .product import Gather, Product, takes_whole_scales
from .semantics import Leaves, Semantics
from .x_rows import TokenRows, pair_rows
from .x_tiles import GROUP, group_words, x_parts


class Packed(NamedTuple):
    """A projection: the format and its planes, [E, ...] or [L, E, ...]; of a dense one its dtype and itself."""

    format: str
    planes: tuple[Any, ...]


def moe_layer(
    gate: Packed | None,
    up: Packed,
    down: Packed,
    x: jax.Array,
    topk_ids: jax.Array,
    topk_weights: jax.Array,
    layer: Any,
    leaves: Leaves,
    semantics: Semantics,
    exact: bool,
    live_share: float,
) -> jax.Array:
    """f32[T, H]; x [T, H] in bf16, f16 or f32, any T from 1."""
    arguments = (gate, up, down, x, topk_ids, topk_weights, layer, leaves, semantics)
    few = takes_few(
        [p.format for p in (gate, up, down) if p is not None],
        experts=up.planes[0].shape[-3],
        tokens=x.shape[0],
        top_k=topk_ids.shape[1],
        dtype=x.dtype,
        weight_on=semantics.weight_on,
        live_share=live_share,
    )
    # The kernel for few tokens is as exact as f32 anyway.
    return moe_few_tokens(*arguments) if few else moe_many_tokens(*arguments, exact, live_share)


def moe_few_tokens(
    gate: Packed | None,
    up: Packed,
    down: Packed,
    x: jax.Array,
    topk_ids: jax.Array,
    topk_weights: jax.Array,
    layer: Any,
    leaves: Leaves,
    semantics: Semantics,
) -> jax.Array:
    if semantics.weight_on == "input" and topk_ids.shape[1] > 1:
        # A slot serves a token once. What an expert makes of one x by two weights is not the sum of the weights' times
        # anything: so a pair is a token of its own.
        pairs = topk_ids.reshape(-1, 1), topk_weights.reshape(-1, 1)
        x_of_pairs = jnp.repeat(x, topk_ids.shape[1], axis=0)
        y = moe_few_tokens(gate, up, down, x_of_pairs, *pairs, layer, leaves, semantics)
        return jnp.sum(y.reshape(*topk_ids.shape, -1), axis=1)
    experts, inner, _ = up.planes[0].shape[-3:]
    tokens, top_k = topk_ids.shape
    sizes = Sizes(tokens, top_k, experts, x.shape[1], x.dtype.name)
    layer = jnp.reshape(jnp.asarray(0 if layer is None else layer, jnp.int32), 1)
    first = [projection for projection in (gate, up) if projection is not None]
    inside = finds_slots(sizes)
    wide = phase_of(tuple(p.format for p in first), sizes, inner, sizes.hidden, sizes.shared, inside)
    tall = phase_of((down.format,), sizes, sizes.hidden, inner)
    planes = [plane for projection in (*first, down) for plane in _flat(projection)]
    flat = _flat_leaves(leaves, up)
    kernel = _kernel(wide, tall, tiling.num_sms(), experts, semantics, tuple(flat))
    if inside:
        _, out, live = kernel(layer, topk_ids, x, topk_weights, _zeros(x), *planes, *flat.values())
    else:
        count, chosen, pair, weight, live, ready, tiles = prepare_kernel(sizes)(topk_ids, topk_weights, layer, x)
        _, out = kernel(count, chosen, tiles, pair, weight, ready, *planes, *flat.values())
    out = out.reshape(*topk_ids.shape, sizes.hidden)
    return jnp.sum(jnp.where(live[:, :, None] != 0, out, 0.0), axis=1)


def moe_many_tokens(
    gate: Packed | None,
    up: Packed,
    down: Packed,
    x: jax.Array,
    topk_ids: jax.Array,
    topk_weights: jax.Array,
    layer: Any,
    leaves: Leaves,
    semantics: Semantics,
    exact: bool,
    live_share: float,
) -> jax.Array:
    """``exact`` as if x were in f32: weights and activations in two bf16 terms."""
    experts, pairs = up.planes[0].shape[-3], topk_ids.size
    terms = 2 if exact else x_parts(x.dtype)
    tile_bytes = max(operands.tile_bytes(p.format) for p in (gate, up, down) if p is not None)
    tile = tiling.tile(pairs * live_share, experts, terms, tile_bytes)
    layer = jnp.asarray(0 if layer is None else layer, jnp.int32)
    by_pair = semantics.weight_on == "input"
    first = [projection for projection in (gate, up) if projection is not None]
    wants_sums = any(
        takes_whole_scales(p.format, terms, tile.warpgroups) and operands.has_mins(p.format) for p in first
    )
    (tokens, hidden), top_k, rows = x.shape, topk_ids.shape[1], sorted_pairs.rounded_up(pairs)
    to_sort = topk_ids, topk_weights, experts, layer, tile.width
    if by_pair:
        # What pairs of one token take differs: their rows are made in their places.
        chosen = sort_kernel.sort_pairs(*to_sort)
        make_rows = pair_rows(x.dtype.name, terms, top_k, hidden, rows, wants_sums)
        x_rows, zeros = make_rows(x, chosen.pair, chosen.tiles.count, chosen.weight), None
        gather = None
    else:
        token_rows = TokenRows(x.dtype.name, terms, tokens, hidden, wants_sums, row_copies.counters(rows))
        chosen, (*x_rows, zeros) = sort_kernel.sort_pairs_beside(token_rows, x, *to_sort)
        gather = Gather(top_k, wants_sums)
    flat = _flat_leaves(leaves, up)

    def product(
        makes: str,
        projections: list[Packed],
        operand: list[Any],
        extras: list[Any],
        names: list[str],
        gather: Any = None,
        weighted: bool = False,
    ) -> list[Any]:
        shape = Product(
            makes,
            tuple(p.format for p in projections),
            projections[0].planes[0].shape[-2],
            operand[0].shape[-1],
            rows,
            terms,
            *tile,
            gate is not None,
            gather,
            weighted,
        )
        present = tuple(name for name in names if name in flat)
        planes = [plane for projection in projections for plane in _flat(projection)]
        before = [chosen.pair, zeros] if gather else []
        run = _grouped_matmul(shape, semantics, present, tiling.num_sms())
        taken = operand[: shape.operands]
        return run(*chosen.tiles, *before, *taken, *planes, *extras, *(flat[name] for name in present))

    if len({projection.format for projection in first}) == 1:
        h, *_ = product("h", first, x_rows, [], ["gate_bias", "up_bias"], gather)
    else:
        g, *gathered = product("gate", first[:1], x_rows, [], ["gate_bias"], gather)
        [h] = product("h", first[1:], gathered or x_rows, [g], ["up_bias"])
    weights = [] if by_pair else [chosen.weight]
    [out] = product("out", [down], [h], weights, ["down_bias", "down_scale"], weighted=not by_pair)
    live = (chosen.place >= 0)[:, :, None]
    y = out.at[jnp.maximum(chosen.place, 0)].get(mode="promise_in_bounds").astype(jnp.float32)
    return jnp.sum(jnp.where(live, y, 0.0), axis=1)


def finds_slots(sizes: Sizes) -> bool:
    """Whether the kernel finds the slots itself and holds x in shared memory, which spares a launch."""
    x_bytes = sizes.hidden // GROUP * group_words(sizes.columns * sizes.parts, sizes.parts) * 4
    # Counters for the slots, and one more, are computed from x.
    few = sizes.pairs <= slots.MAX_PAIRS and sizes.pairs < sizes.tokens * sizes.hidden
    return sizes.shared and few and x_bytes <= tiling.RESIDENT_BYTES


def phase_of(
    formats: tuple[str, ...], sizes: Sizes, outputs: int, depth: int, shared_x: bool = False, resident_x: bool = False
) -> Phase:
    by_depth = Phase(formats, sizes.pairs, outputs, depth, sizes.columns, sizes.parts, shared_x, resident_x, False)
    # Warpgroups that decode different formats cannot share a tile.
    different = len(set(formats)) > 1
    return by_depth._replace(by_rows=different or tiling.by_rows(sizes.pairs * by_depth.units, by_depth.chunks))


def _zeros(x: jax.Array) -> jax.Array:
    """i32[x.size] of zeros, counters for the kernel, computed in whatever kernel of XLA's computes x.

    Zeros as such would take a launch of their own; XLA does not see that a number has less than 64 bits set.
    """
    bits = lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    return (lax.population_count(bits).astype(jnp.int32) >> 6).reshape(-1)


# Cached, so that equal layers share one lowering.
_kernel = functools.lru_cache(moe_kernel)
_grouped_matmul = functools.lru_cache(grouped_matmul)


def _flat(projection: Packed) -> list[jax.Array]:
    """Planes with layers and experts in one axis: a view, not a copy."""
    return [plane.reshape(-1, *plane.shape[-2:]) for plane in projection.planes]


def _flat_leaves(leaves: Leaves, up: Packed) -> dict[str, jax.Array]:
    """Those that are there, with layers and experts in one axis as the planes'."""
    lead = up.planes[0].ndim - 2
    return {name: leaf.reshape(-1, *leaf.shape[lead:]) for name, leaf in leaves.present.items()}
