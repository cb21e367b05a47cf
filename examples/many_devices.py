"""One MoE layer over all devices that there are: one, the eight of a host, or those of many hosts. The same program.

    python examples/many_devices.py tests/data/qwen3moe-Q4_K_M.gguf

On many hosts start it once on each, with JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID set (on SLURM
or a TPU pod JAX finds them itself: call jax.distributed.initialize() without arguments). To try it on a CPU:
XLA_FLAGS=--xla_force_host_platform_device_count=8.
"""

from __future__ import annotations

import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jmoe import RouterConfig, parallel, route

CONFIG = RouterConfig(top_k=2)


def start() -> Mesh:
    """All devices of all processes in one axis; each process must come here before it asks for a device."""
    if address := os.environ.get("JAX_COORDINATOR_ADDRESS"):
        count, number = (int(os.environ[name]) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
        jax.distributed.initialize(address, num_processes=count, process_id=number)
    return jax.make_mesh((jax.device_count(),), ("expert",), axis_types=(AxisType.Auto,))


def main(path: str) -> tuple[jax.Array, jax.Array]:
    mesh = start()
    # Each process reads the experts of its own devices.
    experts = parallel.load_experts(path, 0, mesh)

    @jax.jit
    def decode(experts: parallel.ShardedStack, x: jax.Array, logits: jax.Array) -> jax.Array:
        """Few tokens: every device has all of them, and a sum completes what each adds."""
        return parallel.moe_forward(experts, x, *route(logits, CONFIG))

    @jax.jit
    def prefill(experts: parallel.ShardedStack, x: jax.Array, logits: jax.Array) -> jax.Array:
        """Many tokens: every device has its share, and a token travels to the devices of its experts and back."""
        return parallel.moe_forward(experts, x, *route(logits, CONFIG), split_tokens="expert")

    # Every process makes the same tokens here, and puts those of its own devices there; a model's lie there already.
    rng, tokens = np.random.default_rng(0), 4 * mesh.size
    x = rng.standard_normal((tokens, experts.hidden_size), np.float32)
    logits = rng.standard_normal((tokens, experts.num_experts), np.float32)
    rows = NamedSharding(mesh, PartitionSpec("expert"))
    spread = [jax.make_array_from_callback(a.shape, rows, lambda index, a=a: a[index]) for a in (x, logits)]

    one, many = decode(experts, x, logits), prefill(experts, *spread)
    whole = NamedSharding(mesh, PartitionSpec())
    apart = float(jax.jit(lambda one, many: jnp.max(jnp.abs(one - many)), out_shardings=whole)(one, many))
    if jax.process_index() == 0:
        print(f"{experts}\n{tokens} tokens on {mesh.size} device(s) of {jax.process_count()} process(es): {many.shape}")
        print(f"the two ways differ by at most {apart:.1e}")
    return one, many


if __name__ == "__main__":
    main(sys.argv[1])
