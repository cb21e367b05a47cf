"""Whether JAX can compute on this machine's Apple GPU: through jax-mps, a PJRT plugin over MLX.

jax-metal, Apple's own plugin (platform ``METAL``), ended with version 0.1.1 of October 2024 and jax 0.5.0.
"""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import jax

INSTALL = "pip install 'jmoe[mps]'"
# The first jax-mps with mps.quantized_matmul, and the macOS that its wheels are built for.
MIN_JAX_MPS, MIN_MACOS = (0, 10, 9), 14


def why_unavailable() -> str | None:
    """Why JAX cannot compute on an Apple GPU here, and what to do about it; None where it can.

    Looks at the machine and at what is installed; starts no backend.
    """
    if sys.platform != "darwin" or platform.machine() != "arm64":
        system = f"{platform.system()} {platform.machine()}"
        return f"jax-mps, JAX's plugin for Apple GPUs, needs macOS on Apple silicon, this is {system}"
    macos = platform.mac_ver()[0]
    if _numbers(macos)[:1] < (MIN_MACOS,):
        return f"jax-mps needs macOS {MIN_MACOS} or newer, this is {macos or 'unknown'}"
    installed = installed_version("jax-mps")
    if installed is None:
        metal = installed_version("jax-metal")
        if metal is not None:
            return f"jax-metal {metal} works with no jax that jmoe supports; jax-mps takes its place: {INSTALL}"
        return f"jax-mps, JAX's plugin for Apple GPUs, is not installed: {INSTALL}"
    if _numbers(installed) < MIN_JAX_MPS:
        return f"jax-mps {installed} has no quantised product yet: {INSTALL} --upgrade"
    # A plugin reads the serialised programs of the jax series that it was built with.
    series = _numbers(installed)[:2]
    if jax.__version_info__[:2] != series:
        wanted = ".".join(map(str, series))
        return (
            f"jax-mps {installed} is built for jax {wanted}, this is jax {jax.__version__}: pip install jax=={wanted}.*"
        )
    return None


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    """``"0.11.1"`` -> (0, 11, 1); stops at the first part that is no number."""
    parts: list[int] = []
    for part in text.split("."):
        if not part.isdecimal():
            break
        parts.append(int(part))
    return tuple(parts)
