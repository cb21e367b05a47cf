"""moe_forward's values are the float64 oracle's for every format, dtype and routing; exact where the contract says."""

from __future__ import annotations

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tolerances
from cases import (
    CASES,
    DENSE,
    HALVES,
    ONE_FORMAT,
    SMALL,
    Case,
    ExpertBlocks,
    oracle_layer,
    random_inputs,
    random_routing,
    random_stack,
    set_halves,
    with_experts,
)

from jmoe import FORMATS, QuantTensor, moe_forward

pytestmark = pytest.mark.usefixtures("each_backend")

# Tests share these numbers of tokens, so that they share compiled programs. The jnp backend decodes a format before it
# chooses among widths, so what is about formats takes few widths, which compile in half the time.
TOKENS, FEW = 17, 8
TINY, RAGGED = CASES["tiny"], CASES["ragged"]

# Every format in one projection or another, for dtypes of x: what is not f32 becomes it where the decoded weights are.
_NAMES = tuple(FORMATS)
MIXED = {
    f"{'-'.join(three)}": Case("mixed formats", 256, 256, 8, 2, *three)
    for three in (tuple(_NAMES[(start + i) % len(_NAMES)] for i in range(3)) for start in range(0, len(_NAMES), 3))
}
ALL = CASES | MIXED

# Made once a case, and never changed: jmoe's arrays cannot be.
stack_of = functools.lru_cache(random_stack)
layer_of = functools.lru_cache(lambda case: oracle_layer(case, decoded=True))


def skip_what_jnp_computes_anyway(case: Case, backend: str) -> None:
    if backend == "cpu" and {case.gate, case.up, case.down} & set(DENSE):
        pytest.skip("dense stacks go through jnp, which has had its turn")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "float32") for name in (*SMALL, *ONE_FORMAT)),
        *((name, "bfloat16") for name in ("tiny", "ragged", "dense", *MIXED)),
        *((name, "float16") for name in ("tiny", "ragged", "dense")),
    ],
)
def test_every_format_and_shape_meets_the_bound_of_its_dtype(name, dtype, each_backend, rng):
    case = ALL[name]
    skip_what_jnp_computes_anyway(case, each_backend)
    x = random_inputs(rng, FEW, case.hidden_size, dtype)
    ids, weights = random_routing(rng, FEW, case)
    y = moe_forward(stack_of(case), x, ids, weights)
    assert y.dtype == x.dtype
    oracle.assert_within(y, oracle.moe(layer_of(case), x, ids, weights), tolerances.LAYER[dtype])


@pytest.mark.parametrize(
    ("case", "dtype", "tokens"),
    [
        *((TINY, "float32", tokens) for tokens in (0, 1, 4, 33, 130)),
        *((RAGGED, "float32", tokens) for tokens in (1, 33)),
        *((RAGGED, "bfloat16", tokens) for tokens in (0, 130)),
    ],
)
def test_any_number_of_tokens_meets_the_bound(case: Case, dtype, tokens, rng):
    x = random_inputs(rng, tokens, case.hidden_size, dtype)
    ids, weights = random_routing(rng, tokens, case)
    y = moe_forward(stack_of(case), x, ids, weights)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    oracle.assert_within(y, oracle.moe(layer_of(case), x, ids, weights), tolerances.LAYER[dtype])


@pytest.mark.parametrize(("experts", "tokens"), [(1, TOKENS), (8, 2), (31, TOKENS)])
def test_every_token_may_choose_every_expert(experts, tokens, rng):
    case = with_experts(RAGGED, experts, top_k=experts)
    x = random_inputs(rng, tokens, case.hidden_size)
    ids, weights = random_routing(rng, tokens, case)
    assert ids.shape == (tokens, experts)
    y = moe_forward(stack_of(case), x, ids, weights)
    oracle.assert_within(y, oracle.moe(layer_of(case), x, ids, weights), tolerances.LAYER["float32"])


def test_biases_and_the_down_scale_take_part(rng):
    """Of packed experts; each leaf by itself, and with every activation, in test_activations and test_cpu_kernels."""
    experts, inner, hidden = TINY.shape("up")
    shapes = {"gate_bias": (inner,), "up_bias": (inner,), "down_bias": (hidden,), "down_scale": ()}
    leaves = {name: rng.standard_normal((experts, *shape)).astype(np.float32) for name, shape in shapes.items()}
    stack = dataclasses.replace(stack_of(TINY), **{name: jnp.asarray(leaf) for name, leaf in leaves.items()})
    layer = dataclasses.replace(layer_of(TINY), **leaves)
    x = random_inputs(rng, FEW, hidden)
    ids, weights = random_routing(rng, FEW, TINY)
    expected = oracle.moe(layer, x, ids, weights)
    oracle.assert_within(moe_forward(stack, x, ids, weights), expected, tolerances.LAYER["float32"])
    assert oracle.nmse(oracle.moe(layer_of(TINY), x, ids, weights), expected) > tolerances.LAYER["bfloat16"].nmse


@pytest.mark.parametrize("expert", range(TINY.num_experts))
def test_one_expert_may_take_all_tokens(expert, rng):
    x = random_inputs(rng, TOKENS, TINY.hidden_size)
    _, weights = random_routing(rng, TOKENS, TINY)
    ids = np.full((TOKENS, TINY.top_k), expert, np.int32)
    y = moe_forward(stack_of(TINY), x, ids, weights)
    oracle.assert_within(y, oracle.moe(layer_of(TINY), x, ids, weights), tolerances.LAYER["float32"])


@hypothesis.given(ids=st.lists(st.integers(-1, 5), min_size=27, max_size=27))
@hypothesis.example(ids=[0] * 27)
@hypothesis.example(ids=[4] * 26 + [0])
@hypothesis.example(ids=[-1] * 26 + [4])
@hypothesis.example(ids=[5] * 27)
def test_any_routing_gives_the_oracle_s_sum(ids):
    """Every pattern of group sizes, empty slots and repeated ids, at one shape: T = 9, K = 3, E = 5."""
    case, rng = with_experts(CASES["mixed"], 5), np.random.default_rng(7)
    x = random_inputs(rng, 9, case.hidden_size)
    weights = rng.standard_normal((9, 3)).astype(np.float32)
    topk_ids = np.array(ids, np.int32).reshape(9, 3)
    y = moe_forward(stack_of(case), x, topk_ids, weights)
    oracle.assert_within(y, oracle.moe(layer_of(case), x, topk_ids, weights), tolerances.LAYER["float32"])


@hypothesis.settings(max_examples=12)
@hypothesis.given(
    tokens=st.integers(0, 20),
    experts=st.integers(1, 40),
    top_k=st.integers(0, 5),
    hidden=st.sampled_from([32, 96, 256]),
    inner=st.sampled_from([32, 160]),
    seed=st.integers(0, 2**16),
)
def test_any_shape_gives_the_oracle_s_sum(tokens, experts, top_k, hidden, inner, seed):
    rng = np.random.default_rng(seed)
    case = Case("drawn", hidden, inner, experts, top_k, "q4_0", "q5_0", "q8_0")
    x = random_inputs(rng, tokens, hidden)
    ids = rng.integers(-1, experts + 1, (tokens, top_k), np.int32)
    weights = rng.standard_normal((tokens, top_k)).astype(np.float32)
    y = moe_forward(random_stack(case), x, ids, weights)
    oracle.assert_within(y, oracle.moe(oracle_layer(case), x, ids, weights), tolerances.LAYER["float32"])


OUTSIDE = [-1, -5, TINY.num_experts, TINY.num_experts + 1, 2**31 - 1, -(2**31)]


@pytest.mark.parametrize("tokens", [2, TOKENS])
@pytest.mark.parametrize("outside", OUTSIDE)
def test_an_id_outside_contributes_exactly_nothing(outside, tokens, rng):
    stack, x = stack_of(TINY), random_inputs(rng, tokens, TINY.hidden_size)
    ids, weights = random_routing(rng, tokens, TINY)
    ids[0, 1], ids[1] = outside, outside
    # What such a slot is weighted with must not matter either: here NaN, there 0.
    poisoned, zeroed = weights.copy(), weights.copy()
    poisoned[0, 1], poisoned[1] = np.nan, np.inf
    zeroed[0, 1], zeroed[1] = 0, 0
    y = np.asarray(moe_forward(stack, x, ids, poisoned))
    assert np.all(y[1] == 0)
    np.testing.assert_array_equal(y, moe_forward(stack, x, ids, zeroed))
    oracle.assert_within(y, oracle.moe(layer_of(TINY), x, ids, zeroed), tolerances.LAYER["float32"])


@pytest.mark.parametrize(
    ("dtype", "outside"),
    [
        (np.int64, 2**32 + 1),
        (np.int64, -(2**32) + 1),
        (np.int64, -1),
        (np.uint64, 2**63 + 1),
        (np.uint64, 2**32 + 1),
        (np.uint32, 2**32 - 1),
        (np.int8, -1),
        (np.uint8, 255),
        (np.int16, 4),
    ],
)
def test_ids_of_any_integer_dtype_are_judged_before_they_are_narrowed(dtype, outside, rng):
    stack, x = stack_of(TINY), random_inputs(rng, TOKENS, TINY.hidden_size)
    ids, weights = random_routing(rng, TOKENS, TINY)
    wide, empty = ids.astype(dtype), ids.copy()
    wide[3, 0], wide[5] = outside, outside
    empty[3, 0], empty[5] = -1, -1
    np.testing.assert_array_equal(moe_forward(stack, x, wide, weights), moe_forward(stack, x, empty, weights))


def test_a_repeated_id_adds_up(rng):
    stack, x = stack_of(TINY), random_inputs(rng, TOKENS, TINY.hidden_size)
    ids, weights = random_routing(rng, TOKENS, TINY)
    ids[:, 1] = ids[:, 0]
    once = np.stack([weights.sum(axis=-1), np.zeros(TOKENS, np.float32)], axis=-1)
    y = moe_forward(stack, x, ids, weights)
    oracle.assert_within(y, oracle.moe(layer_of(TINY), x, ids, once), tolerances.LAYER["float32"])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("name", "dtype", "tokens"),
    [
        *(("tiny", "float32", tokens) for tokens in (2, TOKENS)),
        *((name, "float32", FEW) for name in ("ragged", "dense", *ONE_FORMAT)),
        *((name, "bfloat16", FEW) for name in ("tiny", "ragged", "dense", *MIXED)),
        *((name, "float16", FEW) for name in ("tiny", "ragged", "dense")),
    ],
)
def test_a_bad_token_stays_in_its_row(name, dtype, tokens, bad, each_backend, rng):
    case = ALL[name]
    skip_what_jnp_computes_anyway(case, each_backend)
    stack, x = stack_of(case), np.array(random_inputs(rng, tokens, case.hidden_size, dtype))
    ids, weights = random_routing(rng, tokens, case)
    expected = np.asarray(moe_forward(stack, x, ids, weights))
    x[1, 7] = bad
    y = np.asarray(moe_forward(stack, x, ids, weights))
    others = np.arange(tokens) != 1
    assert not np.isfinite(y[1]).all()
    np.testing.assert_array_equal(y[others], expected[others])


def test_a_bad_router_weight_stays_in_its_row(rng):
    stack, x = stack_of(TINY), random_inputs(rng, TOKENS, TINY.hidden_size)
    ids, weights = random_routing(rng, TOKENS, TINY)
    expected = np.asarray(moe_forward(stack, x, ids, weights))
    weights[4, 1] = np.nan
    y = np.asarray(moe_forward(stack, x, ids, weights))
    others = np.arange(TOKENS) != 4
    assert np.isnan(y[4]).all()
    np.testing.assert_array_equal(y[others], expected[others])


@pytest.mark.parametrize("tokens", [1, TOKENS])
@pytest.mark.parametrize("expert", range(TINY.num_experts))
def test_an_expert_that_nobody_chose_cannot_leak(expert, tokens, rng):
    """jax.lax.ragged_dot on the CPU turns every row into NaN here."""
    stack, x = stack_of(TINY), random_inputs(rng, tokens, TINY.hidden_size)
    ids, weights = random_routing(rng, tokens, TINY)
    ids = np.where(ids == expert, -1, ids)
    blocks = np.stack(list(ExpertBlocks(TINY, "down")))
    set_halves(blocks[expert].reshape(-1, FORMATS["q6_k"].block_bytes), HALVES["q6_k"][0], np.nan)
    planes = FORMATS["q6_k"].planes(*map(jnp.asarray, FORMATS["q6_k"].split(blocks)))
    poisoned = dataclasses.replace(stack, down=QuantTensor("q6_k", planes))
    np.testing.assert_array_equal(moe_forward(poisoned, x, ids, weights), moe_forward(stack, x, ids, weights))
    ids[0, 0] = expert
    assert np.isnan(moe_forward(poisoned, x, ids, weights)[0]).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_router_weights_count_as_their_f32_values(dtype, rng):
    stack, x = stack_of(TINY), random_inputs(rng, FEW, TINY.hidden_size)
    ids, weights = random_routing(rng, FEW, TINY)
    narrow = jnp.asarray(weights, dtype)
    y = moe_forward(stack, x, ids, narrow)
    assert y.dtype == jnp.float32
    oracle.assert_within(y, oracle.moe(layer_of(TINY), x, ids, narrow), tolerances.LAYER["float32"])


def test_numpy_and_jax_arguments_give_the_same_bits(rng):
    stack, x = stack_of(TINY), random_inputs(rng, TOKENS, TINY.hidden_size)
    ids, weights = random_routing(rng, TOKENS, TINY)
    y = moe_forward(stack, np.asarray(x), np.asfortranarray(ids), weights)
    np.testing.assert_array_equal(y, moe_forward(stack, x, jnp.asarray(ids), jnp.asarray(weights)))
