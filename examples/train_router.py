"""Fit a new router to frozen packed experts by gradient descent through `route` and `moe_forward`.

The experts' leaves are integers, so `jax.grad` takes the stack for data; gradients flow to x and topk_weights.

python examples/train_router.py [FILE]
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp

from jmoe import ExpertStack, RouterConfig, moe_forward, route

CONFIG = RouterConfig(top_k=2, normalise=True)


def loss(router: jax.Array, stack: ExpertStack, x: jax.Array, target: jax.Array) -> jax.Array:
    topk_ids, topk_weights = route(x @ router.T, CONFIG)
    return jnp.mean(jnp.square(moe_forward(stack, x, topk_ids, topk_weights) - target))


@jax.jit
def step(router: jax.Array, stack: ExpertStack, x: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    value, gradient = jax.value_and_grad(loss)(router, stack, x, target)
    return router - 0.5 * gradient, value


def main(path: str = "tests/data/qwen3moe-Q4_K_M.gguf") -> list[float]:
    """Returns the loss of every step."""
    stack = ExpertStack.open_and_load(path, 0)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (64, stack.hidden_size))
    teacher, router = (
        jax.random.normal(key, (stack.num_experts, stack.hidden_size)) / stack.hidden_size**0.5 for key in keys[1:]
    )
    target = moe_forward(stack, x, *route(x @ teacher.T, CONFIG))
    losses = []
    for _ in range(20):
        router, value = step(router, stack, x, target)
        losses.append(float(value))
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} steps")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:2])
