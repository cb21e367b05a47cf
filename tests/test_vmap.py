"""vmap over anything is one flat call: the loop's numbers, one launch, and no expert of a neighbour's."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tolerances
from cases import (
    CASES,
    HALVES,
    Case,
    ExpertBlocks,
    oracle_layer,
    random_inputs,
    random_stack,
    set_halves,
    specs,
    with_experts,
)

import pallas_kernels
from jmoe import FORMATS, ExpertStack, QuantTensor, RouterConfig, moe_forward, route
from jmoe.folding import fold

MIXED, RAGGED = CASES["mixed"], CASES["ragged"]
SMALL = with_experts(MIXED, 3)
each_backend = pytest.mark.usefixtures("each_backend")


def stacked(*stacks: Any) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *stacks)


def any_routing(rng: np.random.Generator, *shape: int, experts: int) -> tuple[jax.Array, jax.Array]:
    """Ids on both sides of [0, E), f32 weights."""
    ids = rng.integers(-experts, 2 * experts, shape, np.int32)
    return jnp.asarray(ids), jnp.asarray(rng.standard_normal(shape), jnp.float32)


def every_pair(stack: ExpertStack, x: jax.Array, ids: jax.Array, weights: jax.Array, layer: Any) -> jax.Array:
    """The layer with jax's own batching: all chosen experts of a dense stack gathered."""
    gate, up, down = (p if layer is None else p[layer] for p in (stack.gate, stack.up, stack.down))
    inside = (ids >= 0) & (ids < gate.shape[0])
    e = jnp.where(inside, ids, 0)
    dot = partial(jnp.einsum, precision="highest")
    h = jax.nn.silu(dot("tkih,th->tki", gate[e], x)) * dot("tkih,th->tki", up[e], x)
    return dot("tkhi,tki,tk->th", down[e], h, jnp.where(inside, weights, 0.0))


@pytest.mark.parametrize("has_layers", [False, True], ids=["one layer", "layers"])
def test_a_fold_over_any_of_the_arguments_is_the_loop(has_layers, rng):
    members, layers, experts, inner, hidden, tokens, top_k = 3, 2, 4, 3, 5, 2, 3
    lead = (members, layers, experts) if has_layers else (members, experts)
    drawn = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    everyone = (
        ExpertStack(drawn(*lead, inner, hidden), drawn(*lead, inner, hidden), drawn(*lead, hidden, inner)),
        drawn(members, tokens, hidden),
        *any_routing(rng, members, tokens, top_k, experts=experts),
        jnp.asarray([1, 0, 1], jnp.int32) if has_layers else None,
    )
    leaves, tree = jax.tree.flatten(everyone)
    first = [leaf[0] for leaf in leaves]
    for gate, *others in itertools.product([False, True], repeat=len(leaves) - 1):
        # up as down: a stack is batched whole, in parts or not.
        batched = [gate, others[0], *others]
        if not any(batched):
            continue
        operands = tree.unflatten(a if b else f for a, f, b in zip(leaves, first, batched, strict=True))
        axes = tree.unflatten(0 if b else None for b in batched)
        y = every_pair(*fold(members, tree.unflatten(batched), *operands)).reshape(members, tokens, hidden)
        loop = jax.vmap(every_pair, in_axes=tuple(axes), axis_size=members)(*operands)
        np.testing.assert_allclose(y, loop, rtol=1e-5, atol=1e-5)


@each_backend
def test_a_population_of_layers(rng):
    seeds = (1, 2, 3)
    population = stacked(*(random_stack(RAGGED, seed) for seed in seeds))
    x = random_inputs(rng, 4, RAGGED.hidden_size)
    ids, weights = any_routing(rng, 4, RAGGED.top_k, experts=RAGGED.num_experts)
    y = jax.vmap(moe_forward, in_axes=(0, None, None, None))(population, x, ids, weights)
    for row, seed in zip(y, seeds, strict=True):
        oracle.assert_within(row, oracle.moe(oracle_layer(RAGGED, seed), x, ids, weights), tolerances.LAYER["float32"])


@each_backend
def test_nested_over_populations_layers_batches_and_tokens(rng):
    """vmap over stacks of vmap over layers of vmap over batches of vmap over single tokens."""
    seeds = np.arange(1, 5).reshape(2, 2)
    population = stacked(*(stacked(*(random_stack(SMALL, seed) for seed in row)) for row in seeds))
    x = jnp.stack([random_inputs(rng, 2, SMALL.hidden_size) for _ in range(2)])
    ids, weights = any_routing(rng, 2, 2, SMALL.top_k, experts=SMALL.num_experts)

    def token(stack, layer, x, ids, weights):
        return moe_forward(stack, x[None], ids[None], weights[None], layer=layer)[0]

    tokens = jax.vmap(token, in_axes=(None, None, 0, 0, 0))
    batches = jax.vmap(tokens, in_axes=(None, None, 0, 0, 0))
    layers = jax.vmap(batches, in_axes=(None, 0, None, None, None))
    y = jax.jit(jax.vmap(layers, in_axes=(0, None, None, None, None)))(population, jnp.arange(2), x, ids, weights)
    for (p, l, b), _ in np.ndenumerate(np.empty((2, 2, 2))):
        exact = oracle.moe(oracle_layer(SMALL, int(seeds[p, l])), x[b], ids[b], weights[b])
        oracle.assert_within(y[p, l, b], exact, tolerances.LAYER["float32"])


@each_backend
def test_ablations_of_the_router_with_x_and_the_experts_shared(rng):
    stack, x = random_stack(MIXED), random_inputs(rng, 3, MIXED.hidden_size)
    routers = jnp.asarray(rng.standard_normal((4, MIXED.num_experts, MIXED.hidden_size)), jnp.float32)
    config = RouterConfig(2)

    def layer_of(router):
        ids, weights = route(jnp.dot(x, router.T, precision="highest"), config)
        return moe_forward(stack, x, ids, weights), ids, weights

    y, ids, weights = jax.vmap(layer_of)(routers)
    for row, router_ids, router_weights in zip(y, ids, weights, strict=True):
        exact = oracle.moe(oracle_layer(MIXED), x, router_ids, router_weights)
        oracle.assert_within(row, exact, tolerances.LAYER["float32"])


def test_route_over_batches_is_the_loop(rng):
    logits = jnp.asarray(rng.standard_normal((2, 3, 5, 8)), jnp.float32)
    routed = jax.vmap(jax.vmap(partial(route, config=RouterConfig(3))))(logits)
    for at in np.ndindex(2, 3):
        for got, want in zip(routed, route(logits[at], RouterConfig(3)), strict=True):
            np.testing.assert_array_equal(got[at], want)


@each_backend
def test_an_id_outside_hits_no_expert_of_a_neighbour(rng):
    """The neighbours' weights are NaN: one of their experts would show."""
    case = with_experts(CASES["tiny"], 3)
    good = random_stack(case)
    blocks = np.stack(list(ExpertBlocks(case, "down")))
    set_halves(blocks.reshape(-1, FORMATS["q6_k"].block_bytes), HALVES["q6_k"][0], np.nan)
    planes = FORMATS["q6_k"].planes(*map(jnp.asarray, FORMATS["q6_k"].split(blocks)))
    bad = ExpertStack(good.gate, good.up, QuantTensor("q6_k", planes))
    x = random_inputs(rng, 5, case.hidden_size)
    ids = jnp.asarray([[-1, 0], [3, 1], [-3, 2], [5, 0], [2**31 - 1, -(2**31)]], jnp.int32)
    weights = jnp.ones_like(ids, jnp.float32)
    y = jax.vmap(moe_forward, in_axes=(0, None, None, None))(stacked(bad, good, bad), x, ids, weights)
    exact = oracle.moe(oracle_layer(case), x, ids, weights)
    oracle.assert_within(y[1], exact, tolerances.LAYER["float32"])
    assert np.isnan(y[0][:4]).all(axis=1).all()
    np.testing.assert_array_equal(y[:, 4], jnp.zeros_like(y[:, 4]))


def test_derivatives_of_a_population_are_those_of_its_members(rng):
    population = [random_stack(SMALL, seed) for seed in (1, 2)]
    x = random_inputs(rng, 3, SMALL.hidden_size)
    ids, weights = any_routing(rng, 3, SMALL.top_k, experts=SMALL.num_experts)

    def loss(stacks, x, weights):
        y = jax.vmap(moe_forward, in_axes=(0, None, None, None))(stacks, x, ids, weights)
        return jnp.sum(jnp.sin(y))

    by_member = [jax.grad(loss, argnums=(1, 2))(stacked(stack), x, weights) for stack in population]
    together = jax.grad(loss, argnums=(1, 2))(stacked(*population), x, weights)
    for got, *parts in zip(together, *by_member, strict=True):
        oracle.assert_within(got, sum(map(oracle.as_f64, parts)), tolerances.GRADIENT)


@each_backend
def test_nothing_to_compute_stays_nothing():
    stack = random_stack(MIXED)
    over_x = jax.vmap(lambda x, ids, weights: moe_forward(stack, x, ids, weights))
    for members, tokens, top_k in ((2, 0, 2), (2, 3, 0)):
        routing = (members, tokens, top_k)
        y = over_x(jnp.ones((members, tokens, MIXED.hidden_size)), jnp.zeros(routing, jnp.int32), jnp.zeros(routing))
        np.testing.assert_array_equal(y, jnp.zeros((members, tokens, MIXED.hidden_size)))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [2, 64])
def test_on_a_gpu_a_population_is_its_members(tokens, rng):
    population = [random_stack(DECODE, seed) for seed in (1, 2)]
    x = random_inputs(rng, tokens, DECODE.hidden_size, jnp.bfloat16)
    ids, weights = any_routing(rng, tokens, DECODE.top_k, experts=DECODE.num_experts)
    y = jax.vmap(moe_forward, in_axes=(0, None, None, None))(stacked(*population), x, ids, weights)
    for row, stack in zip(y, population, strict=True):
        alone = moe_forward(stack, x, ids, weights)
        oracle.assert_within(row, oracle.as_f64(alone), tolerances.LAYER["bfloat16"])


DECODE = Case("decode", 512, 256, 8, 2, "q4_k", "q4_k", "q6_k")


@pytest.mark.skipif(
    not pallas_kernels.MIN_JAX <= jax.__version_info__ < pallas_kernels.BELOW_JAX, reason="the kernels need another jax"
)
@pytest.mark.parametrize(
    ("what", "tokens", "launches"),
    [
        # The layer; for more tokens what prepares it; for many what sorts, gate and up, and down.
        *((what, 2, 1) for what in ("tokens", "routings", "layers", "population", "nested")),
        *((what, 3, 2) for what in ("routings", "population")),
        *((what, 17, 3) for what in ("routings", "population")),
    ],
)
def test_on_a_gpu_a_batch_is_one_layer_s_launches_without_a_loop_or_a_copy_of_planes(
    what: str, tokens: int, launches: int
):
    lead = {"layers": (2,), "population": (4,), "nested": (2, 2)}.get(what, ())
    stack, x, ids, weights = specs(DECODE, tokens, lead, jnp.bfloat16)
    batch = lambda a, *sizes: jax.ShapeDtypeStruct((*sizes, *a.shape), a.dtype)  # noqa: E731
    over = lambda f, *axes: jax.vmap(f, in_axes=axes)  # noqa: E731
    forward: Any
    if what == "tokens":
        forward, args = over(moe_forward, None, 0, 0, 0), (stack, batch(x, 4), batch(ids, 4), batch(weights, 4))
    elif what == "routings":
        forward, args = over(moe_forward, None, None, 0, 0), (stack, x, batch(ids, 4), batch(weights, 4))
    elif what == "layers":
        at_layer = lambda stack, x, ids, weights, layer: moe_forward(stack, x, ids, weights, layer=layer)  # noqa: E731
        forward = over(at_layer, None, None, None, None, 0)
        args = (stack, x, ids, weights, jax.ShapeDtypeStruct((4,), jnp.int32))
    elif what == "population":
        forward, args = over(moe_forward, 0, None, None, None), (stack, x, ids, weights)
    else:
        members = over(moe_forward, 0, None, None, None)
        forward, args = over(members, 0, 0, 0, 0), (stack, batch(x, 2), batch(ids, 2), batch(weights, 2))
    module = jax.jit(forward).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert module.count("custom_call @mosaic_gpu_v2") == launches
    assert "stablehlo.while" not in module
    # Of the planes only views are made.
    for line in module.splitlines():
        made = line.rpartition("->")[2]
        assert "x512x128xui8" not in made or "stablehlo.reshape" in line or "func." in line, line


def test_where_no_kernel_is_a_batch_takes_no_more_memory_than_the_flat_call():
    case = CASES["qwen3-30b-a3b"]
    forward = partial(moe_forward, backend="jnp")
    stack, x, ids, weights = specs(case, 64)

    def temporary_bytes(f: Any) -> int:
        analysis = jax.jit(f).lower(stack, x, ids, weights).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    def batched(stack, x, ids, weights):
        return jax.vmap(lambda x, i, w: forward(stack, x[None], i[None], w[None])[0])(x, ids, weights)

    assert temporary_bytes(batched) <= 1.01 * temporary_bytes(forward)
