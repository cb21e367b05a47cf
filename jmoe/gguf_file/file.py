"""``GgufFile``: an open GGUF model, one file or all its shards, whose tensors are read with ``pread``.

Files are never mapped into memory: a mapped file that shrinks kills the process, and jax aliases mapped pages,
so that overwriting the file would change an array (jax issue 37830). Every read fills a fresh buffer.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np

from .budget import require_host_bytes
from .errors import GgufError
from .header import TensorInfo
from .shards import StrPath, close_all, identity, open_shards

# One preadv reads at most 2^31 bytes on Linux and macOS.
_MAX_PREAD = 1 << 30


class GgufFile:
    """An open GGUF file. Use it as a context manager, or call ``close()``.

    Given any shard of a split model, its siblings are found by name and the whole model is presented.
    Attributes: ``path`` (the first shard's), ``version``, ``alignment``, ``metadata`` (the first shard's) and
    ``tensors`` (both read-only mappings), ``architecture``. Opening reads headers only and never initialises a
    JAX backend. Reads are thread-safe; closing while another thread reads is not.

    Raises GgufError for a file that is not a valid little-endian GGUF v2 or v3, and OSError where the operating
    system refuses (missing, a directory, no permission).
    """

    def __init__(self, path: StrPath):
        self._shards = open_shards(path)
        self._close = weakref.finalize(self, close_all, [shard.fd for shard in self._shards])
        first = self._shards[0]
        self.path = first.path
        self.version = first.header.version
        self.alignment = first.header.alignment
        self.metadata: Mapping[str, Any] = first.header.metadata
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            {name: info for shard in self._shards for name, info in shard.header.tensors.items()}
        )

    @classmethod
    def open(cls, path: StrPath) -> GgufFile:
        """The same as ``GgufFile(path)``."""
        return cls(path)

    @property
    def architecture(self) -> str:
        """The value of ``general.architecture``, such as "qwen3moe"; GgufError where it is absent."""
        value = self.metadata.get("general.architecture")
        if not isinstance(value, str):
            raise GgufError(f"{self.path}: general.architecture must be a string, got {value!r}")
        return value

    @property
    def closed(self) -> bool:
        return not self._close.alive

    def close(self) -> None:
        """Close every shard. A second call does nothing."""
        self._close()

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed, " if self.closed else ""
        return f"GgufFile({self.path!r}, {state}{len(self._shards)} file(s), {len(self.tensors)} tensors)"

    def info(self, name: str) -> TensorInfo:
        """The table entry of tensor ``name``; GgufError where the file has none."""
        try:
            return self.tensors[name]
        except KeyError:
            raise GgufError(f"{self.path}: no tensor {name!r} among its {len(self.tensors)}") from None

    def read(self, name: str) -> np.ndarray:
        """The bytes of tensor ``name``: u8[leading axes..., row_bytes], a buffer that nobody else holds."""
        info = self.info(name)
        return self._read(info, 0, (*info.shape[:-1], info.row_bytes))

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """The bytes of entries ``start`` to ``stop`` of the slowest axis, such as some experts of [E, O, D].

        u8[stop - start, ..., row_bytes]. Raises GgufError for an unknown name, a tensor of one axis, a range
        outside the tensor, too little memory, or a file that shrank since it was opened.
        """
        info = self.info(name)
        length = info.shape[0]
        if len(info.shape) == 1 or not 0 <= start <= stop <= length:
            raise GgufError(f"{self.path}: tensor {name!r} of shape {list(info.shape)} has no rows {start} to {stop}")
        return self._read(info, start * (info.nbytes // length), (stop - start, *info.shape[1:-1], info.row_bytes))

    def _read(self, info: TensorInfo, start: int, shape: tuple[int, ...]) -> np.ndarray:
        require_host_bytes(prod(shape), f"{self.path}: tensor {info.name!r}", "read fewer rows at once")
        out = np.empty(shape, np.uint8)
        self.read_into(info, start, out)
        return out

    def read_into(self, info: TensorInfo, start: int, out: np.ndarray) -> None:
        """Fill the contiguous array ``out`` with the tensor's bytes from its byte ``start`` on."""
        if self.closed:
            raise ValueError(f"{self.path}: the GgufFile is closed")
        if not 0 <= start <= start + out.nbytes <= info.nbytes:
            raise GgufError(
                f"{self.path}: tensor {info.name!r} has {info.nbytes} bytes, wanted {start} to {start + out.nbytes}"
            )
        flat = out.reshape(-1).view(np.uint8)
        shard, done = self._shards[info.shard], 0
        while done < len(flat):
            got = os.preadv(shard.fd, [flat[done : done + _MAX_PREAD]], info.offset + start + done)
            if not got:
                raise GgufError(
                    f"{shard.path}: tensor {info.name!r} ends after {start + done} of {info.nbytes} bytes: the file"
                    " shrank since it was opened, it changed during load"
                )
            done += got

    def check_unchanged(self) -> None:
        """GgufError if a shard's inode, size or modification time differ from those at opening."""
        if self.closed:
            raise ValueError(f"{self.path}: the GgufFile is closed")
        for shard in self._shards:
            if identity(os.fstat(shard.fd)) != shard.identity:
                raise GgufError(f"{shard.path}: the file changed during load: load it again once it is complete")
