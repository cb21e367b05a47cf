"""The kernels on a real GPU, against the float64 oracle: ``pytest -m gpu`` on a machine with a Hopper."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import prepared_model
import pytest
import tolerances

from jmoe import FORMATS, Activation, moe_forward, which_backend
from pallas_kernels import DEPTHS

pytestmark = pytest.mark.gpu

Q4_K_M = cases.Case("q4_k_m", 2048, 768, 16, 4, "q4_k", "q4_k", "q6_k")
MIXES = [
    *(cases.Case(name, 512, 768, 8, 3, name, name, name) for name in sorted(DEPTHS)),
    Q4_K_M,
    cases.Case("gate differs from up", 512, 320, 8, 2, "q4_k", "q6_k", "q5_0"),
    cases.Case("ragged depth", 576, 704, 8, 2, "q8_0", "q8_0", "q5_0"),
    cases.Case("five experts, odd chunks", 2880, 320, 5, 2, "mxfp4", "mxfp4", "q4_0"),
    cases.Case("q2_k, down q3_k", 512, 768, 8, 3, "q2_k", "q2_k", "q3_k"),
    cases.Case("ragged mins", 576, 704, 8, 2, "q4_1", "iq4_nl", "q5_1"),
]
by_name = pytest.mark.parametrize("case", MIXES, ids=lambda case: case.name)


# One token of one term, and columns for two terms in two tiles; the other numbers of columns for one case.
RUNS = [(case, *run) for case in MIXES for run in ((1, jnp.bfloat16), (7, jnp.float32))]
OTHERS = (
    (1, jnp.float32),
    (3, jnp.float16),
    (8, jnp.bfloat16),
    (12, jnp.float32),
    (16, jnp.bfloat16),
)
RUNS += [(Q4_K_M, *run) for run in OTHERS]
# So few pairs an expert that its weights are read once by the kernel for few tokens too.
SPREAD = cases.Case("spread", 512, 256, 128, 4, "q4_k", "q4_k", "q6_k")
RUNS += [(SPREAD, *run) for run in ((20, jnp.bfloat16), (64, jnp.float32), (64, jnp.bfloat16))]


@pytest.mark.parametrize(
    ("case", "tokens", "dtype"), RUNS, ids=lambda value: getattr(value, "name", getattr(value, "__name__", value))
)
def test_kernels_meet_the_contract(case: cases.Case, tokens: int, dtype: Any, rng: np.random.Generator) -> None:
    stack = cases.random_stack(case)
    x, ids, weights = cases.random_call(case, tokens, dtype, rng)
    assert which_backend(stack, x).name == "pallas"
    exact = oracle.moe(cases.oracle_layer(case), oracle.as_f64(x), ids, weights)
    y = moe_forward(stack, x, ids, weights)
    assert y.dtype == x.dtype
    # f32 is as exact as precision="highest" asks for, without asking.
    oracle.assert_within(y, exact, tolerances.HIGHEST_ON_GPU if dtype == jnp.float32 else tolerances.of_kernels(dtype))
    np.testing.assert_array_equal(y, moe_forward(stack, x, ids, weights), "equal inputs, unequal bits")


ACTIVATIONS = ["silu", "gelu_tanh", "swiglu_oai", Activation("swiglu_clamped", 1.5), "relu2"]
# The second without a gate: units of 128 rows, of which the last has half.
SEMANTIC_CASES = [
    cases.Case("activations", 512, 320, 8, 3, "q4_k", "q4_k", "q5_0"),
    cases.Case("long units", 512, 1856, 8, 2, "mxfp4", "mxfp4", "q8_0"),
]


@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("case", SEMANTIC_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(("tokens", "dtype"), [(1, jnp.bfloat16), (5, jnp.float32)], ids=["T1-bf16", "T5-f32"])
def test_activations_biases_and_scales_meet_the_contract(
    case: cases.Case, tokens: int, dtype: Any, activation: Any, weight_on: str, rng: np.random.Generator
) -> None:
    gated, leaves = activation != "relu2", cases.random_leaves(case, gated=activation != "relu2")
    stack = replace(cases.random_stack(case), **jax.tree.map(jnp.asarray, leaves))
    layer = replace(cases.oracle_layer(case), **leaves)
    if not gated:
        stack, layer = replace(stack, gate=None), replace(layer, gate=None)
    x, ids, weights = cases.random_call(case, tokens, dtype, rng)
    ids[0, :2] = ids[0, 0]  # an expert given twice
    assert which_backend(stack, x, ids, activation=activation, weight_on=weight_on).name == "pallas"
    y = moe_forward(stack, x, ids, weights, activation=activation, weight_on=weight_on)
    name, limit = activation if isinstance(activation, Activation) else (activation, None)
    exact = oracle.moe(layer, oracle.as_f64(x), ids, weights, name, limit=limit, weight_on=weight_on)
    oracle.assert_within(y, exact, tolerances.of_kernels(dtype))


@pytest.mark.parametrize("leaf", ["gate_bias", "up_bias", "down_bias", "down_scale"])
def test_each_leaf_counts_by_itself_and_by_layer(leaf: str, rng: np.random.Generator) -> None:
    case = SEMANTIC_CASES[0]
    leaves = [{leaf: cases.random_leaves(case, seed=seed)[leaf]} for seed in (0, 1)]
    stacks = [replace(cases.random_stack(case), **jax.tree.map(jnp.asarray, each)) for each in leaves]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stacks)
    x, ids, weights = cases.random_call(case, 3, jnp.float32, rng)
    for layer, each in enumerate(leaves):
        exact = oracle.moe(replace(cases.oracle_layer(case), **each), oracle.as_f64(x), ids, weights)
        oracle.assert_within(moe_forward(together, x, ids, weights, layer=layer), exact, tolerances.KERNEL_F32)


@pytest.mark.parametrize("name", sorted(DEPTHS))
def test_a_tile_decodes_to_the_bits_that_gguf_py_gives(name: str, rng: np.random.Generator) -> None:
    import tile_decoder

    blocks = cases.random_blocks(rng, name, (tile_decoder.ROWS, 256))
    planes = jax.tree.map(jnp.asarray, FORMATS[name].split(blocks))
    decoded = jax.jit(tile_decoder.decoder(name))(*planes)
    np.testing.assert_array_equal(tile_decoder.weights_of(name, *decoded), oracle.dequantise(blocks, name))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"),
    [(2, 3, 6), (3, 3, 6), (8, 2, 3), (9, 3, 6), (16, 40, 70), (33, 8, 128), (64, 3, 70)],
)
def test_slots_serve_every_valid_pair_once(
    rng: np.random.Generator, tokens: int, top_k: int, experts: int, dtype: Any
) -> None:
    from pallas_kernels.prepare import Prepared, Sizes, prepare_kernel

    layer, depth = 2, 160
    ids = rng.integers(-2, experts + 2, (tokens, top_k)).astype(np.int32)
    weights = rng.random((tokens, top_k), np.float32)
    x = jnp.asarray(cases.random_inputs(rng, tokens, depth), dtype)
    sizes = Sizes(tokens, top_k, experts, depth, jnp.dtype(dtype).name)
    run = jax.jit(prepare_kernel(sizes))
    slots = Prepared(*map(np.asarray, run(ids, weights, np.full(1, layer, np.int32), x)))
    prepared_model.check(slots, ids, weights, x, sizes, layer)


@by_name
def test_one_hot_x_reads_weights_back(case: cases.Case) -> None:
    """gate of column d is weight [o, d] alone: what is left of h = silu(g) u after exact reads is one f32 rounding."""
    stack = cases.random_stack(case)
    depth = case.hidden_size
    for column in (0, 1, 2, 31, 32, depth // 2 + 17, depth - 1):
        x = jnp.zeros((1, depth), jnp.bfloat16).at[0, column].set(1.0)
        ids, weights = np.full((1, 1), case.num_experts - 1, np.int32), np.ones((1, 1), np.float32)
        exact = oracle.moe(cases.oracle_layer(case), oracle.as_f64(x), ids, weights)
        oracle.assert_within(moe_forward(stack, x, ids, weights), exact, tolerances.LAYER["bfloat16"])


@pytest.mark.parametrize("tokens", [1, 5])
def test_ids_out_of_range_and_repeats(tokens: int, rng: np.random.Generator) -> None:
    case = MIXES[0]
    stack = cases.random_stack(case)
    x, ids, weights = cases.random_call(case, tokens, jnp.float32, rng)
    ids[0] = [2, 2, case.num_experts]
    ids[-1, 0] = -1
    exact = oracle.moe(cases.oracle_layer(case), oracle.as_f64(x), ids, weights)
    oracle.assert_within(moe_forward(stack, x, ids, weights), exact, tolerances.KERNEL_F32)
    nothing = moe_forward(stack, x, np.full_like(ids, -1), np.full_like(weights, np.nan))
    np.testing.assert_array_equal(nothing, np.zeros_like(x))


@by_name
def test_a_token_that_is_not_finite_touches_no_other(case: cases.Case, rng: np.random.Generator) -> None:
    stack = cases.random_stack(case)
    x, ids, weights = cases.random_call(case, 4, jnp.bfloat16, rng)
    ids[:] = ids[0]
    clean = np.asarray(moe_forward(stack, x, ids, weights))
    others = [0, 1, 3]
    for bad in (np.nan, np.inf):
        spoilt = np.asarray(moe_forward(stack, x.at[2, 5].set(bad), ids, weights))
        np.testing.assert_array_equal(spoilt[others], clean[others])
        assert not np.isfinite(spoilt[2].astype(np.float32)).all()


def test_layers_in_one_stack_equal_each_layer_alone(rng: np.random.Generator) -> None:
    case = Q4_K_M
    alone = [cases.random_stack(case, seed) for seed in (0, 1)]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    x, ids, weights = cases.random_call(case, 4, jnp.bfloat16, rng)
    _, y = jax.lax.scan(
        lambda carry, layer: (carry, moe_forward(together, x, ids, weights, layer=layer)), None, jnp.arange(2)
    )
    for layer, stack in enumerate(alone):
        np.testing.assert_array_equal(y[layer], moe_forward(stack, x, ids, weights))


def test_vmap_and_grad_agree_with_xla(rng: np.random.Generator) -> None:
    case = Q4_K_M
    stack = cases.random_stack(case)
    x, ids, weights = cases.random_call(case, 3, jnp.float32, rng)
    flat = moe_forward(stack, x, ids, weights)
    one = lambda x, i, w: moe_forward(stack, x[None], i[None], w[None])[0]  # noqa: E731
    oracle.assert_within(jax.vmap(one)(x, ids, weights), oracle.as_f64(flat), tolerances.KERNEL_F32)

    def loss(backend: str | None):
        return jax.grad(lambda x, w: jnp.sum(moe_forward(stack, x, ids, w, backend=backend) ** 2), argnums=(0, 1))

    for ours, xla in zip(loss(None)(x, weights), loss("jnp")(x, weights), strict=True):
        oracle.assert_within(ours, oracle.as_f64(xla), tolerances.KERNEL_F32)
