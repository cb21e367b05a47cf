"""Train low-rank adapters beside frozen packed experts, in two layers, with optax.

    expert'_e(x) = expert_e(x) + B_e A_e x,   A_e f32[r, H], B_e f32[H, r]

The second layer's backward pass reads its packed planes tile by tile, as forward does, without a dense copy of a stack.
The experts' leaves are integers, so the adapters alone are parameters.

python examples/train_lora.py [FILE]
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jmoe import ExpertStack, RouterConfig, load_expert_stacks, moe_forward, route

CONFIG = RouterConfig(top_k=2, normalise=True)
RANK = 4
OPTIMISER = optax.adam(3e-3)


class Adapter(NamedTuple):
    """Of all experts of a layer."""

    a: jax.Array  # f32[E, r, H]
    b: jax.Array  # f32[E, H, r]


class Layer(NamedTuple):
    """What stays as it is."""

    stack: ExpertStack
    router: jax.Array  # f32[E, H]


def new_adapter(key: jax.Array, stack: ExpertStack, b_scale: float = 0.0) -> Adapter:
    """Random A; B zero at the start, so that training begins with the layer as it is."""
    a_key, b_key = jax.random.split(key)
    experts, hidden = stack.num_experts, stack.hidden_size
    a = jax.random.normal(a_key, (experts, RANK, hidden)) / hidden**0.5
    return Adapter(a, b_scale * jax.random.normal(b_key, (experts, hidden, RANK)))


def network(adapters: list[Adapter], layers: list[Layer], x: jax.Array) -> jax.Array:
    """Residual MoE layers with their adapters, f32[T, H]."""
    for adapter, layer in zip(adapters, layers, strict=True):
        normed = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
        topk_ids, topk_weights = route(normed @ layer.router.T, CONFIG)
        low = jnp.einsum("tkrh,th->tkr", adapter.a[topk_ids], normed)
        low_rank = jnp.einsum("tk,tkhr,tkr->th", topk_weights, adapter.b[topk_ids], low)
        x = x + moe_forward(layer.stack, normed, topk_ids, topk_weights) + low_rank
    return x


def loss(adapters: list[Adapter], layers: list[Layer], x: jax.Array, target: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(network(adapters, layers, x) - target))


@jax.jit
def step(
    adapters: list[Adapter], state: optax.OptState, layers: list[Layer], x: jax.Array, target: jax.Array
) -> tuple[Any, optax.OptState, jax.Array]:
    value, gradient = jax.value_and_grad(loss)(adapters, layers, x, target)
    updates, state = OPTIMISER.update(gradient, state)
    return optax.apply_updates(adapters, updates), state, value


def main(path: str = "tests/data/qwen3moe-Q4_K_M.gguf") -> list[float]:
    """Returns the loss of every step."""
    stacks = list(load_expert_stacks(path, progress=False).values())
    keys = iter(jax.random.split(jax.random.key(0), 1 + 3 * len(stacks)))
    layers = [
        Layer(stack, jax.random.normal(next(keys), (stack.num_experts, stack.hidden_size)) / stack.hidden_size**0.5)
        for stack in stacks
    ]
    # What is to be learnt: the same layers with other experts' maps, each off by a matrix of rank r.
    teacher = [new_adapter(next(keys), stack, b_scale=0.3) for stack in stacks]
    adapters = [new_adapter(next(keys), stack) for stack in stacks]
    x = jax.random.normal(next(keys), (128, stacks[0].hidden_size))
    target = network(teacher, layers, x)
    state, losses = OPTIMISER.init(adapters), []
    for _ in range(60):
        adapters, state, value = step(adapters, state, layers, x, target)
        losses.append(float(value))
    trained, frozen = sum(leaf.size for leaf in jax.tree.leaves(adapters)), sum(stack.nbytes for stack in stacks)
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}; {trained:,} parameters beside {frozen / 1e6:.1f} MB of experts")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:2])
