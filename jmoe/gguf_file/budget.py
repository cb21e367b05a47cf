"""How much memory is free, asked before anything large is allocated."""

from __future__ import annotations

import os

from .errors import GgufError


def available_host_bytes() -> int | None:
    """Bytes of host memory that can be had without swapping, or None where the system does not tell.

    Linux: MemAvailable, which counts the page cache as free (SC_AVPHYS_PAGES does not), and a container's limit.
    Elsewhere: the physical memory.
    """
    figures = [figure for figure in (_meminfo_available(), _cgroup_available()) if figure is not None]
    if figures:
        return min(figures)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def require_host_bytes(needed: int, what: str, fix: str) -> None:
    """GgufError where ``what`` needs more bytes than are available; ``fix`` says what to do instead."""
    # Asking costs a few system calls: not worth it for what any machine has.
    if needed < 1 << 24:
        return
    available = available_host_bytes()
    if available is not None and needed > available:
        raise GgufError(f"{what} needs {needed} bytes of host memory, but {available} are available: {fix}")


def _meminfo_available() -> int | None:
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_available() -> int | None:
    limit, used = _lines("/sys/fs/cgroup/memory.max"), _lines("/sys/fs/cgroup/memory.current")
    if not limit or not used or not limit[0].isdigit():
        return None
    # Cached file pages count as used, but the kernel drops them on demand.
    cached = sum(
        int(line.split()[1]) for line in _lines("/sys/fs/cgroup/memory.stat") if line.startswith("inactive_file ")
    )
    return max(int(limit[0]) - int(used[0]) + cached, 0)


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="ascii") as file:
            return file.read().splitlines()
    except OSError:
        return []
