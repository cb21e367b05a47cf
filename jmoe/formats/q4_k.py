"""Q4_K: 256 weights in 144 bytes, 4.5 bits a weight (ggml-common.h: block_q4_K).

offset  bytes  field
     0      2  d       f16, scale of the sub-blocks' scales
     2      2  dmin    f16, scale of the sub-blocks' mins
     4     12  scales  sc[8], m[8], 6 bits each (_k_scales.py)
    16    128  qs      4-bit codes

qs, 32 bytes for each 64 weights:   byte j  |7 6 5 4|3 2 1 0|
                                             w[j+32]  w[j]
w = d * sc * q - dmin * m
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from gguf import GGMLQuantizationType

from ._bits import blocks_of, entry_bytes, half_bits, nonfinite_halves, row_bytes, rows_of, unpack_pairs
from ._format import Format, Plane
from ._k_scales import affine, pack_k_scales, unpack_k_scales


class Q4KPlanes(NamedTuple):
    """4.625 bits a weight: the 6-bit scales and mins take a byte each."""

    codes: Any  # u8  [..., O, D/2]    the file's own bytes
    scales: Any  # u8  [..., D/32, O]   sc
    mins: Any  # u8  [..., D/32, O]   m
    d: Any  # u16 [..., D/256, O]  f16 bits
    dmin: Any  # u16 [..., D/256, O]  f16 bits


def split(rows: np.ndarray) -> Q4KPlanes:
    """u8[..., O, D/256 * 144] -> planes."""
    b = blocks_of(rows, 144)
    codes = np.ascontiguousarray(b[..., 16:]).reshape(*b.shape[:-2], -1)
    scales, mins = unpack_k_scales(b[..., 4:16])
    return Q4KPlanes(codes, scales, mins, half_bits(b[..., 0:2]), half_bits(b[..., 2:4]))


def join(planes: Q4KPlanes) -> np.ndarray:
    """planes -> u8[..., O, D/256 * 144]."""
    return rows_of(
        entry_bytes(planes.d),
        entry_bytes(planes.dmin),
        pack_k_scales(planes.scales, planes.mins),
        row_bytes(planes.codes, 128),
    )


def decode(planes: Q4KPlanes) -> jax.Array:
    """``w = d * sc * q - dmin * m``, f32[..., O, D/32, 32]."""
    return affine(unpack_pairs(planes.codes), planes.scales, planes.mins, planes.d, planes.dmin)


Q4_K = Format(
    name="q4_k",
    ggml_type=GGMLQuantizationType.Q4_K,
    block_weights=256,
    block_bytes=144,
    layout=Q4KPlanes(
        codes=Plane(np.uint8, 2, True),
        scales=Plane(np.uint8, 32, False),
        mins=Plane(np.uint8, 32, False),
        d=Plane(np.uint16, 256, False),
        dmin=Plane(np.uint16, 256, False),
    ),
    split=split,
    join=join,
    decode=decode,
    count_nonfinite=lambda planes: nonfinite_halves(planes.d, planes.dmin),
)
