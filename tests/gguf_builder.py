"""GGUF bytes made by hand with struct.pack: good ones, and bad ones piece by piece. Imports nothing of jmoe.

header | key_value(...) x n_kv | tensor_entry(...) x n_tensors | padding | data
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_LETTERS = dict(zip((U8, I8, U16, I16, U32, I32, F32, BOOL, U64, I64, F64), "BbHhIif?Qqd", strict=True))


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return u64(len(raw)) + raw


def scalar(code: int, value: Any) -> bytes:
    return string(value) if code == STRING else struct.pack("<" + _LETTERS[code], value)


def key_value(key: str | bytes, code: int, value: Any) -> bytes:
    return string(key) + u32(code) + scalar(code, value)


def key_array(key: str, code: int, values: Iterable[Any], count: int | None = None) -> bytes:
    items = [scalar(code, value) for value in values]
    return string(key) + u32(ARRAY) + u32(code) + u64(len(items) if count is None else count) + b"".join(items)


def tensor_entry(name: str | bytes, dims: Sequence[int], code: int, offset: int) -> bytes:
    """``dims`` as in the file, fastest first."""
    return string(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(code) + u64(offset)


def assemble(
    pairs: Sequence[bytes] = (),
    entries: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    alignment: int = 32,
    version: int = 3,
    n_kv: int | None = None,
    n_tensors: int | None = None,
) -> bytes:
    """A whole file; ``n_kv`` and ``n_tensors`` lie where they are given."""
    counts = u64(len(entries) if n_tensors is None else n_tensors) + u64(len(pairs) if n_kv is None else n_kv)
    head = b"GGUF" + u32(version) + counts + b"".join(pairs) + b"".join(entries)
    return head + bytes(-len(head) % alignment) + data if data else head


class Tensor(NamedTuple):
    """A tensor of a good file; ``blocks`` is u8[..., row bytes]."""

    ggml_type: GGMLQuantizationType
    blocks: np.ndarray

    @property
    def dims(self) -> list[int]:
        block_weights, block_bytes = gguf.GGML_QUANT_SIZES[self.ggml_type]
        *lead, row_bytes = self.blocks.shape
        return [row_bytes // block_bytes * block_weights, *reversed(lead)]


def good_file(
    tensors: Mapping[str, Tensor],
    pairs: Sequence[bytes] = (),
    *,
    alignment: int = 32,
    version: int = 3,
    final_padding: bool = True,
) -> bytes:
    """A valid file; general.alignment is written where it is not the default."""
    entries, data, size = [], [], 0
    for name, tensor in tensors.items():
        entries.append(tensor_entry(name, tensor.dims, int(tensor.ggml_type), size))
        raw = tensor.blocks.tobytes()
        padding = -len(raw) % alignment
        data.append(raw + bytes(padding))
        size += len(raw) + padding
    stated = [] if alignment == 32 else [key_value("general.alignment", U32, alignment)]
    whole = assemble([*pairs, *stated], entries, b"".join(data), alignment=alignment, version=version)
    return whole if final_padding or not tensors else whole[: len(whole) - padding]


def random_tensor(
    rng: np.random.Generator, ggml_type: GGMLQuantizationType, shape: Sequence[int], scale: float = 0.01
) -> Tensor:
    """A tensor of ``shape`` (NumPy order) with random codes and finite scales, whatever the type."""
    *lead, depth = shape
    block_weights, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
    dense = {"F32": np.float32, "F16": np.float16}.get(ggml_type.name)
    if dense is not None:
        return Tensor(ggml_type, rng.normal(0, scale, shape).astype(dense).view(np.uint8))
    if ggml_type.name == "BF16":
        return Tensor(
            ggml_type,
            (rng.normal(0, scale, shape).astype(np.float32).view(np.uint32) >> 16).astype("<u2").view(np.uint8),
        )
    # No f16, whichever two bytes hold it, and no E8M0 exponent is NaN or infinite where no byte exceeds 0x7B.
    blocks = rng.integers(0, 0x7B, (prod(lead) * (depth // block_weights), block_bytes), np.uint8)
    return Tensor(ggml_type, blocks.reshape(*lead, -1))


class Sizes(NamedTuple):
    """E, H, I of the layers that ``moe_tensors`` makes."""

    num_experts: int = 4
    hidden_size: int = 256
    expert_intermediate: int = 512


SIZES = Sizes()


def moe_tensors(
    rng: np.random.Generator,
    layer: int = 0,
    sizes: Sizes = SIZES,
    gate_up: GGMLQuantizationType = GGMLQuantizationType.Q4_K,
    down: GGMLQuantizationType = GGMLQuantizationType.Q6_K,
) -> dict[str, Tensor]:
    """The stacked expert tensors of one layer."""
    experts, hidden, inner = sizes
    return {
        f"blk.{layer}.ffn_gate_exps.weight": random_tensor(rng, gate_up, (experts, inner, hidden)),
        f"blk.{layer}.ffn_up_exps.weight": random_tensor(rng, gate_up, (experts, inner, hidden)),
        f"blk.{layer}.ffn_down_exps.weight": random_tensor(rng, down, (experts, hidden, inner)),
    }


def moe_pairs(
    arch: str = "qwen3moe", sizes: Sizes = SIZES, blocks: int = 1, **changes: tuple[int, Any] | None
) -> list[bytes]:
    """The metadata of such layers; ``changes`` replaces (type code, value), adds, or with None drops a key."""
    experts, hidden, inner = sizes
    stated: dict[str, tuple[int, Any] | None] = {
        "block_count": (U32, blocks),
        "expert_count": (U32, experts),
        "expert_used_count": (U32, 2),
        "embedding_length": (U32, hidden),
        "expert_feed_forward_length": (U32, inner),
        **changes,
    }
    pairs = [key_value("general.architecture", STRING, arch)]
    for key, pair in stated.items():
        if pair is not None:
            code, value = pair
            make = key_array if isinstance(value, list) else key_value
            pairs.append(make(f"{arch}.{key}", code, value))
    return pairs


def write(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path


def open_descriptors() -> int:
    """How many files this process has open; the same on Linux and macOS."""
    return len(os.listdir("/dev/fd"))
