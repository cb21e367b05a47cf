"""Packed experts inside a flax.nnx module: the router is trained, the experts are frozen data.

python examples/flax_module.py [FILE]
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jmoe import ExpertStack, RouterConfig, moe_forward, route


class Frozen(nnx.Variable):
    """Data that no optimiser sees: ``nnx.value_and_grad`` and ``nnx.Optimizer`` look at ``nnx.Param``."""


class MoEBlock(nnx.Module):
    """``x + experts(norm(x))`` with a router to be trained."""

    def __init__(self, stack: ExpertStack, config: RouterConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.norm = nnx.RMSNorm(stack.hidden_size, rngs=rngs)
        self.router = nnx.Linear(stack.hidden_size, stack.num_experts, use_bias=False, rngs=rngs)
        self.experts = Frozen(stack)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.norm(x)
        return x + moe_forward(self.experts.get_value(), h, *route(self.router(h), self.config))


@nnx.jit
def step(model: MoEBlock, optimiser: nnx.Optimizer, x: jax.Array, target: jax.Array) -> jax.Array:
    value, gradient = nnx.value_and_grad(lambda model: jnp.mean(jnp.square(model(x) - target)))(model)
    optimiser.update(model, gradient)
    return value


def main(path: str = "tests/data/qwen3moe-Q4_K_M.gguf") -> list[float]:
    """Returns the loss of every step."""
    stack, config = ExpertStack.open_and_load(path, 0), RouterConfig(top_k=2, normalise=True)
    teacher, model = (MoEBlock(stack, config, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    x = jax.random.normal(jax.random.key(2), (64, stack.hidden_size))
    target = teacher(x)
    optimiser = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    losses = [float(step(model, optimiser, x, target)) for _ in range(20)]
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} steps")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:2])
