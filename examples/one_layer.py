"""One layer of a file, router and all, against the same layer with dense experts.

python examples/one_layer.py [FILE]
"""

from __future__ import annotations

import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from jmoe import ExpertStack, MoELayer, moe_layer_forward


def main(path: str = "tests/data/mixtral-Q6_K.gguf") -> float:
    """Returns the largest difference between packed and dense experts."""
    layer = MoELayer.open_and_load(path, 0)
    stack = layer.experts
    forward = jax.jit(moe_layer_forward)
    x = jax.random.normal(jax.random.key(0), (5, layer.hidden_size), jnp.float32)
    y = forward(layer, x)

    # The same experts in float32, 4.9 times the memory of Q6_K: any expert, or all of them.
    gate_up = [stack.gate_up(e) for e in range(stack.num_experts)]
    inner = stack.expert_intermediate
    dense = ExpertStack.from_dense_stacks(
        jnp.stack([w[:inner] for w in gate_up]),
        jnp.stack([w[inner:] for w in gate_up]),
        jnp.stack([stack.down_of(e) for e in range(stack.num_experts)]),
        num_experts=stack.num_experts,
        hidden_size=stack.hidden_size,
        expert_intermediate=inner,
    )
    difference = float(np.max(np.abs(y - forward(replace(layer, experts=dense), x))))
    print(f"{layer}\ny {y.shape}, packed and dense differ by at most {difference:.1e}")
    return difference


if __name__ == "__main__":
    main(*sys.argv[1:2])
