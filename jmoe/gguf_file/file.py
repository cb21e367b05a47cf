"""`GgufFile`: an open GGUF model, one file or all its shards, whose tensors are read with `pread`.

Files are never mapped into memory: a mapped file that shrinks kills the process, and jax aliases mapped pages, so
that overwriting the file would change an array (jax issue 37830). Every read fills a fresh buffer.
"""

import errno
import os
import re
import stat
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from jmoe.gguf_file.budget import require_host_bytes
from jmoe.gguf_file.errors import GgufError
from jmoe.gguf_file.header import Header, TensorInfo, parse_header

_SHARD_NAME = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf", re.ASCII | re.DOTALL)
# One preadv reads at most 2^31 bytes on Linux and macOS.
_MAX_PREAD = 1 << 30

StrPath = str | bytes | os.PathLike


@dataclass(frozen=True)
class _Shard:
    path: str
    fd: int
    identity: tuple[int, int, int]
    header: Header


class GgufFile:
    """An open GGUF file. Use it as a context manager, or call `close()`.

    Given any shard of a split model, its siblings are found by name and the whole model is presented.
    Attributes: `path` (the first shard's), `version`, `alignment`, `metadata` and `tensors` (read-only mappings),
    `architecture`. Opening reads headers only and never initialises a JAX backend. Reads are thread-safe; closing
    while another thread reads is not.

    Raises GgufError for a file that is not a valid little-endian GGUF v2 or v3 and OSError where the operating
    system refuses (missing, a directory, no permission).
    """

    def __init__(self, path: StrPath):
        shards = _open_shards(path)
        self._shards = shards
        self._close = weakref.finalize(self, _close_all, [shard.fd for shard in shards])
        first = shards[0]
        self.path = first.path
        self.version = first.header.version
        self.alignment = first.header.alignment
        self.metadata: Mapping[str, Any] = first.header.metadata
        if len(shards) == 1:
            self.tensors: Mapping[str, TensorInfo] = first.header.tensors
        else:
            self.tensors = MappingProxyType({k: v for shard in shards for k, v in shard.header.tensors.items()})

    @classmethod
    def open(cls, path: StrPath) -> "GgufFile":
        """The same as `GgufFile(path)`."""
        return cls(path)

    @property
    def architecture(self) -> str:
        """The value of `general.architecture`, such as "qwen3moe"."""
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

    def __enter__(self) -> "GgufFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed, " if self.closed else ""
        return f"GgufFile({self.path!r}, {state}{len(self._shards)} file(s), {len(self.tensors)} tensors)"

    def info(self, name: str) -> TensorInfo:
        """The table entry of tensor `name`; GgufError where the file has none."""
        try:
            return self.tensors[name]
        except KeyError:
            raise GgufError(f"{self.path}: no tensor {name!r} among its {len(self.tensors)}") from None

    def read(self, name: str) -> np.ndarray:
        """The bytes of tensor `name`: u8 [leading dims..., row_bytes], a buffer that nobody else holds."""
        return self.read_rows(name, 0, self.info(name).shape[0])

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """The bytes of entries `start` to `stop` of the slowest axis, such as experts: u8 [stop - start, ..., row_bytes].

        A tensor of one axis is one row: only (0, its length) reads it.
        Raises GgufError for an unknown name, a range outside the tensor, too little memory or a file that shrank.
        """
        info = self.info(name)
        length = info.shape[0]
        if not 0 <= start <= stop <= length or (len(info.shape) == 1 and (start, stop) != (0, length)):
            raise GgufError(f"{self.path}: tensor {name!r} of shape {list(info.shape)} has no rows {start} to {stop}")
        shape = (stop - start, *info.shape[1:-1], info.row_bytes) if len(info.shape) > 1 else (info.row_bytes,)
        nbytes = info.nbytes // length * (stop - start) if len(info.shape) > 1 else info.nbytes
        require_host_bytes(nbytes, f"{self.path}: tensor {name!r}", "read fewer rows at once")
        out = np.empty(shape, np.uint8)
        if out.size:
            self.read_into(info, start * (info.nbytes // length), out)
        return out

    def read_into(self, info: TensorInfo, start: int, out: np.ndarray) -> None:
        """Fill the contiguous array `out` with the tensor's bytes from its byte `start` on; it must end within."""
        if self.closed:
            raise ValueError(f"{self.path}: the GgufFile is closed")
        view = memoryview(out.reshape(-1).view(np.uint8))
        if start < 0 or start + len(view) > info.nbytes:
            raise GgufError(f"{self.path}: tensor {info.name!r} has {info.nbytes} bytes, not {start} to {start + len(view)}")
        shard, done = self._shards[info.shard], 0
        while done < len(view):
            got = os.preadv(shard.fd, [view[done : done + _MAX_PREAD]], info.offset + start + done)
            if not got:
                raise GgufError(f"{shard.path}: tensor {info.name!r} ends after {start + done} of {info.nbytes} bytes: "
                                f"the file shrank; it changed during load")
            done += got

    def check_unchanged(self) -> None:
        """GgufError if a shard's inode, size or modification time differ from those at opening."""
        if self.closed:
            raise ValueError(f"{self.path}: the GgufFile is closed")
        for shard in self._shards:
            if _identity(os.fstat(shard.fd)) != shard.identity:
                raise GgufError(f"{shard.path}: the file changed during load: load it again once it is complete")


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _open_regular(path: str) -> int:
    # O_NONBLOCK: opening a pipe that nobody writes to would wait forever.
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise GgufError(f"{path}: not a regular file but a socket or a device: GGUF needs a regular file") from None
        raise
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd
    os.close(fd)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    raise GgufError(f"{path}: not a regular file but {_KINDS.get(stat.S_IFMT(mode), 'a special file')}: "
                    f"GGUF needs a regular file, since it is read at random offsets")


_KINDS = {stat.S_IFIFO: "a pipe (FIFO)", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a character device",
          stat.S_IFBLK: "a block device"}


def _open_shard(path: str, index: int) -> _Shard:
    fd = _open_regular(path)
    try:
        status = os.fstat(fd)
        header = parse_header(fd, status.st_size, path, index)
    except BaseException:
        os.close(fd)
        raise
    return _Shard(path, fd, _identity(status), header)


def _open_shards(path: StrPath) -> list[_Shard]:
    given = os.fsdecode(path)
    shards = [_open_shard(given, 0)]
    try:
        count = _split_value(shards[0], "split.count", 1)
        if count <= 1:
            return shards
        number = _split_value(shards[0], "split.no", 0) + 1
        match = _SHARD_NAME.fullmatch(given)
        if match is None or (int(match[2]), int(match[3])) != (number, count):
            raise GgufError(f"{given}: the file is shard {number} of {count}, but its name does not end in "
                            f"-{number:05}-of-{count:05}.gguf, so its siblings cannot be found: give it its name back")
        # The given shard is opened again at its place: its table must carry its own number.
        os.close(shards.pop().fd)
        for index in range(count):
            shards.append(_open_sibling(f"{match[1]}-{index + 1:05}-of-{count:05}.gguf", given, index, count))
        _check_split(shards)
    except BaseException:
        _close_all([shard.fd for shard in shards])
        raise
    return shards


def _open_sibling(path: str, given: str, index: int, count: int) -> _Shard:
    try:
        shard = _open_shard(path, index)
    except FileNotFoundError:
        raise GgufError(f"{given} is one shard of {count}, but shard {index + 1}, {path}, is missing: put all shards "
                        f"into one directory") from None
    try:
        found = _split_value(shard, "split.no", 0), _split_value(shard, "split.count", 1)
        if found != (index, count):
            raise GgufError(f"{path}: split.no and split.count are {found}, wanted {(index, count)} as in its name")
    except BaseException:
        os.close(shard.fd)
        raise
    return shard


def _check_split(shards: list[_Shard]) -> None:
    seen: dict[str, str] = {}
    for shard in shards:
        for name in shard.header.tensors:
            if name in seen:
                raise GgufError(f"{shard.path}: tensor {name!r} stands in {seen[name]} too")
            seen[name] = shard.path
    wanted = _split_value(shards[0], "split.tensors.count", len(seen))
    if wanted != len(seen):
        raise GgufError(f"{shards[0].path}: split.tensors.count is {wanted}, but the {len(shards)} shards hold "
                        f"{len(seen)} tensors")


def _split_value(shard: _Shard, key: str, default: int) -> int:
    value = shard.header.metadata.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise GgufError(f"{shard.path}: {key} must be an integer from 0 on, got {value!r}")
    return value
