"""Which experts a router uses while it learns: the statistics are counted inside the jitted step, then drawn.

python examples/expert_utilisation.py [FILE] [PICTURE]
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
from jax import lax

from jmoe import ExpertStack, RouterConfig, load_imbalance, moe_forward, plot, route, tokens_per_expert

CONFIG = RouterConfig(top_k=2, normalise=True)
STEPS = 80


@jax.jit
def train(router: jax.Array, stack: ExpertStack, x: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(losses f32[STEPS], tokens per expert i32[STEPS, E]) of plain gradient descent on the router."""

    def loss(router: jax.Array) -> tuple[jax.Array, jax.Array]:
        topk_ids, topk_weights = route(x @ router.T, CONFIG)
        error = moe_forward(stack, x, topk_ids, topk_weights) - target
        return jnp.mean(jnp.square(error)), tokens_per_expert(topk_ids, stack.num_experts)

    def step(router: jax.Array, _: None) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        (value, counts), gradient = jax.value_and_grad(loss, has_aux=True)(router)
        return router - 2 * gradient, (value, counts)

    return lax.scan(step, router, None, length=STEPS)[1]


def main(path: str = "tests/data/qwen3moe-Q4_K_M.gguf", picture: str = "examples/expert_utilisation.png") -> jax.Array:
    """Returns the tokens per expert of every step."""
    stack = ExpertStack.open_and_load(path, 0)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (128, stack.hidden_size)) + 0.3  # a mean, by which a router can prefer experts
    teacher, router = (
        jax.random.normal(key, (stack.num_experts, stack.hidden_size)) / stack.hidden_size**0.5 for key in keys[1:]
    )
    # The teacher prefers some experts.
    preference = jnp.linspace(3, -3, stack.num_experts)
    target = moe_forward(stack, x, *route(x @ teacher.T + preference, CONFIG))
    losses, counts = train(router, stack, x, target)
    first, last = (float(load_imbalance(counts[step])) for step in (0, -1))
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}, load imbalance {first:.2f} -> {last:.2f}; {picture}")

    axes = plot.expert_utilisation(counts, rows="step of training")
    axes.set_title("A router learns which experts to use")
    axes.figure.set_size_inches(6, 3)
    axes.figure.savefig(picture, dpi=100)
    return counts


if __name__ == "__main__":
    main(*sys.argv[1:3])
