"""Q5_1: 32 weights in 24 bytes, 6 bits a weight (ggml-common.h: block_q5_1).

offset  bytes  field
     0      2  d   f16, scale
     2      2  m   f16, what a code of zero stands for
     4      4  qh  the codes' fifth bits, a little-endian word: bit i belongs to weight i
     8     16  qs  the codes' low four bits, byte i: |7 6 5 4|3 2 1 0|
                                                     w[i+16]   w[i]

w = d * q + m,  q = low | high << 4
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from gguf import GGMLQuantizationType

from ._bits import (
    blocks_of,
    column_words,
    entry_bytes,
    half_bits,
    nonfinite_halves,
    pack_pairs,
    paired_blocks,
    rows_of,
    unpack_pairs,
)
from ._format import Format, Plane
from .q4_1 import affine
from .q5_0 import high_bits


class Q51Planes(NamedTuple):
    """6 bits a weight, as in the file."""

    codes: Any  # u8  [..., O, D/2]    low four bits, in Q4_K's order
    high: Any  # u32 [..., D/32, O]   fifth bits, as Q5_0 has them
    d: Any  # u16 [..., D/32, O]   f16 bits
    m: Any  # u16 [..., D/32, O]   f16 bits


def split(rows: np.ndarray) -> Q51Planes:
    """u8[..., O, D/32 * 24] -> planes."""
    b = blocks_of(rows, 24)
    return Q51Planes(pack_pairs(b[..., 8:]), column_words(b[..., 4:8]), half_bits(b[..., 0:2]), half_bits(b[..., 2:4]))


def join(planes: Q51Planes) -> np.ndarray:
    """planes -> u8[..., O, D/32 * 24]."""
    columns = (entry_bytes(plane) for plane in (planes.d, planes.m, planes.high))
    return rows_of(*columns, paired_blocks(planes.codes))


def decode(planes: Q51Planes) -> jax.Array:
    """``w = d * q + m``, f32[..., O, D/32, 32]."""
    return affine(unpack_pairs(planes.codes) | high_bits(planes.high), planes.d, planes.m)


Q5_1 = Format(
    name="q5_1",
    ggml_type=GGMLQuantizationType.Q5_1,
    block_weights=32,
    block_bytes=24,
    layout=Q51Planes(
        codes=Plane(np.uint8, 2, True),
        high=Plane(np.uint32, 32, False),
        d=Plane(np.uint16, 32, False),
        m=Plane(np.uint16, 32, False),
    ),
    split=split,
    join=join,
    decode=decode,
    count_nonfinite=lambda planes: nonfinite_halves(planes.d, planes.m),
)
