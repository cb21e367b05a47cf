"""Which backend computes a call, and why: the only importer of pallas_kernels and metal_bridge."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

import metal_bridge
import pallas_kernels

from . import checks
from .stack import ExpertStack


class Choice(NamedTuple):
    """A backend's name, and the reason for it."""

    name: str
    why: str


# What jax calls a platform, and what its lowering rules call it.
_LOWERING_NAME = {"gpu": "cuda"}


def which_backend(
    stack: ExpertStack,
    x: Any,
    topk_ids: Any = None,
    *,
    activation: str = "silu",
    precision: str | None = None,
    platform: str | None = None,
) -> Choice:
    """What ``moe_forward`` runs for these arguments on ``platform``, and why.

    | platform        | runs                                                                    |
    |-----------------|-------------------------------------------------------------------------|
    | cuda            | "pallas" where ``pallas_kernels`` takes the formats and shapes, else jnp |
    | mps             | "mps" where ``metal_bridge`` is available, else jnp                      |
    | cpu, all others | "jnp"                                                                   |

    ``platform`` defaults to that of ``jax.default_backend()``. Only shapes and dtypes are looked at.
    """
    checks.check_options(activation, precision, None)
    platform = platform or jax.default_backend()
    platform = _LOWERING_NAME.get(platform, platform)
    if platform == "cuda":
        why_not = pallas_kernels.why_unavailable()
        return Choice("jnp", f"cuda, but {why_not}")
    if platform in ("mps", "METAL"):
        return Choice("jnp", f"{platform}, but {metal_bridge.why_unavailable()}")
    return Choice("jnp", f"platform {platform} has no kernels of its own: dequantise an expert, then matmul, in XLA")


def force(name: str, choice: Choice) -> None:
    """Raises where a backend that the caller insists on is not the one that can run."""
    if name not in ("jnp", choice.name):
        raise ValueError(f"backend={name!r} cannot run this call: {choice.why}. Leave backend=None to take what can.")
