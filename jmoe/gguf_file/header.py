"""Parse and check a GGUF header: magic, version, metadata, tensor table.

    u32 magic "GGUF" | u32 version | u64 n_tensors | u64 n_kv
    n_kv x      (string key | u32 type | value)            string: u64 length, bytes
    n_tensors x (string name | u32 n_dims | u64 dims[n_dims], fastest first | u32 type | u64 offset)
    padding to general.alignment, then the tensors' bytes, each padded likewise

Follows ggml's gguf.cpp (gguf_init_from_file) and is never laxer than it: tensors stand in the table's order,
each at exactly the padded end of the one before. Counts and lengths are compared with the file's size before
they are used, so a hostile header fails in bounded time and memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any, NamedTuple

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from .cursor import U32, U64, Cursor
from .errors import GgufError
from .metadata import read_metadata, refuse_twins, shortened, utf8

# What the shortest entry of each table takes: an unsigned 8-bit value under a one-letter key, a tensor of one axis.
_FIXED_HEADER = 24
_MIN_KEY_VALUE = 8 + 1 + 4 + 1
_MIN_TENSOR = 8 + 4 + 8 + 4 + 8
# Over a hundred times what models hold (Kimi-K2: 1,096 tensors). Each entry becomes a Python object, so the byte
# budget alone would bound neither memory nor time.
MAX_TENSORS = 1 << 17
MAX_KEYS = 1 << 18
# ggml.h: GGML_MAX_NAME, the final NUL included, and GGML_MAX_DIMS.
_MAX_NAME = 64
_MAX_DIMS = 4

# {type: (weights, bytes) of a block}. gguf-py 0.19 has an older Q8_1 of 40 bytes.
BLOCK_SIZES = {**GGML_QUANT_SIZES, GGMLQuantizationType.Q8_1: (32, 36)}

_MISTAKEN_FILES = (
    (b"version https://git-lfs", "a Git LFS pointer, not the model itself: run `git lfs pull`"),
    (b"<!doctype", "an HTML page: the download link led to a web page instead of the file"),
    (b"<html", "an HTML page: the download link led to a web page instead of the file"),
    (b"pk\x03\x04", "a zip archive (perhaps a PyTorch checkpoint): convert it to GGUF first"),
    (b"tjgg", "a GGML file older than GGUF: convert it with llama.cpp"),
)


class TensorInfo(NamedTuple):
    """One tensor of the table.

    ``shape`` is in NumPy order (slowest axis first: [E, O, D]); ``offset`` counts from the start of shard number
    ``shard`` (0 where the model is one file).
    """

    name: str
    ggml_type: GGMLQuantizationType
    shape: tuple[int, ...]
    nbytes: int
    offset: int
    shard: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row along the last axis."""
        block_weights, block_bytes = BLOCK_SIZES[self.ggml_type]
        return self.shape[-1] // block_weights * block_bytes


@dataclass(frozen=True)
class Header:
    """What a header says; the mappings are read-only."""

    version: int
    alignment: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]


def parse_header(fd: int, size: int, path: str, shard: int = 0) -> Header:
    """Read and check the header of the open regular file ``fd`` of ``size`` bytes; GgufError where it is wrong."""
    cursor = Cursor(fd, size, path)
    version = _magic_and_version(cursor)
    n_tensors = cursor.value(U64, "the tensor count")
    n_kv = cursor.value(U64, "the key count")
    _check_count(cursor, "metadata keys", n_kv, 0, _MIN_KEY_VALUE, MAX_KEYS)
    _check_count(cursor, "tensors", n_tensors, n_kv * _MIN_KEY_VALUE, _MIN_TENSOR, MAX_TENSORS)
    metadata = read_metadata(cursor, n_kv)
    alignment = metadata.get("general.alignment", 32)
    tensors = _tensor_table(cursor, n_tensors, alignment, shard)
    return Header(version, alignment, MappingProxyType(metadata), MappingProxyType(tensors))


def _magic_and_version(cursor: Cursor) -> int:
    path, start = cursor.path, cursor.peek(4096)
    if not start:
        raise GgufError(f"{path}: the file is empty: incomplete download?")
    if not start.startswith(b"GGUF"):
        raise GgufError(f"{path}: not a GGUF file: it starts with {start[:8]!r} instead of b'GGUF'{_guess(start)}")
    if cursor.size < _FIXED_HEADER:
        raise GgufError(
            f"{path}: a GGUF header needs {_FIXED_HEADER} bytes, the file has {cursor.size}: incomplete download?"
        )
    cursor.pos = 4
    version = cursor.value(U32, "the version")
    # ggml's own test for swapped bytes: no version reaches 65536.
    if version and version & 0xFFFF == 0:
        raise GgufError(
            f"{path}: a big-endian GGUF file (the version reads {version:#010x}), only little-endian ones can be"
            " loaded: convert it with gguf-py's gguf_convert_endian"
        )
    if version not in (2, 3):
        raise GgufError(f"{path}: GGUF version {version}, wanted 2 or 3: convert the file with a current llama.cpp")
    return version


def _guess(start: bytes) -> str:
    lowered = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for prefix, words in _MISTAKEN_FILES:
        if lowered.startswith(prefix):
            return f". It is {words}"
    if start[8:9] == b"{" and start[9:10] in (b'"', b"}", b" "):
        return ". It is a safetensors file: convert it with llama.cpp's convert_hf_to_gguf.py"
    if (offset := start.find(b"GGUF")) > 0:
        return f". b'GGUF' stands at offset {offset}: {offset} bytes were put before the file"
    return ""


def _check_count(cursor: Cursor, what: str, count: int, other_bytes: int, least: int, limit: int) -> None:
    remaining = max(cursor.size - cursor.pos - other_bytes, 0)
    if count > remaining // least:
        raise GgufError(
            f"{cursor.path}: the header counts {count} {what}, but the {remaining} bytes left hold at most"
            f" {remaining // least}: incomplete download, or a damaged file?"
        )
    if count > limit:
        raise GgufError(f"{cursor.path}: the header counts {count} {what}, over the limit of {limit}")


def _tensor_table(cursor: Cursor, count: int, alignment: int, shard: int) -> dict[str, TensorInfo]:
    entries = [_tensor_entry(cursor, index) for index in range(count)]
    data_start = -(-cursor.pos // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    expected = 0
    for name, ggml_type, shape, nbytes, offset in entries:
        what = f"{cursor.path}: tensor {name!r}"
        if name in tensors:
            raise GgufError(f"{what} comes twice")
        if offset != expected:
            raise GgufError(
                f"{what} starts at {offset} of the tensor data, wanted {expected}: tensors follow one another in"
                f" order, padded to {alignment} bytes, without gap or overlap"
            )
        end = data_start + offset + nbytes
        if end > cursor.size:
            raise GgufError(
                f"{what} needs {nbytes} bytes up to byte {end} of the file, which has {cursor.size}:"
                " incomplete download?"
            )
        tensors[name] = TensorInfo(name, ggml_type, shape, nbytes, data_start + offset, shard)
        expected += -(-nbytes // alignment) * alignment
    refuse_twins(cursor.path, "tensor", tensors, tensors)
    return tensors


def _tensor_entry(cursor: Cursor, index: int) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int, int]:
    what = f"the name of tensor {index}"
    raw = cursor.string(what)
    if len(raw) >= _MAX_NAME:
        raise GgufError(f"{cursor.path}: {what} has {len(raw)} bytes, wanted below {_MAX_NAME}: {shortened(raw)}")
    name = utf8(cursor, raw, what)
    what = f"tensor {name!r}"
    n_dims = cursor.value(U32, what)
    if not 1 <= n_dims <= _MAX_DIMS:
        raise GgufError(f"{cursor.path}: {what} has {n_dims} dimensions, wanted 1 to {_MAX_DIMS}")
    shape = tuple(cursor.value(U64, what) for _ in range(n_dims))[::-1]
    if 0 in shape or prod(shape) >= 1 << 63:
        raise GgufError(
            f"{cursor.path}: {what} has shape {list(shape)}, wanted dimensions from 1 on and a product below 2^63"
        )
    code = cursor.value(U32, what)
    try:
        ggml_type = GGMLQuantizationType(code)
        block_weights, block_bytes = BLOCK_SIZES[ggml_type]
    except (ValueError, KeyError):
        raise GgufError(
            f"{cursor.path}: {what} has ggml type id {code}, which is unknown or was removed from ggml:"
            " quantise the model again, or update the gguf package"
        ) from None
    if shape[-1] % block_weights:
        raise GgufError(
            f"{cursor.path}: {what} has rows of {shape[-1]} weights, but {ggml_type.name} holds them in blocks of"
            f" {block_weights}"
        )
    offset = cursor.value(U64, what)
    return name, ggml_type, shape, prod(shape) // block_weights * block_bytes, offset
