"""Read a header's key-value pairs: bool, int, float, str, a NumPy array or a StringArray for each key."""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np

from .cursor import U32, U64, Cursor
from .errors import GgufError

MAX_ALIGNMENT = 1 << 20

# enum gguf_type (gguf.h). Booleans are read as bytes: any byte but zero is true, as in ggml.
_UINT32, _BOOL, _STRING, _ARRAY = 4, 7, 8, 9
_LETTERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_LAYOUTS = {code: struct.Struct("<" + letter) for code, letter in _LETTERS.items()}
_DTYPES = {code: np.dtype("<" + letter) for code, letter in _LETTERS.items()}


def read_metadata(cursor: Cursor, count: int) -> dict[str, Any]:
    """``count`` pairs of (string key | u32 type | value). GgufError names the key that is wrong."""
    metadata: dict[str, Any] = {}
    for index in range(count):
        what = f"the name of metadata key {index}"
        key = utf8(cursor, cursor.string(what), what)
        if not key:
            raise GgufError(f"{cursor.path}: {what} is empty")
        if key in metadata:
            raise GgufError(f"{cursor.path}: metadata key {shortened(key)} comes twice")
        metadata[key] = _value(cursor, key)
    refuse_twins(cursor.path, "metadata key", metadata, {*metadata, "general.alignment"})
    return metadata


def shortened(value: object) -> str:
    """``repr(value)``, cut where a hostile text would fill the screen, or the memory."""
    if isinstance(value, str | bytes) and len(value) > 80:
        return f"{value[:80]!r}... ({len(value)} {'bytes' if isinstance(value, bytes) else 'characters'})"
    return repr(value)


def refuse_twins(path: str, kind: str, names: Iterable[str], others: Collection[str]) -> None:
    """GgufError where one of ``names`` is one of ``others`` with a NUL byte and more behind it.

    Lookups of ggml end at the NUL: it would find the one where jmoe finds the other.
    """
    for name in names:
        if "\0" in name and name.partition("\0")[0] in others:
            raise GgufError(
                f"{path}: {kind} {shortened(name)} is another one with a NUL byte and more behind it: ggml would take"
                " them for one"
            )


def utf8(cursor: Cursor, raw: bytes, what: str) -> str:
    """``raw`` decoded; GgufError where it is not UTF-8."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise GgufError(f"{cursor.path}: {what} is not UTF-8: {shortened(raw)}") from None


def _value(cursor: Cursor, key: str) -> Any:
    what = f"metadata key {shortened(key)}"
    code = cursor.value(U32, what)
    if key == "general.alignment":
        return _alignment(cursor, code)
    if code == _ARRAY:
        return _array(cursor, what)
    if code == _STRING:
        return cursor.string(what).decode(errors="replace")
    if code not in _LAYOUTS:
        raise GgufError(f"{cursor.path}: {what} has value type {code}, wanted 0 to 12")
    value = cursor.value(_LAYOUTS[code], what)
    return value != 0 if code == _BOOL else value


def _alignment(cursor: Cursor, code: int) -> int:
    if code != _UINT32:
        raise GgufError(f"{cursor.path}: general.alignment has value type {code}, wanted {_UINT32} (UINT32)")
    value = cursor.value(U32, "general.alignment")
    if not 1 <= value <= MAX_ALIGNMENT or value & (value - 1):
        raise GgufError(f"{cursor.path}: general.alignment is {value}, wanted a power of two up to {MAX_ALIGNMENT}")
    return value


def _array(cursor: Cursor, what: str) -> Any:
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
