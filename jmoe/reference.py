"""The jnp backend: decode an expert, multiply its tokens, add what they give. What runs where no kernel does.

    y[t] = sum_k topk_weights[t, k] * (down_e(act(gate_e x[t], up_e x[t])) * down_scale_e),   e = topk_ids[t, k]

or with topk_weights on x[t] instead; gate_e, up_e and down_e add their bias, where they have one.

Work is proportional to the (token, slot) pairs: tile by tile of one expert's tokens. An expert is decoded once for each
tile, and where it is large, part by part of its intermediate axis I, so no more than ``PART_BYTES`` are held in float.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .activations import Activation, activate
from .grouping import Tiles, cut, group_by_expert
from .stack import ExpertStack, QuantTensor, depth_step, window

# The widths that tiles are padded to. Each takes 0.1 s to compile. At 512 tokens of Qwen3-30B-A3B's shape, powers of
# four alone take 1.3 times as long, all powers of two as long.
WIDTHS = (1, 4, 16, 32, 64, 128, 256)

# Float weights held at once: Qwen3-30B-A3B's expert (18 MiB) whole. Larger ones (gpt-oss, DeepSeek-V3, Mixtral) run 1.8
# to 2.8 times as fast in such parts as whole at T = 1, because a part stays in the cache; in 8 MiB Qwen3's is slower.
PART_BYTES = 24 << 20

# What a platform has for a format: (planes of [O, D], rows f32[B, D]) -> f32[B, O]. Without one a weight is decoded.
Product = Callable[[Any, jax.Array], jax.Array]
NO_PRODUCTS: Mapping[str, Product] = MappingProxyType({})


def moe_jnp(
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
    """f32[T, H] of the formula above, summed in ascending order of expert; ``products`` by format name."""
    if topk_ids.size == 0:
        return jnp.zeros((x.shape[0], stack.hidden_size), jnp.float32)
    # The backward pass starts from the arguments. The checkpoint of a tile's step below is not enough under a scan over
    # layers, where JAX saves what the step closes over, the stack, for each tile.
    over_tiles = jax.checkpoint(partial(_sum_over_tiles, activation, weight_on, products))
    return over_tiles(stack, x, topk_ids, topk_weights.astype(jnp.float32), layer)


def _sum_over_tiles(
    activation: Activation,
    weight_on: str,
    products: Mapping[str, Product],
    stack: ExpertStack,
    x: jax.Array,
    topk_ids: jax.Array,
    topk_weights: jax.Array,
    layer: Any,
) -> jax.Array:
    tokens, top_k = topk_ids.shape
    pairs, parts = tokens * top_k, num_parts(stack, products)
    widths = widths_for(pairs)
    groups = group_by_expert(topk_ids, stack.num_experts)

    def add_tile(y: jax.Array, tile: Tiles, part: jax.Array) -> jax.Array:
        offset = lax.iota(jnp.int32, widths[-1])
        live = offset < tile.size
        # Past the tile's end stands its first pair again, with weight 0: what spoils its sum has spoilt it already. Not
        # an index outside, to be filled and dropped: jax-mps writes where such a one points (its issue 240).
        pair = groups.order.at[tile.start + jnp.where(live, offset, 0)].get(mode="clip")
        token = pair // top_k  # i32[B]
        scale = jnp.where(live, topk_weights.reshape(-1).at[pair].get(mode="clip"), 0)  # f32[B]
        expert = decode(stack, tile.expert, layer, part, parts, products)

        def add_columns(width: int, y: jax.Array, expert: ExpertStack) -> jax.Array:
            columns = x.at[token[:width]].get(mode="clip").astype(jnp.float32).T  # f32[H, B]
            if weight_on == "input":
                columns = columns * scale[None, :width]
            # Even of an input of zeros an expert with biases makes something.
            weight = live.astype(jnp.float32) if weight_on == "input" else scale
            out = expert_forward(expert, columns, activation, products) * weight[None, :width]  # f32[H, B]
            return y.at[token[:width]].add(out.T, mode="clip")

        # A switch even of two: else XLA fuses decode with the reshape before the matmul, which triples its time.
        narrowest = jnp.sum(tile.size > jnp.array(widths[:-1], jnp.int32), dtype=jnp.int32)
        return lax.switch(narrowest, [partial(add_columns, width) for width in widths], y, expert)

    # The backward pass decodes again: saving what the tiles decode would save all experts in float. Around the cond,
    # not in it: of a checkpoint inside, a cond saves all that it closes over, the stack again.
    @partial(jax.checkpoint, prevent_cse=False)
    def step(y: jax.Array, tile_and_part: tuple[Tiles, jax.Array]) -> tuple[jax.Array, None]:
        tile, part = tile_and_part
        return lax.cond(tile.size > 0, add_tile, lambda y, *_: y, y, tile, part), None

    # A scan over the most tiles there can be, not a while over those there are: a while has no reverse mode.
    tiles = cut(groups, widths[-1])
    each_part = jnp.tile(lax.iota(jnp.int32, parts), tiles.size.shape[0])
    each_tile = jax.tree.map(lambda leaf: jnp.repeat(leaf, parts), tiles)
    return lax.scan(step, jnp.zeros((tokens, stack.hidden_size), jnp.float32), (each_tile, each_part))[0]


def expert_forward(
    expert: ExpertStack, x: jax.Array, activation: Activation, products: Mapping[str, Product] = NO_PRODUCTS
) -> jax.Array:
    """``down(act(gate x, up x))`` of one expert, as ``decode`` gives it: f32[H, B] -> f32[H, B].

    Tokens are columns: XLA CPU multiplies [O, D] by 2 to 16 columns twice as fast as as many rows by [D, O].
    """
    g = None if expert.gate is None else affine(expert.gate, x, expert.gate_bias, products)  # f32[I, B]
    u = affine(expert.up, x, expert.up_bias, products)  # f32[I, B]
    h = activate(g, u, activation)  # f32[I, B]
    y = affine(expert.down, h, expert.down_bias, products)  # f32[H, B]
    return y if expert.down_scale is None else y * expert.down_scale


def affine(weight: Any, x: jax.Array, bias: jax.Array | None, products: Mapping[str, Product]) -> jax.Array:
    """``weight @ x + bias``, f32[O, N, n] (or packed [O, D]) and [D, B] -> f32[O, B], D = N * n; never TF32."""
    if isinstance(weight, QuantTensor):
        y = products[weight.format](weight.planes, x.T).T
    else:
        weight = weight.reshape(weight.shape[0], x.shape[0])
        y = lax.dot_general(
            weight, x, (((1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
        )
    return y if bias is None else y + bias[:, None]


def decode(
    stack: ExpertStack,
    expert: jax.Array,
    layer: Any,
    part: Any = 0,
    parts: int = 1,
    products: Mapping[str, Product] = NO_PRODUCTS,
) -> ExpertStack:
    """One of equal parts of an expert's axis I in f32, its projections as ``Packed.decode`` gives them.

    A projection whose format has one of ``products`` stays packed.
    ``sum over parts of down[:, part] @ act(gate[part] @ x, up[part] @ x)`` is the expert; part 0 has down's bias.
    """
    index = (expert,) if layer is None else (layer, expert)

    def read(leaf: Any, axis: int | None = None) -> Any:
        if leaf is None:
            return None
        leaf = window(leaf, index, axis, part, parts)
        if isinstance(leaf, QuantTensor):
            return leaf if leaf.format in products else leaf.spec.decode(leaf.planes)
        return leaf.astype(jnp.float32)

    down_bias = read(stack.down_bias)
    return ExpertStack(
        gate=read(stack.gate, -2),
        up=read(stack.up, -2),
        down=read(stack.down, -1),
        gate_bias=read(stack.gate_bias, -1),
        up_bias=read(stack.up_bias, -1),
        down_bias=None if down_bias is None else jnp.where(part == 0, down_bias, 0.0),
        down_scale=read(stack.down_scale),
    )


def widths_for(pairs: int) -> tuple[int, ...]:
    """The ``WIDTHS`` that tiles of a routing of ``pairs`` pairs may need; two at least, so that there is a switch."""
    return WIDTHS[: max(2, 1 + sum(width < pairs for width in WIDTHS))]


def num_parts(stack: ExpertStack, products: Mapping[str, Product] = NO_PRODUCTS) -> int:
    """The fewest equal parts of I that ``PART_BYTES`` allows, or the most that whole blocks of ``down`` allow."""
    inner = stack.expert_intermediate
    step = max(64, depth_step(stack.down))
    possible = [n for n in range(1, inner // step + 1) if inner % (n * step) == 0] or [1]
    nbytes = 4 * inner * stack.hidden_size * sum(name is not None and name not in products for name in stack.formats)
    return next((n for n in possible if nbytes <= n * PART_BYTES), possible[-1])
