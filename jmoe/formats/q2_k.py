"""Q2_K: 256 weights in 84 bytes, 2.625 bits a weight (ggml-common.h: block_q2_K).

offset  bytes  field
     0     16  scales  one byte for 16 weights:  |7 6 5 4|3 2 1 0|
                                                     m       sc
    16     64  qs      2-bit codes; 32 bytes for each 128 weights,
                       byte j of 32: |7 6|5 4|3 2|1 0|
                                     w[j+96] [j+64] [j+32] w[j]
    80      2  d       f16, scale of the scales
    82      2  dmin    f16, scale of the mins

w = d * sc * q - dmin * m
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
)
from ._format import Format, Plane


class Q2KPlanes(NamedTuple):
    """2.625 bits a weight, as in the file."""

    codes: Any  # u8  [..., O, D/4]    the file's own bytes
    scales: Any  # u8  [..., D/16, O]   sc low, m high, as in the file
    d: Any  # u16 [..., D/256, O]  f16 bits
    dmin: Any  # u16 [..., D/256, O]  f16 bits


def split(rows: np.ndarray) -> Q2KPlanes:
    """u8[..., O, D/256 * 84] -> planes."""
    b = blocks_of(rows, 84)
    lead = b.shape[:-2]
    codes = np.ascontiguousarray(b[..., 16:80]).reshape(*lead, -1)
    scales = column_plane(b[..., 0:16].reshape(*lead, -1))
    return Q2KPlanes(codes, scales, half_bits(b[..., 80:82]), half_bits(b[..., 82:84]))


def join(planes: Q2KPlanes) -> np.ndarray:
    """planes -> u8[..., O, D/256 * 84]."""
    scales = row_bytes(entry_bytes(planes.scales)[..., 0], 16)
    return rows_of(scales, row_bytes(planes.codes, 64), entry_bytes(planes.d), entry_bytes(planes.dmin))


def decode(planes: Q2KPlanes) -> jax.Array:
    """``w = d * sc * q - dmin * m``, f32[..., O, D/32, 32]; both products are exact, so the difference alone rounds."""
    scale = jnp.repeat(half_to_f32(planes.d), 16, axis=-2) * (planes.scales & 15).astype(jnp.float32)
    low = jnp.repeat(half_to_f32(planes.dmin), 16, axis=-2) * (planes.scales >> 4).astype(jnp.float32)
    return by_sixteens(scale) * unpack_crumbs(planes.codes).astype(jnp.float32) - by_sixteens(low)


Q2_K = Format(
    name="q2_k",
    ggml_type=GGMLQuantizationType.Q2_K,
    block_weights=256,
    block_bytes=84,
    layout=Q2KPlanes(
        codes=Plane(np.uint8, 4, True),
        scales=Plane(np.uint8, 16, False),
        d=Plane(np.uint16, 256, False),
        dmin=Plane(np.uint16, 256, False),
    ),
    split=split,
    join=join,
    decode=decode,
    count_nonfinite=lambda planes: nonfinite_halves(planes.d, planes.dmin),
)
