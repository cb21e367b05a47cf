"""The hand-written Metal kernels' indexing and arithmetic, compiled as C++ behind a shim; nothing here is Metal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import tolerances
from cases import HALVES, random_blocks, random_inputs, set_halves
from metal_shim import needs_compiler, run_launch

from jmoe import FORMATS
from metal_bridge import gemv


def gathered_gemv(name: str, blocks: np.ndarray, x: np.ndarray, ids: np.ndarray, folder: Path) -> np.ndarray:
    planes = FORMATS[name].split(blocks)
    how = gemv.launch(name, planes._fields, planes.codes.shape, len(x), ids.size)
    words = [p.view(np.uint32) if field in ("codes", "high") else p for field, p in planes._asdict().items()]
    return run_launch(how, [*words, x, ids.astype(np.int32).ravel()], folder)


def expected(name: str, blocks: np.ndarray, x: np.ndarray, ids: np.ndarray) -> np.ndarray:
    weights = oracle.dequantise(blocks, name).astype(np.float64)
    rows = np.repeat(x.astype(np.float64), ids.size // len(x), axis=0)
    valid = (ids.ravel() >= 0) & (ids.ravel() < len(blocks))
    return np.stack([weights[e] @ row if ok else np.zeros(blocks.shape[1])
                     for e, row, ok in zip(ids.ravel(), rows, valid, strict=True)])  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("name", gemv.FORMATS)
@pytest.mark.parametrize(
    ("experts", "rows", "depth", "tokens"),
    [(5, 8, 256, 2), (3, 21, 512, 3), (1, 1, 768, 1)],
    ids=["whole groups of rows", "rows left over", "one row of one expert"],
)
def test_gate_and_up_are_the_oracle_s_products(name, experts, rows, depth, tokens, rng, tmp_path):
    blocks = random_blocks(rng, name, (experts, rows, depth))
    x = np.asarray(random_inputs(rng, tokens, depth))
    ids = rng.integers(0, experts, (tokens, 2))
    oracle.assert_within(
        gathered_gemv(name, blocks, x, ids, tmp_path), expected(name, blocks, x, ids), tolerances.LAYER["float32"]
    )


@needs_compiler
@pytest.mark.parametrize("name", gemv.FORMATS)
def test_down_has_a_row_of_x_for_each_id_and_ids_that_are_no_expert_give_zeros(name, rng, tmp_path):
    blocks = random_blocks(rng, name, (4, 8, 256))
    ids = np.array([[3, -1], [4, 0], [2, 2]])
    x = np.asarray(random_inputs(rng, ids.size, 256))
    y = gathered_gemv(name, blocks, x, ids, tmp_path)
    oracle.assert_within(y, expected(name, blocks, x, ids), tolerances.LAYER["float32"])
    np.testing.assert_array_equal(y[[1, 2]], 0)


@needs_compiler
@pytest.mark.parametrize("name", gemv.FORMATS)
def test_identity_vectors_read_back_every_weight(name, rng, tmp_path):
    blocks = rng.integers(0, 256, (1, 4, FORMATS[name].row_bytes(512)), np.uint8)
    scales = blocks.reshape(-1, FORMATS[name].block_bytes)
    for offset in HALVES[name]:
        set_halves(scales, offset, rng.choice([-3.5, 2.0**-24, 0.0, 1e-3, 40000.0], len(scales)))
    y = gathered_gemv(name, blocks, np.eye(512, dtype=np.float32), np.zeros((512, 1)), tmp_path)
    np.testing.assert_array_equal(y.T, oracle.dequantise(blocks[0], name))


@needs_compiler
@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("if (thread_index_in_simdgroup < 7) out[0] = metal::simd_sum(1.0f);", "lanes of a simdgroup part"),
        ("out[x[0] + 8] = metal::simd_sum(1.0f);", "out: index 9 of 8"),
    ],
)
def test_the_shim_refuses_lanes_that_part_and_indices_outside(source, complaint, tmp_path):
    how = gemv.Launch("bad", ("x",), source, (), (32, 1, 1), (32, 1, 1), (1, 8))
    with pytest.raises(AssertionError, match=complaint):
        run_launch(how, [np.ones(1, np.float32)], tmp_path)


@needs_compiler
def test_the_shim_sums_the_lanes_of_each_simdgroup(tmp_path):
    source = "const float sum = metal::simd_sum(thread_position_in_grid.x); out[thread_position_in_grid.x] = sum;"
    how = gemv.Launch("sums", (), source, (), (64, 1, 1), (64, 1, 1), (2, 32))
    sums = run_launch(how, [], tmp_path)
    np.testing.assert_array_equal(sums, np.repeat([[496.0], [496.0 + 32 * 32]], 32, axis=1))


def launch_of(name: str, **changes: Any) -> gemv.Launch:
    planes = FORMATS[name].plane_specs((4, 8, 256))
    return gemv.launch(name, planes._fields, planes.codes.shape, changes.get("vectors", 2), changes.get("pairs", 4))


def test_a_format_without_a_kernel_and_vectors_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="kernels for q4_k and q6_k, not for q5_k"):
        launch_of("q5_k")
    with pytest.raises(ValueError, match="a row for each of the 4 ids, or for equal runs of them, got 3"):
        launch_of("q4_k", vectors=3)


@pytest.mark.parametrize("name", gemv.FORMATS)
def test_a_kernel_s_header_names_every_input_with_its_type(name):
    how, planes = launch_of(name), FORMATS[name].layout
    for field, plane in planes._asdict().items():
        kind = {"uint8": "u8", "int8": "s8", "uint16": "u16"}[np.dtype(plane.dtype).name]
        assert f"//     {field} " in how.source
        assert field in ("codes", "high") or f"{kind} " in how.source.split(f"//     {field} ")[1].split("\n")[0]
    assert how.input_names == (*planes._fields, "x", "ids")
