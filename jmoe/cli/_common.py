"""What the commands share: their error, argument types, and plain-text tables."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax


class UsageError(Exception):
    """The command line asks for what cannot be done; the message is one line that says why and what to do."""


def integer(least: int) -> Callable[[str], int]:
    """An argparse type: an integer from ``least`` on."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"wanted an integer from {least} on, got {text!r}")
        return value

    return parse


def own_version() -> str:
    try:
        return version("jmoe")
    except PackageNotFoundError:
        return "(not installed)"


def heading(device: Any) -> str:
    """What computes: ``jmoe 0.1.0, jax 0.11.2 on cpu (cpu)``."""
    return f"jmoe {own_version()}, jax {jax.__version__} on {device.platform} ({device.device_kind})"


def printable(text: str) -> str:
    """A file's own words, which must not steer the terminal."""
    return text if text.isprintable() else repr(text)


def megabytes(nbytes: float) -> str:
    return f"{nbytes / 1e6:,.1f} MB"


def duration(seconds: float) -> str:
    """Three digits in the unit that fits: ``4.21 s``, ``12.3 ms``, ``870 us``."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.0f} us"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as their widest cell: text to the left, what starts with a digit or a sign to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    right = [all(row[column][:1] in "-+0123456789" for row in cells[1:]) for column in range(len(header))]
    lines = []
    for row in cells:
        aligned = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)
