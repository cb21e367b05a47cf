"""One layer of a file, with the router that the file holds, against a plain dense computation.

python examples/one_layer.py [FILE]
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np

from jmoe import ExpertStack, GgufFile, RouterConfig, moe_forward, route


def main(path: str = "tests/data/mixtral-Q6_K.gguf") -> float:
    """Returns the largest difference between packed and dense experts."""
    with GgufFile(path) as gguf:
        stack = ExpertStack.load_from_gguf(gguf, 0)
        router = gguf.read("blk.0.ffn_gate_inp.weight").view("<f4")  # [E, H]
        top_k = gguf.metadata[f"{gguf.architecture}.expert_used_count"]
    # Mixtral and Qwen3 normalise the chosen weights; the file does not say so.
    config = RouterConfig(top_k, normalise=True)

    @jax.jit
    def layer_of(stack: ExpertStack, x: jax.Array) -> jax.Array:
        topk_ids, topk_weights = route(x @ router.T, config)
        return moe_forward(stack, x, topk_ids, topk_weights)

    x = jax.random.normal(jax.random.key(0), (5, stack.hidden_size), jnp.float32)
    y = layer_of(stack, x)

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
    difference = float(np.max(np.abs(y - layer_of(dense, x))))
    print(f"{stack}\ny {y.shape}, packed and dense differ by at most {difference:.1e}")
    return difference


if __name__ == "__main__":
    main(*sys.argv[1:2])
