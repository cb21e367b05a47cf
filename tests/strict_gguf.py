"""A second reader of GGUF headers, short and strict, over bytes in memory: what the fuzz test judges jmoe's reader by.

Follows ggml's gguf_init_from_file, and refuses beyond it what shared rules refuse: a tensor without axes or weights, a
name that is no UTF-8, an alignment over 1 MiB, data past the file's end, a shard without its siblings. Nothing is
bounded, because the files are small, and everything wrong is one ``Malformed``. Imports nothing of jmoe.
"""

from __future__ import annotations

import struct
from math import prod
from typing import Any, NamedTuple

import gguf

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class Malformed(Exception):
    pass


class Tensor(NamedTuple):
    type_name: str
    shape: tuple[int, ...]  # NumPy order
    data: bytes


class File(NamedTuple):
    metadata: dict[str, Any]  # numbers, bytes for strings, lists for arrays
    tensors: dict[str, Tensor]


def parse(raw: bytes) -> File:
    """Every key and tensor of a file that ggml would open; Malformed for any other."""
    return parse_and_locate(raw)[0]


def parse_and_locate(raw: bytes) -> tuple[File, list[tuple[int, int]]]:
    """The same, and where in the header each number stands: (offset, bytes)."""
    try:
        b = _Bytes(raw)
        return _parse(b), b.numbers
    except (struct.error, UnicodeDecodeError) as error:
        raise Malformed from error


class _Bytes:
    def __init__(self, raw: bytes):
        self.raw, self.at = raw, 0
        self.numbers: list[tuple[int, int]] = []

    def take(self, letter: str) -> Any:
        self.numbers.append((self.at, struct.calcsize("<" + letter)))
        (value,) = struct.unpack_from("<" + letter, self.raw, self.at)
        self.at += struct.calcsize("<" + letter)
        return value

    def string(self) -> bytes:
        length = self.take("Q")
        text = self.raw[self.at : self.at + length]
        _demand(len(text) == length)
        self.at += length
        return text


def _demand(holds: bool) -> None:
    if not holds:
        raise Malformed


def _parse(b: _Bytes) -> File:
    _demand(b.raw[:4] == b"GGUF")
    b.at = 4
    _demand(b.take("I") in (2, 3))
    n_tensors, n_kv = b.take("Q"), b.take("Q")
    metadata: dict[str, Any] = {}
    for _ in range(n_kv):
        key = b.string().decode()
        _demand(key != "" and key not in metadata)
        metadata[key] = _value(b, key)
    alignment = metadata.get("general.alignment", 32)
    _demand(0 < alignment <= 1 << 20 and alignment & (alignment - 1) == 0)
    shards = metadata.get("split.count", 1)
    _demand(type(shards) is int and 0 <= shards <= 1)
    entries = [_entry(b) for _ in range(n_tensors)]
    start, expected, tensors = -(-b.at // alignment) * alignment, 0, {}
    for name, type_name, shape, nbytes, offset in entries:
        _demand(name not in tensors and offset == expected and start + offset + nbytes <= len(b.raw))
        tensors[name] = Tensor(type_name, shape, b.raw[start + offset : start + offset + nbytes])
        expected += -(-nbytes // alignment) * alignment
    return File(metadata, tensors)


def _value(b: _Bytes, key: str) -> Any:
    code = b.take("I")
    _demand(key != "general.alignment" or code == 4)
    if code == _STRING:
        return b.string()
    if code != _ARRAY:
        _demand(code in _SCALARS)
        # A boolean of any byte: struct takes it, as ggml does.
        return b.take(_SCALARS[code])
    code, count = b.take("I"), b.take("Q")
    _demand((code == _STRING or code in _SCALARS) and count <= len(b.raw))
    return [b.string() if code == _STRING else b.take(_SCALARS[code]) for _ in range(count)]


def _entry(b: _Bytes) -> tuple[str, str, tuple[int, ...], int, int]:
    name = b.string().decode()
    n_dims = b.take("I")
    _demand(len(name.encode()) < 64 and 1 <= n_dims <= 4)
    dims = [b.take("Q") for _ in range(n_dims)]
    _demand(0 < prod(dims) < 1 << 63)
    code = b.take("I")
    _demand(code in set(gguf.GGMLQuantizationType))
    ggml_type = gguf.GGMLQuantizationType(code)
    # ggml.c: block_q8_1 is 36 bytes; gguf-py 0.19 still has its older size.
    weights, nbytes = (32, 36) if ggml_type.name == "Q8_1" else gguf.GGML_QUANT_SIZES[ggml_type]
    _demand(dims[0] % weights == 0)
    return name, ggml_type.name, tuple(dims[::-1]), prod(dims) // weights * nbytes, b.take("Q")
