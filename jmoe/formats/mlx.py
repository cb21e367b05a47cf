"""MLX's affine format, for Apple GPUs: groups of 32 weights with an f32 scale and bias; no GGUF type.

words, codes one after the other from the low bits on; in 4 bits:    word  |31 .. 28| ... |7 6 5 4|3 2 1 0|
                                                                             w[7]          w[1]    w[0]
in 8 bits four to a word; in 5 bits a group fills five words, and codes 6, 12, 19 and 25 lie across two of them.

w = scale * q + bias

6, 7 and 10 bits a weight for q of 4, 5 and 8 bits. ``jmoe.for_mps`` makes them of GGUF formats; metal_bridge/affine.py
says which, and why the weights are the same.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._format import Packed, Plane

GROUP = 32


class MLXPlanes(NamedTuple):
    """Scales and biases are the bits of f32 numbers: leaves are integers, as in every packed format."""

    words: Any  # u32 [..., O, D/32 * bits]
    scales: Any  # u32 [..., O, D/32]  f32 bits
    biases: Any  # u32 [..., O, D/32]  f32 bits


def as_f32(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float32)


def codes_of(words: jax.Array, bits: int) -> jax.Array:
    """u32[..., O, N * bits] -> u32[..., O, N, 32]."""
    *lead, entries = words.shape
    words = words.reshape(*lead, entries // bits, bits, 1)
    # Code i begins at bit i * bits of the group, so far to the right of word w's first bit; or to the left, where the
    # word holds only its upper end. A shift by 32 leaves nothing of the words that hold none of it.
    right = np.arange(GROUP) * bits - 32 * np.arange(bits)[:, None]
    lower = _shifted(lax.shift_right_logical, words, right, range(32))
    upper = _shifted(lax.shift_left, words, -right, range(1, bits))
    return jnp.sum(lower | upper, axis=-2, dtype=jnp.uint32) & np.uint32(2**bits - 1)


def _shifted(shift: Any, words: jax.Array, by: np.ndarray, within: range) -> jax.Array:
    """u32[..., bits, 1] words shifted by [bits, 32] places, zero where that is not ``within``."""
    by = np.where((by >= within.start) & (by < within.stop), by, 32).astype(np.uint32)
    return shift(*jnp.broadcast_arrays(words, jnp.asarray(by.reshape((1,) * (words.ndim - 2) + by.shape))))


def decode(planes: MLXPlanes, bits: int) -> jax.Array:
    """``w = scale * q + bias``, f32[..., O, D/32, 32]."""
    codes = codes_of(planes.words, bits).astype(jnp.float32)
    return as_f32(planes.scales)[..., None] * codes + as_f32(planes.biases)[..., None]


def _mlx(bits: int) -> Packed:
    return Packed(
        name=f"mlx{bits}",
        block_weights=GROUP,
        layout=MLXPlanes(
            words=Plane(np.uint32, Fraction(32, bits), True),
            scales=Plane(np.uint32, GROUP, True),
            biases=Plane(np.uint32, GROUP, True),
        ),
        decode=lambda planes: decode(planes, bits),
    )


MLX_FORMATS = {spec.name: spec for spec in map(_mlx, (4, 5, 8))}
