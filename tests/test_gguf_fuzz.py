"""Valid files, changed at random: each loads with the numbers that an independent reader finds, or is a GgufError.

    JMOE_FUZZ_CASES=200000 pytest tests/test_gguf_fuzz.py -s      prints the count of each outcome

A case is a valid file, changed in what it says (tensors and keys) and then in its bytes (numbers of the header, any
byte, pieces, the end). ``strict_gguf`` judges what may open; gguf-py's dequantisation what the numbers are.
"""

from __future__ import annotations

import collections
import functools
import gc
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import gguf_builder as b
import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import strict_gguf
from gguf import GGMLQuantizationType as T
from test_gguf_header import peak_bytes

from jmoe import QuantTensor
from jmoe.gguf_file import DenseFallbackWarning, GgufError, GgufFile, moe_layers
from jmoe.gguf_file.load import load_expert_stack

CASES = int(os.environ.get("JMOE_FUZZ_CASES", "2000"))
# Hypothesis remembers what it tried: batches keep that small, and each has its own seed.
BATCH = 2000


@dataclass(frozen=True)
class Model:
    """What a valid file says, before it is written; ``keys`` maps to (type code, value)."""

    tensors: dict[str, b.Tensor]
    keys: dict[str, tuple[int, Any]]
    alignment: int = 32
    version: int = 3

    def write(self) -> bytes:
        pairs = [
            (b.key_array if isinstance(value, list) else b.key_value)(name, code, value)
            for name, (code, value) in self.keys.items()
        ]
        return b.good_file(self.tensors, pairs, alignment=self.alignment, version=self.version)


def model(arch: str, sizes: b.Sizes, tensors: dict[str, b.Tensor], blocks: int = 1, **options: int) -> Model:
    experts, hidden, inner = sizes
    keys: dict[str, tuple[int, Any]] = {
        "general.architecture": (b.STRING, arch),
        "general.file_type": (b.U32, 15),
        "tokenizer.ggml.tokens": (b.STRING, ["<s>", "", "é"]),
        "tokenizer.ggml.scores": (b.F32, [0.5, -1.0, 0.0]),
        "tokenizer.ggml.add_bos_token": (b.BOOL, True),
        f"{arch}.block_count": (b.U32, blocks),
        f"{arch}.expert_count": (b.U32, experts),
        f"{arch}.expert_used_count": (b.U32, 2),
        f"{arch}.embedding_length": (b.U32, hidden),
        f"{arch}.expert_feed_forward_length": (b.U32, [inner] * blocks),
    }
    return Model(tensors, keys, **options)


def models() -> Iterator[Model]:
    """K-quants in stacked tensors; blocks of 32, gate and up fused, biases, a second layer; one tensor an expert."""
    rng = np.random.default_rng(8)
    large, small = b.Sizes(2, 256, 256), b.Sizes(3, 64, 32)
    router = {"blk.0.ffn_gate_inp.weight": b.random_tensor(rng, T.F32, (2, 256))}
    yield model("qwen3moe", large, {**router, **b.moe_tensors(rng, 0, large, T.Q4_K, T.Q6_K)})
    fused = {
        "blk.0.ffn_gate_up_exps.weight": b.random_tensor(rng, T.MXFP4, (3, 64, 64)),
        "blk.0.ffn_down_exps.weight": b.random_tensor(rng, T.Q4_0, (3, 64, 32)),
        "blk.0.ffn_down_exps.bias": b.random_tensor(rng, T.F16, (3, 64)),
        "output_norm.weight": b.random_tensor(rng, T.F32, (64,)),
        **b.moe_tensors(rng, 1, small, T.Q5_0, T.BF16),
        "blk.1.ffn_up_exps.bias": b.random_tensor(rng, T.F32, (3, 32)),
    }
    yield model("gpt-oss", small, fused, 2)
    single = {
        f"blk.0.ffn_{kind}.{e}.weight": b.random_tensor(rng, T.IQ4_NL if kind == "down" else T.Q5_1, shape)
        for e in range(3)
        for kind, shape in (("gate", (32, 64)), ("up", (32, 64)), ("down", (64, 32)))
    }
    yield model("llama", small, single, alignment=64, version=2)


MODELS = tuple(models())

# What a file says

NAMES = [
    *(f"blk.{layer}.ffn_{kind}_exps.weight" for layer in (0, 1, 7) for kind in ("gate", "up", "down", "gate_up")),
    *("blk.0.ffn_up.0.weight", "blk.0.ffn_up.3.weight", "blk.0.ffn_up_exps.bias", "blk.0.ffn_down_exps.scale"),
    *("blk.0.ffn_gate_exps.scale", "blk.00.ffn_up_exps.weight", "blk.0.ffn_up_exps.weight\0x", "", "é" * 32),
]
KEYS = [
    *("block_count", "expert_count", "expert_used_count", "embedding_length", "expert_feed_forward_length"),
    *("feed_forward_length", "moe_latent_size", "general.architecture", "general.alignment", "split.count"),
]
VALUES = [
    *((b.U32, n) for n in (0, 1, 2, 3, 32, 64, 256, 2**31, 2**32 - 1)),
    *((b.I32, -1), (b.U64, 2**63), (b.F32, 2.0), (b.BOOL, True), (b.STRING, "3"), (b.U32, [])),
    *((b.U32, [32]), (b.I32, [32, 0, 7]), (b.STRING, ["a", "b"])),
]
TYPES = [
    T.F32,
    T.F16,
    T.BF16,
    T.Q4_0,
    T.Q8_0,
    T.Q4_K,
    T.MXFP4,
    T.Q8_1,
    T.IQ4_NL,
    T.IQ4_XS,
    T.Q2_K,
    T.Q3_K,
    T.IQ3_S,
    T.I32,
    T.F64,
]


def nth(items: Any, index: int) -> Any:
    """One of ``items``, whatever number was drawn."""
    return list(items)[index % len(items)]


def drop_tensor(m: Model, index: int) -> Model:
    name = nth(m.tensors, index)
    return replace(m, tensors={n: t for n, t in m.tensors.items() if n != name})


def rename_tensor(m: Model, index: int, name: str) -> Model:
    old = nth(m.tensors, index)
    return replace(m, tensors={name if n == old else n: t for n, t in m.tensors.items()})


def retype_tensor(m: Model, index: int, ggml_type: T) -> Model:
    name = nth(m.tensors, index)
    shape = tuple(reversed(m.tensors[name].dims))
    if shape[-1] % gguf.GGML_QUANT_SIZES[ggml_type][0] or ggml_type == T.Q8_1:
        return m
    return replace(m, tensors={**m.tensors, name: b.random_tensor(np.random.default_rng(index), ggml_type, shape)})


def reshape_tensor(m: Model, index: int, way: int) -> Model:
    name = nth(m.tensors, index)
    *lead, row = m.tensors[name].blocks.shape
    shapes = [(*lead[::-1], row), (-1, row), (1, *lead, row), (1, 1, *lead, row), (*lead, 1, row), (-1, 2, row)]
    shape = nth(shapes, way)
    if len(shape) > 4 or (-1 in shape and np.prod(lead, dtype=int) % np.prod(shape[1:-1], dtype=int)):
        return m
    return replace(
        m, tensors={**m.tensors, name: m.tensors[name]._replace(blocks=m.tensors[name].blocks.reshape(shape))}
    )


def reverse_tensors(m: Model) -> Model:
    return replace(m, tensors=dict(reversed(m.tensors.items())), keys=dict(reversed(m.keys.items())))


def set_key(m: Model, key: str, value: tuple[int, Any]) -> Model:
    name = key if "." in key else f"{m.keys['general.architecture'][1]}.{key}"
    return replace(m, keys={**m.keys, name: value})


def drop_key(m: Model, index: int) -> Model:
    kept = nth(m.keys, index)
    return replace(m, keys={k: v for k, v in m.keys.items() if k != kept or k == "general.architecture"})


def set_layout(m: Model, alignment: int, version: int) -> Model:
    return replace(m, alignment=alignment, version=version)


SAID: dict[str, tuple[Callable[..., Model], tuple[st.SearchStrategy[Any], ...]]] = {
    "drop tensor": (drop_tensor, (st.integers(0, 20),)),
    "rename tensor": (rename_tensor, (st.integers(0, 20), st.sampled_from(NAMES))),
    "retype tensor": (retype_tensor, (st.integers(0, 20), st.sampled_from(TYPES))),
    "reshape tensor": (reshape_tensor, (st.integers(0, 20), st.integers(0, 5))),
    "reverse": (reverse_tensors, ()),
    "set key": (set_key, (st.sampled_from(KEYS), st.sampled_from(VALUES))),
    "drop key": (drop_key, (st.integers(0, 20),)),
    "layout": (set_layout, (st.sampled_from([1, 8, 64, 4096]), st.sampled_from([2, 3]))),
}

# Its bytes

NUMBERS = [
    *(0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 31, 32, 33, 63, 64, 128, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32 - 32),
    *(2**32 - 1, 2**32, 2**61, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1),
]
TEXTS = [b"", b"\0", b"\xff", b"blk.0.", b"GGUF", bytes(32), b"\x00\x7c" * 150, b"\xff" * 32]


@functools.lru_cache(64)
def numbers_of(raw: bytes) -> list[tuple[int, int]]:
    """Where the header's numbers stand."""
    try:
        return strict_gguf.parse_and_locate(raw)[1]
    except strict_gguf.Malformed:
        return [(16, 8)]


def put(raw: bytes, at: int, new: bytes) -> bytes:
    return raw[:at] + new + raw[at + len(new) :]


def set_number(raw: bytes, index: int, value: int) -> bytes:
    at, size = nth(numbers_of(raw), index)
    return put(raw, at, (value % 256**size).to_bytes(size, "little"))


def add_to_number(raw: bytes, index: int, by: int) -> bytes:
    at, size = nth(numbers_of(raw), index)
    return put(raw, at, ((int.from_bytes(raw[at : at + size], "little") + by) % 256**size).to_bytes(size, "little"))


def set_byte(raw: bytes, at: int, value: int) -> bytes:
    return put(raw, at % len(raw), bytes([value])) if raw else raw


def set_text(raw: bytes, at: int, text: bytes) -> bytes:
    return put(raw, at % (len(raw) + 1), text)


def insert(raw: bytes, at: int, text: bytes) -> bytes:
    return raw[:at] + text + raw[at:]


def delete(raw: bytes, at: int, count: int) -> bytes:
    return raw[:at] + raw[at + count :]


def copy_piece(raw: bytes, at: int, to: int, count: int) -> bytes:
    return put(raw, to % (len(raw) + 1), raw[at : at + count])


def cut(raw: bytes, at: int) -> bytes:
    return raw[: at % (len(raw) + 1)]


def cut_end(raw: bytes, count: int) -> bytes:
    return raw[: max(0, len(raw) - count)]


# In the header, which is below 2 KiB, or anywhere.
PLACE = st.integers(0, 2047) | st.integers(0, 1 << 18)
NUMBER = st.integers(0, 150)
WRITTEN: dict[str, tuple[Callable[..., bytes], tuple[st.SearchStrategy[Any], ...]]] = {
    "set number": (set_number, (NUMBER, st.sampled_from(NUMBERS))),
    "add to number": (add_to_number, (NUMBER, st.sampled_from([-32, -1, 1, 32, 256, 2**32]))),
    "set byte": (set_byte, (PLACE, st.integers(0, 255))),
    "set text": (set_text, (PLACE, st.sampled_from(TEXTS))),
    "insert": (insert, (PLACE, st.sampled_from(TEXTS))),
    "delete": (delete, (PLACE, st.integers(1, 64))),
    "copy piece": (copy_piece, (PLACE, PLACE, st.integers(1, 300))),
    "cut": (cut, (PLACE,)),
    "cut end": (cut_end, (st.integers(1, 300),)),
    "append": (lambda raw, text: raw + text, (st.sampled_from(TEXTS),)),
}


def changes(table: dict[str, Any], most: int) -> st.SearchStrategy[list[tuple[Any, ...]]]:
    one = st.one_of([st.tuples(st.just(name), *arguments) for name, (_, arguments) in table.items()])
    return st.lists(one, max_size=most)


CASE = st.tuples(st.integers(0, len(MODELS) - 1), changes(SAID, 2), changes(WRITTEN, 3))


def changed(which: int, said: list[tuple[Any, ...]], written: list[tuple[Any, ...]]) -> bytes:
    changed_model = MODELS[which]
    for name, *arguments in said:
        changed_model = SAID[name][0](changed_model, *arguments)
    raw = changed_model.write()
    for name, *arguments in written:
        raw = WRITTEN[name][0](raw, *arguments)
    return raw


# The judge


def weights_of(tensor: strict_gguf.Tensor) -> np.ndarray:
    """f32 of the tensor's shape, by gguf-py."""
    blocks = np.frombuffer(tensor.data, np.uint8).reshape(*tensor.shape[:-1], -1)
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(blocks, T[tensor.type_name])


def without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def layer_weights(file: strict_gguf.File, layer: int, field: str) -> np.ndarray:
    """What leaf ``field`` of the layer's stack must hold: gate, up, down, or a bias or scale."""
    kind, _, rest = field.partition("_")
    prefix, suffix = f"blk.{layer}.ffn_", rest or "weight"
    if (name := f"{prefix}{kind}_exps.{suffix}") in file.tensors:
        return weights_of(file.tensors[name])
    if (name := f"{prefix}gate_up_exps.weight") in file.tensors:
        both = weights_of(file.tensors[name])
        half = both.shape[-2] // 2
        return both[..., :half, :] if kind == "gate" else both[..., half:, :]
    experts = [file.tensors[name] for e in range(64) if (name := f"{prefix}{kind}.{e}.weight") in file.tensors]
    return np.stack([weights_of(tensor) for tensor in experts])


@jax.jit
def decoded(projection: Any) -> jax.Array:
    return projection.dequantise()


def assert_same_numbers(leaf: Any, expected: np.ndarray) -> None:
    got = np.asarray(decoded(leaf) if isinstance(leaf, QuantTensor) else leaf).astype(np.float32)
    assert without_ones(got.shape) == without_ones(expected.shape)
    # XLA on the CPU flushes subnormal weights to zero (the README says so of MXFP4).
    tiny = np.finfo(np.float32).tiny
    got, expected = (np.where(np.abs(a) < tiny, 0, a).ravel() for a in (got, expected))
    np.testing.assert_array_equal(got, expected)


def expert_tensors(file: strict_gguf.File, layer: int) -> dict[str, strict_gguf.Tensor]:
    return {
        name: t for name, t in file.tensors.items() if name.startswith((f"blk.{layer}.ffn_",)) and "inp" not in name
    }


def is_finite(tensor: strict_gguf.Tensor) -> bool:
    if tensor.type_name == "MXFP4":
        return 255 not in np.frombuffer(tensor.data, np.uint8)[::17]
    return bool(np.isfinite(weights_of(tensor)).all())


@functools.cache
def original(which: int) -> strict_gguf.File:
    return strict_gguf.parse(MODELS[which].write())


def must_load(file: strict_gguf.File, which: int, layer: int) -> bool:
    """Whether the layer is the valid file's but for its codes: refusing it would be wrong."""
    ours, theirs = (expert_tensors(f, layer) for f in (file, original(which)))
    alike = [(n, t.type_name, t.shape) for n, t in sorted(ours.items())] == [
        (n, t.type_name, t.shape) for n, t in sorted(theirs.items())
    ]
    # By repr: 1 == True.
    same_keys = repr(file.metadata) == repr(original(which).metadata)
    return alike and same_keys and all(map(is_finite, ours.values()))


def result_or_error(action: Callable[[], Any], error_type: type[Exception] = GgufError) -> Any:
    """What ``action`` gives, or its typed error; any other error passes."""
    try:
        return action()
    except error_type as error:
        return error


def judge(path: Path, raw: bytes, which: int) -> str:
    """Load every layer of the file; the outcome in a word, where it is one of the accepted."""
    expected = result_or_error(lambda: strict_gguf.parse(raw), strict_gguf.Malformed)
    file = result_or_error(lambda: GgufFile(path))
    if isinstance(file, GgufError):
        assert str(path) in str(file)
        # A name that goes on behind a NUL, which ggml takes for another.
        assert isinstance(expected, strict_gguf.Malformed) or "NUL byte" in str(file), file
        return "refused at opening"
    assert isinstance(expected, strict_gguf.File), "opened, but the strict reader refuses it"
    with file:
        assert list(file.tensors) == list(expected.tensors)
        outcomes = [judge_layer(file, expected, which, layer) for layer in moe_layers(file)]
    return next((o for o in outcomes if o != "loaded"), "loaded" if outcomes else "opened, without a layer")


def judge_layer(file: GgufFile, expected: strict_gguf.File, which: int, layer: int) -> str:
    stack = result_or_error(lambda: load_expert_stack(file, layer))
    if isinstance(stack, GgufError):
        assert file.path in str(stack)
        assert not must_load(expected, which, layer), stack
        return "refused for scales that are not finite" if "NaN or inf" in str(stack) else "refused at a layer"
    for field in stack.__dataclass_fields__:
        if (leaf := getattr(stack, field)) is not None:
            assert_same_numbers(leaf, layer_weights(expected, layer, field))
    return "loaded"


@pytest.mark.parametrize("batch", range(-(-CASES // BATCH)))
def test_a_changed_file_loads_with_the_right_numbers_or_is_a_typed_error(batch, tmp_path):
    outcomes: collections.Counter[str] = collections.Counter()
    path = tmp_path / "changed.gguf"
    slowest = 0.0

    @hypothesis.seed(batch)
    @hypothesis.settings(
        max_examples=min(BATCH, CASES - batch * BATCH),
        derandomize=False,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )
    @hypothesis.given(CASE)
    def run(case):
        nonlocal slowest
        path.write_bytes(raw := changed(*case))
        start = time.perf_counter()
        outcomes[judge(path, raw, case[0])] += 1
        slowest = max(slowest, time.perf_counter() - start)

    before = (b.open_descriptors(), threading.active_count(), len(jax.live_arrays()))
    peak = peak_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DenseFallbackWarning)
        run()
    print(f"\n{sum(outcomes.values())} cases, slowest {slowest:.2f} s: {dict(outcomes.most_common())}")
    gc.collect()
    assert (b.open_descriptors(), threading.active_count(), len(jax.live_arrays())) == before
    assert peak_bytes() - peak < 1 << 30
    assert slowest < 5
    if CASES >= BATCH:
        # Neither door alone: or the mutations have become too coarse, or too tame.
        assert min(outcomes[o] for o in ("loaded", "refused at opening", "refused at a layer")) > BATCH // 20


@pytest.mark.parametrize("which", range(len(MODELS)))
def test_the_files_themselves_load(which, tmp_path):
    path = b.write(tmp_path / "good.gguf", raw := MODELS[which].write())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DenseFallbackWarning)
        assert judge(path, raw, which) == "loaded"
