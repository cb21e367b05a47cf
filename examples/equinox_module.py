"""Packed experts inside an equinox module: filtered transformations train its float leaves, which are the router's.

python examples/equinox_module.py [FILE]
"""

from __future__ import annotations

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from jmoe import ExpertStack, RouterConfig, moe_forward, route


class MoEBlock(eqx.Module):
    """``x + experts(norm(x))``; of packed experts no leaf is a float, so ``eqx.is_inexact_array`` leaves them out.

    Dense projections and biases are floats: to freeze those, ``eqx.partition`` the module with a filter of your own.
    """

    norm: eqx.nn.RMSNorm
    router: eqx.nn.Linear
    experts: ExpertStack
    config: RouterConfig = eqx.field(static=True)

    def __init__(self, stack: ExpertStack, config: RouterConfig, *, key: jax.Array):
        self.norm = eqx.nn.RMSNorm(stack.hidden_size)
        self.router = eqx.nn.Linear(stack.hidden_size, stack.num_experts, use_bias=False, key=key)
        self.experts, self.config = stack, config

    def __call__(self, x: jax.Array) -> jax.Array:
        h = jax.vmap(self.norm)(x)
        return x + moe_forward(self.experts, h, *route(jax.vmap(self.router)(h), self.config))


@eqx.filter_jit
def step(
    model: MoEBlock, state: optax.OptState, optimiser: optax.GradientTransformation, x: jax.Array, target: jax.Array
) -> tuple[MoEBlock, optax.OptState, jax.Array]:
    value, gradient = eqx.filter_value_and_grad(lambda model: jnp.mean(jnp.square(model(x) - target)))(model)
    updates, state = optimiser.update(gradient, state)
    return eqx.apply_updates(model, updates), state, value


def main(path: str = "tests/data/qwen3moe-Q4_K_M.gguf") -> list[float]:
    """Returns the loss of every step."""
    stack, config = ExpertStack.open_and_load(path, 0), RouterConfig(top_k=2, normalise=True)
    teacher, model = (MoEBlock(stack, config, key=jax.random.key(seed)) for seed in (0, 1))
    x = jax.random.normal(jax.random.key(2), (64, stack.hidden_size))
    target, optimiser = teacher(x), optax.adam(1e-2)
    state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))
    losses = []
    for _ in range(20):
        model, state, value = step(model, state, optimiser, x, target)
        losses.append(float(value))
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} steps")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:2])
