"""From router logits to the chosen experts and their weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import checks, devices

GATINGS = ("softmax", "sigmoid", "softmax_top_k", "sqrt_softplus")
SELECT_ON = ("probs", "logits")

# f16's smallest normal number: llama.cpp clamps the sum of the chosen weights to it before it divides.
SMALLEST_WEIGHT_SUM = 6.103515625e-5

# Comparisons up to which a GPU counts ranks instead of sorting: T * E^2. benchmarks/routing.py measured on an H100, by
# ranks and by lax.top_k, 8.8 and 12.3 us for E = 512 at T = 16 (2^22), 15.6 and 11.0 for E = 128 at T = 512 (2^23).
_MOST_COMPARISONS = 1 << 22


@dataclass(frozen=True)
class RouterConfig:
    """How a router chooses. Static and hashable: a new one compiles anew.

    ``top_k``: experts a token. ``normalise``: whether the chosen weights are divided by their sum; files do not
    always say, and a wrong value gives garbage (Qwen3 and Mixtral: yes; Qwen2-MoE and OLMoE: no).
    ``gating``: what turns logits into probabilities: "softmax" over all experts, "sigmoid", "sqrt_softplus", or
    "softmax_top_k", the softmax over the chosen ones alone (gpt-oss). ``scale`` multiplies the weights at the end; 0 is
    llama.cpp's word for none. ``group_count`` > 1: experts stand in that many groups of neighbours, and only the
    ``groups_used`` best are chosen from (DeepSeek-V3). ``select_on="logits"`` ranks the logits instead of the
    probabilities (Llama 4). Raises ValueError that names field, value and what was wanted.
    """

    top_k: int
    normalise: bool = True
    gating: str = "softmax"
    scale: float = 1.0
    group_count: int = 1
    groups_used: int = 1
    select_on: str = "probs"

    def __post_init__(self) -> None:
        for field, least in (("top_k", 0), ("group_count", 1), ("groups_used", 1)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{field} must be an int >= {least}, got {value!r}")
        if not isinstance(self.normalise, bool):
            raise ValueError(f"normalise must be True or False, got {self.normalise!r}")
        if isinstance(self.scale, bool) or not isinstance(self.scale, int | float) or not math.isfinite(self.scale):
            raise ValueError(f"scale must be a finite number, got {self.scale!r}")
        if self.groups_used > self.group_count:
            raise ValueError(f"groups_used must be at most group_count={self.group_count}, got {self.groups_used!r}")
        for field, known in (("gating", GATINGS), ("select_on", SELECT_ON)):
            value = getattr(self, field)
            if not isinstance(value, str) or value not in known:
                raise ValueError(f"{field} must be one of {', '.join(map(repr, known))}, got {value!r}")

    def __str__(self) -> str:
        """In words, for reports: ``top 8 of sigmoid, from the best 4 of 8 groups, normalised, times 2.5``."""
        parts = [f"top {self.top_k} of {self.gating}"]
        if self.select_on == "logits":
            parts.append("chosen by logits")
        if self.group_count > 1:
            parts.append(f"from the best {self.groups_used} of {self.group_count} groups")
        parts.append("normalised" if self.normalise else "not normalised")
        if self.scale not in (0, 1):
            parts.append(f"times {self.scale:g}")
        return ", ".join(parts)


def route(
    logits: Any, config: RouterConfig, selection_bias: Any = None, *, topk_ids: Any = None
) -> tuple[jax.Array, jax.Array]:
    """``topk_ids = top_k(p + selection_bias), topk_weights = scale * p[topk_ids] / sum``, p = gating(logits).

    ``logits`` f32, bf16 or f16 [T, E]; ``selection_bias`` float [E], added for the choice alone (``exp_probs_b``).
    Returns ``topk_ids`` i32[T, K], by descending selection, ties to the smaller index, and ``topk_weights`` f32[T, K].
    The division is there where ``config.normalise``, its sum clamped at 2^-14. A group's score is the sum of its two
    best selections. ``topk_ids``, integer [T, K], skips the choice: the weights are those that the router gives these
    experts; an id outside [0, E) weighs nothing. NaN counts as the largest.

    Differentiable in the logits. Raises AssertionError for wrong shapes or dtypes, ValueError for what cannot be chosen
    from E experts, a bias beside ``select_on="logits"`` or ``topk_ids``, and logits that Explicit axes of a mesh shard
    along E, TypeError for what is no config. Semantics: llama.cpp's build_moe_ffn.
    """
    if not isinstance(config, RouterConfig):
        raise TypeError(f"config must be a RouterConfig, got {type(config).__name__}")
    checks.check_logits(logits, config, selection_bias, topk_ids)
    devices.check_process()
    devices.check_rows(logits, "logits")
    if topk_ids is not None:
        topk_ids = checks.narrow_ids(topk_ids, logits.shape[1])
    return _route(jnp.asarray(logits), selection_bias, topk_ids, config)


@partial(jax.jit, static_argnames="config")
def _route(
    logits: jax.Array, selection_bias: jax.Array | None, topk_ids: jax.Array | None, config: RouterConfig
) -> tuple[jax.Array, jax.Array]:
    logits = logits.astype(jnp.float32)
    probs = _gated(logits, config.gating)  # f32[T, E]
    if topk_ids is None:
        selection = lax.stop_gradient(logits if config.select_on == "logits" else probs)
        if selection_bias is not None:
            selection = selection + lax.stop_gradient(selection_bias).astype(jnp.float32)[None]
        if config.groups_used < config.group_count:
            selection = _best_groups(selection, config)
        ids, weights = _choose(selection, probs, config.top_k)  # [T, K]
        inside = None
    else:
        ids = topk_ids.astype(jnp.int32)
        inside = (ids >= 0) & (ids < logits.shape[1])
        weights = jnp.take_along_axis(probs, jnp.where(inside, ids, 0), axis=-1)
    if config.gating == "softmax_top_k":
        lowest = jnp.finfo(jnp.float32).min
        weights = jax.nn.softmax(weights if inside is None else jnp.where(inside, weights, lowest), axis=-1)
    if inside is not None:
        weights = jnp.where(inside, weights, 0)
    if config.normalise:
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = weights / jnp.maximum(total, jnp.float32(SMALLEST_WEIGHT_SUM))
    if config.scale not in (0, 1):
        weights = weights * jnp.float32(config.scale)
    return ids, weights


def _gated(logits: jax.Array, gating: str) -> jax.Array:
    match gating:
        case "softmax":
            return jax.nn.softmax(logits, axis=-1)
        case "sigmoid":
            return jax.nn.sigmoid(logits)
        case "sqrt_softplus":
            # Below -20 it is exp(z / 2) to 1e-9, and softplus would underflow: a root's derivative there is infinite.
            root = jnp.sqrt(jax.nn.softplus(jnp.maximum(logits, -20)))
            return jnp.where(logits < -20, jnp.exp(jnp.minimum(logits, -20) / 2), root)
    return logits  # softmax_top_k: the softmax follows the choice


def _best_groups(selection: jax.Array, config: RouterConfig) -> jax.Array:
    """``selection`` f32[T, E] with -inf outside the best groups."""
    groups = selection.reshape(selection.shape[0], config.group_count, selection.shape[1] // config.group_count)
    score = jnp.max(groups, axis=-1)  # [T, G]
    if groups.shape[-1] > 1:
        at = lax.broadcasted_iota(jnp.int32, groups.shape, 2)
        first = jnp.argmax(groups, axis=-1, keepdims=True).astype(jnp.int32)
        score = score + jnp.max(jnp.where(at == first, -jnp.inf, groups), axis=-1)
    best = _ranks(score) < config.groups_used
    return jnp.where(best[..., None], groups, -jnp.inf).reshape(selection.shape)


def _choose(selection: jax.Array, probs: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
    """The ids of the ``top_k`` largest selections and their probs, both [T, K]."""
    tokens, experts = selection.shape
    if 0 in (tokens, top_k) or tokens * experts**2 > _MOST_COMPARISONS:
        return _choose_by_top_k(selection, probs, top_k)
    # A GPU sorts all E for top_k; to count is one fused reduction, with no order among threads. CPUs sort partially.
    by_rank, by_top_k = partial(_choose_by_rank, top_k=top_k), partial(_choose_by_top_k, top_k=top_k)
    return lax.platform_dependent(selection, probs, cuda=by_rank, default=by_top_k)


def _choose_by_top_k(selection: jax.Array, probs: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
    # top_k's order is total: -0 lies below 0, and a NaN's place depends on its sign.
    ordered = jnp.where(jnp.isnan(selection), jnp.nan, jnp.where(selection == 0, 0, selection))
    ids = lax.top_k(ordered, top_k)[1].astype(jnp.int32)
    return ids, jnp.take_along_axis(probs, ids, axis=-1)


def _choose_by_rank(selection: jax.Array, probs: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
    slots = lax.broadcasted_iota(jnp.int32, (1, top_k, 1), 1)
    chosen = _ranks(selection)[:, None] == slots  # [T, K, E], one True in each slot
    experts = lax.broadcasted_iota(jnp.int32, chosen.shape, 2)
    ids = jnp.sum(jnp.where(chosen, experts, 0), axis=-1, dtype=jnp.int32)
    return ids, jnp.sum(jnp.where(chosen, probs[:, None], 0), axis=-1)


def _ranks(values: jax.Array) -> jax.Array:
    """i32[T, N]: how many of the row's values are larger, or equal and before it; NaN is the largest."""
    bits = lax.bitcast_convert_type(jnp.where(values == 0, 0, values), jnp.int32)
    # As integers they have the order of the floats, and NaNs are equal.
    keys = jnp.where(jnp.isnan(values), jnp.int32(0x7FFFFFFF), jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits))
    this, other = keys[:, :, None], keys[:, None, :]
    size = values.shape[1]
    before = lax.broadcasted_iota(jnp.int32, (1, size, size), 2) < lax.broadcasted_iota(jnp.int32, (1, size, size), 1)
    return jnp.sum((other > this) | ((other == this) & before), axis=-1, dtype=jnp.int32)
