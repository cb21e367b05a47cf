"""Activations, biases, scales and where the weight goes: moe_forward against the float64 oracle."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tolerances

from jmoe import Activation, ExpertStack, moe_forward, which_backend
from jmoe.activations import NAMES, as_activation, sigmoid_gate
from pallas_kernels import Semantics
from pallas_kernels.semantics import activate

E, H, I, T, K = 5, 64, 96, 5, 3
ACTIVATIONS = [name if name != "swiglu_clamped" else Activation(name, 1.5) for name in NAMES]


def make_layer(rng: np.random.Generator, activation: str | Activation) -> tuple[oracle.Layer, ExpertStack]:
    """A dense layer with every optional leaf, its gate values large enough that limits bite."""
    gated = activation != "relu2"
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    gate, up, down = 0.6 * draw(E, I, H), 0.6 * draw(E, I, H), 0.1 * draw(E, H, I)
    optional = {"up_bias": draw(E, I), "down_bias": draw(E, H), "down_scale": draw(E)}
    if gated:
        optional["gate_bias"] = draw(E, I)
    weight = lambda array: oracle.Weight("float32", array)  # noqa: E731
    layer = oracle.Layer(weight(gate) if gated else None, weight(up), weight(down), **optional)
    leaves = {name: jnp.asarray(array) for name, array in optional.items()}
    return layer, ExpertStack(gate if gated else None, up, down, **leaves)


def routing(rng: np.random.Generator, tokens: int = T) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, ids with one outside and one given twice, and weights."""
    ids = rng.integers(0, E, (tokens, K)).astype(np.int32)
    ids[0] = (1, 1, -1)
    return rng.standard_normal((tokens, H)).astype(np.float32), ids, rng.random((tokens, K)).astype(np.float32)


@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_a_layer_with_biases_and_scales_is_the_float64_formula(activation, weight_on, rng):
    layer, stack = make_layer(rng, activation)
    x, ids, weights = routing(rng)
    y = moe_forward(stack, x, ids, weights, activation=activation, weight_on=weight_on)
    name, limit = activation if isinstance(activation, Activation) else (activation, None)
    expected = oracle.moe(layer, x, ids, weights, name, limit=limit, weight_on=weight_on)
    oracle.assert_within(y, expected, tolerances.LAYER["float32"])


@pytest.mark.parametrize("leaf", ["gate_bias", "up_bias", "down_bias", "down_scale"])
def test_each_optional_leaf_counts_by_itself(leaf, rng):
    layer, stack = make_layer(rng, "silu")
    names = ("gate_bias", "up_bias", "down_bias", "down_scale")
    others = {name: None for name in names if name != leaf}
    x, ids, weights = routing(rng)
    y = moe_forward(replace(stack, **others), x, ids, weights)
    oracle.assert_within(y, oracle.moe(replace(layer, **others), x, ids, weights), tolerances.LAYER["float32"])
    without = moe_forward(replace(stack, **dict.fromkeys(names)), x, ids, weights)
    assert oracle.nmse(without, y) > 1e-4


@pytest.mark.parametrize("activation", ["swiglu_oai", "relu2"])
def test_vmap_and_scan_over_layers_give_what_single_calls_give(activation, rng):
    x, ids, weights = routing(rng)
    stacks = [make_layer(rng, activation)[1] for _ in range(2)]
    expected = [moe_forward(stack, x, ids, weights, activation=activation, weight_on="input") for stack in stacks]
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stacks)

    def of_layer(layer):
        return moe_forward(both, x, ids, weights, activation=activation, weight_on="input", layer=layer)

    mapped = jax.vmap(of_layer)(jnp.arange(2))
    _, scanned = jax.lax.scan(lambda carry, layer: (carry, of_layer(layer)), 0, jnp.arange(2))
    for got in (mapped, scanned):
        np.testing.assert_allclose(got, np.stack(expected), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("activation", ["swiglu_oai", "relu2"])
def test_gradients_are_those_of_the_float64_formula(activation, rng):
    layer, stack = make_layer(rng, activation)
    x, ids, weights = routing(rng, tokens=2)
    cotangent, direction = rng.standard_normal((2, 2, H)).astype(np.float32)

    def loss(x, weights, down_bias):
        bent = replace(stack, down_bias=down_bias)
        return jnp.sum(moe_forward(bent, x, ids, weights, activation=activation, weight_on="input") * cotangent)

    def exact(step: float) -> float:
        y = oracle.moe(layer, oracle.as_f64(x) + step * direction, ids, weights, activation, weight_on="input")
        return float(np.sum(y * cotangent))

    gradient, by_weights, by_bias = jax.grad(loss, argnums=(0, 1, 2))(x, weights, stack.down_bias)
    central = (exact(1e-6) - exact(-1e-6)) / 2e-6
    np.testing.assert_allclose(np.sum(oracle.as_f64(gradient) * direction), central, rtol=1e-4)
    assert np.isfinite(by_weights).all()
    # Each pair inside the stack adds its expert's bias once, times the scale.
    expected = np.zeros((E, H))
    for token, slot in zip(*np.nonzero(ids >= 0), strict=True):
        expected[ids[token, slot]] += cotangent[token] * float(stack.down_scale[ids[token, slot]])
    np.testing.assert_allclose(by_bias, expected, rtol=1e-5, atol=1e-5)


def test_a_nan_stays_in_its_row_with_every_activation(rng):
    for activation in ACTIVATIONS:
        _, stack = make_layer(rng, activation)
        x, ids, weights = routing(rng)
        x[3, 5] = np.nan
        y = np.asarray(moe_forward(stack, x, ids, weights, activation=activation, weight_on="input"))
        assert not np.isfinite(y[3]).any(), activation
        assert np.isfinite(np.delete(y, 3, axis=0)).all(), activation


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        ("gelu", r"activation must be one of 'silu', 'gelu_tanh', .*'relu2', got 'gelu'"),
        (None, r"activation must be one of .*, got None"),
        ("swiglu_clamped", r'"swiglu_clamped" needs a limit above 0, got None. Give jmoe.Activation'),
        (Activation("swiglu_clamped", -1.0), r"needs a limit above 0, got -1.0"),
        (Activation("silu", 7.0), r"activation 'silu' takes no limit, got 7.0"),
    ],
)
def test_an_activation_that_is_none_is_refused(activation, message, rng):
    _, stack = make_layer(rng, "silu")
    with pytest.raises(ValueError, match=message):
        moe_forward(stack, *routing(rng), activation=activation)
    with pytest.raises(ValueError, match=message):
        which_backend(stack, routing(rng)[0], activation=activation)


def test_a_gate_is_there_exactly_where_the_activation_has_one(rng):
    _, stack = make_layer(rng, "silu")
    with pytest.raises(
        ValueError, match=r"stack.gate is None, and activation 'silu' multiplies by a gate. .* or the gate"
    ):
        moe_forward(replace(stack, gate=None), *routing(rng))
    with pytest.raises(ValueError, match=r"stack.gate is there, but activation 'relu2' has none. .* or gate=None"):
        moe_forward(stack, *routing(rng), activation="relu2")
    with pytest.raises(ValueError, match=r"stack.gate_bias is there, but stack.gate is None"):
        moe_forward(replace(stack, gate=None), *routing(rng), activation="relu2")


def test_weights_go_on_the_output_or_the_input(rng):
    _, stack = make_layer(rng, "silu")
    with pytest.raises(ValueError, match=r"weight_on must be one of 'output', 'input', got 'x'"):
        moe_forward(stack, *routing(rng), weight_on="x")


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_the_kernels_formula_is_each_activation(activation, rng):
    activation = as_activation(activation)
    gate, up = rng.uniform(-30, 30, (2, 1000)).astype(np.float32)
    gates = (gate,) if activation.gated else ()
    limits = () if activation.limit is None else (activation.limit,)
    expected = oracle.ACTIVATIONS[activation.name](*limits, *map(oracle.as_f64, (*gates, up)))
    semantics = Semantics(*sigmoid_gate(activation))
    got = np.asarray(activate(gate if gates else None, up, semantics, jnp))
    # exp(z) of an f32 z, |z| up to 3000 for gelu, is wrong by z ulps: where h is next to nothing beside |g u|.
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-12)
    spoilt = activate(np.float32(np.nan) if gates else None, np.float32(1 if gates else np.nan), semantics, jnp)
    assert np.isnan(spoilt)
