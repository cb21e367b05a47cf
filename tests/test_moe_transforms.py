"""moe_forward under jit, vmap, grad and scan, with layer=, in x64 mode: pure, without retracing, the same numbers."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tolerances
import x64_probe
from cases import CASES, PROJECTIONS, Case, oracle_layer, random_inputs, random_routing, random_stack

from jmoe import ExpertStack, moe_forward

MIXED, RAGGED, DENSE = CASES["mixed"], CASES["ragged"], CASES["dense"]
# Few tokens and many may take different paths through a backend.
FEW, MANY = 2, 8
each_backend = pytest.mark.usefixtures("each_backend")


def arguments(rng: np.random.Generator, case: Case, tokens: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, (ids, weights) = random_inputs(rng, tokens, case.hidden_size), random_routing(rng, tokens, case)
    return x, jnp.asarray(ids), jnp.asarray(weights)


@each_backend
@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_inside_jit(tokens, rng):
    stack, args = random_stack(MIXED), arguments(rng, MIXED, tokens)
    oracle.assert_within(
        jax.jit(moe_forward)(stack, *args), oracle.moe(oracle_layer(MIXED), *args), tolerances.LAYER["float32"]
    )


@each_backend
@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_vmap_over_the_tokens_arguments(tokens, rng):
    stack, batch = random_stack(MIXED), [arguments(rng, MIXED, tokens) for _ in range(3)]
    y = jax.vmap(partial(moe_forward, stack))(*map(jnp.stack, zip(*batch, strict=True)))
    for row, args in zip(y, batch, strict=True):
        oracle.assert_within(row, oracle.moe(oracle_layer(MIXED), *args), tolerances.LAYER["float32"])


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_vmap_over_the_stack(tokens, rng):
    stacks = [random_stack(RAGGED, seed) for seed in (1, 2)]
    args = arguments(rng, RAGGED, tokens)
    y = jax.vmap(moe_forward, in_axes=(0, None, None, None))(tree_stack(stacks), *args)
    for row, seed in zip(y, (1, 2), strict=True):
        oracle.assert_within(row, oracle.moe(oracle_layer(RAGGED, seed), *args), tolerances.LAYER["float32"])


@each_backend
@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_vmap_over_the_routing_alone(tokens, rng):
    stack, (x, _, weights) = random_stack(RAGGED), arguments(rng, RAGGED, tokens)
    ids = jnp.asarray(rng.integers(-1, RAGGED.num_experts + 1, (3, *weights.shape)), jnp.int32)
    y = jax.vmap(lambda ids: moe_forward(stack, x, ids, weights))(ids)
    for row, one in zip(y, ids, strict=True):
        oracle.assert_within(row, oracle.moe(oracle_layer(RAGGED), x, one, weights), tolerances.LAYER["float32"])


def central_difference(f: Callable[[np.ndarray], np.ndarray], at: np.ndarray, axis_sizes: int) -> np.ndarray:
    """d f(at)[t] / d at[t, i], f64[T, axis_sizes], of an f that treats the rows t apart."""
    steps = 1e-4 * np.eye(axis_sizes)
    return np.stack([(f(at + step) - f(at - step)) / 2e-4 for step in steps], axis=-1)


@pytest.mark.parametrize(("tokens", "transform"), [(FEW, lambda f: f), (MANY, jax.jit)])
def test_gradients_to_x_and_topk_weights_are_those_of_the_float64_oracle(tokens, transform, rng):
    stack, (x, ids, weights) = random_stack(RAGGED), arguments(rng, RAGGED, tokens)
    ids = ids.at[0, 0].set(-1).at[1, 2].set(ids[1, 0])
    cotangent = rng.standard_normal(x.shape).astype(np.float32)
    loss = lambda x, w: jnp.sum(moe_forward(stack, x, ids, w) * cotangent)  # noqa: E731
    to_x, to_weights = transform(jax.grad(loss, argnums=(0, 1)))(x, weights)

    layer = oracle_layer(RAGGED, decoded=True)
    by_token = lambda x, w: np.sum(oracle.moe(layer, x, ids, w) * cotangent, axis=-1)  # noqa: E731
    x, weights = oracle.as_f64(x), oracle.as_f64(weights)
    expected = central_difference(lambda x: by_token(x, weights), x, x.shape[-1])
    oracle.assert_within(to_x, expected, tolerances.GRADIENT)
    expected = central_difference(lambda w: by_token(x, w), weights, weights.shape[-1])
    oracle.assert_within(to_weights, expected, tolerances.GRADIENT)
    assert to_weights[0, 0] == 0


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_gradients_to_dense_projections_are_those_of_the_float64_oracle(tokens, rng):
    args = arguments(rng, DENSE, tokens)
    cotangent = rng.standard_normal(args[0].shape).astype(np.float32)
    stack = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), random_stack(DENSE))
    gradient = jax.grad(lambda s: jnp.sum(moe_forward(s, *args) * cotangent))(stack)
    weights = {name: oracle.as_f64(getattr(stack, name)) for name in PROJECTIONS}

    def loss(name: str, step: np.ndarray) -> float:
        moved = {**weights, name: weights[name] + step}
        gate, up, down = (oracle.Weight("float64", moved[name]) for name in PROJECTIONS)
        return float(np.sum(oracle.moe(oracle.Layer(gate, up, down), *args) * cotangent))

    for name in PROJECTIONS:
        # In a few random directions: all coordinates would be thousands.
        directions = rng.standard_normal((8, *weights[name].shape))
        expected = [(loss(name, 1e-5 * d) - loss(name, -1e-5 * d)) / 2e-5 for d in directions]
        measured = [np.sum(oracle.as_f64(getattr(gradient, name)) * d) for d in directions]
        oracle.assert_within(measured, expected, tolerances.GRADIENT)


def test_a_bad_token_does_not_reach_the_gradients_of_others(rng):
    stack, (x, ids, weights) = random_stack(MIXED), arguments(rng, MIXED, MANY)
    loss = lambda x, w: jnp.sum(moe_forward(stack, x, ids, w))  # noqa: E731
    expected = jax.grad(loss, argnums=(0, 1))(x, weights)
    others = np.arange(MANY) != 3
    for got, want in zip(jax.grad(loss, argnums=(0, 1))(x.at[3, 0].set(jnp.nan), weights), expected, strict=True):
        assert np.isnan(got[3]).any()
        np.testing.assert_array_equal(got[others], want[others])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gradients_have_the_dtype_of_what_they_belong_to(dtype, rng):
    stack, (x, ids, weights) = random_stack(MIXED), arguments(rng, MIXED, MANY)
    loss = lambda x, w: jnp.sum(moe_forward(stack, x, ids, w).astype(jnp.float32))  # noqa: E731
    narrow = jax.grad(loss, argnums=(0, 1))(x.astype(dtype), weights)
    exact = jax.grad(loss, argnums=(0, 1))(x.astype(dtype).astype(jnp.float32), weights)
    assert [g.dtype for g in narrow] == [dtype, jnp.float32]
    for got, want in zip(narrow, exact, strict=True):
        oracle.assert_within(got, want, tolerances.LAYER[jnp.dtype(dtype).name])


@each_backend
def test_layer_picks_one_of_a_stack_of_layers(rng):
    layer_picks_one_of_a_stack_of_layers(MIXED, FEW, rng)


def test_layer_picks_one_where_a_projection_is_dense(rng):
    layer_picks_one_of_a_stack_of_layers(CASES["dense-down"], MANY, rng)


def layer_picks_one_of_a_stack_of_layers(case: Case, tokens: int, rng: np.random.Generator) -> None:
    seeds, args = (1, 2, 3), arguments(rng, case, tokens)
    layers = tree_stack([random_stack(case, seed) for seed in seeds])
    expected = [oracle.moe(oracle_layer(case, seed), *args) for seed in seeds]
    traced = jax.jit(lambda layer: moe_forward(layers, *args, layer=layer))
    _, scanned = jax.lax.scan(lambda _, layer: (None, moe_forward(layers, *args, layer=layer)), None, jnp.arange(3))
    for layer, y in enumerate(expected):
        oracle.assert_within(moe_forward(layers, *args, layer=layer), y, tolerances.LAYER["float32"])
        oracle.assert_within(traced(layer), y, tolerances.LAYER["float32"])
        oracle.assert_within(scanned[layer], y, tolerances.LAYER["float32"])


def test_equal_shapes_neither_trace_nor_compile_again(rng):
    stack, other = random_stack(MIXED, 1), random_stack(MIXED, 2)
    # Random data is made outside the count: jnp.asarray may compile.
    first, second = arguments(rng, MIXED, 11), arguments(rng, MIXED, 11)
    with counting_compilations() as cold:
        moe_forward(stack, *first).block_until_ready()
    with counting_compilations() as warm:
        moe_forward(other, *second).block_until_ready()
    assert cold
    assert warm == []


def test_another_layer_index_does_not_compile_again(rng):
    layers = tree_stack([random_stack(MIXED, seed) for seed in (1, 2)])
    args = arguments(rng, MIXED, 11)
    moe_forward(layers, *args, layer=0).block_until_ready()
    with counting_compilations() as warm:
        moe_forward(layers, *args, layer=1).block_until_ready()
    assert warm == []


@each_backend
@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_two_calls_give_the_same_bits_and_leave_their_arguments_alive(tokens, rng):
    stack, args = random_stack(MIXED), arguments(rng, MIXED, tokens)
    before = jax.tree.map(np.array, (stack, args))
    first, second = moe_forward(stack, *args), moe_forward(stack, *args)
    np.testing.assert_array_equal(first, second)
    jax.tree.map(np.testing.assert_array_equal, (stack, args), before)


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_debug_nans_finds_none_where_the_result_has_none(tokens, rng):
    stack, (x, ids, weights) = random_stack(MIXED), arguments(rng, MIXED, tokens)
    ids = ids.at[0].set(-1)
    expected = moe_forward(stack, x, ids, weights)
    with jax.debug_nans(True):
        np.testing.assert_array_equal(moe_forward(stack, x, ids, weights), expected)
        with pytest.raises(FloatingPointError):
            moe_forward(stack, x.at[1, 0].set(jnp.nan), ids, weights)


def test_x64_mode_changes_no_dtype_and_no_bit():
    run = subprocess.run(
        [sys.executable, x64_probe.__file__],
        env={**os.environ, "JAX_ENABLE_X64": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n")[0] == "x64 True"
    assert run.stdout.split("\n")[1:-1] == x64_probe.digests()


def tree_stack(stacks: list[ExpertStack]) -> ExpertStack:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *stacks)


@contextlib.contextmanager
def counting_compilations() -> Iterator[list[str]]:
    """Collects the events of tracing, lowering and compiling while it is open."""
    events: list[str] = []
    _LISTENERS.append(events)
    try:
        yield events
    finally:
        _LISTENERS.remove(events)


_LISTENERS: list[list[str]] = []


def _listen(event: str, duration_secs: float, **_: object) -> None:
    if event.startswith("/jax/core/compile"):
        for events in _LISTENERS:
            events.append(event)


# jax offers no way to take a listener away again: one for all tests.
jax.monitoring.register_event_duration_secs_listener(_listen)
