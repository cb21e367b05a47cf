"""route: the experts and weights that a float64 softmax and a stable sort give, with ties to the smaller index."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tolerances

from jmoe import RouterConfig, route

# E of gguf_moe.md's edge shapes, with K = 1, K = E and the usual ones.
SIZES = [(1, 1, 1), (5, 8, 2), (17, 31, 8), (4, 40, 40), (33, 128, 8), (3, 257, 6), (2, 512, 10)]


def reference(logits: np.ndarray, top_k: int, normalise: bool) -> tuple[np.ndarray, np.ndarray]:
    """ids by a stable sort of the f64 softmax, weights f64."""
    z = logits.astype(np.float64)
    exp = np.exp(z - z.max(axis=-1, keepdims=True))
    probs = exp / exp.sum(axis=-1, keepdims=True)
    ids = np.argsort(-probs, axis=-1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(probs, ids, axis=-1)
    return ids, weights / weights.sum(axis=-1, keepdims=True) if normalise else weights


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), SIZES)
def test_ids_and_weights_are_those_of_a_float64_softmax(tokens, experts, top_k, normalise, rng):
    logits = rng.standard_normal((tokens, experts)).astype(np.float32) * 3
    ids, weights = route(logits, RouterConfig(top_k, normalise=normalise))
    expected_ids, expected_weights = reference(logits, top_k, normalise)
    assert (ids.dtype, weights.dtype) == (jnp.int32, jnp.float32)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(weights, expected_weights, rtol=tolerances.ROUTER_WEIGHT_RTOL, atol=0)


def test_ties_go_to_the_smaller_index():
    logits = jnp.array([[0.0, 1.0, 1.0, -1.0, 1.0], [2.0, 2.0, 2.0, 2.0, 2.0], [0.0, -0.0, 0.0, 1.0, 0.0]])
    ids, weights = route(logits, RouterConfig(3))
    np.testing.assert_array_equal(ids, [[1, 2, 4], [0, 1, 2], [3, 0, 1]])
    np.testing.assert_array_equal(weights[1], np.full(3, np.float32(1) / np.float32(3)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_logits_are_routed_as_their_f32_values(dtype, rng):
    logits = jnp.asarray(rng.standard_normal((9, 16)), dtype)
    for got, expected in zip(
        route(logits, RouterConfig(4)), route(logits.astype(jnp.float32), RouterConfig(4)), strict=True
    ):
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)


def test_normalising_divides_by_the_sum_of_the_chosen(rng):
    logits = rng.standard_normal((50, 60)).astype(np.float32)
    _, normalised = route(logits, RouterConfig(8))
    _, plain = route(logits, RouterConfig(8, normalise=False))
    plain = oracle.as_f64(plain)
    assert np.all(plain.sum(axis=-1) < 1 - tolerances.ROUTER_WEIGHT_RTOL)
    expected = plain / plain.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(normalised, expected, rtol=tolerances.ROUTER_WEIGHT_RTOL, atol=0)


def test_a_vanishing_sum_is_clamped_as_llama_cpp_does():
    # One of 20,000 equal experts has probability 5e-5, less than f16's smallest normal number 2^-14.
    _, weights = route(jnp.zeros((1, 20_000)), RouterConfig(1))
    np.testing.assert_allclose(weights, [[2.0**14 / 20_000]], rtol=tolerances.ROUTER_WEIGHT_RTOL)


def test_logits_far_apart_overflow_nothing():
    ids, weights = route(jnp.array([[-3e38, 3e38, 0.0, -jnp.inf]]), RouterConfig(2))
    np.testing.assert_array_equal(ids, [[1, 0]])
    np.testing.assert_array_equal(weights, [[1, 0]])


@pytest.mark.parametrize(("tokens", "top_k"), [(0, 2), (0, 0), (3, 0)])
def test_no_tokens_or_no_slots_give_empty_arrays(tokens, top_k):
    ids, weights = route(jnp.zeros((tokens, 4)), RouterConfig(top_k))
    assert ids.shape == weights.shape == (tokens, top_k)
    assert (ids.dtype, weights.dtype) == (jnp.int32, jnp.float32)


def test_a_bad_token_leaves_the_others_alone(rng):
    logits = rng.standard_normal((4, 8)).astype(np.float32)
    expected = route(logits, RouterConfig(2))
    logits[1, 3], logits[2] = np.nan, -np.inf
    for got, want in zip(route(logits, RouterConfig(2)), expected, strict=True):
        np.testing.assert_array_equal(got[jnp.array([0, 3])], want[jnp.array([0, 3])])


def test_jit_and_vmap_give_the_same_bits(rng):
    logits, config = jnp.asarray(rng.standard_normal((3, 5, 8)), jnp.float32), RouterConfig(2)
    one_by_one = [route(row, config) for row in logits]
    batched = jax.vmap(lambda z: route(z, config))(logits)
    jitted = [jax.jit(route, static_argnums=1)(row, config) for row in logits]
    for part in (0, 1):
        expected = np.stack([result[part] for result in one_by_one])
        np.testing.assert_array_equal(batched[part], expected)
        np.testing.assert_array_equal(np.stack([result[part] for result in jitted]), expected)


@pytest.mark.parametrize("normalise", [True, False])
def test_the_gradient_to_the_logits_is_that_of_the_float64_formula(normalise, rng):
    logits, cotangent = rng.standard_normal((3, 6)).astype(np.float32), rng.standard_normal((3, 2))
    loss = lambda z: jnp.sum(route(z, RouterConfig(2, normalise=normalise))[1] * jnp.float32(cotangent))  # noqa: E731
    gradient = jax.grad(loss)(jnp.asarray(logits))
    expected = np.zeros(logits.shape)
    for at in np.ndindex(*logits.shape):
        step = np.zeros(logits.shape)
        step[at] = 1e-4
        above, below = (reference(logits + sign * step, 2, normalise)[1] for sign in (1, -1))
        expected[at] = np.sum((above - below) * cotangent) / 2e-4
    oracle.assert_within(gradient.ravel(), expected.ravel(), tolerances.GRADIENT)


@hypothesis.given(
    logits=st.lists(st.lists(st.integers(-40, 40), min_size=7, max_size=7, unique=True), min_size=3, max_size=3),
    permutation=st.permutations(range(7)),
)
def test_permuting_the_experts_permutes_the_ids(logits, permutation):
    # Quarters: distinct logits stay distinct probabilities in f32.
    logits = np.array(logits, np.float32) / 4
    ids, weights = route(logits, RouterConfig(3))
    permuted_ids, permuted_weights = route(logits[:, permutation], RouterConfig(3))
    np.testing.assert_array_equal(np.array(permutation)[permuted_ids], ids)
    # The sum over the experts runs in another order.
    np.testing.assert_allclose(permuted_weights, weights, rtol=tolerances.ROUTER_WEIGHT_RTOL, atol=0)


@hypothesis.given(
    st.lists(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 9.0]), min_size=6, max_size=6), min_size=2, max_size=2)
)
def test_ids_are_distinct_and_ordered_by_weight_then_index(logits):
    ids, weights = (np.asarray(a) for a in route(np.array(logits, np.float32), RouterConfig(4, normalise=False)))
    for row_ids, row_weights in zip(ids, weights, strict=True):
        assert len(set(row_ids)) == 4
        assert sorted(zip(-row_weights, row_ids, strict=True)) == list(zip(-row_weights, row_ids, strict=True))


@pytest.mark.parametrize("top_k", [-1, 2.0, True, None])
def test_a_router_refuses_a_top_k_that_is_no_count(top_k):
    with pytest.raises(ValueError, match=r"top_k must be an int >= 0, got"):
        RouterConfig(top_k)


def test_a_router_refuses_a_normalise_that_is_no_bool():
    with pytest.raises(ValueError, match=r"normalise must be True or False, got 1"):
        RouterConfig(2, normalise=1)  # pyright: ignore[reportArgumentType]


def test_more_slots_than_experts_is_an_error_in_our_words():
    with pytest.raises(ValueError, match=r"top_k=5 .* logits float32\[2,4\], which hold 4 experts.*Lower RouterConfig"):
        route(jnp.zeros((2, 4)), RouterConfig(5))


@pytest.mark.parametrize("config", [2, None, {"top_k": 2}])
def test_what_is_no_config_is_refused(config):
    with pytest.raises(TypeError, match=rf"config must be a RouterConfig, got {type(config).__name__}"):
        route(jnp.zeros((2, 4)), config)


@pytest.mark.parametrize(
    ("logits", "error", "message"),
    [
        (jnp.zeros(4), AssertionError, r"logits must be .*\[\?,\?\], got float32\[4\]"),
        (jnp.zeros((2, 3, 4)), AssertionError, r"got float32\[2,3,4\]"),
        (jnp.zeros((2, 4), jnp.int32), AssertionError, r"float32 or bfloat16 or float16.*got int32\[2,4\]"),
        (np.zeros((2, 4)), AssertionError, r"got float64\[2,4\]"),
        (np.zeros((2, 4), ">f4"), AssertionError, r"got >f4\[2,4\]"),
        ([[1.0, 2.0]], TypeError, r"logits must be an array, got list"),
    ],
)
def test_logits_of_a_wrong_shape_or_dtype_are_refused(logits, error, message):
    with pytest.raises(error, match=message):
        route(logits, RouterConfig(1))
