"""Pallas (Mosaic GPU) kernels for packed expert stacks. Imports jax, numpy and the standard library only."""

from __future__ import annotations


def why_unavailable() -> str:
    """Why no kernel can run a call."""
    return "this version of jmoe has no GPU kernels yet"
