"""Stacks written to a file: the bytes that they were read from, in a file that jmoe, gguf-py and ggml read."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import gguf_builder as b
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, random_stack
from gguf import GGMLQuantizationType as T
from test_gguf_load import FIXTURES, SMALL, leaves_equal

from jmoe import FORMATS, ExpertStack, for_mps, load_expert_stacks, save_gguf
from jmoe.gguf_file import GgufError, GgufFile, moe_layers
from jmoe.gguf_file import save as save_module


def assert_same_tensors(written: Path, source: Path) -> None:
    """Each expert tensor of ``source`` stands in ``written`` as it was, by gguf-py's reader."""
    ours = {tensor.name: tensor for tensor in gguf.GGUFReader(written).tensors}
    theirs = {t.name: t for t in gguf.GGUFReader(source).tensors if "_exps." in t.name}
    assert set(theirs) == {name for name in ours if "_exps." in name}
    for name, tensor in theirs.items():
        assert (ours[name].tensor_type, ours[name].shape.tolist()) == (tensor.tensor_type, tensor.shape.tolist()), name
        assert ours[name].data.tobytes() == tensor.data.tobytes(), name


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
@pytest.mark.parametrize("stacked", [False, True], ids=["apart", "stacked"])
def test_files_of_llama_cpp_are_written_back_byte_for_byte(path, stacked, tmp_path):
    with GgufFile(path) as file:
        architecture, metadata = file.architecture, file.metadata
        routers = {
            name: file.read(name).view(np.float32) for name in file.tensors if name.endswith("ffn_gate_inp.weight")
        }
    out = tmp_path / "again.gguf"
    stacks: Any = load_expert_stacks(path, stacked=stacked, progress=False)
    save_gguf(out, stacks, architecture=architecture, metadata=metadata, tensors=routers)
    assert_same_tensors(out, path)
    with GgufFile(out) as again:
        for name, router in routers.items():
            np.testing.assert_array_equal(again.read(name).view(np.float32), router)
        for key, value in metadata.items():
            got = again.metadata[key]
            assert list(got) == list(value) if hasattr(value, "__len__") and len(value) else got == value, key
    assert os.listdir(tmp_path) == ["again.gguf"]


@pytest.mark.parametrize("ggml_type", [*(f.ggml_type for f in FORMATS.values()), T.F32, T.F16, T.BF16])
def test_every_type_with_biases_and_scales_survives_the_way_there_and_back(ggml_type, rng, tmp_path):
    sizes = b.Sizes(3, 256, 512)
    tensors = b.moe_tensors(rng, 0, sizes, ggml_type, ggml_type)
    for name, shape in {
        "gate_exps.bias": (3, 512),
        "up_exps.bias": (3, 512),
        "down_exps.bias": (3, 256),
        "down_exps.scale": (3,),
    }.items():
        tensors[f"blk.0.ffn_{name}"] = b.random_tensor(rng, T.F32, shape)
    source = b.write(tmp_path / "source.gguf", b.good_file(tensors, b.moe_pairs(sizes=sizes)))
    stack = ExpertStack.open_and_load(source, 0)
    save_gguf(tmp_path / "out.gguf", stack, architecture="qwen3moe")
    assert_same_tensors(tmp_path / "out.gguf", source)
    leaves_equal(ExpertStack.open_and_load(tmp_path / "out.gguf", 0), stack)


def test_gate_and_up_of_a_fused_tensor_become_its_two_halves(rng, tmp_path):
    fused = b.random_tensor(rng, T.Q5_0, (3, 192, 64))
    tensors = {
        "blk.0.ffn_gate_up_exps.weight": fused,
        "blk.0.ffn_down_exps.weight": b.random_tensor(rng, T.Q8_0, (3, 64, 96)),
    }
    source = b.write(tmp_path / "source.gguf", b.good_file(tensors, b.moe_pairs(sizes=SMALL)))
    save_gguf(tmp_path / "out.gguf", ExpertStack.open_and_load(source, 0), architecture="gemma4")
    with GgufFile(tmp_path / "out.gguf") as file:
        halves = [file.read(f"blk.0.ffn_{kind}_exps.weight") for kind in ("gate", "up")]
    np.testing.assert_array_equal(np.concatenate(halves, axis=1), fused.blocks)


def test_layers_of_different_formats_and_sizes_of_i_share_a_file(rng, tmp_path):
    small, tall = b.Sizes(3, 256, 256), b.Sizes(3, 256, 512)
    pairs = b.moe_pairs(sizes=small, blocks=6, expert_feed_forward_length=(b.U32, [0, 0, 256, 0, 0, 512]))
    tensors = {**b.moe_tensors(rng, 2, small), **b.moe_tensors(rng, 5, tall, T.Q5_K, T.Q4_K)}
    source = b.write(tmp_path / "source.gguf", b.good_file(tensors, pairs))
    save_gguf(tmp_path / "out.gguf", load_expert_stacks(source, progress=False), architecture="qwen3moe")
    assert_same_tensors(tmp_path / "out.gguf", source)
    with GgufFile(tmp_path / "out.gguf") as file:
        assert moe_layers(file) == (2, 5)
        assert "qwen3moe.block_count" not in file.metadata


def test_experts_without_a_gate_are_written_for_an_architecture_that_has_none(tmp_path):
    stack = replace(random_stack(CASES["tiny"]), gate=None)
    save_gguf(tmp_path / "out.gguf", stack, architecture="nemotron_h_moe")
    leaves_equal(ExpertStack.open_and_load(tmp_path / "out.gguf", 0), stack)
    with pytest.raises(GgufError, match=r"refused\.gguf: layer 0 has no tensor ffn_gate_exps"):
        save_gguf(tmp_path / "refused.gguf", stack, architecture="qwen3moe")
    assert os.listdir(tmp_path) == ["out.gguf"]


def test_what_fails_halfway_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    out, stack = tmp_path / "model.gguf", random_stack(CASES["tiny"])
    out.write_bytes(b"the old one")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    descriptors = b.open_descriptors()
    monkeypatch.setattr(save_module.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_gguf(out, stack, architecture="qwen3moe")
    assert os.listdir(tmp_path) == ["model.gguf"]
    assert out.read_bytes() == b"the old one"
    assert b.open_descriptors() == descriptors
    monkeypatch.undo()
    save_gguf(os.fsencode(out), stack, architecture="qwen3moe")
    leaves_equal(ExpertStack.open_and_load(out, 0), stack)
    with pytest.raises(FileNotFoundError):
        save_gguf(tmp_path / "no such directory" / "model.gguf", stack, architecture="qwen3moe")


def test_what_cannot_be_written_is_refused_with_its_reason(tmp_path):
    tiny = random_stack(CASES["tiny"])
    layers = jax.tree.map(lambda leaf: leaf[None], tiny)
    other_experts, mixed = random_stack(CASES["all-chosen"]), random_stack(CASES["mixed"])

    def refused(error: type[Exception], words: str, stacks: Any, architecture: Any = "qwen3moe", **more: Any) -> None:
        with pytest.raises(error, match=words):
            save_gguf(tmp_path / "out.gguf", stacks, architecture=architecture, **more)
        assert os.listdir(tmp_path) == []

    refused(TypeError, "architecture must be a name", tiny, None)
    refused(TypeError, "stacks must be an ExpertStack, a mapping", [tiny])
    refused(TypeError, "stack must be an ExpertStack, got int", {0: 1})
    refused(ValueError, "no stack to save", {})
    refused(ValueError, "numbered from 0", {-1: tiny})
    refused(ValueError, r"leading axes \[1\]", layers)
    refused(ValueError, r"one num_experts, got \{0: 4, 1: 8\}", {0: tiny, 1: other_experts})
    refused(ValueError, "before jmoe.for_mps", for_mps(mixed))
    refused(TypeError, "outside jit", jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tiny))
    refused(ValueError, "must be .* to fit", replace(tiny, down_bias=jnp.zeros((4, 3))))
    twice = {"blk.0.ffn_up_exps.weight": np.zeros((4, 4), np.float32)}
    refused(ValueError, "is a tensor of the stacks already", tiny, tensors=twice)
    refused(TypeError, "must be f32, f16 or bf16", tiny, tensors={"a": np.zeros(3, np.int32)})
    refused(ValueError, "general.architecture is 'llama'", tiny, metadata={"general.architecture": "llama"})
    refused(TypeError, "must be of one kind", tiny, metadata={"a": [1, "b"]})
    refused(TypeError, "must be a number of 64 bits", tiny, metadata={"a": 1 << 64})
    refused(GgufError, r"out.gguf: .*expert_used_count is 9", tiny, metadata={"qwen3moe.expert_used_count": 9})
