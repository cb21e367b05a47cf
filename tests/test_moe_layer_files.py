"""MoE layers in files: dense layers, unknown architectures, what is missing or contradicts, where the arrays go."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import layer_files
import numpy as np
import oracle
import pytest
import tolerances
from gguf import GGMLQuantizationType as Type
from gguf_builder import BOOL, F32, F64, I32, STRING, U32, Tensor, open_descriptors
from layer_files import CASES, quantised

from jmoe import Activation, GgufError, GgufFile, MoELayer, RouterConfig, load_moe_layers, moe_layer_forward
from jmoe.gguf_file.architectures import architectures
from jmoe.routing import GATINGS, SELECT_ON

DEEPSEEK, QWEN = CASES["deepseek-v3"], CASES["qwen3moe"]
CONFIG = RouterConfig(2)


def write(folder: Path, case: layer_files.Case, tensors: Any = None, **options: Any) -> Path:
    path = folder / "layer.gguf"
    path.write_bytes(layer_files.file_of(case, tensors, **options))
    return path


def refused(path: Path, words: str, **options: Any) -> None:
    before = open_descriptors(), len(jax.live_arrays())
    with pytest.raises(GgufError, match=words) as raised:
        MoELayer.open_and_load(path, 0, **options)
    assert str(path) in str(raised.value)
    # What was loaded before the error is gone: experts come first.
    assert (open_descriptors(), len(jax.live_arrays())) == before


def test_the_table_of_architectures_is_whole_and_in_the_words_of_the_code():
    promised = {case.arch for case in CASES.values()}
    assert set(architectures()) == promised
    assert len(promised) == 17
    for name, entry in architectures().items():
        keyed, _, otherwise = entry.gating.partition(", else ")
        assert (keyed in GATINGS and not otherwise) or (keyed == "key" and otherwise in (*GATINGS, "")), name
        assert entry.normalise in (True, False, "key")
        assert entry.scale in ("none", "key")
        assert entry.shared in ("none", "optional", "required", "gated")
        assert entry.select_on in SELECT_ON


@pytest.mark.parametrize(
    ("arch", "keys", "fields"),
    [
        # What files of deepseek2 leave out: softmax, no normalisation, no scale.
        ("deepseek2", {}, {"normalise": False}),
        ("deepseek2", {"expert_gating_func": (U32, 0)}, {"normalise": False}),
        (
            "deepseek2",
            {"expert_gating_func": (U32, 4), "expert_weights_scale": (F32, 0.0)},
            {"gating": "sqrt_softplus"},
        ),
        ("deepseek2", {"expert_group_count": (U32, 0)}, {}),
        ("deepseek2", {"expert_group_count": (U32, 4), "expert_group_used_count": (U32, 4)}, {}),
        ("glm4moe", {}, {"gating": "sigmoid"}),
        ("minimax-m2", {}, {"gating": "sigmoid", "normalise": True}),
        ("minimax-m2", {"expert_gating_func": (U32, 1)}, {"gating": "softmax", "normalise": True}),
        # No key of these: what a file says nevertheless is not theirs.
        ("qwen3moe", {"expert_weights_norm": (BOOL, False)}, {"normalise": True}),
        ("olmoe", {"expert_weights_norm": (BOOL, True), "expert_weights_scale": (F32, 3.0)}, {"normalise": False}),
        ("granitemoe", {"expert_weights_scale": (F64, 0.25)}, {"normalise": True, "scale": 0.25}),
    ],
)
def test_keys_count_where_the_architecture_reads_them(tmp_path, arch, keys, fields):
    case = next(case for case in CASES.values() if case.arch == arch)
    case = dataclasses.replace(case, keys={})
    config = MoELayer.open_and_load(write(tmp_path, case, **keys), 0).router_config
    expected = RouterConfig(2, **{"normalise": False, **fields})
    assert config == expected


@pytest.mark.parametrize(
    ("blocks", "words", "code", "gating"),
    [
        *((47, 154_880, code, gating) for code, gating in ((0, "sigmoid"), (1, "softmax"))),
        (48, 154_880, 0, "sigmoid"),
        (60, 154_880, 0, "softmax"),
        (47, 102_400, 0, "softmax"),
    ],
)
@pytest.mark.parametrize("stated", [True, False])
def test_glm_4_7_flash_is_known_by_its_sizes(tmp_path, rng, blocks, words, code, gating, stated):
    case = dataclasses.replace(CASES["deepseek-v2"], keys={"expert_gating_func": (U32, code)})
    vocabulary = {"vocab_size": (U32, words)} if stated else {}
    norm = quantised(rng, Type.F32, (64,))
    tensors = layer_files.tensors_of(case) | {f"blk.{i}.attn_norm.weight": norm for i in range(1, blocks)}
    tensors["token_embd.weight"] = quantised(rng, Type.F32, (words, 1))
    path = write(tmp_path, case, tensors, blocks=blocks, **vocabulary)
    assert MoELayer.open_and_load(path, 0).router_config.gating == gating


@pytest.mark.parametrize(
    ("arch", "keys", "words"),
    [
        ("deepseek2", {"expert_gating_func": (U32, 5)}, r"expert_gating_func must be one of 1 \(softmax\), .*, got 5"),
        ("deepseek2", {"expert_gating_func": (STRING, "sigmoid")}, r"expert_gating_func must be .*, got 'sigmoid'"),
        ("deepseek2", {"expert_gating_func": (I32, -1)}, r"expert_gating_func must be .*, got -1"),
        ("deepseek2", {"expert_weights_norm": (U32, 1)}, r"expert_weights_norm must be a boolean, got 1"),
        (
            "deepseek2",
            {"expert_weights_scale": (F32, float("nan"))},
            r"expert_weights_scale must be a finite .*, got nan",
        ),
        ("deepseek2", {"expert_weights_scale": (F64, 1e300)}, r"expert_weights_scale must be a finite .*, got 1e\+300"),
        ("deepseek2", {"expert_group_count": (U32, 3)}, r"2 of 8 experts cannot be chosen from the best 2 of 3"),
        (
            "deepseek2",
            {"expert_group_count": (U32, 8), "expert_group_used_count": (U32, 1)},
            r"2 of 8 experts cannot be chosen from the best 1 of 8",
        ),
        ("deepseek2", {"expert_group_used_count": (U32, 9)}, r"expert_group_used_count is 9, but there are 4 groups"),
        ("deepseek2", {"expert_group_count": (STRING, "4")}, r"expert_group_count must be an integer from 0 on"),
        ("qwen3moe", {"expert_used_count": None}, r"no qwen3moe.expert_used_count: give router_config="),
        ("qwen3moe", {"expert_used_count": (F32, 2.0)}, r"expert_used_count must be an integer from 1 on, got 2.0"),
        ("qwen3moe", {"expert_used_count": (U32, 9)}, r"expert_used_count is 9, but .* 8 experts"),
        ("lfm2moe", {"expert_gating_func": None}, r"no lfm2moe.expert_gating_func, wanted one of"),
    ],
)
def test_keys_of_the_router_that_are_wrong_are_named(tmp_path, arch, keys, words):
    case = {"deepseek2": DEEPSEEK, "qwen3moe": QWEN, "lfm2moe": CASES["lfm2moe"]}[arch]
    refused(write(tmp_path, case, **keys), words)


@pytest.mark.parametrize(
    ("name", "dropped", "words"),
    [
        ("qwen3moe", "ffn_gate_inp.weight", r"no tensor ffn_gate_inp.weight: is a shard"),
        ("deepseek-v3", "ffn_gate_shexp.weight", r"no tensor ffn_gate_shexp.weight beside its other shared ones"),
        ("deepseek-v3", "shexp", r"no tensor ffn_up_shexp.weight, but deepseek2 has shared experts"),
        ("qwen2moe", "ffn_gate_inp_shexp.weight", r"no tensor ffn_gate_inp_shexp.weight"),
        ("glm4moe", "exp_probs_b.bias", r"no tensor exp_probs_b.bias"),
        ("nemotron-super", "ffn_latent_up.weight", r"no tensor 'blk.0.ffn_latent_up.weight'"),
        ("nemotron-super", "latent", r"no tensor 'blk.0.ffn_latent_down.weight'"),
    ],
)
def test_a_missing_tensor_is_named(tmp_path, name, dropped, words):
    tensors = {key: value for key, value in layer_files.tensors_of(CASES[name]).items() if dropped not in key}
    assert len(tensors) < len(layer_files.tensors_of(CASES[name]))
    refused(write(tmp_path, CASES[name], tensors), words)


@pytest.mark.parametrize(
    ("name", "tensor", "shape", "words"),
    [
        (
            "qwen3moe",
            "ffn_gate_inp.weight",
            (8, 32),
            r"'blk.0.ffn_gate_inp.weight' has shape \[8, 32\], wanted \[8, 64\]",
        ),
        ("qwen3moe", "ffn_gate_inp.weight", (2, 8, 64), r"wanted 2 axes"),
        ("gpt-oss", "ffn_gate_inp.bias", (7,), r"has shape \[7\], wanted \[8\]"),
        ("deepseek-v3", "exp_probs_b.bias", (9,), r"has shape \[9\], wanted \[8\]"),
        ("qwen2moe", "ffn_gate_inp_shexp.weight", (63,), r"has shape \[63\], wanted \[64\]"),
        (
            "deepseek-v3",
            "ffn_down_shexp.weight",
            (64, 64),
            r"ffn_down_shexp.weight has shape \[64, 64\], wanted \[64, 32\]",
        ),
        ("nemotron-super", "ffn_latent_down.weight", (16, 64), r"has shape \[16, 64\], wanted \[32, 64\]"),
        ("nemotron_h_moe", "ffn_gate_shexp.weight", (64, 64), r"has a tensor ffn_gate_shexp.weight beside"),
        ("qwen3moe", "ffn_gate_inp_shexp.weight", (64,), r"has 'blk.0.ffn_gate_inp_shexp.weight', but no ffn_up_shexp"),
        ("llama4", "exp_probs_b.bias", (8,), r"has exp_probs_b, which a router that selects on logits cannot add"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path, rng, name, tensor, shape, words):
    tensors = layer_files.tensors_of(CASES[name]) | {f"blk.0.{tensor}": quantised(rng, Type.F32, shape)}
    refused(write(tmp_path, CASES[name], tensors), words)


def test_values_that_are_not_finite_are_refused_unless_allowed(tmp_path):
    tensors = layer_files.tensors_of(DEEPSEEK)
    bad = np.zeros(8, np.float32)
    bad[3] = np.inf
    tensors["blk.0.exp_probs_b.bias"] = Tensor(Type.F32, bad.view(np.uint8))
    path = write(tmp_path, DEEPSEEK, tensors)
    refused(path, r"'blk.0.exp_probs_b.bias' has 1 NaN or infinite values")
    np.testing.assert_array_equal(MoELayer.open_and_load(path, 0, check_finite=False).selection_bias, bad)


def test_an_unknown_architecture_wants_a_router_and_names_the_known(tmp_path, rng):
    path = write(tmp_path, QWEN, arch="newmoe")
    refused(path, r"router of architecture 'newmoe' is not known.*router_config=.*llama, qwen2moe, .*nemotron_h_moe")
    with pytest.raises(GgufError, match="is not known"):
        load_moe_layers(path)
    layer = MoELayer.open_and_load(path, 0, router_config=RouterConfig(3, gating="sigmoid"), activation="gelu_tanh")
    assert (layer.activation, layer.weight_on) == (Activation("gelu_tanh"), "output")
    x = jnp.asarray(rng.standard_normal((3, 64)), jnp.float32)
    # What is given is what is computed.
    case = dataclasses.replace(QWEN, router={"gating": "sigmoid"}, activation="gelu_tanh")
    ids = np.stack([rng.permutation(8)[:2] for _ in range(3)])
    two = dataclasses.replace(layer, router_config=RouterConfig(2, gating="sigmoid"))
    y = moe_layer_forward(two, x, topk_ids=ids)
    expected = layer_files.forward(case, layer_files.tensors_of(case), x, ids=ids)
    oracle.assert_within(y, expected, tolerances.KERNEL_F32)


def test_what_is_given_replaces_what_is_known(tmp_path):
    path = write(tmp_path, CASES["olmoe"])
    given = MoELayer.open_and_load(path, 0, router_config=CONFIG, weight_on="input")
    assert (given.router_config, given.weight_on) == (CONFIG, "input")
    refused(path, r"takes 9 experts a token, but there are 8", router_config=RouterConfig(9))
    for options, error in (
        ({"router_config": 2}, TypeError),
        ({"activation": "tanh"}, ValueError),
        ({"weight_on": "x"}, ValueError),
    ):
        with pytest.raises(error):
            MoELayer.open_and_load(path, 0, **options)


@pytest.fixture
def interleaved(tmp_path) -> Path:
    """Layer 0 dense, layers 1 and 3 of experts, as leading_dense_block_count and interleaving make them."""
    tensors = {f"blk.0.ffn_{kind}.weight": quantised(np.random.default_rng(0), Type.F32, (64, 64)) for kind in ("up",)}
    for layer in (1, 3):
        tensors |= layer_files.tensors_of(DEEPSEEK, layer, seed=layer)
    return write(tmp_path, DEEPSEEK, tensors, blocks=4, leading_dense_block_count=(U32, 1))


def test_dense_layers_are_skipped_and_refused_by_name(interleaved, rng):
    layers = load_moe_layers(interleaved, progress=False)
    assert list(layers) == [1, 3]
    assert list(load_moe_layers(interleaved, [3, 1, 3], progress=False)) == [3, 1]
    assert load_moe_layers(interleaved, [], progress=False) == {}
    x = jnp.asarray(rng.standard_normal((3, 64)), jnp.float32)
    expected = layer_files.forward(DEEPSEEK, layer_files.tensors_of(DEEPSEEK, 3, seed=3), x, layer=3)
    oracle.assert_within(moe_layer_forward(layers[3], x), expected, tolerances.KERNEL_F32)
    refused(interleaved, r"layer 0 is dense: it holds no expert tensors; its MoE layers are 1, 3")
    for layer in (2, 4):
        with pytest.raises(GgufError, match=rf"layer {layer} holds no expert tensors"):
            load_moe_layers(interleaved, [layer], progress=False)


def test_numpy_s_integers_are_layers_and_other_things_are_not(interleaved):
    with GgufFile(interleaved) as gguf:
        assert MoELayer.load_from_gguf(gguf, np.int64(3)).num_experts == 8  # pyright: ignore[reportArgumentType]
        with pytest.raises(TypeError, match="layer_idx must be an int"):
            MoELayer.load_from_gguf(gguf, "1")  # pyright: ignore[reportArgumentType]


def test_arrays_go_where_they_are_told(tmp_path):
    path = write(tmp_path, CASES["qwen2moe"])
    device = jax.devices()[0]
    placed = MoELayer.open_and_load(path, 0, device=device)
    assert all(leaf.devices() == {device} and leaf.committed for leaf in jax.tree.leaves(placed))
    mesh = jax.make_mesh((1,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    by_expert = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("expert"))
    sharded = MoELayer.open_and_load(path, 0, sharding=by_expert)
    # One shared expert cannot be dealt out: only the stack's leaves are.
    assert sharded.experts.up.planes[0].sharding.spec[0] == "expert"
    assert all(not any(leaf.sharding.spec) for leaf in jax.tree.leaves((sharded.shared, sharded.router)))


def test_memory_is_asked_for_before_it_is_taken(tmp_path, monkeypatch):
    from jmoe.gguf_file import budget

    monkeypatch.setattr(budget, "available_host_bytes", lambda: 1000)
    monkeypatch.setattr(GgufFile, "read_into", None)
    big = dataclasses.replace(DEEPSEEK, shared=1 << 17)
    refused(write(tmp_path, big), r"layer 0 needs \d+ bytes of host memory, but 1000 are available")
