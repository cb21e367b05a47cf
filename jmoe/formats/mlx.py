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
    words = words.reshape(*lead, entries // bits, bits)
    codes = []
    for start in range(0, GROUP * bits, bits):
        word, shift = divmod(start, 32)
        code = words[..., word] >> np.uint32(shift)
        if shift + bits > 32:
            code |= words[..., word + 1] << np.uint32(32 - shift)
        codes.append(code)
    return jnp.stack(codes, axis=-1) & np.uint32(2**bits - 1)


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
