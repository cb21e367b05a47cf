"""Small models that llama.cpp quantised, beside the activations that llama.cpp itself computed with them.

``tests/data``: random weights, 17 tokens; ``blk.L`` of the GGUF file and ``ffn_*-L`` of the ``.npz`` belong together.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tolerances
from cases import PROJECTIONS

from jmoe import ExpertStack, RouterConfig, moe_forward, route

DATA = Path(__file__).parent / "data"
# File, layer, and the formats that llama.cpp chose there.
LAYERS = [
    ("qwen3moe-Q4_K_M", 0, ("q4_k", "q4_k", "q4_k")),
    ("qwen3moe-Q4_K_M", 1, ("q4_k", "q4_k", "q6_k")),
    ("mixtral-Q6_K", 0, ("q6_k", "q6_k", "q6_k")),
]


class Fixture(NamedTuple):
    path: Path
    index: int
    formats: tuple[str, str, str]
    layer: oracle.Layer
    x: np.ndarray  # f32[T, H]
    logits: np.ndarray  # f32[T, E]
    topk_ids: np.ndarray  # i32[T, K]
    topk_weights: np.ndarray  # f32[T, K], normalised
    out: np.ndarray  # f32[T, H]


@pytest.fixture(params=LAYERS, ids=lambda layer: f"{layer[0]}-{layer[1]}")
def fixture(request: pytest.FixtureRequest) -> Fixture:
    name, index, formats = request.param
    tensors = oracle.read_gguf(DATA / f"{name}.gguf")
    gate, up, down = (tensors[f"blk.{index}.ffn_{name}_exps.weight"] for name in PROJECTIONS)
    layer = oracle.Layer(gate, up, down)
    with np.load(DATA / f"{name}.npz") as saved:
        names = ("norm", "moe_logits", "moe_topk", "moe_weights_norm", "moe_out")
        return Fixture(DATA / f"{name}.gguf", index, formats, layer, *(saved[f"ffn_{part}-{index}"] for part in names))


def test_route_chooses_and_weighs_as_llama_cpp_does(fixture):
    ids, weights = route(fixture.logits, RouterConfig(fixture.topk_ids.shape[1], normalise=True))
    np.testing.assert_array_equal(ids, fixture.topk_ids)
    np.testing.assert_allclose(weights, fixture.topk_weights, rtol=tolerances.ROUTER_WEIGHT_RTOL, atol=0)


def test_the_oracle_is_as_close_to_llama_cpp_as_8_bit_activations_allow(fixture):
    # If the oracle misread the files, agreeing with it would prove nothing.
    expected = oracle.moe(fixture.layer, fixture.x, fixture.topk_ids, fixture.topk_weights)
    assert oracle.nmse(fixture.out, expected) <= tolerances.LLAMA_CPP_NMSE


def test_moe_forward_matches_llama_cpp_and_the_oracle(fixture):
    stack = ExpertStack.open_and_load(fixture.path, fixture.index)
    assert stack.formats == fixture.formats
    args = (fixture.topk_ids, fixture.topk_weights)
    y = moe_forward(stack, fixture.x, *args, backend="jnp")
    assert oracle.nmse(y, fixture.out) <= tolerances.LLAMA_CPP_NMSE
    oracle.assert_within(y, oracle.moe(fixture.layer, fixture.x, *args), tolerances.LAYER["float32"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_activations_match_the_oracle_too(fixture, dtype):
    stack, x = ExpertStack.open_and_load(fixture.path, fixture.index), jnp.asarray(fixture.x, dtype)
    y = moe_forward(stack, x, fixture.topk_ids, fixture.topk_weights)
    expected = oracle.moe(fixture.layer, x, fixture.topk_ids, fixture.topk_weights)
    oracle.assert_within(y, expected, tolerances.LAYER[dtype])


def test_the_whole_block_from_logits_on_matches_llama_cpp(fixture):
    stack = ExpertStack.open_and_load(fixture.path, fixture.index)
    y = moe_forward(stack, fixture.x, *route(fixture.logits, RouterConfig(fixture.topk_ids.shape[1])))
    assert oracle.nmse(y, fixture.out) <= tolerances.LLAMA_CPP_NMSE
