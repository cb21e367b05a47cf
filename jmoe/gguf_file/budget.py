"""How much memory is free, asked before anything large is allocated."""

from __future__ import annotations

import os
import resource
from typing import NamedTuple

from .errors import GgufError


class _Cgroup(NamedTuple):
    """Where a container finds its limit, what it uses, and under which name of its statistics the page cache."""

    limit: str
    used: str
    statistics: str
    cached: str


_V1, _V2 = "/sys/fs/cgroup/memory/memory.", "/sys/fs/cgroup/memory."
_CGROUPS = (
    _Cgroup(f"{_V2}max", f"{_V2}current", f"{_V2}stat", "inactive_file"),
    _Cgroup(f"{_V1}limit_in_bytes", f"{_V1}usage_in_bytes", f"{_V1}stat", "total_inactive_file"),
)


def available_host_bytes() -> int | None:
    """Bytes of host memory that can be had without swapping, or None where the system does not tell.

    Linux: MemAvailable, which counts the page cache as free (SC_AVPHYS_PAGES does not), and a container's limit.
    Elsewhere: the physical memory. Everywhere: the process's limit of address space (``ulimit -v``).
    """
    system = [figure for figure in (_meminfo_available(), *map(_cgroup_available, _CGROUPS)) if figure is not None]
    figures = [*(system or _physical()), *_address_space()]
    return min(figures, default=None)


def require_host_bytes(needed: int, what: str, fix: str) -> None:
    """GgufError where ``what`` needs more bytes than are available; ``fix`` says what to do instead."""
    # Asking costs a few system calls: not worth it for what any machine has.
    if needed < 1 << 24:
        return
    available = available_host_bytes()
    if available is not None and needed > available:
        raise GgufError(f"{what} needs {needed} bytes of host memory, but {available} are available: {fix}")


def _physical() -> list[int]:
    try:
        return [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    except (ValueError, OSError, AttributeError):
        return []


def _address_space() -> list[int]:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return []
    pages = next((int(line.split()[0]) for line in _lines("/proc/self/statm")), 0)
    return [max(limit - pages * resource.getpagesize(), 0)]


def _meminfo_available() -> int | None:
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_available(cgroup: _Cgroup) -> int | None:
    limit, used = _lines(cgroup.limit), _lines(cgroup.used)
    if not limit or not used or not limit[0].isdigit():
        return None
    # Cached file pages count as used, but the kernel drops them on demand.
    lines = (line.split() for line in _lines(cgroup.statistics))
    cached = sum(int(value) for name, value in lines if name == cgroup.cached)
    return max(int(limit[0]) - int(used[0]) + cached, 0)


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="ascii") as file:
            return file.read().splitlines()
    except OSError:
        return []
