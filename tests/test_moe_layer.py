"""MoELayer: every architecture's file against float64, transformations, and what is refused at the door."""

from __future__ import annotations

import pickle
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import layer_files
import numpy as np
import oracle
import pytest
import tolerances
from cases import Case, specs
from layer_files import CASES, SIZES, TOP_K

from jmoe import Activation, ExpertStack, MoELayer, RouterConfig, load_moe_layers, moe_layer_forward, which_backend

DATA = Path(__file__).parent / "data"
# One with every optional leaf but the latent projections.
FULL = CASES["deepseek-v3"]


def load(case: layer_files.Case, folder: Path) -> MoELayer:
    path = folder / "layer.gguf"
    path.write_bytes(layer_files.file_of(case))
    return MoELayer.open_and_load(path, 0)


def inputs(rng: np.random.Generator, tokens: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(rng.standard_normal((tokens, SIZES.hidden_size)).astype(np.float32), dtype)


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> MoELayer:
    return load(FULL, tmp_path_factory.mktemp("full"))


@pytest.mark.parametrize("name", CASES)
def test_a_file_of_the_architecture_computes_what_float64_does(name, tmp_path, rng):
    case = CASES[name]
    layer = load(case, tmp_path)
    config = layer.router_config
    # As the oracle is called; what a case leaves out is a default of both.
    assert config == RouterConfig(TOP_K, **case.router)
    assert (layer.activation, layer.weight_on) == (Activation(case.activation), case.weight_on)
    x = inputs(rng, 7)
    y = moe_layer_forward(layer, x)
    expected = layer_files.forward(case, layer_files.tensors_of(case), x)
    oracle.assert_within(y, expected, tolerances.KERNEL_F32)
    assert y.dtype == x.dtype


@pytest.mark.parametrize("name", ["qwen2moe", "gpt-oss", "nemotron-super"])
def test_jnp_computes_it_to_f32_s_own_error(name, tmp_path, rng):
    case, x = CASES[name], inputs(rng, 5)
    y = moe_layer_forward(load(case, tmp_path), x, backend="jnp", precision="highest")
    expected = layer_files.forward(case, layer_files.tensors_of(case), x)
    oracle.assert_within(y, expected, tolerances.LAYER["float32"])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_x_gives_narrow_y(full, dtype, rng):
    x = inputs(rng, 5, dtype)
    y = moe_layer_forward(full, x)
    assert y.dtype == dtype
    expected = layer_files.forward(FULL, layer_files.tensors_of(FULL), x)
    oracle.assert_within(y, expected, tolerances.LAYER[np.dtype(dtype).name])


@pytest.mark.parametrize("stem", ["qwen3moe-Q4_K_M", "mixtral-Q6_K"])
def test_llama_cpp_s_own_layers_are_computed_from_the_file_alone(stem):
    recorded = np.load(DATA / f"{stem}.npz")
    for index, layer in load_moe_layers(DATA / f"{stem}.gguf", progress=False).items():
        y = moe_layer_forward(layer, recorded[f"ffn_norm-{index}"])
        assert oracle.nmse(y, recorded[f"ffn_moe_out-{index}"]) <= tolerances.LLAMA_CPP_NMSE


def test_the_router_may_see_another_input(full, rng):
    x, seen = inputs(rng, 5), inputs(rng, 5)
    y = moe_layer_forward(full, x, seen)
    expected = layer_files.forward(FULL, layer_files.tensors_of(FULL), x, router_input=seen)
    oracle.assert_within(y, expected, tolerances.KERNEL_F32)


def test_given_ids_are_weighed_by_the_router_and_given_weights_replace_it(full, rng):
    x = inputs(rng, 5)
    ids = np.stack([rng.permutation(8)[:2] for _ in range(5)])
    expected = layer_files.forward(FULL, layer_files.tensors_of(FULL), x, ids=ids)
    oracle.assert_within(moe_layer_forward(full, x, topk_ids=ids), expected, tolerances.KERNEL_F32)
    nothing = moe_layer_forward(full, x, topk_ids=ids, topk_weights=jnp.zeros((5, 2)))
    none_chosen = moe_layer_forward(full, x, topk_ids=np.full((5, 2), 2**32 + 1), topk_weights=jnp.ones((5, 2)))
    np.testing.assert_array_equal(nothing, none_chosen)
    assert np.abs(nothing).max() > 0  # the shared experts


@pytest.mark.parametrize("tokens", [0, 1, 129])
def test_any_number_of_tokens(full, tokens, rng):
    x = inputs(rng, tokens)
    y = moe_layer_forward(full, x)
    assert y.shape == x.shape
    if tokens:
        oracle.assert_within(y, layer_files.forward(FULL, layer_files.tensors_of(FULL), x), tolerances.KERNEL_F32)


def test_a_bad_token_leaves_the_others_alone(full, rng):
    x = np.array(inputs(rng, 5))
    good = np.asarray(moe_layer_forward(full, x))
    x[2, 5] = np.nan
    y = np.asarray(moe_layer_forward(full, x))
    assert not np.isfinite(y[2]).any()
    np.testing.assert_array_equal(np.delete(y, 2, 0), np.delete(good, 2, 0))


def test_jit_vmap_and_scan_give_what_single_calls_give(full, rng):
    x = inputs(rng, 12).reshape(3, 4, -1)
    one_by_one = np.stack([moe_layer_forward(full, part) for part in x])
    # Matrix products of a batch sum in another order.
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    close(jax.jit(jax.vmap(moe_layer_forward, in_axes=(None, 0)))(full, x), one_by_one)
    # Two layers, stacked and scanned over: slices of every leaf.
    other = jax.tree.map(lambda leaf: leaf[::-1], full)
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), full, other)
    scanned, _ = jax.lax.scan(lambda x, layer: (x + moe_layer_forward(layer, x), None), x[0], both)
    by_hand = x[0] + moe_layer_forward(full, x[0])
    by_hand = by_hand + moe_layer_forward(other, by_hand)
    close(scanned, by_hand)
    mapped = jax.vmap(moe_layer_forward, in_axes=(0, None))(both, x[0])
    close(mapped[0], one_by_one[0])


@pytest.mark.parametrize("name", ["deepseek-v3", "nemotron-super"])
def test_an_index_picks_one_of_a_stack_of_layers(name, tmp_path, rng):
    layer = load(CASES[name], tmp_path)
    other = jax.tree.map(lambda leaf: leaf[::-1], layer)
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), layer, other)
    x = inputs(rng, 5)
    expected = [np.asarray(moe_layer_forward(one, x)) for one in (layer, other)]
    step = lambda carry, l: (carry, moe_layer_forward(both, x, index=l))  # noqa: E731
    _, scanned = jax.jit(lambda: jax.lax.scan(step, None, jnp.arange(2)))()
    mapped = jax.vmap(lambda l: moe_layer_forward(both, x, index=l))(jnp.arange(2))
    for got in (scanned, mapped, [moe_layer_forward(both, x, index=np.int64(at)) for at in range(2)]):
        for y, one in zip(got, expected, strict=True):
            np.testing.assert_allclose(y, one, rtol=1e-4, atol=1e-4)


def test_a_scan_over_whole_layers_copies_no_layer_s_planes():
    case, layers = Case("decode", 512, 256, 8, 2, "q4_k", "q4_k", "q6_k"), 3
    stack, x, *_ = specs(case, 20, (layers,))
    layer = MoELayer(jax.ShapeDtypeStruct((layers, 8, 512), jnp.float32), stack, RouterConfig(2))

    def network(layer, x):
        step = lambda x, l: (x + moe_layer_forward(layer, x, index=l, backend="jnp"), None)  # noqa: E731
        return jax.lax.scan(step, x, jnp.arange(layers))[0]

    analysis: Any = jax.jit(network).lower(layer, x).compile().memory_analysis()
    assert analysis.temp_size_in_bytes < stack.nbytes / layers


@pytest.mark.parametrize(
    ("index", "change", "error", "message"),
    [
        (2, {}, ValueError, r"index=2 is outside the stack's 2 layers"),
        (1.0, {}, TypeError, r"index must be an integer scalar, got 1.0"),
        (None, {}, AssertionError, r"layer.router must be"),
        (0, {"selection_bias": np.zeros(8, np.float32)}, ValueError, r"float32\[8\] at layer.selection_bias"),
        (0, {"router": np.zeros((2, 7, 64), np.float32)}, AssertionError, r"layer.router must be .*\[8,\?\]"),
    ],
)
def test_a_stack_of_layers_that_does_not_fit_is_refused(full, index, change, error, message):
    both = replace(jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), full), **change)
    with pytest.raises(error, match=message):
        moe_layer_forward(both, np.zeros((2, 64), np.float32), index=index)


def test_an_index_without_an_axis_of_layers_is_refused(full):
    with pytest.raises(ValueError, match=r"index= wants one layer axis"):
        moe_layer_forward(full, np.zeros((2, 64), np.float32), index=0)


def test_gradients_reach_x_router_and_shared_gate(tmp_path, rng):
    case = CASES["qwen2moe"]
    layer = load(case, tmp_path)
    x, cotangent = inputs(rng, 3), rng.standard_normal((3, 64))

    def loss(x: Any, router: Any, shared_gate: Any) -> jax.Array:
        changed = replace(layer, router=router, shared_gate=shared_gate)
        return jnp.sum(moe_layer_forward(changed, x, backend="jnp") * jnp.float32(cotangent))

    got = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, layer.router, layer.shared_gate)
    tensors = layer_files.tensors_of(case)
    names = (None, "blk.0.ffn_gate_inp.weight", "blk.0.ffn_gate_inp_shexp.weight")
    for gradient, name, value in zip(got, names, (x, layer.router, layer.shared_gate), strict=True):
        direction = rng.standard_normal(value.shape)
        ends = []
        for sign in (1, -1):
            moved = oracle.as_f64(value) + sign * 1e-4 * direction
            if name is None:
                ends.append(np.sum(layer_files.forward(case, tensors, moved) * cotangent))
            else:
                changed = tensors | {name: as_f64_tensor(moved)}
                ends.append(np.sum(layer_files.forward(case, changed, x) * cotangent))
        slope = (ends[0] - ends[1]) / 2e-4
        np.testing.assert_allclose(np.sum(oracle.as_f64(gradient) * direction), slope, rtol=1e-4)


def as_f64_tensor(array: np.ndarray) -> Any:
    """Stands for a tensor of a file with more digits than its types have."""

    class Exact:
        ggml_type = type("float64", (), {"name": "float64"})
        blocks = array

    return Exact()


def test_it_is_a_pytree_of_arrays_that_pickles_and_exports(full, rng):
    x = inputs(rng, 3)
    expected = moe_layer_forward(full, x, backend="jnp")
    again = pickle.loads(pickle.dumps(full))
    assert jax.tree.structure(again) == jax.tree.structure(full)
    jax.tree.map(np.testing.assert_array_equal, again, full)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(full))
    assert full.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(full))
    pytest.importorskip("flatbuffers")
    forward: Any = lambda layer, x: moe_layer_forward(layer, x, backend="jnp")  # noqa: E731
    written = jax.export.export(jax.jit(forward))(full, x).serialize()
    assert b"jmoe.MoELayer" in written
    read = jax.export.deserialize(written)
    assert read.in_tree == jax.tree.structure(((full, x), {}))
    np.testing.assert_array_equal(read.call(full, x), expected)


def test_it_says_what_it_is(full):
    words = repr(full)
    for word in (
        "router=float32[8, 64]",
        "q8_0",
        "best 2 of 4 groups",
        "times 2.5",
        "activation=silu",
        "selection_bias",
    ):
        assert word in words
    assert (full.num_experts, full.hidden_size, full.expert_intermediate) == SIZES


def test_its_experts_run_where_which_backend_says(full, rng):
    assert isinstance(full.experts, ExpertStack)
    assert which_backend(full.experts, inputs(rng, 1)).name in ("cpu", "jnp")
    with pytest.raises(ValueError, match=r"backend='pallas' cannot run this call"):
        moe_layer_forward(full, inputs(rng, 1), backend="pallas")


def test_for_a_gpu_routed_and_shared_experts_are_kernels_of_one_program():
    case = Case("decode", 512, 256, 8, 2, "q4_k", "q4_k", "q6_k")
    stack, x, *_ = specs(case, 1)
    float32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    shared = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), stack)
    layer = MoELayer(float32(8, 512), stack, RouterConfig(2), shared=shared, shared_gate=float32(512))
    lowered = jax.jit(moe_layer_forward).trace(layer, x).lower(lowering_platforms=("cuda",))
    kernels = [which_backend(part, x, platform="cuda").name == "pallas" for part in (stack, shared)]
    assert lowered.as_text().count("custom_call @mosaic_gpu_v2") == sum(kernels)


@pytest.mark.parametrize(
    ("change", "arguments", "error", "message"),
    [
        ({}, {"x": np.zeros((2, 63), np.float32)}, AssertionError, r"x must be .*\[\?,64\], got float32\[2,63\]"),
        ({}, {"router_input": np.zeros((3, 64), np.float32)}, AssertionError, r"router_input must be .*\[2,64\]"),
        ({}, {"topk_weights": np.zeros((2, 2), np.float32)}, ValueError, r"topk_weights came without topk_ids"),
        ({}, {"topk_ids": np.zeros((2, 3), np.int32)}, AssertionError, r"topk_ids must be integer\[2,2\]"),
        ({}, {"precision": "low"}, ValueError, r"precision must be one of"),
        ({"router": np.zeros((7, 64), np.float32)}, {}, AssertionError, r"layer.router must be .*\[8,\?\]"),
        ({"router": np.zeros((8, 64), np.int8)}, {}, AssertionError, r"layer.router must be float32 .* got int8"),
        ({"router_bias": np.zeros(7, np.float32)}, {}, AssertionError, r"layer.router_bias must be .*\[8\]"),
        ({"selection_bias": np.zeros(7, np.float32)}, {}, AssertionError, r"selection_bias must be .*\[8\]"),
        ({"shared_gate": np.zeros(63, np.float32)}, {}, AssertionError, r"layer.shared_gate must be .*\[64\]"),
        ({"shared_gate": np.zeros(64, np.float32), "shared": None}, {}, ValueError, r"layer.shared is None"),
        ({"latent_down": np.zeros((1, 8, 64), np.float32)}, {}, ValueError, r"come together: one of them is None"),
        ({"weight_on": "x"}, {}, ValueError, r"weight_on must be one of"),
        ({"activation": Activation("relu2")}, {}, ValueError, r"stack.gate is there"),
    ],
)
def test_what_does_not_fit_is_refused(full, change, arguments, error, message):
    arguments = {"x": np.zeros((2, 64), np.float32), **arguments}
    with pytest.raises(error, match=message):
        moe_layer_forward(replace(full, **change), **arguments)


def test_what_is_no_layer_is_refused(full):
    with pytest.raises(TypeError, match=r"layer must be a MoELayer, got ExpertStack"):
        moe_layer_forward(full.experts, np.zeros((2, 64), np.float32))
