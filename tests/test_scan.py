"""Layers in one program: a scan by index makes no copy of a layer's planes; remat and donation do what they should."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from cases import CASES, Case, random_inputs, random_routing, random_stack, specs

import pallas_kernels
from jmoe import ExpertStack, cpu_kernels, moe_forward

LAYERS = 4
QWEN3, MIXED = CASES["qwen3-30b-a3b"], CASES["mixed"]
DECODE = Case("decode", 512, 256, 8, 2, "q4_k", "q4_k", "q6_k")


def network(stack: ExpertStack, x: Any, ids: Any, weights: Any, *, block: Any = lambda f: f) -> jax.Array:
    """``LAYERS`` residual layers by their index, the stack [L, E, ...] closed over."""

    @block
    def step(x: jax.Array, layer: jax.Array) -> tuple[jax.Array, None]:
        return x + moe_forward(stack, x, ids, weights, layer=layer), None

    return jax.lax.scan(step, x, jnp.arange(LAYERS))[0]


def layers_and_inputs(rng: np.random.Generator) -> tuple[Any, ...]:
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(random_stack(MIXED, seed) for seed in range(LAYERS)))
    return stack, random_inputs(rng, 3, MIXED.hidden_size), *map(jnp.asarray, random_routing(rng, 3, MIXED))


@pytest.mark.skipif(cpu_kernels.why_unavailable(tokens=1) is not None, reason="no CPU kernels")
@pytest.mark.parametrize("tokens", [1, 512])
def test_native_kernels_read_a_layer_in_place(tokens):
    arguments = specs(QWEN3, tokens, (LAYERS,))
    compiled = jax.jit(network).lower(*arguments).compile()
    analysis, (_, x, ids, _) = compiled.memory_analysis(), arguments
    assert analysis is not None
    assert analysis.temp_size_in_bytes <= 4 * (x.size + 2 * ids.size) * 4 + (64 << 10)
    # One layer's planes have no shape of their own in the program: all are [4, 128, ...].
    program = str(compiled.as_text())
    assert "u8[4,128,768,1024]" in program
    assert not re.search(r"u8\[(1,)?128,768,1024\]", program)


@pytest.mark.skipif(
    not pallas_kernels.MIN_JAX <= jax.__version_info__ < pallas_kernels.BELOW_JAX, reason="the kernels need another jax"
)
def test_on_a_gpu_the_loop_over_layers_holds_one_layer_s_launches_and_no_layer_s_planes():
    module = jax.jit(network).trace(*specs(DECODE, 9, (LAYERS,))).lower(lowering_platforms=("cuda",)).as_text()
    assert module.count("custom_call @mosaic_gpu_v2") == 2  # what prepares, and the layer
    assert module.count("stablehlo.while") == 1
    # The kernel sees all layers' experts: 32 of 256 rows of 256 bytes.
    assert "tensor<32x256x256xui8>" in module
    assert not re.search(r"tensor<(1x)?8x256x256xui8>", module)


def test_remat_changes_no_gradient(rng):
    arguments = layers_and_inputs(rng)
    gradient = lambda block: jax.grad(lambda *args: jnp.sum(network(*args, block=block)), argnums=(1, 3))  # noqa: E731
    plain, saved = (jax.jit(gradient(block))(*arguments) for block in (lambda f: f, jax.checkpoint))
    for got, want in zip(saved, plain, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=tolerances.GRADIENT.max_over_rms * np.std(want))


def test_a_donated_x_becomes_the_output(rng):
    stack, x, ids, weights = layers_and_inputs(rng)
    expected = network(stack, x, ids, weights)
    donating = jax.jit(network, donate_argnames="x")
    analysis = donating.lower(stack, x, ids, weights).compile().memory_analysis()
    assert analysis is not None
    assert analysis.alias_size_in_bytes >= x.nbytes
    np.testing.assert_allclose(donating(stack, x, ids, weights), expected, rtol=1e-6, atol=1e-6)
    assert x.is_deleted()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(stack))


def test_differentiating_packed_leaves_is_jax_s_own_type_error(rng):
    stack, *arguments = layers_and_inputs(rng)
    with pytest.raises(TypeError, match=r"grad requires real- or complex-valued inputs.*got uint8"):
        jax.grad(lambda stack: jnp.sum(network(stack, *arguments)))(stack)
    # Where jax is told to go on, an integer's tangent space is float0: no memory, nothing to train.
    zero = jax.grad(partial(lambda *args: jnp.sum(network(*args))), allow_int=True)(stack, *arguments)
    assert {leaf.dtype for leaf in jax.tree.leaves(zero)} == {jax.dtypes.float0}
