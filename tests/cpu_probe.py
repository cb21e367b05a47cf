"""Bits of what the CPU kernels compute, and the number of threads of the process: a program and a module."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from cases import CASES, random_inputs, random_routing, random_stack

from jmoe import moe_forward


def digests() -> list[str]:
    """Of few tokens and of many; where there are two devices, in shards of the tokens too, which must not differ."""
    found = []
    for name, tokens in (("tiny", 2), ("gemma-like", 40), ("many-experts", 600)):
        case, rng = CASES[name], np.random.default_rng(tokens)
        stack, x = random_stack(case), random_inputs(rng, tokens, case.hidden_size)
        ids, weights = map(jnp.asarray, random_routing(rng, tokens, case))
        y = moe_forward(stack, x, ids, weights)
        if jax.device_count() > 1:
            mesh = jax.make_mesh((2,), ("tokens",), axis_types=(jax.sharding.AxisType.Auto,))
            whole, rows = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("tokens")
            specs = {"in_specs": (whole, rows, rows, rows), "out_specs": rows, "check_vma": False}
            sharded = jax.jit(jax.shard_map(moe_forward, mesh=mesh, **specs))
            np.testing.assert_array_equal(sharded(stack, x, ids, weights), y)
        found.append(f"{name} {tokens} {hashlib.sha256(np.asarray(y)).hexdigest()}")
    return found


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 2)
    lines = digests()
    tasks = Path("/proc/self/task")
    print(len(os.listdir(tasks)) if tasks.exists() else 0)
    print("\n".join(lines))
