"""IQ4_XS: 256 weights in 136 bytes, 4.25 bits a weight (ggml-common.h: block_iq4_xs).

offset  bytes  field
     0      2  d         f16, scale of the sub-blocks' scales
     2      2  scales_h  sc[8] + 32, the high two bits, a little-endian halfword: bits 2s, 2s + 1 are sub-block s's
     4      4  scales_l  and the low four, byte j: |7 6 5 4 |3 2 1 0|
                                                    sc[2j+1]  sc[2j]
     8    128  qs        4-bit codes, 16 bytes for each 32 weights, byte i of 16: |7 6 5 4|3 2 1 0|
                                                                                   w[i+16]   w[i]

w = d * sc * v(q),  v: IQ4_NL's sixteen values
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType

from ._bits import (
    blocks_of,
    column_plane,
    entry_bytes,
    half_bits,
    half_to_f32,
    nonfinite_halves,
    pack_pairs,
    paired_blocks,
    per_row,
    row_bytes,
    rows_of,
    unpack_pairs,
)
from ._format import Format, Plane
from .iq4_nl import values_of


class IQ4XSPlanes(NamedTuple):
    """4.3125 bits a weight: the 6-bit scales take a byte each."""

    codes: Any  # u8  [..., O, D/2]    in Q4_K's order
    scales: Any  # s8  [..., D/32, O]   sc, -32..31
    d: Any  # u16 [..., D/256, O]  f16 bits


def split(rows: np.ndarray) -> IQ4XSPlanes:
    """u8[..., O, D/256 * 136] -> planes."""
    b = blocks_of(rows, 136)
    *lead, blocks, _ = b.shape
    sc = np.empty((*lead, blocks, 8), np.uint8)
    np.bitwise_and(b[..., 4:8], 15, out=sc[..., 0::2])
    np.right_shift(b[..., 4:8], 4, out=sc[..., 1::2])
    # A byte of scales_h has the bits of four sub-blocks.
    for four in range(4):
        sc[..., four::4] |= (b[..., 2:4] >> 2 * four & 3) << 4
    scales = column_plane((sc.view(np.int8) - np.int8(32)).reshape(*lead, blocks * 8))
    return IQ4XSPlanes(pack_pairs(b[..., 8:].reshape(*lead, blocks * 8, 16)), scales, half_bits(b[..., 0:2]))


def join(planes: IQ4XSPlanes) -> np.ndarray:
    """planes -> u8[..., O, D/256 * 136]."""
    sc = row_bytes(entry_bytes(planes.scales + np.int8(32))[..., 0], 8)
    low = sc[..., 0::2] & 15 | sc[..., 1::2] << 4
    high = np.zeros((*sc.shape[:-1], 2), np.uint8)
    for four in range(4):
        high |= sc[..., four::4] >> 4 << 2 * four
    return rows_of(
        entry_bytes(planes.d), high, low, row_bytes(paired_blocks(planes.codes).reshape(*sc.shape[:-2], -1), 128)
    )


def decode(planes: IQ4XSPlanes) -> jax.Array:
    """``w = d * sc * v(q)``, f32[..., O, D/32, 32]; every value is exact."""
    scale = jnp.repeat(half_to_f32(planes.d), 8, axis=-2) * planes.scales.astype(jnp.float32)
    return per_row(scale) * values_of(unpack_pairs(planes.codes))


IQ4_XS = Format(
    name="iq4_xs",
    ggml_type=GGMLQuantizationType.IQ4_XS,
    block_weights=256,
    block_bytes=136,
    layout=IQ4XSPlanes(
        codes=Plane(np.uint8, 2, True),
        scales=Plane(np.int8, 32, False),
        d=Plane(np.uint16, 256, False),
    ),
    split=split,
    join=join,
    decode=decode,
    count_nonfinite=lambda planes: nonfinite_halves(planes.d),
)
