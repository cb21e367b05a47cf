"""Open a GGUF file, and where it is one shard of a split model, its siblings.

gguf-split numbers the files ``-00001-of-00003.gguf`` and writes split.no (from 0), split.count and
split.tensors.count (over all shards) into every header.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from dataclasses import dataclass

from .errors import GgufError
from .header import Header, parse_header
from .metadata import shortened

_SHARD_NAME = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf", re.ASCII | re.DOTALL)
_KINDS = {stat.S_IFIFO: "a pipe (FIFO)", stat.S_IFCHR: "a character device", stat.S_IFBLK: "a block device"}

StrPath = str | bytes | os.PathLike


@dataclass(frozen=True)
class Shard:
    """An open file: its descriptor, its (inode, size, modification time) at opening, its header."""

    path: str
    fd: int
    identity: tuple[int, int, int]
    header: Header


def open_shards(path: StrPath) -> list[Shard]:
    """The open file, or all shards in order where it is one of several. No descriptor stays open on an error."""
    given = os.fsdecode(path)
    shards = [_open_shard(given, 0)]
    try:
        count = _split_value(shards[0], "split.count", 1)
        if count <= 1:
            return shards
        number = _split_value(shards[0], "split.no", 0) + 1
        match = _SHARD_NAME.fullmatch(given)
        if match is None or (int(match[2]), int(match[3])) != (number, count):
            raise GgufError(
                f"{given}: the file is shard {number} of {count}, but its name does not end in"
                f" -{number:05}-of-{count:05}.gguf, so its siblings cannot be found: give it its name back"
            )
        # Opened again below, at its place: a tensor's entry carries the number of its shard.
        os.close(shards.pop().fd)
        for index in range(count):
            shards.append(_open_sibling(f"{match[1]}-{index + 1:05}-of-{count:05}.gguf", given, index, count))
        _check_tensors(shards)
    except BaseException:
        close_all([shard.fd for shard in shards])
        raise
    return shards


def close_all(fds: list[int]) -> None:
    """Close every descriptor."""
    for fd in fds:
        os.close(fd)


def identity(status: os.stat_result) -> tuple[int, int, int]:
    """What tells that a file was written or replaced: (inode, size, modification time in ns)."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def _open_regular(path: str) -> int:
    # O_NONBLOCK: opening a pipe that nobody writes to would wait forever.
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.EOPNOTSUPP):
            raise GgufError(f"{path}: a socket or a device without a driver, wanted a regular file") from None
        raise
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd
    os.close(fd)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    kind = _KINDS.get(stat.S_IFMT(mode), "a special file")
    raise GgufError(f"{path}: {kind}, wanted a regular file: copy the model into one")


def _open_shard(path: str, index: int) -> Shard:
    fd = _open_regular(path)
    try:
        status = os.fstat(fd)
        header = parse_header(fd, status.st_size, path, index)
    except BaseException:
        os.close(fd)
        raise
    return Shard(path, fd, identity(status), header)


def _open_sibling(path: str, given: str, index: int, count: int) -> Shard:
    try:
        shard = _open_shard(path, index)
    except FileNotFoundError:
        raise GgufError(
            f"{given} is one shard of {count}, but shard {index + 1}, {path}, is missing: put all shards into one"
            " directory"
        ) from None
    try:
        found = _split_value(shard, "split.no", 0), _split_value(shard, "split.count", 1)
        if found != (index, count):
            raise GgufError(f"{path}: split.no and split.count are {found}, wanted {(index, count)} by its name")
    except BaseException:
        os.close(shard.fd)
        raise
    return shard


def _check_tensors(shards: list[Shard]) -> None:
    seen: dict[str, str] = {}
    for shard in shards:
        for name in shard.header.tensors:
            if name in seen:
                raise GgufError(f"{shard.path}: tensor {name!r} stands in {seen[name]} too")
            seen[name] = shard.path
    wanted = _split_value(shards[0], "split.tensors.count", len(seen))
    if wanted != len(seen):
        raise GgufError(
            f"{shards[0].path}: split.tensors.count is {wanted}, but the {len(shards)} shards hold {len(seen)} tensors"
        )


def _split_value(shard: Shard, key: str, default: int) -> int:
    value = shard.header.metadata.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise GgufError(f"{shard.path}: {key} must be an integer from 0 on, got {shortened(value)}")
    return value
