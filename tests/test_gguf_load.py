"""From file to pytree: every weight is the one that gguf-py decodes, wherever it stood; and what loading refuses."""

from __future__ import annotations

import os
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import gguf_builder as b
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from gguf import GGMLQuantizationType as T

from jmoe import FORMATS, ExpertStack, QuantTensor
from jmoe.formats import format_of_type
from jmoe.gguf_file import DenseFallbackWarning, GgufError, GgufFile, moe_layers, planes
from jmoe.gguf_file.load import load_expert_stack, load_expert_stacks

DATA = Path(__file__).parent / "data"
FIXTURES = sorted(DATA.glob("*.gguf"))
SMALL = b.Sizes(num_experts=3, hidden_size=64, expert_intermediate=96)
DENSE_TYPES = {T.F32: jnp.float32, T.F16: jnp.float16, T.BF16: jnp.bfloat16}
KINDS = ("gate", "up", "down")


def bits(weights: Any) -> np.ndarray:
    """u32, every NaN alike."""
    weights = np.asarray(weights, np.float32)
    return np.where(np.isnan(weights), np.float32(np.nan), weights).view(np.uint32)


def assert_holds(projection: Any, ggml_type: T, blocks: np.ndarray) -> None:
    """The projection is ``blocks`` u8[E, O, row bytes], packed where the type has a format, to the bit."""
    packed = format_of_type(ggml_type)
    if packed is not None:
        assert isinstance(projection, QuantTensor)
        assert projection.format == packed.name
        for ours, whole in zip(projection.planes, packed.split(blocks), strict=True):
            assert ours.dtype == whole.dtype
            np.testing.assert_array_equal(np.asarray(ours), whole)
        return
    dtype = DENSE_TYPES.get(ggml_type, jnp.float32)
    assert projection.dtype == dtype
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(blocks, ggml_type)
    np.testing.assert_array_equal(bits(projection.astype(jnp.float32)), bits(expected))


def opened(tmp_path: Path, tensors: dict[str, b.Tensor], pairs: list[bytes] | None = None) -> GgufFile:
    return GgufFile(
        b.write(tmp_path / "m.gguf", b.good_file(tensors, b.moe_pairs(sizes=SMALL) if pairs is None else pairs))
    )


def leaves_equal(one: Any, other: Any) -> None:
    jax.tree.map(lambda a, c: np.testing.assert_array_equal(np.asarray(a), np.asarray(c)), one, other)


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_files_of_llama_cpp_load_to_the_bits_that_gguf_py_decodes(path):
    weights = oracle.read_gguf(path)
    stacks = load_expert_stacks(path, progress=False)
    with GgufFile(path) as file:
        assert tuple(stacks) == moe_layers(file)
        for layer, stack in stacks.items():
            leaves_equal(stack, ExpertStack.load_from_gguf(file, layer))
            leaves_equal(stack, ExpertStack.open_and_load(path, layer, stack.num_experts, stack.hidden_size))
            for kind in KINDS:
                weight = weights[f"blk.{layer}.ffn_{kind}_exps.weight"]
                for expert in range(stack.num_experts):
                    ours = getattr(stack, kind)[expert].dequantise()
                    np.testing.assert_array_equal(bits(ours), bits(weight.dequantise(expert)))


@pytest.mark.parametrize("piece", [1, 1000, 1 << 30], ids=lambda piece: f"pieces of {piece} bytes")
@pytest.mark.parametrize("ggml_type", [*(f.ggml_type for f in FORMATS.values()), *DENSE_TYPES], ids=lambda t: t.name)
def test_every_type_keeps_its_bits_however_it_is_cut_for_reading(ggml_type, piece, tmp_path, rng, monkeypatch):
    monkeypatch.setattr(planes, "_PIECE", piece)
    sizes = b.Sizes(3, 256, 512)
    tensors = b.moe_tensors(rng, 0, sizes, ggml_type, ggml_type)
    with opened(tmp_path, tensors, b.moe_pairs(sizes=sizes)) as file:
        stack = load_expert_stack(file, 0)
    for kind in KINDS:
        assert_holds(getattr(stack, kind), ggml_type, tensors[f"blk.0.ffn_{kind}_exps.weight"].blocks)


@pytest.mark.parametrize(
    "ggml_type", [t for t in T if format_of_type(t) is None and t not in DENSE_TYPES], ids=lambda t: t.name
)
def test_other_types_become_dense_with_a_warning_or_are_refused(ggml_type, tmp_path, rng):
    sizes = b.Sizes(2, 256, 512)
    tensors = b.moe_tensors(rng, 0, sizes, T.Q4_K, ggml_type)
    blocks = tensors["blk.0.ffn_down_exps.weight"].blocks
    with opened(tmp_path, tensors, b.moe_pairs(sizes=sizes)) as file:
        try:
            gguf.quants.dequantize(blocks[:1, :1], ggml_type)
        except NotImplementedError:
            with pytest.raises(GgufError, match=rf"'blk.0.ffn_down_exps.weight' has type {ggml_type.name}, .*Q4_K_M"):
                load_expert_stack(file, 0)
            return
        words = (
            rf"blk.0.ffn_down_exps.weight of type {ggml_type.name} .* {blocks.size // blocks.shape[-1] * 512 * 4} bytes"
        )
        with pytest.warns(DenseFallbackWarning, match=words) as caught:
            stack = load_expert_stack(file, 0, check_finite=False)
        assert len(caught) == 1
        # The warning points at the caller's line.
        assert caught[0].filename == __file__
    assert_holds(stack.down, ggml_type, blocks)


def test_fused_rows_become_gate_and_up(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(planes, "_PIECE", 500)
    fused = b.random_tensor(rng, T.Q5_0, (3, 192, 64))
    tensors = {
        "blk.0.ffn_gate_up_exps.weight": fused,
        "blk.0.ffn_down_exps.weight": b.random_tensor(rng, T.Q8_0, (3, 64, 96)),
    }
    with opened(tmp_path, tensors) as file:
        stack = load_expert_stack(file, 0)
    assert_holds(stack.gate, T.Q5_0, fused.blocks[:, :96])
    assert_holds(stack.up, T.Q5_0, fused.blocks[:, 96:])


@pytest.mark.parametrize("experts", [1, 3, 12])
@pytest.mark.parametrize("ggml_type", [T.Q4_0, T.F16], ids=lambda t: t.name)
def test_one_tensor_an_expert_becomes_a_stack(ggml_type, experts, tmp_path, rng):
    sizes = SMALL._replace(num_experts=experts)
    stacked = b.moe_tensors(rng, 0, sizes, ggml_type, ggml_type)
    tensors = {
        f"blk.0.ffn_{kind}.{e}.weight": b.Tensor(ggml_type, stacked[f"blk.0.ffn_{kind}_exps.weight"].blocks[e])
        for e in range(experts)
        for kind in KINDS
    }
    pairs = b.moe_pairs("llama", sizes, expert_used_count=(b.U32, 1))
    with opened(tmp_path, tensors, pairs) as file:
        stack = load_expert_stack(file, 0, *sizes)
    for kind in KINDS:
        assert_holds(getattr(stack, kind), ggml_type, stacked[f"blk.0.ffn_{kind}_exps.weight"].blocks)


def test_biases_and_scales_load_as_f32_and_are_none_where_absent(tmp_path, rng):
    optional = {"gate_bias": (3, 96), "up_bias": (3, 96), "down_bias": (3, 64), "down_scale": (3,)}
    names = {leaf: "blk.0.ffn_{}_exps.{}".format(*leaf.split("_")) for leaf in optional}
    types = {"gate_bias": T.F32, "up_bias": T.F16, "down_bias": T.BF16, "down_scale": T.F32}
    tensors = b.moe_tensors(rng, 0, SMALL, T.Q8_0, T.Q8_0)
    with opened(tmp_path, tensors) as file:
        plain = load_expert_stack(file, 0)
        assert [getattr(plain, leaf) for leaf in optional] == [None] * 4
    added = {names[leaf]: b.random_tensor(rng, types[leaf], shape, 1.0) for leaf, shape in optional.items()}
    with opened(tmp_path, {**tensors, **added}) as file:
        stack = load_expert_stack(file, 0)
    for leaf, shape in optional.items():
        loaded = getattr(stack, leaf)
        assert (loaded.shape, loaded.dtype) == (shape, jnp.float32)
        expected = gguf.quants.dequantize(added[names[leaf]].blocks, types[leaf])
        np.testing.assert_array_equal(np.asarray(loaded), expected.reshape(shape))


def test_a_layer_without_a_gate_loads(tmp_path, rng):
    tensors = b.moe_tensors(rng, 0, SMALL, T.Q8_0, T.Q8_0)
    del tensors["blk.0.ffn_gate_exps.weight"]
    with opened(tmp_path, tensors, b.moe_pairs("nemotron_h_moe", SMALL)) as file:
        stack = load_expert_stack(file, 0)
    assert stack.gate is None
    assert stack.formats == (None, "q8_0", "q8_0")


@pytest.mark.parametrize("given", ["num_experts", "hidden_size", "expert_intermediate"])
def test_sizes_that_the_caller_gives_must_be_the_files(given):
    right: dict[str, Any] = {"num_experts": 8, "hidden_size": 256, "expert_intermediate": 256}
    with GgufFile(DATA / "qwen3moe-Q4_K_M.gguf") as file:
        load_expert_stack(file, 1, **right)
        with pytest.raises(GgufError, match=rf"{given}=7 was given, but layer 1 has {right[given]}"):
            load_expert_stack(file, 1, **{**right, given: 7})


def spoilt(tensor: b.Tensor, at: int, raw: bytes) -> b.Tensor:
    """Byte ``at`` on of the tensor's last block replaced."""
    block_bytes = gguf.GGML_QUANT_SIZES[tensor.ggml_type][1]
    blocks = tensor.blocks.copy()
    last = blocks.reshape(-1, block_bytes)[-1]
    last[at : at + len(raw)] = np.frombuffer(raw, np.uint8)
    return tensor._replace(blocks=blocks)


@pytest.mark.parametrize(
    ("ggml_type", "at", "raw"),
    [
        (T.Q4_K, 0, b"\x00\x7c"),  # d = inf
        (T.Q4_K, 2, b"\x01\xfe"),  # dmin = nan
        (T.Q6_K, 208, b"\x00\xfc"),
        (T.Q8_0, 0, b"\xff\x7f"),
        (T.F32, 0, b"\x00\x00\x80\x7f"),
        (T.F16, 0, b"\x00\x7e"),
        (T.BF16, 0, b"\x80\xff"),
        (T.Q5_1, 2, b"\x00\x7c"),
        (T.Q3_K, 108, b"\x00\x7c"),
        (T.Q2_K, 82, b"\x00\x7c"),
        (T.IQ4_XS, 0, b"\x00\x7c"),
        (T.IQ3_S, 0, b"\x00\x7c"),
    ],
)
@pytest.mark.filterwarnings("ignore::jmoe.gguf_file.DenseFallbackWarning")
def test_scales_that_are_not_finite_are_refused_unless_the_caller_takes_them(ggml_type, at, raw, tmp_path, rng):
    sizes = b.Sizes(2, 256, 512)
    tensors = b.moe_tensors(rng, 0, sizes, T.Q8_0, ggml_type)
    name = "blk.0.ffn_down_exps.weight"
    tensors[name] = spoilt(tensors[name], at, raw)
    with opened(tmp_path, tensors, b.moe_pairs(sizes=sizes)) as file:
        with pytest.raises(
            GgufError, match=rf"{name} has \d+ (scales|weights) that are NaN or infinite.*check_finite=False"
        ):
            load_expert_stack(file, 0)
        assert_holds(load_expert_stack(file, 0, check_finite=False).down, ggml_type, tensors[name].blocks)


def test_a_bias_that_is_not_finite_is_refused(tmp_path, rng):
    tensors = b.moe_tensors(rng, 0, SMALL, T.Q8_0, T.Q8_0)
    name = "blk.0.ffn_up_exps.bias"
    tensors[name] = spoilt(b.random_tensor(rng, T.F32, (3, 96)), 0, b"\x00\x00\xc0\x7f")
    with opened(tmp_path, tensors) as file:
        with pytest.raises(GgufError, match=f"'{name}' has 1 NaN or infinite values"):
            load_expert_stack(file, 0)
        assert np.isnan(np.asarray(load_expert_stack(file, 0, check_finite=False).up_bias)).sum() == 1


def test_only_the_layers_own_bytes_are_read(monkeypatch):
    reads: list[tuple[int, int]] = []
    preadv = os.preadv

    def recorded(fd: int, buffers: Any, offset: int) -> int:
        reads.append((offset, offset + sum(len(buffer) for buffer in buffers)))
        return preadv(fd, buffers, offset)

    with GgufFile(DATA / "qwen3moe-Q4_K_M.gguf") as file:
        monkeypatch.setattr(os, "preadv", recorded)
        load_expert_stack(file, 1)
        own = [file.tensors[f"blk.1.ffn_{kind}_exps.weight"] for kind in KINDS]
    assert all(any(t.offset <= start and end <= t.offset + t.nbytes for t in own) for start, end in reads)
    assert sum(end - start for start, end in reads) == sum(t.nbytes for t in own)


def test_a_file_that_changes_during_the_load_is_refused_and_what_was_loaded_before_stays(tmp_path, rng):
    path = b.write(
        tmp_path / "m.gguf", b.good_file(b.moe_tensors(rng, 0, SMALL, T.Q8_0, T.F32), b.moe_pairs(sizes=SMALL))
    )
    with GgufFile(path) as file:
        loaded = load_expert_stack(file, 0)
        copy = jax.tree.map(lambda leaf: np.array(leaf), loaded)
        with open(path, "r+b") as other:
            other.seek(-1000, os.SEEK_END)
            other.write(bytes(1000))
        os.utime(path, ns=(1, 1))
        with pytest.raises(GgufError, match="changed during load"):
            load_expert_stack(file, 0)
        os.truncate(path, 500)
        with pytest.raises(GgufError, match="changed during load"):
            load_expert_stack(file, 0)
    path.unlink()
    leaves_equal(loaded, copy)


def test_eight_threads_load_what_one_loads():
    path = DATA / "qwen3moe-Q4_K_M.gguf"
    before = b.open_descriptors()
    with GgufFile(path) as file, ThreadPoolExecutor(8) as executor:
        expected = load_expert_stack(file, 1)
        jobs = [executor.submit(load_expert_stack, file, 1) for _ in range(8)]
        jobs += [executor.submit(ExpertStack.open_and_load, path, 1) for _ in range(8)]
        for job in jobs:
            leaves_equal(job.result(), expected)
    assert b.open_descriptors() == before


def test_peak_memory_is_the_planes_and_less_than_one_tensor(tmp_path, rng):
    sizes = b.Sizes(num_experts=8, hidden_size=2048, expert_intermediate=1536)
    with opened(tmp_path, b.moe_tensors(rng, 0, sizes, T.Q8_0, T.Q8_0), b.moe_pairs(sizes=sizes)) as file:
        tensor = file.tensors["blk.0.ffn_up_exps.weight"].nbytes
        load_expert_stack(file, 0)
        tracemalloc.start()
        try:
            stack = load_expert_stack(file, 0)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert stack.nbytes < peak < stack.nbytes + tensor
