"""Whole MoE layers of files changed at random: the file's own numbers, or a GgufError, and nothing left behind."""

from __future__ import annotations

import gc
import threading
import warnings
from pathlib import Path
from typing import Any

import gguf_builder as b
import hypothesis
import hypothesis.strategies as st
import jax
import layer_files
import numpy as np
import strict_gguf
import test_gguf_fuzz as fuzz
from gguf import GGMLQuantizationType as T
from layer_files import CASES, SIZES

from jmoe import DenseFallbackWarning, GgufError, GgufFile, MoELayer, RouterConfig
from jmoe.gguf_file import moe_layers

EXAMPLES = 800
NAMES = ("deepseek-v3", "qwen2moe", "gpt-oss", "nemotron-super")
# Leaf -> the tensor that it holds whole.
TENSORS = {
    "router": "ffn_gate_inp.weight",
    "router_bias": "ffn_gate_inp.bias",
    "selection_bias": "exp_probs_b.bias",
    "shared_gate": "ffn_gate_inp_shexp.weight",
    "latent_down": "ffn_latent_down.weight",
    "latent_up": "ffn_latent_up.weight",
}
KEYS = [
    *("expert_used_count", "expert_gating_func", "expert_weights_norm", "expert_weights_scale", "expert_group_count"),
    *("expert_group_used_count", "expert_shared_count", "expert_shared_feed_forward_length", "moe_latent_size"),
    "general.architecture",
]
VALUES = [
    *((b.U32, n) for n in (0, 1, 2, 3, 8, 9, 32, 2**32 - 1)),
    *((b.I32, -1), (b.U64, 2**63), (b.F32, 2.5), (b.F32, float("nan")), (b.F64, 1e300), (b.BOOL, True)),
    *((b.STRING, "olmoe"), (b.STRING, "other"), (b.U32, []), (b.U32, [2]), (b.STRING, ["a"])),
]
RENAMED = [f"blk.0.{name}" for name in (*TENSORS.values(), "ffn_up_shexp.weight", "ffn_gate_shexp.weight", "other")]


def model(name: str) -> fuzz.Model:
    case = CASES[name]
    stated = {
        "block_count": (b.U32, 1),
        "expert_count": (b.U32, SIZES.num_experts),
        "expert_used_count": (b.U32, layer_files.TOP_K),
        "embedding_length": (b.U32, SIZES.hidden_size),
        "expert_feed_forward_length": (b.U32, SIZES.expert_intermediate),
        **case.keys,
    }
    keys = {f"{case.arch}.{key}": value for key, value in stated.items() if value is not None}
    return fuzz.Model(layer_files.tensors_of(case), {"general.architecture": (b.STRING, case.arch), **keys})


MODELS = {name: model(name) for name in NAMES}
index = st.integers(0, 30)
SAID = st.one_of(
    st.tuples(st.just(fuzz.set_key), st.sampled_from(KEYS), st.sampled_from(VALUES)),
    st.tuples(st.just(fuzz.drop_key), index),
    st.tuples(st.just(fuzz.drop_tensor), index),
    st.tuples(st.just(fuzz.rename_tensor), index, st.sampled_from(RENAMED)),
    st.tuples(st.just(fuzz.retype_tensor), index, st.sampled_from([T.F32, T.F16, T.Q8_0, T.Q4_0, T.I32])),
    st.tuples(st.just(fuzz.reshape_tensor), index, st.integers(0, 5)),
)
WRITTEN = st.sampled_from(["set number", "add to number", "set byte", "cut end"]).flatmap(
    lambda name: st.tuples(st.just(name), *fuzz.WRITTEN[name][1])
)


def judge(path: Path, raw: bytes) -> str:
    path.write_bytes(raw)
    file = fuzz.result_or_error(lambda: GgufFile(path))
    if isinstance(file, GgufError):
        return "refused at opening"
    expected = strict_gguf.parse(raw)
    with file:
        outcomes = [judge_layer(file, expected, layer) for layer in moe_layers(file)]
    return next((outcome for outcome in outcomes if outcome != "loaded"), "loaded" if outcomes else "no layer")


def judge_layer(file: GgufFile, expected: strict_gguf.File, index: int) -> str:
    layer = fuzz.result_or_error(lambda: MoELayer.load_from_gguf(file, index))
    if isinstance(layer, GgufError):
        assert file.path in str(layer)
        return "refused"
    assert isinstance(layer.router_config, RouterConfig)
    for leaf, name in TENSORS.items():
        value, tensor = getattr(layer, leaf), expected.tensors.get(f"blk.{index}.{name}")
        assert (value is None) == (tensor is None), leaf
        if tensor is not None:
            fuzz.assert_same_numbers(value, fuzz.weights_of(tensor))
    for kind in ("gate", "up", "down"):
        tensor = expected.tensors.get(f"blk.{index}.ffn_{kind}_shexp.weight")
        assert (tensor is None) == (layer.shared is None or getattr(layer.shared, kind) is None)
        if tensor is not None:
            fuzz.assert_same_numbers(getattr(layer.shared, kind), fuzz.weights_of(tensor))
        if (held := getattr(layer.experts, kind)) is not None:
            fuzz.assert_same_numbers(held, fuzz.layer_weights(expected, index, kind))
    return "loaded"


def test_a_changed_layer_is_the_file_s_own_or_a_typed_error(tmp_path):
    outcomes: dict[str, int] = {}

    @hypothesis.settings(max_examples=EXAMPLES, suppress_health_check=[hypothesis.HealthCheck.too_slow])
    @hypothesis.given(st.sampled_from(NAMES), st.lists(SAID, max_size=2), st.lists(WRITTEN, max_size=1))
    def run(name: str, said: list[Any], written: list[Any]) -> None:
        changed = MODELS[name]
        for change, *arguments in said:
            changed = change(changed, *arguments)
        raw = changed.write()
        for kind, *arguments in written:
            raw = fuzz.WRITTEN[kind][0](raw, *arguments)
        outcome = judge(tmp_path / "changed.gguf", raw)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1

    gc.collect()  # what earlier tests left
    before = (b.open_descriptors(), threading.active_count(), len(jax.live_arrays()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DenseFallbackWarning)
        run()
    gc.collect()
    assert (b.open_descriptors(), threading.active_count(), len(jax.live_arrays())) == before
    assert min(outcomes.get(kind, 0) for kind in ("loaded", "refused", "refused at opening")) > EXAMPLES // 20, outcomes


def test_the_files_themselves_load(tmp_path):
    for name, whole in MODELS.items():
        assert judge(tmp_path / f"{name}.gguf", whole.write()) == "loaded"
        layer = MoELayer.open_and_load(tmp_path / f"{name}.gguf", 0)
        assert np.isfinite(np.asarray(layer.router)).all()
