"""Every router against the float64 oracle, by both ways of choosing; test_routing.py holds softmax's own properties."""

from __future__ import annotations

from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import router_oracle
import tolerances

from jmoe import RouterConfig, route, routing

# Name -> (the config's fields, whether there is a selection bias). The models that route so stand behind.
ROUTERS: dict[str, tuple[dict[str, Any], bool]] = {
    "softmax": ({"gating": "softmax"}, False),  # Qwen3, Mixtral
    "softmax-plain": ({"gating": "softmax", "normalise": False}, False),  # OLMoE, Qwen2-MoE
    "softmax-biased": ({"gating": "softmax"}, True),  # Ernie 4.5
    "softmax-scaled": ({"gating": "softmax", "normalise": False, "scale": 16.0}, False),  # DeepSeek-V2
    "sigmoid-biased": ({"gating": "sigmoid"}, True),  # MiniMax-M2
    "sigmoid-scaled": ({"gating": "sigmoid", "scale": 2.5}, True),  # GLM-4.5, Nemotron 3
    "sigmoid-plain": ({"gating": "sigmoid", "normalise": False}, False),
    "softmax-top-k": ({"gating": "softmax_top_k", "normalise": False}, False),  # gpt-oss
    "sqrt-softplus": ({"gating": "sqrt_softplus", "scale": 1.5}, True),  # DeepSeek-V4
    "on-logits": ({"gating": "sigmoid", "normalise": False, "select_on": "logits"}, False),  # Llama 4
}
GROUPS = {"softmax-plain": 2, "sigmoid-scaled": 4, "sqrt-softplus": 3}
# E of the files that people run and of the edge shapes, with their K.
SIZES = [(1, 1, 1), (5, 40, 8), (4, 60, 4), (3, 72, 6), (2, 160, 8), (2, 257, 8), (2, 384, 8), (9, 31, 31)]
WAYS = ["_choose_by_top_k", "_choose_by_rank"]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """One way of choosing on every platform, in routers compiled for this test alone."""
    monkeypatch.setattr(routing, "_choose", getattr(routing, request.param))
    compiled: Any = routing._route
    compiled.clear_cache()
    yield request.param
    compiled.clear_cache()


def inputs(rng: np.random.Generator, tokens: int, experts: int, biased: bool) -> tuple[np.ndarray, np.ndarray | None]:
    logits = rng.standard_normal((tokens, experts)).astype(np.float32) * 3
    return logits, rng.standard_normal(experts).astype(np.float32) / 4 if biased else None


def check(logits: np.ndarray, bias: np.ndarray | None, top_k: int, **fields: Any) -> None:
    ids, weights = route(logits, RouterConfig(top_k, **fields), bias)
    expected_ids, expected = router_oracle.route(logits, top_k, bias=bias, **fields)
    assert (ids.dtype, weights.dtype) == (jnp.int32, jnp.float32)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(weights, expected, rtol=tolerances.ROUTER_WEIGHT_RTOL, atol=0)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize(("tokens", "experts", "top_k"), SIZES[1:3])
def test_ids_and_weights_are_the_oracle_s(name, tokens, experts, top_k, rng):
    fields, biased = ROUTERS[name]
    check(*inputs(rng, tokens, experts, biased), top_k, **fields)


@pytest.mark.parametrize(("tokens", "experts", "top_k"), SIZES)
def test_both_ways_of_choosing_are_the_oracle_s_at_every_size(way, tokens, experts, top_k, rng):
    fields, biased = ROUTERS["sigmoid-scaled"]
    check(*inputs(rng, tokens, experts, biased), top_k, **fields)


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize(("experts", "groups"), [(72, 4), (256, 8), (6, 6)])
def test_only_the_best_groups_are_chosen_from(way, name, experts, groups, rng):
    fields, biased = ROUTERS[name]
    used = min(GROUPS[name], groups)
    top_k = min(6, used * experts // groups)
    check(*inputs(rng, 7, experts, biased), top_k, group_count=groups, groups_used=used, **fields)


def test_the_bias_chooses_and_does_not_weigh():
    logits = jnp.array([[2.0, 1.0, 0.0, -1.0]])
    bias = jnp.array([0.0, 0.0, 0.0, 5.0])
    ids, weights = route(logits, RouterConfig(2, normalise=False, gating="sigmoid"), bias)
    np.testing.assert_array_equal(ids, [[3, 0]])
    np.testing.assert_allclose(weights, [router_oracle.sigmoid(np.array([-1.0, 2.0]))], rtol=1e-6)


def test_ties_and_zeros_of_both_signs_go_to_the_smaller_index(way):
    logits = np.array([[0.0, -0.0, 1.0, 0.0, 1.0], [-0.0, 0.0, -0.0, 0.0, -1.0]], np.float32)
    ids, _ = route(logits, RouterConfig(4, normalise=False, gating="sigmoid", select_on="logits"))
    np.testing.assert_array_equal(ids, [[2, 4, 0, 1], [0, 1, 2, 3]])


def test_ties_among_groups_go_to_the_smaller_group(way):
    ids, _ = route(jnp.zeros((1, 12)), RouterConfig(4, gating="sigmoid", group_count=4, groups_used=2))
    np.testing.assert_array_equal(ids, [[0, 1, 2, 3]])


@pytest.mark.parametrize("select_on", ["probs", "logits"])
def test_ids_are_distinct_whatever_the_row_holds(way, select_on):
    odd = np.array([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, -3e38], np.float32)
    logits = np.random.default_rng(5).choice(odd, (64, 8))
    ids, weights = route(logits, RouterConfig(8, gating="sigmoid", select_on=select_on, normalise=False))
    np.testing.assert_array_equal(np.sort(ids, axis=-1), np.tile(np.arange(8), (64, 1)))
    # NaN comes first, and its weight is NaN: it shows.
    np.testing.assert_array_equal(np.isnan(weights).sum(axis=-1), np.isnan(logits).sum(axis=-1))
    np.testing.assert_array_equal(np.sort(np.isnan(weights)[:, ::-1], axis=-1), np.isnan(weights)[:, ::-1])


@pytest.mark.parametrize("name", ROUTERS)
def test_given_ids_get_the_router_s_weights(name, rng):
    fields, _ = ROUTERS[name]
    logits, _ = inputs(rng, 5, 12, False)
    given = np.stack([rng.permutation(12)[:3] for _ in range(5)])
    ids, weights = route(logits, RouterConfig(3, **fields), topk_ids=given)
    np.testing.assert_array_equal(ids, given)
    expected = router_oracle.route(logits, 3, ids=given, **fields)[1]
    np.testing.assert_allclose(weights, expected, rtol=tolerances.ROUTER_WEIGHT_RTOL, atol=0)


@pytest.mark.parametrize("name", ["softmax", "sigmoid-scaled", "softmax-top-k"])
@pytest.mark.parametrize("outside", [-1, 12, 2**32 + 1])
def test_given_ids_outside_weigh_nothing_and_count_in_no_sum(name, outside, rng):
    fields, _ = ROUTERS[name]
    logits, _ = inputs(rng, 2, 12, False)
    given = np.array([[4, outside, 7], [outside, outside, outside]])
    _, weights = route(logits, RouterConfig(3, **fields), topk_ids=given)
    alone = route(logits, RouterConfig(2, **fields), topk_ids=given[:, [0, 2]])[1]
    np.testing.assert_array_equal(weights[:, [0, 2]], alone)
    np.testing.assert_array_equal(weights[:, 1], 0)
    np.testing.assert_array_equal(weights[1], 0)


@pytest.mark.parametrize("name", ["softmax", "sigmoid-scaled", "softmax-top-k", "sqrt-softplus"])
def test_the_gradient_to_the_logits_is_the_oracle_s(way, name, rng):
    fields, biased = ROUTERS[name]
    logits, bias = inputs(rng, 2, 6, biased)
    cotangent = rng.standard_normal((2, 2))
    config = RouterConfig(2, **fields)
    gradient = jax.grad(lambda z: jnp.sum(route(z, config, bias)[1] * jnp.float32(cotangent)))(jnp.asarray(logits))
    expected = np.zeros(logits.shape)
    for at in np.ndindex(*logits.shape):
        step = np.zeros(logits.shape)
        step[at] = 1e-4
        ends = (router_oracle.route(logits + s * step, 2, bias=bias, **fields)[1] for s in (1, -1))
        above, below = ends
        expected[at] = np.sum((above - below) * cotangent) / 2e-4
    oracle.assert_within(gradient.ravel(), expected.ravel(), tolerances.GRADIENT)


@pytest.mark.parametrize("gating", routing.GATINGS)
def test_logits_far_out_give_finite_weights_and_gradients(gating):
    logits = jnp.array([[-500.0, -90.0, 0.0, 90.0, 500.0]])
    config = RouterConfig(5, normalise=False, gating=gating)
    assert np.isfinite(route(logits, config)[1]).all()
    assert np.isfinite(jax.grad(lambda z: jnp.sum(route(z, config)[1][:, 1]))(logits)).all()


@pytest.mark.parametrize("name", ["softmax", "sigmoid-scaled", "softmax-top-k"])
def test_jit_and_vmap_give_the_same_experts_and_weights(way, name, rng):
    fields, biased = ROUTERS[name]
    config = RouterConfig(3, **fields)
    logits, bias = inputs(rng, 12, 8, biased)
    batch = jnp.asarray(logits.reshape(3, 4, 8))
    expected = [np.stack(part) for part in zip(*(route(z, config, bias) for z in batch), strict=True)]
    batched = jax.vmap(lambda z: route(z, config, bias))(batch)
    jitted = jax.jit(lambda z: jax.lax.map(lambda z: route(z, config, bias), z))(batch)
    for ids, weights in (batched, jitted):
        np.testing.assert_array_equal(ids, expected[0])
        # XLA may fuse the sums of exponentials in another order: with jax 0.12 it does.
        np.testing.assert_allclose(weights, expected[1], rtol=5e-7)


@pytest.mark.parametrize(
    ("tokens", "experts", "sorts"), [(1, 128, False), (16, 256, False), (512, 128, True), (8192, 384, True)]
)
def test_on_a_gpu_few_comparisons_are_counted_and_many_sorted(tokens, experts, sorts):
    logits = jax.ShapeDtypeStruct((tokens, experts), jnp.float32)
    traced = jax.jit(lambda z: route(z, RouterConfig(8))).trace(logits)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert ("top_k" in text or "sort" in text) == sorts


@hypothesis.given(data=st.data(), name=st.sampled_from(sorted(ROUTERS)))
def test_ids_are_distinct_weights_sum_and_permuted_experts_permute_ids(data, name):
    fields, biased = ROUTERS[name]
    # Quarters: distinct logits stay distinct in every gating, so no tie is broken by index.
    row = st.lists(st.integers(-24, 24), min_size=7, max_size=7, unique=True)
    logits = np.array(data.draw(st.lists(row, min_size=3, max_size=3)), np.float32) / 4
    bias = np.full(7, 0.25, np.float32) if biased else None
    config = RouterConfig(3, **fields)
    ids, weights = map(np.asarray, route(logits, config, bias))
    assert all(len(set(chosen)) == 3 for chosen in ids)
    if config.normalise or config.gating == "softmax_top_k":
        np.testing.assert_allclose(weights.sum(axis=-1), config.scale, rtol=tolerances.ROUTER_WEIGHT_RTOL)
    permutation = np.array(data.draw(st.permutations(range(7))))
    permuted_ids, permuted = route(logits[:, permutation], config, bias)
    np.testing.assert_array_equal(permutation[permuted_ids], ids)
    np.testing.assert_allclose(permuted, weights, rtol=tolerances.ROUTER_WEIGHT_RTOL, atol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gating": "relu"}, r"gating must be one of 'softmax', .*, got 'relu'"),
        ({"gating": 2}, r"gating must be one of .*, got 2"),
        ({"select_on": "bias"}, r"select_on must be one of 'probs', 'logits', got 'bias'"),
        ({"scale": float("nan")}, r"scale must be a finite number, got nan"),
        ({"scale": "2"}, r"scale must be a finite number, got '2'"),
        ({"scale": True}, r"scale must be a finite number, got True"),
        ({"group_count": 0}, r"group_count must be an int >= 1, got 0"),
        ({"group_count": 4, "groups_used": 5}, r"groups_used must be at most group_count=4, got 5"),
        ({"groups_used": 2}, r"groups_used must be at most group_count=1, got 2"),
        ({"groups_used": True}, r"groups_used must be an int >= 1, got True"),
    ],
)
def test_a_config_names_the_field_that_is_wrong(fields, message):
    with pytest.raises(ValueError, match=message):
        RouterConfig(2, **fields)


@pytest.mark.parametrize(
    ("config", "bias", "ids", "error", "message"),
    [
        (RouterConfig(2, group_count=3), None, None, ValueError, r"group_count=3 must divide the 8 experts"),
        (
            RouterConfig(5, group_count=4, groups_used=2),
            None,
            None,
            ValueError,
            r"top_k=5 .* groups_used=2 .* hold 4 of 8",
        ),
        (
            RouterConfig(2),
            np.zeros(7, np.float32),
            None,
            AssertionError,
            r"selection_bias must be .*\[8\], got .*\[7\]",
        ),
        (RouterConfig(2), np.zeros(8, np.int32), None, AssertionError, r"got int32\[8\]"),
        (RouterConfig(2), [0.0] * 8, None, TypeError, r"selection_bias must be an array, got list"),
        (RouterConfig(2, select_on="logits"), np.zeros(8, np.float32), None, ValueError, r"ranks the raw logits"),
        (RouterConfig(2), np.zeros(8, np.float32), np.zeros((3, 2), np.int32), ValueError, r"is the choice already"),
        (RouterConfig(2), None, np.zeros((3, 3), np.int32), AssertionError, r"topk_ids must be integer\[3,2\]"),
        (RouterConfig(2), None, np.zeros((3, 2), np.float32), AssertionError, r"got float32\[3,2\]"),
    ],
)
def test_what_does_not_fit_the_logits_is_refused(config, bias, ids, error, message):
    with pytest.raises(error, match=message):
        route(jnp.zeros((3, 8)), config, bias, topk_ids=ids)
