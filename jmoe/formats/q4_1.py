"""Q4_1: 32 weights in 20 bytes, 5 bits a weight (ggml-common.h: block_q4_1).

offset  bytes  field
     0      2  d   f16, scale
     2      2  m   f16, what a code of zero stands for
     4     16  qs  4-bit codes, byte i: |7 6 5 4|3 2 1 0|
                                         w[i+16]   w[i]

w = d * q + m
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType

from ._bits import (
    blocks_of,
    entry_bytes,
    half_bits,
    half_to_f32,
    nonfinite_halves,
    pack_pairs,
    paired_blocks,
    per_row,
    rows_of,
    unpack_pairs,
)
from ._format import Format, Plane


class Q41Planes(NamedTuple):
    """5 bits a weight, as in the file."""

    codes: Any  # u8  [..., O, D/2]   in Q4_K's order
    d: Any  # u16 [..., D/32, O]  f16 bits
    m: Any  # u16 [..., D/32, O]  f16 bits


def split(rows: np.ndarray) -> Q41Planes:
    """u8[..., O, D/32 * 20] -> planes."""
    b = blocks_of(rows, 20)
    return Q41Planes(pack_pairs(b[..., 4:]), half_bits(b[..., 0:2]), half_bits(b[..., 2:4]))


def join(planes: Q41Planes) -> np.ndarray:
    """planes -> u8[..., O, D/32 * 20]."""
    return rows_of(entry_bytes(planes.d), entry_bytes(planes.m), paired_blocks(planes.codes))


def affine(codes: jax.Array, d: jax.Array, m: jax.Array) -> jax.Array:
    """``w = d * q + m``, f32[..., O, D/32, 32]; the product is exact, so the sum alone rounds."""
    return per_row(half_to_f32(d)) * codes.astype(jnp.float32) + per_row(half_to_f32(m))


def decode(planes: Q41Planes) -> jax.Array:
    """``w = d * q + m``, f32[..., O, D/32, 32]."""
    return affine(unpack_pairs(planes.codes), planes.d, planes.m)


Q4_1 = Format(
    name="q4_1",
    ggml_type=GGMLQuantizationType.Q4_1,
    block_weights=32,
    block_bytes=20,
    layout=Q41Planes(codes=Plane(np.uint8, 2, True), d=Plane(np.uint16, 32, False), m=Plane(np.uint16, 32, False)),
    split=split,
    join=join,
    decode=decode,
    count_nonfinite=lambda planes: nonfinite_halves(planes.d, planes.m),
)
