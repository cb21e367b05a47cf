"""Q4_0: 32 weights in 18 bytes, 4.5 bits a weight (ggml-common.h: block_q4_0).

offset  bytes  field
     0      2  d   f16, scale
     2     16  qs  4-bit codes, byte i: |7 6 5 4|3 2 1 0|
                                        w[i+16]   w[i]

w = d * (q - 8)
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


class Q40Planes(NamedTuple):
    """4.5 bits a weight, as in the file."""

    codes: Any  # u8  [..., O, D/2]   in Q4_K's order
    d: Any  # u16 [..., D/32, O]  f16 bits


def split(rows: np.ndarray) -> Q40Planes:
    """u8[..., O, D/32 * 18] -> planes."""
    b = blocks_of(rows, 18)
    return Q40Planes(pack_pairs(b[..., 2:]), half_bits(b[..., 0:2]))


def join(planes: Q40Planes) -> np.ndarray:
    """planes -> u8[..., O, D/32 * 18]."""
    return rows_of(entry_bytes(planes.d), paired_blocks(planes.codes))


def decode(planes: Q40Planes) -> jax.Array:
    """``w = d * (q - 8)``, f32[..., O, D/32, 32]; every value is exact."""
    codes = unpack_pairs(planes.codes).astype(jnp.int8) - jnp.int8(8)
    return per_row(half_to_f32(planes.d)) * codes.astype(jnp.float32)


Q4_0 = Format(
    name="q4_0",
    ggml_type=GGMLQuantizationType.Q4_0,
    block_weights=32,
    block_bytes=18,
    layout=Q40Planes(codes=Plane(np.uint8, 2, True), d=Plane(np.uint16, 32, False)),
    split=split,
    join=join,
    decode=decode,
    count_nonfinite=lambda planes: nonfinite_halves(planes.d),
)
