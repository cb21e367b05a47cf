"""Pallas (Mosaic GPU) kernels for packed expert stacks. Imports jax, numpy and the standard library only.

The kernels themselves, and jax.experimental.pallas with them, are imported when a call first needs them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import jax

from .semantics import Leaves as Leaves
from .semantics import Semantics as Semantics

# Depth that a row of each format must be a multiple of, for the copy engine's and the tensor core's tiles.
DEPTHS = {
    **dict.fromkeys(("q4_k", "q5_k", "q6_k", "q3_k", "q2_k", "iq4_xs"), 256),
    **dict.fromkeys(("q5_0", "q8_0", "q4_0", "mxfp4", "q5_1", "q4_1", "iq4_nl"), 64),
}
# The same of dense projections, which only the kernel for many tokens takes.
DENSE_DEPTHS = dict.fromkeys(("bfloat16", "float16"), 64)
# What always goes to few_tokens.py, which reads weights faster and computes less with them.
FEW_TOKENS = 16
OUTPUTS = 32
# Of a projection for all pairs of a token and an expert: 16 GiB in bf16. x_rows.py counts eights of them, and
# many_tokens.py units and the depth that a block goes through, in 32-bit words, which hold out beyond that.
MAX_OUTPUTS = 2**33
# They use names of jax that change without notice: a newer jax must not break what runs without them.
MIN_JAX, BELOW_JAX = (0, 11, 0), (0, 13, 0)

NO_LEAVES, SILU = Leaves(), Semantics()


def why_unavailable(
    formats: Mapping[str, tuple[str, tuple[int, ...]]],
    *,
    tokens: int,
    top_k: int | None = None,
    weight_on: str = "output",
) -> str | None:
    """Why the kernels do not take a call, or None where they do.

    ``formats``: projection name -> (format, (O, D)), a dense one's format is its dtype; ``top_k`` None where it is not
    known yet. Looks at no device but the default one's compute capability, and at that only where jax already runs on a
    GPU.
    """
    if not MIN_JAX <= jax.__version_info__ < BELOW_JAX:
        wanted = " and ".join(f"{sign} {_dotted(version)}" for sign, version in ((">=", MIN_JAX), ("<", BELOW_JAX)))
        return f"the kernels need jax {wanted}, this is {jax.__version__}"
    if tokens == 0:
        return "this call has 0 tokens"
    if top_k == 0:
        return "this call chooses no expert"
    pairs = tokens * (1 if top_k is None else top_k)
    few = are_few(tokens, pairs, weight_on)
    depths = DEPTHS | DENSE_DEPTHS
    for name, (format_name, (outputs, depth)) in formats.items():
        if format_name not in depths:
            return f"there is no kernel for {name}'s format {format_name}"
        if few and format_name in DENSE_DEPTHS:
            return f"{name} is dense, which the kernels take from {FEW_TOKENS + 1} tokens on"
        if depth % depths[format_name]:
            return f"{name}'s depth must be a multiple of {depths[format_name]} for {format_name}, it is {depth}"
        if outputs % OUTPUTS:
            return f"{name}'s outputs must be a multiple of {OUTPUTS}, they are {outputs}"
        if pairs * outputs > MAX_OUTPUTS:
            return (
                f"the kernels give at most 2^{MAX_OUTPUTS.bit_length() - 1} numbers a projection, {name} would give"
                f" {pairs} pairs of a token and an expert {outputs} each: split the tokens"
            )
    if jax.config.jax_disable_jit:
        return "the kernels do not run with jax_disable_jit"
    if jax.config.jax_enable_x64:
        return "the kernels do not run with jax_enable_x64"
    if jax.default_backend() == "gpu":
        capability = jax.devices()[0].compute_capability
        if capability != "9.0":
            return f"the kernels need compute capability 9.0, this GPU has {capability}"
    return None


def are_few(tokens: int, pairs: int, weight_on: str) -> bool:
    """Whether few_tokens.py always takes a call: with weights on the input a pair is a token of its own there."""
    return (pairs if weight_on == "input" else tokens) <= FEW_TOKENS


def takes_few(
    formats: Collection[str],
    *,
    experts: int,
    tokens: int,
    top_k: int,
    dtype: Any,
    weight_on: str = "output",
    live_share: float = 1.0,
) -> bool:
    """Whether few_tokens.py takes a call that the kernels take, else many_tokens.py: ``formats`` of the projections,
    ``dtype`` of x."""
    if are_few(tokens, tokens * top_k, weight_on):
        return True
    if any(name in DENSE_DEPTHS for name in formats) or (weight_on == "input" and top_k > 1):
        return False
    from . import tiling, x_tiles

    return tiling.is_read_once(tokens, tokens * top_k * x_tiles.x_parts(dtype), experts, live_share)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def moe_layer(
    gate: Any,
    up: Any,
    down: Any,
    x: jax.Array,
    topk_ids: jax.Array,
    topk_weights: jax.Array,
    layer: Any,
    leaves: Leaves = NO_LEAVES,
    semantics: Semantics = SILU,
    exact: bool = False,
    live_share: float = 1.0,
) -> jax.Array:
    """``y[t] = sum_k topk_weights[t, k] * down_e(act(gate_e x[t], up_e x[t]))``, f32[T, H].

    Projections are ``(format, planes)``, dense ones ``(dtype, (array,))``, gate None where there is none; planes and
    leaves have a leading layer axis where ``layer`` is an index. semantics.py has the activation, and what the leaves
    do. ``exact``: f32-class arithmetic for x in bf16 too. ``live_share``, up to 1: of the pairs of a token and a slot,
    those to expect to lead to an expert; others are as right, and slower.
    """
    from .layer import Packed, moe_layer

    gate, up, down = (None if projection is None else Packed(*projection) for projection in (gate, up, down))
    return moe_layer(gate, up, down, x, topk_ids, topk_weights, layer, leaves, semantics, exact, live_share)
