"""Q5_0: 32 weights in 22 bytes, 5.5 bits a weight (ggml-common.h: block_q5_0).

offset  bytes  field
     0      2  d   f16, scale
     2      4  qh  the codes' fifth bits, a little-endian word: bit i belongs to weight i
     6     16  qs  the codes' low four bits, byte i: |7 6 5 4|3 2 1 0|
                                                     w[i+16]   w[i]

w = d * (q - 16),  q = low | high << 4
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType

from ._bits import (
    blocks_of,
    column_words,
    entry_bytes,
    half_bits,
    half_to_f32,
    nonfinite_halves,
    pack_pairs,
    paired_blocks,
    per_row,
    ramp,
    rows_of,
    unpack_pairs,
)
from ._format import Format, Plane


class Q50Planes(NamedTuple):
    """5.5 bits a weight, as in the file."""

    codes: Any  # u8  [..., O, D/2]    low four bits, in Q4_K's order
    high: Any  # u32 [..., D/32, O]   fifth bits: bit i is weight i's. A row of bytes (D/8) would be no
    #               multiple of 16 bytes at D = 704 or 1856, which the copy engine refuses
    d: Any  # u16 [..., D/32, O]   f16 bits


def split(rows: np.ndarray) -> Q50Planes:
    """u8[..., O, D/32 * 22] -> planes."""
    b = blocks_of(rows, 22)
    return Q50Planes(pack_pairs(b[..., 6:]), column_words(b[..., 2:6]), half_bits(b[..., 0:2]))


def join(planes: Q50Planes) -> np.ndarray:
    """planes -> u8[..., O, D/32 * 22]."""
    return rows_of(entry_bytes(planes.d), entry_bytes(planes.high), paired_blocks(planes.codes))


def high_bits(high: jax.Array) -> jax.Array:
    """u32[..., D/32, O] -> u8[..., O, D/32, 32], each 0 or 16."""
    words = per_row(high)
    return ((words >> ramp(words, -1, 32)) & 1).astype(jnp.uint8) << 4


def decode(planes: Q50Planes) -> jax.Array:
    """``w = d * (q - 16)``, f32[..., O, D/32, 32]; every value is exact."""
    codes = (unpack_pairs(planes.codes) | high_bits(planes.high)).astype(jnp.int8) - jnp.int8(16)
    return per_row(half_to_f32(planes.d)) * codes.astype(jnp.float32)


Q5_0 = Format(
    name="q5_0",
    ggml_type=GGMLQuantizationType.Q5_0,
    block_weights=32,
    block_bytes=22,
    layout=Q50Planes(
        codes=Plane(np.uint8, 2, True),
        high=Plane(np.uint32, 32, False),
        d=Plane(np.uint16, 32, False),
    ),
    split=split,
    join=join,
    decode=decode,
    count_nonfinite=lambda planes: nonfinite_halves(planes.d),
)
