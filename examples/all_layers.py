"""All MoE layers of a file in one jit: layers of one signature lie in one stack and are scanned by their index.

A Q4_K_M file alternates between two signatures (down in Q4_K or Q6_K), so its layers form runs; each run is one scan.
The stacks are closed over by the scan and indexed with `layer=`: a scanned slice would copy a layer's weights a step.

python examples/all_layers.py [FILE]
"""

from __future__ import annotations

import sys
from itertools import groupby

import jax
import jax.numpy as jnp
from jax import lax

from jmoe import ExpertStack, RouterConfig, load_expert_stacks, moe_forward, route

CONFIG = RouterConfig(top_k=2, normalise=True)


def scan_layers(stack: ExpertStack, x: jax.Array, entries: jax.Array, logits: jax.Array) -> jax.Array:
    """``x = x + moe(layer, x)`` for the given entries of a stack [L, E, ...]; logits [entries, T, E]."""

    def step(x: jax.Array, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        entry, layer_logits = at
        topk_ids, topk_weights = route(layer_logits, CONFIG)
        return x + moe_forward(stack, x, topk_ids, topk_weights, layer=entry), None

    return lax.scan(step, x, (entries, logits))[0]


def main(path: str = "tests/data/qwen3moe-Q4_K_M.gguf") -> jax.Array:
    groups = load_expert_stacks(path, stacked=True)
    stacks = [group.stack for group in groups]
    # In the file's order: (layer, its stack, its entry there), cut into runs of one stack.
    order = sorted((layer, g, entry) for g, group in enumerate(groups) for entry, layer in enumerate(group.layers))
    runs = [(g, [entry for _, _, entry in run]) for g, run in groupby(order, key=lambda place: place[1])]

    @jax.jit
    def model(stacks: list[ExpertStack], x: jax.Array, logits: jax.Array) -> jax.Array:
        done = 0
        for g, entries in runs:
            x = scan_layers(stacks[g], x, jnp.asarray(entries), logits[done : done + len(entries)])
            done += len(entries)
        return x

    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (5, stacks[0].hidden_size))
    y = model(stacks, x, jax.random.normal(keys[1], (len(order), 5, stacks[0].num_experts)))
    print(f"{len(order)} layers in {len(runs)} runs over {len(groups)} stacks: y {y.shape}")
    return y


if __name__ == "__main__":
    main(*sys.argv[1:2])
