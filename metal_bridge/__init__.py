"""The Apple path. Imports jax, numpy and the standard library only."""

from __future__ import annotations


def why_unavailable() -> str:
    """Why the Apple path cannot run a call."""
    return "this version of jmoe has no Metal path yet"
