"""The jnp backend: little memory at any size, work by pairs and not by experts, and derivatives of every kind."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tolerances
from cases import (
    CASES,
    HALVES,
    ExpertBlocks,
    oracle_layer,
    random_inputs,
    random_routing,
    random_stack,
    set_halves,
    specs,
    with_experts,
)
from jax.flatten_util import ravel_pytree

from jmoe import FORMATS, Activation, ExpertStack, QuantTensor, moe_forward, reference
from jmoe.grouping import cut, group_by_expert

TINY, MIXED = CASES["tiny"], CASES["mixed"]
QWEN3, MIXTRAL = CASES["qwen3-30b-a3b"], CASES["mixtral-8x7b"]
F32 = tolerances.LAYER["float32"]
LIMIT = 64 << 20

jnp_forward = partial(moe_forward, backend="jnp")


def temporary_bytes(f, *args) -> int:
    analysis = jax.jit(f).lower(*args).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


@pytest.mark.parametrize(
    ("case", "tokens"), [(QWEN3, 1), (QWEN3, 512), (MIXTRAL, 64)], ids=lambda v: getattr(v, "name", v)
)
def test_temporaries_stay_below_64_mib_however_large_an_expert_is(case, tokens):
    assert temporary_bytes(jnp_forward, *specs(case, tokens)) <= LIMIT


def test_a_scan_over_layers_copies_no_layer_s_stack_forward_or_backward():
    layers = 4
    stack, x, ids, weights = specs(QWEN3, 512, (layers,))

    def network(x, weights, stack, ids):
        block = lambda x, layer: (x + jnp_forward(stack, x, ids, weights, layer=layer), None)  # noqa: E731
        return jnp.sum(jax.lax.scan(block, x, jnp.arange(layers))[0])

    assert temporary_bytes(network, x, weights, stack, ids) <= LIMIT
    # What the backward pass needs of each layer is its input.
    saved = layers * x.size * x.dtype.itemsize
    assert temporary_bytes(jax.grad(network, argnums=(0, 1)), x, weights, stack, ids) <= LIMIT + saved


# Of one length: another would compile again.
@hypothesis.given(
    ids=st.lists(st.integers(-2, 7), min_size=24, max_size=24),
    experts=st.sampled_from([1, 6]),
    width=st.sampled_from([1, 4, 16]),
)
def test_tiles_cover_each_pair_inside_once_by_ascending_expert(ids, experts, width):
    groups = group_by_expert(jnp.asarray(ids, jnp.int32)[:, None], experts)
    tiles = jax.tree.map(np.asarray, cut(groups, width))
    order, seen = np.asarray(groups.order), []
    for expert, start, size in zip(*tiles, strict=True):
        pairs = order[start : start + size]
        assert size <= width
        assert [ids[pair] for pair in pairs] == [expert] * size
        seen += pairs.tolist()
    assert seen == sorted((p for p in range(len(ids)) if 0 <= ids[p] < experts), key=lambda p: ids[p])
    assert len(tiles.size) <= len(ids)


def test_a_tile_is_padded_to_less_than_four_times_its_pairs():
    # So work is proportional to the pairs: no tile holds less than one.
    widths = reference.widths_for(10**6)
    assert all(wide <= 4 * narrow for narrow, wide in itertools.pairwise(widths))


def test_each_of_many_tokens_gets_what_it_gets_alone(rng):
    stack, x = random_stack(TINY), random_inputs(rng, 300, TINY.hidden_size)
    ids, weights = random_routing(rng, 300, TINY)
    # One expert with more tokens than the widest tile, so that all widths and several tiles take part.
    ids[:, 0] = 1
    together = jnp_forward(stack, x, ids, weights)
    for token in (0, 7, 299):
        row = slice(token, token + 1)
        oracle.assert_within(together[row], jnp_forward(stack, x[row], ids[row], weights[row]), F32)
    oracle.assert_within(together, oracle.moe(oracle_layer(TINY, decoded=True), x, ids, weights), F32)


@pytest.mark.parametrize("name", ["tiny", "gemma-like"])
def test_an_expert_computed_in_parts_is_the_whole_expert(name, rng, monkeypatch):
    case = CASES[name]
    stack, layer = random_stack(case), oracle_layer(case, decoded=True)
    leaves = {
        "gate_bias": (case.expert_intermediate,),
        "up_bias": (case.expert_intermediate,),
        "down_bias": (case.hidden_size,),
        "down_scale": (),
    }
    leaves = {name: rng.standard_normal((case.num_experts, *shape), np.float32) for name, shape in leaves.items()}
    stack = dataclasses.replace(stack, **jax.tree.map(jnp.asarray, leaves))
    x = random_inputs(rng, 9, case.hidden_size)
    ids, weights = random_routing(rng, 9, case)
    monkeypatch.setattr(reference, "PART_BYTES", 1 << 18)
    # tiny's down has one super-block a row: it cannot be cut.
    assert (reference.num_parts(stack) > 1) == (name == "gemma-like")
    y = reference.moe_jnp(stack, x, jnp.asarray(ids), jnp.asarray(weights), activation=Activation("silu"))
    oracle.assert_within(y, oracle.moe(dataclasses.replace(layer, **leaves), x, ids, weights), F32)


def test_the_order_of_a_token_s_slots_changes_no_bit(rng):
    case = dataclasses.replace(MIXED, top_k=5)
    stack, x = random_stack(case), random_inputs(rng, 12, case.hidden_size)
    ids, weights = random_routing(rng, 12, case)
    slots = rng.permuted(np.tile(np.arange(5), (12, 1)), axis=1)
    shuffled = [np.take_along_axis(array, slots, axis=1) for array in (ids, weights)]
    np.testing.assert_array_equal(jnp_forward(stack, x, *shuffled), jnp_forward(stack, x, ids, weights))


def every_expert(stack: ExpertStack, x: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
    """The formula over all experts in float, whose derivatives are JAX's own."""

    def out(expert: int) -> jax.Array:
        gate, up = jnp.split(stack.gate_up(expert), 2)
        h = jax.nn.silu(jnp.dot(x, gate.T, precision="highest")) * jnp.dot(x, up.T, precision="highest")
        chosen = jnp.sum(jnp.where(ids == expert, weights, 0.0), axis=1)
        return chosen[:, None] * jnp.dot(h, stack.down_of(expert).T, precision="highest")

    return sum(map(out, range(stack.num_experts)), jnp.zeros_like(x))


def test_first_and_second_derivatives_are_those_of_the_formula_over_all_experts(rng):
    case = with_experts(MIXED, 4)
    stack, x = random_stack(case), random_inputs(rng, 3, case.hidden_size)
    ids, weights = map(jnp.asarray, random_routing(rng, 3, case))
    ids = ids.at[0, 0].set(-1)
    towards = jnp.asarray(rng.standard_normal(x.shape), jnp.float32), jnp.ones_like(weights)

    @partial(jax.jit, static_argnums=0)
    def derivatives(forward):
        f = lambda x, weights: forward(stack, x, ids, weights)  # noqa: E731
        gradient = jax.grad(lambda *args: jnp.sum(jnp.sin(f(*args))), argnums=(0, 1))
        product = jax.grad(lambda *args: sum(map(jnp.vdot, gradient(*args), towards)), argnums=(0, 1))
        return jax.jvp(f, (x, weights), towards), gradient(x, weights), product(x, weights)

    for ours, formula in zip(derivatives(jnp_forward), derivatives(every_expert), strict=True):
        # As one vector: a second derivative's elements cancel to less than the rounding of their terms.
        oracle.assert_within(ravel_pytree(ours)[0], ravel_pytree(formula)[0], tolerances.GRADIENT)


def test_an_expert_of_nan_weights_reaches_no_gradient_but_its_own_tokens(rng):
    stack, x = random_stack(TINY), random_inputs(rng, 9, TINY.hidden_size)
    ids, weights = map(jnp.asarray, random_routing(rng, 9, TINY))
    blocks = np.stack(list(ExpertBlocks(TINY, "down")))
    set_halves(blocks[2].reshape(-1, FORMATS["q6_k"].block_bytes), HALVES["q6_k"][0], np.nan)
    planes = FORMATS["q6_k"].planes(*map(jnp.asarray, FORMATS["q6_k"].split(blocks)))
    poisoned = dataclasses.replace(stack, down=QuantTensor("q6_k", planes))
    loss = lambda x, weights, stack: jnp.sum(jnp_forward(stack, x, ids, weights))  # noqa: E731
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    others = ~np.any(np.asarray(ids) == 2, axis=1)
    assert 0 < others.sum() < 9
    for got, want in zip(gradient(x, weights, poisoned), gradient(x, weights, stack), strict=True):
        np.testing.assert_array_equal(got[others], want[others])
        assert np.isnan(got[~others]).any(axis=1).all()


def test_nested_vmap_over_stacks_and_tokens_is_the_loop(rng):
    stacks = [random_stack(MIXED, seed) for seed in (1, 2)]
    x = jnp.stack([random_inputs(rng, 3, MIXED.hidden_size) for _ in range(2)])
    ids = jnp.asarray(rng.integers(-1, MIXED.num_experts + 1, (2, 3, MIXED.top_k)), jnp.int32)
    weights = jnp.asarray(rng.random(ids.shape), jnp.float32)
    over_tokens = jax.vmap(jnp_forward, in_axes=(None, 0, 0, 0))
    over_both = jax.jit(jax.vmap(over_tokens, in_axes=(0, None, None, None)))
    y = over_both(jax.tree.map(lambda *leaves: jnp.stack(leaves), *stacks), x, ids, weights)
    for got, stack in zip(y, stacks, strict=True):
        for row, *args in zip(got, x, ids, weights, strict=True):
            oracle.assert_within(row, jnp_forward(stack, *args), F32)


@pytest.mark.parametrize("platform", ["cuda", "mps"])
def test_it_lowers_for_other_platforms(platform):
    traced = jax.jit(jnp_forward).trace(*specs(QWEN3, 16))
    assert traced.lower(lowering_platforms=(platform,)).as_text()
