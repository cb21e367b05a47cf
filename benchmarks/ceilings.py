"""What the device can do at most, measured: the floor under a layer's time."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jmoe.synthetic import ModelShape, layer_bytes

WARM_S = 2.0
CALLS = 8


class Ceilings(NamedTuple):
    """Of random bits and numbers, which take more power than zeros and ones."""

    bytes_per_s: float  # XLA reduction over 1 GiB of u32 on a CPU, 4 GiB elsewhere
    flops: float  # square matmul: f32 on a CPU, bf16 elsewhere
    # The same after two seconds of it: clocks follow the power.
    sustained_bytes_per_s: float
    sustained_flops: float


def measure() -> Ceilings:
    on_cpu = jax.default_backend() == "cpu"
    words = jax.random.bits(jax.random.key(0, impl="rbg"), (1 << (28 if on_cpu else 30),), jnp.uint32)
    reads = partial(_seconds, jax.jit(lambda a: jnp.bitwise_xor.reduce(a)), words)
    read_s, sustained_read_s = _fastest(reads), after(WARM_S, reads)
    nbytes = words.nbytes
    del words, reads
    size, dtype = (2048, jnp.float32) if on_cpu else (8192, jnp.bfloat16)
    square = jax.random.normal(jax.random.key(0), (size, size), dtype)
    products = partial(_seconds, jax.jit(lambda a: lax.dot(a, a, precision=lax.Precision.DEFAULT)), square)
    product_s, sustained_product_s = _fastest(products), after(WARM_S, products)
    flops = 2 * size**3
    return Ceilings(nbytes / read_s, flops / product_s, nbytes / sustained_read_s, flops / sustained_product_s)


def after(seconds: float, measured: Callable[[], float]) -> float:
    """What it returns once it has been called for so long without a pause."""
    end = time.perf_counter() + seconds
    while True:
        last = measured()
        if time.perf_counter() >= end:
            return last


def _fastest(measured: Callable[[], float]) -> float:
    return min(measured() for _ in range(4))


def _seconds(function: Any, argument: jax.Array) -> float:
    """A call's, of several queued one behind the other: what it costs to start one is not part of the ceiling."""
    start = time.perf_counter()
    jax.block_until_ready([function(argument) for _ in range(CALLS)])
    return (time.perf_counter() - start) / CALLS


def floor_us(model: ModelShape, tokens: int, ceilings: Ceilings) -> float:
    """max(active packed bytes / bandwidth, flops / peak); a chosen expert's bytes count once.

    Of E experts, T tokens that each choose K at random leave (1 - K/E)^T untouched.
    """
    touched = 1 - (1 - model.top_k / model.num_experts) ** tokens
    flops = 2 * 3 * tokens * model.top_k * model.hidden_size * model.expert_intermediate
    return 1e6 * max(touched * layer_bytes(model) / ceilings.bytes_per_s, flops / ceilings.flops)
