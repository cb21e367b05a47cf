"""Q3_K: 256 weights in 110 bytes, 3.4375 bits a weight (ggml-common.h: block_q3_K).

offset  bytes  field
     0     32  hmask   the codes' third bits: bit s of byte j belongs to weight j of 32-weight sub-block s
    32     64  qs      the codes' low two bits; 32 bytes for each 128 weights,
                       byte j of 32: |7 6|5 4|3 2|1 0|
                                     w[j+96] [j+64] [j+32] w[j]
    96     12  scales  sc[16] + 32, 6 bits each, one for 16 weights
   108      2  d       f16, scale of the scales

scales, byte j      |7 6 5 4    |3 2 1 0  |     for j = 0..7
                     sc[j+8] 3-0 sc[j] 3-0
        byte 8 + j  |7 6        |5 4        |3 2        |1 0      |     for j = 0..3
                     sc[j+12] 5-4 sc[j+8] 5-4 sc[j+4] 5-4 sc[j] 5-4

w = d * sc * (q - 4),  q = low | high << 2
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
    entry_bytes,
    half_bits,
    half_to_f32,
    nonfinite_halves,
    row_bytes,
    rows_of,
    unpack_crumbs,
    unpack_eighths,
)
from ._format import Format, Plane


class Q3KPlanes(NamedTuple):
    """3.5625 bits a weight: the 6-bit scales take a byte each."""

    codes: Any  # u8  [..., O, D/4]    low two bits, the file's own bytes
    high: Any  # u8  [..., O, D/8]    third bits, the file's own bytes
    scales: Any  # s8  [..., D/16, O]   sc, -32..31
    d: Any  # u16 [..., D/256, O]  f16 bits


def split(rows: np.ndarray) -> Q3KPlanes:
    """u8[..., O, D/256 * 110] -> planes."""
    b = blocks_of(rows, 110)
    lead = b.shape[:-2]
    high = np.ascontiguousarray(b[..., 0:32]).reshape(*lead, -1)
    codes = np.ascontiguousarray(b[..., 32:96]).reshape(*lead, -1)
    return Q3KPlanes(codes, high, unpack_scales(b[..., 96:108]), half_bits(b[..., 108:]))


def join(planes: Q3KPlanes) -> np.ndarray:
    """planes -> u8[..., O, D/256 * 110]."""
    fields = row_bytes(planes.high, 32), row_bytes(planes.codes, 64), pack_scales(planes.scales)
    return rows_of(*fields, entry_bytes(planes.d))


def unpack_scales(packed: np.ndarray) -> np.ndarray:
    """u8[..., O, B, 12] -> s8[..., 16 B, O]."""
    *lead, rows, blocks, _ = packed.shape
    # Rows last first: the bit operations then run over contiguous bytes.
    s = np.ascontiguousarray(np.moveaxis(packed, -3, -1))  # [..., B, 12, O]
    low, high = s[..., 0:8, :], s[..., 8:12, :]
    scales = np.empty((*lead, blocks, 4, 4, rows), np.uint8)
    np.bitwise_and(low, 15, out=scales[..., 0:2, :, :].reshape(low.shape))
    np.right_shift(low, 4, out=scales[..., 2:4, :, :].reshape(low.shape))
    for four in range(4):
        scales[..., four, :, :] |= (high >> 2 * four & 3) << 4
    return (scales.view(np.int8) - np.int8(32)).reshape(*lead, blocks * 16, rows)


def pack_scales(scales: np.ndarray) -> np.ndarray:
    """s8[..., 16 B, O] -> u8[..., O, B, 12]; undoes unpack_scales."""
    *lead, subs, rows = scales.shape
    sc = (scales + np.int8(32)).view(np.uint8).reshape(*lead, subs // 16, 4, 4, rows)
    packed = np.zeros((*lead, subs // 16, 12, rows), np.uint8)
    low = sc & 15
    np.bitwise_or(
        low[..., 0:2, :, :], low[..., 2:4, :, :] << 4, out=packed[..., 0:8, :].reshape(*low.shape[:-3], 2, 4, rows)
    )
    for four in range(4):
        packed[..., 8:12, :] |= sc[..., four, :, :] >> 4 << 2 * four
    return np.moveaxis(packed, -1, -3)


def decode(planes: Q3KPlanes) -> jax.Array:
    """``w = d * sc * (q - 4)``, f32[..., O, D/32, 32]; every value is exact."""
    codes = (unpack_crumbs(planes.codes) | unpack_eighths(planes.high) << 2).astype(jnp.int8) - jnp.int8(4)
    scale = jnp.repeat(half_to_f32(planes.d), 16, axis=-2) * planes.scales.astype(jnp.float32)  # [..., D/16, O]
    return by_sixteens(scale) * codes.astype(jnp.float32)


Q3_K = Format(
    name="q3_k",
    ggml_type=GGMLQuantizationType.Q3_K,
    block_weights=256,
    block_bytes=110,
    layout=Q3KPlanes(
        codes=Plane(np.uint8, 4, True),
        high=Plane(np.uint8, 8, True),
        scales=Plane(np.int8, 16, False),
        d=Plane(np.uint16, 256, False),
    ),
    split=split,
    join=join,
    decode=decode,
    count_nonfinite=lambda planes: nonfinite_halves(planes.d),
)
