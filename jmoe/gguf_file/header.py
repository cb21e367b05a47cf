"""Parse and check a GGUF header: magic, version, metadata, tensor table.

    u32 magic "GGUF" | u32 version | u64 n_tensors | u64 n_kv
    n_kv x      (string key | u32 type | value)            string: u64 length, bytes
    n_tensors x (string name | u32 n_dims | u64 dims[n_dims], fastest first | u32 type | u64 offset)
    padding to general.alignment, then the tensors' bytes, each padded likewise

Follows ggml's gguf.cpp (gguf_init_from_file) and is never laxer than it: tensors stand in the table's order,
each at exactly the padded end of the one before. Counts and lengths are compared with the file's size before
they are used, so a hostile header fails in bounded time and memory.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from jmoe.gguf_file.cursor import U32, U64, Cursor
from jmoe.gguf_file.errors import GgufError

_FIXED_HEADER = 24
_MIN_KEY_VALUE = 8 + 1 + 4 + 1
_MIN_TENSOR = 8 + 4 + 8 + 4 + 8
# A thousand times what models hold (Kimi-K2: 1,096 tensors in 61 layers). Each entry becomes a Python object,
# so that the byte budget alone would not bound memory.
MAX_TENSORS = 1 << 18
MAX_KEYS = 1 << 20
MAX_ALIGNMENT = 1 << 20
# ggml.h: GGML_MAX_NAME, the final NUL included, and GGML_MAX_DIMS.
_MAX_NAME = 64
_MAX_DIMS = 4

_UINT32, _BOOL, _STRING, _ARRAY = 4, 7, 8, 9
# enum gguf_type: id -> layout of one value. Booleans are read as bytes, any non-zero byte is true, as in ggml.
_LAYOUTS = {code: struct.Struct("<" + letter) for code, letter in
            {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}.items()}
_DTYPES = {code: np.dtype("<" + name) for code, name in
           {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "u1", 10: "u8", 11: "i8",
            12: "f8"}.items()}

_MISTAKEN_FILES = (
    (b"version https://git-lfs", "a Git LFS pointer, not the model itself: run `git lfs pull`"),
    (b"<!doctype", "an HTML page: the download link led to a web page instead of the file"),
    (b"<html", "an HTML page: the download link led to a web page instead of the file"),
    (b"pk\x03\x04", "a zip archive (perhaps a PyTorch checkpoint): convert it to GGUF first"),
    (b"tjgg", "a GGML file older than GGUF: convert it with llama.cpp"),
)


class TensorInfo(NamedTuple):
    """One tensor of the table. `shape` is in NumPy order (slowest axis first: [E, O, D]); `offset` counts from
    the start of the file `shard` (0 for a file without shards)."""

    name: str
    ggml_type: GGMLQuantizationType
    shape: tuple[int, ...]
    nbytes: int
    offset: int
    shard: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of the last axis."""
        block_weights, block_bytes = GGML_QUANT_SIZES[self.ggml_type]
        return self.shape[-1] // block_weights * block_bytes


@dataclass(frozen=True)
class Header:
    """What a header says. Metadata values are int, float, bool, str, a NumPy array or a StringArray."""

    version: int
    alignment: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]


def parse_header(fd: int, size: int, path: str, shard: int = 0) -> Header:
    """Read and check the header of the open regular file `fd` of `size` bytes; GgufError where it is wrong."""
    cursor = Cursor(fd, size, path)
    version = _magic_and_version(cursor)
    n_tensors = cursor.value(U64, "the tensor count")
    n_kv = cursor.value(U64, "the key count")
    _check_count(cursor, "metadata keys", n_kv, 0, _MIN_KEY_VALUE, MAX_KEYS)
    _check_count(cursor, "tensors", n_tensors, n_kv * _MIN_KEY_VALUE, _MIN_TENSOR, MAX_TENSORS)
    metadata: dict[str, Any] = {}
    for index in range(n_kv):
        key, value = _key_value(cursor, index)
        if key in metadata:
            raise GgufError(f"{path}: metadata key {_short(key)} comes twice")
        metadata[key] = value
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
        raise GgufError(f"{path}: a GGUF header needs {_FIXED_HEADER} bytes, the file has {cursor.size}: "
                        f"incomplete download?")
    cursor.pos = 4
    version = cursor.value(U32, "the version")
    # ggml's own test for swapped bytes: no version reaches 65536.
    if version and version & 0xFFFF == 0:
        raise GgufError(f"{path}: a big-endian GGUF file (version reads {version:#010x}): only little-endian files "
                        f"can be loaded; convert it with gguf-py's gguf_convert_endian")
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
        raise GgufError(f"{cursor.path}: the header counts {count} {what}, but the {remaining} bytes left hold at "
                        f"most {remaining // least}: incomplete download, or a damaged file?")
    if count > limit:
        raise GgufError(f"{cursor.path}: the header counts {count} {what}, over the limit of {limit}")


def _short(name: object) -> str:
    text = repr(name)
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text)} characters)"


def _text(cursor: Cursor, raw: bytes, what: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise GgufError(f"{cursor.path}: {what} is not UTF-8: {_short(raw)}") from None


def _key_value(cursor: Cursor, index: int) -> tuple[str, object]:
    what = f"the name of metadata key {index}"
    key = _text(cursor, cursor.string(what), what)
    if not key:
        raise GgufError(f"{cursor.path}: {what} is empty")
    what = f"metadata key {_short(key)}"
    code = cursor.value(U32, what)
    if key == "general.alignment":
        return key, _alignment(cursor, code)
    if code == _ARRAY:
        return key, _array(cursor, what)
    if code == _STRING:
        return key, cursor.string(what).decode(errors="replace")
    if code not in _LAYOUTS:
        raise GgufError(f"{cursor.path}: {what} has value type {code}, wanted 0 to 12")
    value = cursor.value(_LAYOUTS[code], what)
    return key, value != 0 if code == _BOOL else value


def _alignment(cursor: Cursor, code: int) -> int:
    if code != _UINT32:
        raise GgufError(f"{cursor.path}: general.alignment has value type {code}, wanted {_UINT32} (UINT32)")
    value = cursor.value(U32, "general.alignment")
    if not 1 <= value <= MAX_ALIGNMENT or value & (value - 1):
        raise GgufError(f"{cursor.path}: general.alignment is {value}, wanted a power of two up to {MAX_ALIGNMENT}")
    return value


def _array(cursor: Cursor, what: str):
    code = cursor.value(U32, what)
    count = cursor.value(U64, what)
    if code == _STRING:
        return cursor.strings(count, what)
    if code not in _DTYPES:
        came = "arrays" if code == _ARRAY else f"value type {code}"
        raise GgufError(f"{cursor.path}: {what} is an array of {came}, wanted numbers, booleans or strings")
    values = cursor.numbers(_DTYPES[code], count, what)
    if code == _BOOL:
        values = values != 0
    values.flags.writeable = False
    return values


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
            raise GgufError(f"{what} starts at {offset} of the tensor data, wanted {expected}: tensors follow one "
                            f"another in order, padded to {alignment} bytes, without gap or overlap")
        end = data_start + offset + nbytes
        if end > cursor.size:
            raise GgufError(f"{what} needs {nbytes} bytes up to byte {end} of the file, which has {cursor.size}: "
                            f"incomplete download?")
        tensors[name] = TensorInfo(name, ggml_type, shape, nbytes, data_start + offset, shard)
        expected += -(-nbytes // alignment) * alignment
    return tensors


def _tensor_entry(cursor: Cursor, index: int) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int, int]:
    what = f"the name of tensor {index}"
    raw = cursor.string(what)
    if len(raw) >= _MAX_NAME:
        raise GgufError(f"{cursor.path}: {what} has {len(raw)} bytes, wanted fewer than {_MAX_NAME}: {_short(raw)}")
    name = _text(cursor, raw, what)
    what = f"tensor {name!r}"
    n_dims = cursor.value(U32, what)
    if not 1 <= n_dims <= _MAX_DIMS:
        raise GgufError(f"{cursor.path}: {what} has {n_dims} dimensions, wanted 1 to {_MAX_DIMS}")
    shape = tuple(cursor.value(U64, what) for _ in range(n_dims))[::-1]
    if 0 in shape or prod(shape) >= 1 << 63:
        raise GgufError(f"{cursor.path}: {what} has shape {list(shape)}: every dimension must be at least 1 and "
                        f"their product below 2^63")
    code = cursor.value(U32, what)
    try:
        ggml_type = GGMLQuantizationType(code)
        block_weights, block_bytes = GGML_QUANT_SIZES[ggml_type]
    except (ValueError, KeyError):
        raise GgufError(f"{cursor.path}: {what} has ggml type id {code}, which is unknown or was removed from ggml: "
                        f"quantise the model again, or update the gguf package") from None
    if shape[-1] % block_weights:
        raise GgufError(f"{cursor.path}: {what} has rows of {shape[-1]} weights, but {ggml_type.name} holds them in "
                        f"blocks of {block_weights}")
    offset = cursor.value(U64, what)
    return name, ggml_type, shape, prod(shape) // block_weights * block_bytes, offset
