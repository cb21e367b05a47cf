"""IQ4_NL: 32 weights in 18 bytes, 4.5 bits a weight (ggml-common.h: block_iq4_nl, kvalues_iq4nl).

offset  bytes  field
     0      2  d   f16, scale
     2     16  qs  4-bit codes, byte i: |7 6 5 4|3 2 1 0|
                                         w[i+16]   w[i]

w = d * v(q),  v: -127 -104 -83 -65 -49 -35 -22 -10 1 13 25 38 53 69 89 113
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

VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


class IQ4NLPlanes(NamedTuple):
    """4.5 bits a weight, as in the file."""

    codes: Any  # u8  [..., O, D/2]   in Q4_K's order
    d: Any  # u16 [..., D/32, O]  f16 bits


def split(rows: np.ndarray) -> IQ4NLPlanes:
    """u8[..., O, D/32 * 18] -> planes."""
    b = blocks_of(rows, 18)
    return IQ4NLPlanes(pack_pairs(b[..., 2:]), half_bits(b[..., 0:2]))


def join(planes: IQ4NLPlanes) -> np.ndarray:
    """planes -> u8[..., O, D/32 * 18]."""
    return rows_of(entry_bytes(planes.d), paired_blocks(planes.codes))


def values_of(codes: jax.Array) -> jax.Array:
    """u8 codes 0..15 -> f32 ``v``."""
    # By halves, bit after bit: XLA vectorises selections, and no look-ups.
    found = [jnp.int8(value) for value in VALUES]
    for bit in range(4):
        odd = (codes >> bit & 1) != 0
        found = [jnp.where(odd, b, a) for a, b in zip(found[::2], found[1::2], strict=True)]
    return found[0].astype(jnp.float32)


def decode(planes: IQ4NLPlanes) -> jax.Array:
    """``w = d * v(q)``, f32[..., O, D/32, 32]; every value is exact."""
    return per_row(half_to_f32(planes.d)) * values_of(unpack_pairs(planes.codes))


IQ4_NL = Format(
    name="iq4_nl",
    ggml_type=GGMLQuantizationType.IQ4_NL,
    block_weights=32,
    block_bytes=18,
    layout=IQ4NLPlanes(codes=Plane(np.uint8, 2, True), d=Plane(np.uint16, 32, False)),
    split=split,
    join=join,
    decode=decode,
    count_nonfinite=lambda planes: nonfinite_halves(planes.d),
)
