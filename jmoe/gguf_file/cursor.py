"""A forward cursor over a file's first bytes that never trusts a length.

Every read goes through ``Cursor.ensure``, which compares the wanted end with the file size and the header budget
before a byte is allocated. Reads are ``os.pread`` in doubling chunks, so a header costs at most twice its bytes.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import numpy as np

from .errors import GgufError

# The largest honest headers (two million strings, 64 MiB arrays) fit; what is larger is no model's header.
HEADER_BUDGET = 128 << 20
# Thirty times the largest vocabulary. Each one is stepped over in Python: empty ones, 16 million of which the budget of
# bytes would hold, would take seconds.
MAX_STRINGS = 1 << 23
_FIRST_CHUNK = 64 << 10

U32 = struct.Struct("<I")
U64 = struct.Struct("<Q")


class StringArray:
    """A metadata array of strings, kept as its bytes in the file: ``count`` times a u64 length and UTF-8 text.

    A vocabulary of 150,000 tokens stays one ``bytes`` object; iterating or ``list(...)`` decodes it (what is not
    UTF-8 becomes U+FFFD, as ggml accepts it).
    """

    __slots__ = ("_count", "_raw")

    def __init__(self, raw: bytes, count: int):
        self._raw = raw
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        start = 0
        for _ in range(self._count):
            start += U64.size
            stop = start + U64.unpack_from(self._raw, start - U64.size)[0]
            yield self._raw[start:stop].decode(errors="replace")
            start = stop

    def __repr__(self) -> str:
        return f"StringArray({self._count} strings, {len(self._raw)} bytes)"


class Cursor:
    """Reads little-endian values from the start of ``fd``; ``size`` is the file's size, ``path`` serves the messages.

    Each method takes ``what``, the words that name the value in an error. Raises GgufError where the file ends
    first, where the header budget is exceeded and where the file shrank meanwhile.
    """

    def __init__(self, fd: int, size: int, path: str):
        self.fd = fd
        self.size = size
        self.path = path
        self.pos = 0
        self._data = bytearray()
        self._strings_left = MAX_STRINGS

    def ensure(self, end: int, what: str, *, read: bool = True) -> None:
        """Check that the header may extend to byte ``end`` and, where ``read``, make those bytes available."""
        data = self._data
        if end <= len(data):
            return
        if end > self.size:
            raise GgufError(
                f"{self.path}: {what} needs {end - self.pos} bytes at offset {self.pos}, but the file "
                f"ends at {self.size}: incomplete download, or a damaged file?"
            )
        if end > HEADER_BUDGET:
            raise GgufError(
                f"{self.path}: {what} reaches byte {end} of the header, over the limit of "
                f"{HEADER_BUDGET} bytes: no model's header is that large"
            )
        if not read:
            return
        wanted = min(max(end, 2 * len(data), _FIRST_CHUNK), self.size, HEADER_BUDGET)
        while len(data) < wanted:
            chunk = os.pread(self.fd, wanted - len(data), len(data))
            if not chunk:
                raise GgufError(
                    f"{self.path}: the file shrank from {self.size} to {len(data)} bytes while its "
                    f"header was read: it changed during load"
                )
            data += chunk

    def peek(self, count: int) -> bytes:
        """At most ``count`` bytes at the cursor, fewer where the file ends."""
        end = min(self.pos + count, self.size)
        self.ensure(end, "the file")
        return self._copy(self.pos, end)

    def value(self, layout: struct.Struct, what: str):
        """One scalar laid out as ``layout``."""
        self.ensure(self.pos + layout.size, what)
        (result,) = layout.unpack_from(self._data, self.pos)
        self.pos += layout.size
        return result

    def string(self, what: str) -> bytes:
        """A u64 length and so many bytes."""
        length = self.value(U64, what)
        self.ensure(self.pos + length, what)
        start = self.pos
        self.pos += length
        return self._copy(start, self.pos)

    def numbers(self, dtype: np.dtype, count: int, what: str) -> np.ndarray:
        """``count`` numbers of ``dtype``: one private array."""
        self.ensure(self.pos + count * dtype.itemsize, what)
        result = np.frombuffer(self._data, dtype, count, self.pos).copy() if count else np.empty(0, dtype)
        self.pos += count * dtype.itemsize
        return result

    def strings(self, count: int, what: str) -> StringArray:
        """``count`` strings, skipped by their lengths and decoded only on demand."""
        # Each string takes at least its length field: a count that cannot fit fails before the loop.
        self.ensure(self.pos + count * U64.size, what, read=False)
        self._strings_left -= count
        if self._strings_left < 0:
            raise GgufError(
                f"{self.path}: {what} counts {count} strings: with those before it more than the limit of"
                f" {MAX_STRINGS}: no model's header holds that many"
            )
        data, length_at, pos = self._data, U64.unpack_from, self.pos
        for _ in range(count):
            if pos + 8 > len(data):
                self.ensure(pos + 8, what)
            pos += 8 + length_at(data, pos)[0]
        self.ensure(pos, what)
        raw = self._copy(self.pos, pos)
        self.pos = pos
        return StringArray(raw, count)

    def _copy(self, start: int, stop: int) -> bytes:
        # A slice of the bytearray itself would be a second copy.
        with memoryview(self._data) as view:
            return bytes(view[start:stop])
