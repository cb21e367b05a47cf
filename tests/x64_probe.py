"""Dtypes and bits of what jmoe computes, as lines of text: the same in x64 mode as without. A program and a module."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from cases import CASES, random_inputs, random_routing, random_stack

from jmoe import MoELayer, RouterConfig, moe_forward, moe_layer_forward, route


def digests() -> list[str]:
    return [f"{name} {a.dtype}{list(a.shape)} {hashlib.sha256(np.asarray(a)).hexdigest()}" for name, a in results()]


def results() -> Iterator[tuple[str, jax.Array]]:
    """Routing, moe_forward for few tokens and for many, its gradients, and a view of a stack."""
    rng = np.random.default_rng(64)
    ids, weights = route(jnp.asarray(rng.standard_normal((17, 31)), jnp.float32), RouterConfig(3))
    yield from (("topk_ids", ids), ("topk_weights", weights))
    grouped = RouterConfig(3, gating="sigmoid", group_count=4, groups_used=2, scale=2.5)
    bias = rng.standard_normal(32).astype(np.float32)
    ids, weights = route(jnp.asarray(rng.standard_normal((17, 32)), jnp.float32), grouped, bias)
    yield from (("grouped ids", ids), ("grouped weights", weights))
    case = CASES["mixed"]
    stack = random_stack(case)
    router, shared_gate = (jnp.asarray(rng.standard_normal(n), jnp.float32) for n in ((case.num_experts, 256), 256))
    shared = jax.tree.map(lambda leaf: leaf[:1], stack)
    layer = MoELayer(router, stack, RouterConfig(2, gating="sigmoid"), shared=shared, shared_gate=shared_gate)
    yield "layer", moe_layer_forward(layer, random_inputs(rng, 3, 256))
    yield "gate_up", jax.jit(type(stack).gate_up)(stack, 1)
    for tokens, dtype in ((2, jnp.float32), (6, jnp.bfloat16)):
        x = random_inputs(rng, tokens, case.hidden_size, dtype)
        ids, weights = random_routing(rng, tokens, case)
        yield f"y {tokens}", moe_forward(stack, x, ids, weights)
        # 2^32 + 1 is no expert, whether jax would narrow it (x64 off: NumPy's array) or hold it (x64 on).
        wide = ids.astype(np.int64)
        wide[0, 0] = 2**32 + 1
        yield f"y {tokens} wide", moe_forward(stack, x, wide, weights)
        held = jnp.asarray(wide) if jax.config.jax_enable_x64 else wide
        yield f"y {tokens} held", moe_forward(stack, x, held, weights)
        loss = lambda x, w: jnp.sum(moe_forward(stack, x, ids, w).astype(jnp.float32))  # noqa: B023, E731
        to_x, to_weights = jax.grad(loss, argnums=(0, 1))(x, jnp.asarray(weights))
        yield from ((f"to x {tokens}", to_x), (f"to weights {tokens}", to_weights))


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    print("x64", jax.config.jax_enable_x64)
    print("\n".join(digests()))
