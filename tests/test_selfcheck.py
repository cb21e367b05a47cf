"""The package's float64 reference and random stacks agree with the tests' own oracle, table of shapes and bounds."""

from __future__ import annotations

from pathlib import Path

import cases
import jax
import ml_dtypes
import numpy as np
import oracle
import pytest
import tolerances

from jmoe import FORMATS, selfcheck, synthetic
from jmoe.gguf_file import GgufFile
from jmoe.gguf_file.planes import aligned_empty
from jmoe.synthetic import MODELS, ModelShape, layer_blocks, layer_bytes, random_blocks, stack_of, weights_of

QWEN = Path(__file__).parent / "data" / "qwen3moe-Q4_K_M.gguf"
# Float64 sums in another order, over depths of 256 and 512.
SUMS = (1e-28, 1e-13)


def test_the_reference_reads_a_file_as_the_oracle_does(rng):
    tensors = oracle.read_gguf(QWEN)
    gate, up, down = (tensors[f"blk.1.ffn_{kind}_exps.weight"] for kind in ("gate", "up", "down"))
    x = selfcheck.outlier_x(rng, 5, 256)
    # An id outside [0, 8), and one twice in a token.
    ids = np.array([[0, 7], [3, 3], [8, 1], [-1, 2], [5, 4]], np.int32)
    weights = rng.random(ids.shape, np.float32)
    layer = oracle.Layer(gate, up, down)
    with GgufFile(QWEN) as gguf:
        y = selfcheck.moe_float64(selfcheck.weights_in_file(gguf, 1), x, ids, weights, num_experts=8)
    oracle.assert_within(y, oracle.moe(layer, x, ids, weights), SUMS)


@pytest.mark.parametrize("name", FORMATS)
def test_random_stacks_have_unit_gain_and_finite_scales(name, rng):
    model = ModelShape(256, 512, 4, 2, name, name)
    blocks = layer_blocks(rng, model)
    stack = stack_of(model, blocks)
    assert stack.formats == (name, name, name)
    assert (stack.hidden_size, stack.expert_intermediate, stack.num_experts) == model[:3]
    assert sum(part.nbytes for part in blocks) == layer_bytes(model)
    for projection in (stack.gate, stack.up, stack.down):
        assert FORMATS[name].count_nonfinite(projection.planes) == 0
        w = np.asarray(projection.dequantise())
        # mxfp4's scales are powers of two: off by up to sqrt(2), and half of them by 2.
        assert 0.5 < float(w.std()) * w.shape[-1] ** 0.5 < 1.5
        assert abs(float(w.mean())) * w.shape[-1] ** 0.5 < 0.15
    x, ids = rng.standard_normal((3, 256), np.float32), np.array([[0, 1], [2, 3], [1, 1]])
    y = selfcheck.moe_float64(weights_of(model, blocks), x, ids, np.full((3, 2), 0.5))
    layer = oracle.Layer(**dict(zip(cases.PROJECTIONS, (oracle.Weight(name, part) for part in blocks), strict=True)))
    oracle.assert_within(y, oracle.moe(layer, x, ids, np.full((3, 2), 0.5)), SUMS)


def test_random_stacks_lie_in_memory_as_loaded_ones(rng, monkeypatch):
    """In the arrays that the loader would make: jax takes them over, and does not copy them into pages of its own."""
    made = []

    def watched(shape, dtype):
        made.append(aligned_empty(shape, dtype))
        return made[-1]

    monkeypatch.setattr(synthetic, "aligned_empty", watched)
    model = MODELS["tiny"]
    with jax.default_device(jax.devices("cpu")[0]):
        stack = stack_of(model, layer_blocks(rng, model))
    assert [plane.unsafe_buffer_pointer() for plane in jax.tree.leaves(stack)] == [host.ctypes.data for host in made]


def test_every_bit_of_random_blocks_is_in_use(rng):
    for name, spec in FORMATS.items():
        blocks = random_blocks(rng, name, (64, 512)).reshape(-1, spec.block_bytes)
        # The scales are chosen; they are at most four bytes of a block.
        varying = np.bitwise_or.reduce(blocks) & ~np.bitwise_and.reduce(blocks)
        assert np.count_nonzero(varying == 255) >= spec.block_bytes - 4, name


def test_shapes_are_those_of_the_tests_table():
    real = {case.name: case for case in cases.CASES.values() if case.name in cases.REAL}
    assert set(real) == set(MODELS) - {"tiny"}
    for name, case in real.items():
        assert MODELS[name] == (
            case.hidden_size,
            case.expert_intermediate,
            case.num_experts,
            case.top_k,
            case.gate,
            case.down,
        )


def test_bounds_are_those_of_the_numerics_contract():
    for name in ("float32", "bfloat16", "float16"):
        dtype = ml_dtypes.bfloat16 if name == "bfloat16" else name
        assert selfcheck.bound(dtype, "jnp", "cpu") == tolerances.LAYER[name]
        assert selfcheck.bound(dtype, "jnp", "gpu") == tolerances.LAYER[name]
    assert selfcheck.bound(np.float32, "pallas", "gpu") == tolerances.KERNEL_F32
    assert selfcheck.bound(np.float32, "cpu", "cpu") == tolerances.KERNEL_F32
    assert selfcheck.bound(np.float32, "cpu", "cpu", "highest") == tolerances.LAYER["float32"]
    assert selfcheck.bound(np.float32, "pallas", "gpu", "highest") == tolerances.HIGHEST_ON_GPU
    assert selfcheck.bound(np.float32, "jnp", "cpu", "highest") == tolerances.LAYER["float32"]


def test_errors_are_the_oracle_s_measures_and_nan_is_never_within(rng):
    exact = rng.standard_normal((4, 8))
    y = exact + 1e-3 * rng.standard_normal((4, 8))
    errors = selfcheck.errors(y, exact)
    np.testing.assert_allclose(errors, (oracle.nmse(y, exact), oracle.max_over_rms(y, exact)), rtol=1e-12)
    y[1, 2] = np.nan
    assert not selfcheck.errors(y, exact).within(selfcheck.Errors(np.inf, np.inf))
    assert selfcheck.errors(exact, exact) == (0.0, 0.0)
    assert selfcheck.errors(np.ones((1, 2)), np.zeros((1, 2))).nmse == np.inf
    assert selfcheck.errors(np.ones((0, 2)), np.zeros((0, 2))) == (0.0, 0.0)
