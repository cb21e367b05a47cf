"""Q5_K: 256 weights in 176 bytes, 5.5 bits a weight (ggml-common.h: block_q5_K).

offset  bytes  field
     0      2  d       f16, scale of the sub-blocks' scales
     2      2  dmin    f16, scale of the sub-blocks' mins
     4     12  scales  sc[8], m[8], 6 bits each (_k_scales.py)
    16     32  qh      the codes' fifth bits: bit s of byte j belongs to weight j of sub-block s
    48    128  qs      the codes' low four bits, as in Q4_K

w = d * sc * q - dmin * m,  q = low | high << 4
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from gguf import GGMLQuantizationType

from ._bits import blocks_of, entry_bytes, half_bits, nonfinite_halves, row_bytes, rows_of, unpack_eighths, unpack_pairs
from ._format import Format, Plane
from ._k_scales import affine, pack_k_scales, unpack_k_scales


class Q5KPlanes(NamedTuple):
    """5.625 bits a weight."""

    codes: Any  # u8  [..., O, D/2]    low four bits, the file's own bytes
    high: Any  # u8  [..., O, D/8]    fifth bits, the file's own bytes
    scales: Any  # u8  [..., D/32, O]   sc
    mins: Any  # u8  [..., D/32, O]   m
    d: Any  # u16 [..., D/256, O]  f16 bits
    dmin: Any  # u16 [..., D/256, O]  f16 bits


def split(rows: np.ndarray) -> Q5KPlanes:
    """u8[..., O, D/256 * 176] -> planes."""
    b = blocks_of(rows, 176)
    lead = b.shape[:-2]
    high = np.ascontiguousarray(b[..., 16:48]).reshape(*lead, -1)
    codes = np.ascontiguousarray(b[..., 48:]).reshape(*lead, -1)
    scales, mins = unpack_k_scales(b[..., 4:16])
    return Q5KPlanes(codes, high, scales, mins, half_bits(b[..., 0:2]), half_bits(b[..., 2:4]))


def join(planes: Q5KPlanes) -> np.ndarray:
    """planes -> u8[..., O, D/256 * 176]."""
    return rows_of(
        entry_bytes(planes.d),
        entry_bytes(planes.dmin),
        pack_k_scales(planes.scales, planes.mins),
        row_bytes(planes.high, 32),
        row_bytes(planes.codes, 128),
    )


def decode(planes: Q5KPlanes) -> jax.Array:
    """``w = d * sc * q - dmin * m``, f32[..., O, D/32, 32]."""
    codes = unpack_pairs(planes.codes) | unpack_eighths(planes.high) << 4
    return affine(codes, planes.scales, planes.mins, planes.d, planes.dmin)


Q5_K = Format(
    name="q5_k",
    ggml_type=GGMLQuantizationType.Q5_K,
    block_weights=256,
    block_bytes=176,
    layout=Q5KPlanes(
        codes=Plane(np.uint8, 2, True),
        high=Plane(np.uint8, 8, True),
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
