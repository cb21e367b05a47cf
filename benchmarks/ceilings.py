"""What the device can do at most, measured: the floor under a layer's time."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jmoe.synthetic import ModelShape, layer_bytes

WARM_S = 2.0


class Ceilings(NamedTuple):
    bytes_per_s: float  # XLA reduction over 1 GiB of int32 on a CPU, 4 GiB elsewhere
    flops: float  # square matmul of random numbers, which take more power than ones: f32 on a CPU, bf16 elsewhere
    sustained_flops: float  # the same after two seconds of it: clocks follow the power


def measure() -> Ceilings:
    on_cpu = jax.default_backend() == "cpu"
    ints = jax.device_put(jnp.arange(1 << (28 if on_cpu else 30), dtype=jnp.int32))
    bandwidth = ints.nbytes / _fastest(jax.jit(lambda a: jnp.bitwise_xor.reduce(a)), ints)
    del ints
    size, dtype = (2048, jnp.float32) if on_cpu else (8192, jnp.bfloat16)
    square = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(lambda a: lax.dot(a, a, precision=lax.Precision.DEFAULT))
    flops = 2 * size**3 / _fastest(product, square)
    return Ceilings(bandwidth, flops, 2 * size**3 / _after(WARM_S, product, square))


def _fastest(function: Any, argument: jax.Array) -> float:
    """Seconds a call, of several queued one behind the other."""
    return min(_seconds(function, argument, 4) for _ in range(4))


def _after(seconds: float, function: Any, argument: jax.Array) -> float:
    end = time.perf_counter() + seconds
    while True:
        last = _seconds(function, argument, 16)
        if time.perf_counter() >= end:
            return last


def _seconds(function: Any, argument: jax.Array, calls: int) -> float:
    """A call's, of so many queued one behind the other: what it costs to start one is not part of the ceiling."""
    start = time.perf_counter()
    jax.block_until_ready([function(argument) for _ in range(calls)])
    return (time.perf_counter() - start) / calls


def floor_us(model: ModelShape, tokens: int, ceilings: Ceilings) -> float:
    """max(active packed bytes / bandwidth, flops / peak); a chosen expert's bytes count once.

    Of E experts, T tokens that each choose K at random leave (1 - K/E)^T untouched.
    """
    touched = 1 - (1 - model.top_k / model.num_experts) ** tokens
    flops = 2 * 3 * tokens * model.top_k * model.hidden_size * model.expert_intermediate
    return 1e6 * max(touched * layer_bytes(model) / ceilings.bytes_per_s, flops / ceilings.flops)
