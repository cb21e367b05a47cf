"""Q6_K: 256 weights in 210 bytes, 6.5625 bits a weight (ggml-common.h: block_q6_K).

offset  bytes  field
     0    128  ql      the codes' low four bits; 64 bytes for each 128 weights,
                       byte j of 64: |7 6 5 4|3 2 1 0|   in the planes: Q4_K's order, (j, j + 32) of 64
                                      w[j+64]  w[j]
   128     64  qh      the codes' high two bits; 32 bytes for each 128 weights,
                       byte j of 32: |7 6|5 4|3 2|1 0|
                                     w[j+96] [j+64] [j+32] w[j]
   192     16  scales  sc[16], s8, one for 16 weights
   208      2  d       f16, scale of the scales

w = d * sc * (q - 32),  q = low | high << 4
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType

from ._bits import (
    blocks_of,
    by_sixteens,
    column_plane,
    entry_bytes,
    half_bits,
    half_to_f32,
    nonfinite_halves,
    row_bytes,
    rows_of,
    unpack_crumbs,
    unpack_pairs,
)
from ._format import Format, Plane


class Q6KPlanes(NamedTuple):
    """6.5625 bits a weight, as in the file."""

    codes: Any  # u8  [..., O, D/2]    low four bits, in Q4_K's order
    high: Any  # u8  [..., O, D/4]    high two bits, the file's own bytes
    scales: Any  # s8  [..., D/16, O]   sc
    d: Any  # u16 [..., D/256, O]  f16 bits


def split(rows: np.ndarray) -> Q6KPlanes:
    """u8[..., O, D/256 * 210] -> planes."""
    b = blocks_of(rows, 210)
    lead = b.shape[:-2]
    low = b[..., :128].reshape(*b.shape[:-1], 2, 2, 32)
    first, second = low[..., 0, :], low[..., 1, :]  # weights (0..31, 64..95) and (32..63, 96..127)
    codes = np.empty(low.shape, np.uint8)
    np.bitwise_or(first & 15, second << 4, out=codes[..., 0, :])
    np.bitwise_or(first >> 4, second & 240, out=codes[..., 1, :])
    high = np.ascontiguousarray(b[..., 128:192]).reshape(*lead, -1)
    scales = column_plane(b[..., 192:208].reshape(*lead, -1)).view(np.int8)
    return Q6KPlanes(codes.reshape(*lead, -1), high, scales, half_bits(b[..., 208:]))


def join(planes: Q6KPlanes) -> np.ndarray:
    """planes -> u8[..., O, D/256 * 210]."""
    pairs = row_bytes(planes.codes, 128).reshape(*planes.codes.shape[:-1], -1, 2, 2, 32)
    first, second = pairs[..., 0, :], pairs[..., 1, :]
    low = np.empty(pairs.shape, np.uint8)
    np.bitwise_or(first & 15, second << 4, out=low[..., 0, :])
    np.bitwise_or(first >> 4, second & 240, out=low[..., 1, :])
    scales = row_bytes(entry_bytes(planes.scales)[..., 0], 16)
    return rows_of(low.reshape(*low.shape[:-3], 128), row_bytes(planes.high, 64), scales, entry_bytes(planes.d))


def decode(planes: Q6KPlanes) -> jax.Array:
    """``w = d * sc * (q - 32)``, f32[..., O, D/32, 32]; every value is exact."""
    codes = (unpack_pairs(planes.codes) | unpack_crumbs(planes.high) << 4).astype(jnp.int8) - jnp.int8(32)
    scale = jnp.repeat(half_to_f32(planes.d), 16, axis=-2) * planes.scales.astype(jnp.float32)  # [..., D/16, O]
    return by_sixteens(scale) * codes.astype(jnp.float32)


Q6_K = Format(
    name="q6_k",
    ggml_type=GGMLQuantizationType.Q6_K,
    block_weights=256,
    block_bytes=210,
    layout=Q6KPlanes(
        codes=Plane(np.uint8, 2, True),
        high=Plane(np.uint8, 4, True),
        scales=Plane(np.int8, 16, False),
        d=Plane(np.uint16, 256, False),
    ),
    split=split,
    join=join,
    decode=decode,
    count_nonfinite=lambda planes: nonfinite_halves(planes.d),
)
