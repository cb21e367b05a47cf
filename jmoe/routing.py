"""From router logits to the chosen experts and their weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import checks, devices

# f16's smallest normal number: llama.cpp clamps the sum of the chosen weights to it before it divides.
SMALLEST_WEIGHT_SUM = 6.103515625e-5


@dataclass(frozen=True)
class RouterConfig:
    """How a router chooses. Static and hashable: a new one compiles anew.

    ``top_k``: experts a token. ``normalise``: whether the chosen weights are divided by their sum; files do not
    always say, and a wrong value gives garbage (Qwen3 and Mixtral: yes; Qwen2-MoE and OLMoE: no).
    """

    top_k: int
    normalise: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top_k must be an int >= 0, got {self.top_k!r}")
        if not isinstance(self.normalise, bool):
            raise ValueError(f"normalise must be True or False, got {self.normalise!r}")


def route(logits: Any, config: RouterConfig) -> tuple[jax.Array, jax.Array]:
    """``topk_weights = softmax(logits)[topk_ids]``, divided by their sum where ``config.normalise``.

    ``logits`` f32, bf16 or f16 [T, E]; returns ``topk_ids`` i32[T, K], by descending weight, ties to the smaller
    index, and ``topk_weights`` f32[T, K]. The sum is clamped at 2^-14, as llama.cpp does (build_moe_ffn).
    Raises AssertionError for wrong shapes or dtypes, ValueError for ``top_k > E`` and for logits that Explicit axes of
    a mesh shard along E, TypeError for what is no config.
    """
    if not isinstance(config, RouterConfig):
        raise TypeError(f"config must be a RouterConfig, got {type(config).__name__}")
    checks.check_logits(logits, config)
    devices.check_process()
    devices.check_rows(logits, "logits")
    return _route(jnp.asarray(logits), config)


@partial(jax.jit, static_argnames="config")
def _route(logits: jax.Array, config: RouterConfig) -> tuple[jax.Array, jax.Array]:
    probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)  # f32[T, E]
    weights, ids = lax.top_k(probs, config.top_k)  # [T, K]
    if config.normalise:
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = weights / jnp.maximum(total, jnp.float32(SMALLEST_WEIGHT_SUM))
    return ids.astype(jnp.int32), weights
