"""MLX itself, on its CPU backend, reads the affine planes as gguf-py reads the blocks. Needs the extra ``mlx``."""

from __future__ import annotations

import json
from typing import Any

import cases
import jax
import jax.numpy as jnp
import metal_shim
import numpy as np
import oracle
import pytest
import tolerances

import metal_bridge
import metal_bridge.mlx
from jmoe import FORMATS, dispatch, for_mps
from jmoe.gathered import moe_gathered
from jmoe.reference import moe_jnp
from metal_bridge import gemv

mx = pytest.importorskip("mlx.core", reason="needs MLX: pip install '.[mlx]'")

F32 = tolerances.LAYER["float32"]
# A row of odd blocks of 32, and more than one super-block.
DEPTH = {32: 160, 256: 512}


def blocks_of(rng: np.random.Generator, name: str, lead: tuple[int, ...] = (3, 8)) -> np.ndarray:
    """Random bytes with finite scales of many sizes."""
    spec = FORMATS[name]
    blocks = rng.integers(0, 256, (*lead, spec.row_bytes(DEPTH[spec.block_weights])), np.uint8)
    each = blocks.reshape(-1, spec.block_bytes)
    for offset in cases.HALVES[name]:
        halves = rng.integers(0, 1 << 16, len(each)).astype(np.uint16).view(np.float16)
        cases.set_halves(each, offset, np.where(np.isfinite(halves), halves, np.float16(2.0**-24)))
    if name == "mxfp4":
        each[:, 0] = rng.integers(2, 252, len(each))
    return blocks


@pytest.mark.parametrize("name", metal_bridge.BITS)
def test_mlx_dequantises_affine_planes_to_gguf_s_weights(name, rng):
    blocks = blocks_of(rng, name)
    words, scales, biases = map(mx.array, metal_bridge.to_affine(name, FORMATS[name].split(blocks)))
    weights = mx.dequantize(words, scales, biases, group_size=32, bits=metal_bridge.BITS[name])
    assert weights.dtype == mx.float32
    np.testing.assert_array_equal(np.array(weights), oracle.dequantise(blocks, name))


@pytest.mark.parametrize("name", metal_bridge.BITS)
def test_mlx_dequantises_what_quantized_gives_to_gguf_s_weights(name, rng):
    blocks = blocks_of(rng, name)
    words, how = metal_bridge.mlx.quantized(name, FORMATS[name].split(blocks))
    weights = mx.dequantize(words, **how, dtype=mx.float32)
    np.testing.assert_array_equal(np.array(weights), oracle.dequantise(blocks, name))
    spent = words.nbytes + sum(how[part].nbytes for part in ("scales", "biases") if part in how)
    bits_a_weight = {4: 6, 5: 7, 8: 10}[metal_bridge.BITS[name]] if name != "mxfp4" else 4.25
    assert 8 * spent / weights.size == bits_a_weight


def test_mlx_has_no_groups_of_16_for_q6_k():
    with pytest.raises(ValueError, match="group size 16"):
        mx.quantize(mx.zeros((4, 64)), group_size=16, bits=6)
    with pytest.raises(ValueError, match="q6_k has no MLX affine form"):
        metal_bridge.mlx.quantized("q6_k", FORMATS["q6_k"].split(np.zeros((1, 4, 210), np.uint8)))


@pytest.mark.parametrize("name", metal_bridge.BITS)
def test_gather_qmm_of_them_is_the_oracle_s_product(name, rng):
    blocks = cases.random_blocks(rng, name, (4, 24, DEPTH[FORMATS[name].block_weights]))
    weights = oracle.dequantise(blocks, name).astype(np.float64)
    x = np.array(cases.random_inputs(rng, 3, weights.shape[-1]))
    ids = rng.integers(0, 4, (3, 2))
    words, how = metal_bridge.mlx.quantized(name, FORMATS[name].split(blocks))
    y = mx.gather_qmm(mx.array(x)[:, None, None], words, **how, rhs_indices=mx.array(ids))
    oracle.assert_within(np.array(y)[:, :, 0], np.einsum("tkod,td->tko", weights[ids], x.astype(np.float64)), F32)


@pytest.fixture
def jax_mps_s_handler(monkeypatch):
    """The custom call as jax-mps handles it: operands and string attributes to MLX; defaults where one is missing."""
    calls: list[dict[str, int]] = []

    def ffi_call(
        target: str, result: Any, *, custom_call_api_version: int, legacy_backend_config: str, vmap_method: str
    ):
        assert (target, custom_call_api_version) == ("mps.quantized_matmul", 1)
        config = {"transpose": 1, "group_size": 64, "bits": 4, **json.loads(legacy_backend_config)}

        def on_host(x: Any, words: Any, scales: Any, biases: Any) -> np.ndarray:
            calls.append(config)
            operands = (mx.array(np.asarray(operand)) for operand in (x, words, scales, biases))
            y = mx.quantized_matmul(*operands, bool(config["transpose"]), config["group_size"], config["bits"])
            return np.array(y)

        return lambda *operands: jax.pure_callback(on_host, result, *operands, vmap_method=vmap_method)

    monkeypatch.setattr(jax.ffi, "ffi_call", ffi_call)
    return calls


@pytest.mark.parametrize("moe", [moe_gathered, moe_jnp])
@pytest.mark.parametrize("name", [*metal_bridge.BITS, "tiny"])
def test_a_converted_layer_computed_by_mlx_is_the_oracle_s(name, moe, rng, jax_mps_s_handler):
    case = cases.CASES[name]
    x, (ids, weights) = cases.random_inputs(rng, 5, case.hidden_size), cases.random_routing(rng, 5, case)
    ids[0, 0], ids[1, 1] = -1, case.num_experts
    products = dispatch._MLX_PRODUCTS
    y = moe(
        for_mps(cases.random_stack(case)),
        x,
        jnp.asarray(ids),
        jnp.asarray(weights),
        activation="silu",
        products=products,
    )
    oracle.assert_within(y, oracle.moe(cases.oracle_layer(case), x, ids, weights), F32)
    used = {metal_bridge.BITS[f] for f in (case.gate, case.up, case.down) if f in metal_bridge.BITS}
    assert {call["bits"] for call in jax_mps_s_handler} == used


def test_kernels_need_metal_and_say_what_runs_without(rng):
    if mx.metal.is_available():
        pytest.skip("this machine has Metal: python -m metal_bridge runs the kernels")
    planes = FORMATS["q4_k"].split(cases.random_blocks(rng, "q4_k", (2, 8, 256)))
    with pytest.raises(RuntimeError, match=r"MLX has no GPU here; mx\.gather_qmm"):
        metal_bridge.mlx.gathered_gemv("q4_k", planes, np.zeros((1, 256), np.float32), np.zeros((1, 2), np.int32))


@pytest.mark.parametrize("shape", [(3, 128), (2, 256), (3, 3, 256)])
def test_vectors_that_do_not_fit_the_ids_are_refused(shape, rng):
    planes = FORMATS["q4_k"].split(cases.random_blocks(rng, "q4_k", (2, 8, 256)))
    with pytest.raises(ValueError, match=r"x must be \[3, 256\], or have a row for each of the ids \[3, 2\], got"):
        metal_bridge.mlx.gathered_gemv("q4_k", planes, np.zeros(shape, np.float32), np.zeros((3, 2), np.int32))


@metal_shim.needs_compiler
@pytest.mark.parametrize("name", gemv.FORMATS)
@pytest.mark.parametrize("row_for_each_id", [False, True])
def test_the_helper_launches_the_kernel_as_it_is_written(name, row_for_each_id, rng, tmp_path, monkeypatch):
    """MLX's Metal compiler replaced by the C++ shim: the launch, its inputs and its template are the helper's own."""

    def metal_kernel(*, name: str, input_names: list[str], output_names: list[str], source: str) -> Any:
        def kernel(*, inputs, template, grid, threadgroup, output_shapes, output_dtypes):
            assert (output_names, output_dtypes) == (["out"], [mx.float32])
            how = gemv.Launch(name, tuple(input_names), source, tuple(template), grid, threadgroup, output_shapes[0])
            return [mx.array(metal_shim.run_launch(how, [np.array(array) for array in inputs], tmp_path))]

        return kernel

    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx.fast, "metal_kernel", metal_kernel)
    blocks = cases.random_blocks(rng, name, (4, 12, 256))
    weights = oracle.dequantise(blocks, name).astype(np.float64)
    ids = np.array([[0, 3], [2, 2], [1, 0]])
    x = np.array(cases.random_inputs(rng, 6 if row_for_each_id else 3, 256))
    x = x.reshape(3, 2, 256) if row_for_each_id else x
    y = metal_bridge.mlx.gathered_gemv(name, FORMATS[name].split(blocks), x, ids)
    rows = x if row_for_each_id else x[:, None]
    oracle.assert_within(np.array(y), np.sum(weights[ids] * rows[:, :, None].astype(np.float64), axis=-1), F32)
    assert y.shape == (3, 2, 12)


def test_no_ids_give_no_outputs(rng):
    planes = FORMATS["q4_k"].split(cases.random_blocks(rng, "q4_k", (2, 8, 256)))
    y = metal_bridge.mlx.gathered_gemv("q4_k", planes, np.zeros((0, 256), np.float32), np.zeros((0, 2), np.int32))
    assert y.shape == (0, 2, 8)
