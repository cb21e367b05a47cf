"""What the device can do at most, measured: the floor under a layer's time."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jmoe.synthetic import ModelShape, layer_bytes


class Ceilings(NamedTuple):
    bytes_per_s: float  # XLA reduction over 1 GiB of int32 on a CPU, 4 GiB elsewhere
    flops: float  # square matmul: f32 on a CPU, bf16 elsewhere


def measure() -> Ceilings:
    on_cpu = jax.default_backend() == "cpu"
    ints = jax.device_put(jnp.arange(1 << (28 if on_cpu else 30), dtype=jnp.int32))
    bandwidth = ints.nbytes / _fastest(jax.jit(lambda a: jnp.bitwise_xor.reduce(a)), ints)
    del ints
    size, dtype = (2048, jnp.float32) if on_cpu else (8192, jnp.bfloat16)
    square = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a: lax.dot(a, a, precision=lax.Precision.DEFAULT))
    return Ceilings(bandwidth, 2 * size**3 / _fastest(product, square))


def _fastest(function: Any, argument: jax.Array) -> float:
    """Seconds a call, of four queued one behind the other: what a call costs to start is not part of the ceiling."""
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        jax.block_until_ready([function(argument) for _ in range(4)])
        seconds.append((time.perf_counter() - start) / 4)
    return min(seconds)


def floor_us(model: ModelShape, tokens: int, ceilings: Ceilings) -> float:
    """max(active packed bytes / bandwidth, flops / peak); a chosen expert's bytes count once.

    Of E experts, T tokens that each choose K at random leave (1 - K/E)^T untouched.
    """
    touched = 1 - (1 - model.top_k / model.num_experts) ** tokens
    flops = 2 * 3 * tokens * model.top_k * model.hidden_size * model.expert_intermediate
    return 1e6 * max(touched * layer_bytes(model) / ceilings.bytes_per_s, flops / ceilings.flops)
