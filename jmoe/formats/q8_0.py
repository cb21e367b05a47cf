"""Q8_0: 32 weights in 34 bytes, 8.5 bits a weight (ggml-common.h: block_q8_0).

offset  bytes  field
     0      2  d   f16, scale
     2     32  qs  s8 codes, byte i is weight i

w = d * q
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType

from ._bits import blocks_of, entry_bytes, half_bits, half_to_f32, nonfinite_halves, per_row, row_bytes, rows_of
from ._format import Format, Plane


class Q80Planes(NamedTuple):
    """8.5 bits a weight, as in the file."""

    codes: Any  # s8  [..., O, D]     the file's own bytes
    d: Any  # u16 [..., D/32, O]  f16 bits


def split(rows: np.ndarray) -> Q80Planes:
    """u8[..., O, D/32 * 34] -> planes."""
    b = blocks_of(rows, 34)
    codes = np.ascontiguousarray(b[..., 2:]).view(np.int8).reshape(*b.shape[:-2], -1)
    return Q80Planes(codes, half_bits(b[..., 0:2]))


def join(planes: Q80Planes) -> np.ndarray:
    """planes -> u8[..., O, D/32 * 34]."""
    return rows_of(entry_bytes(planes.d), row_bytes(planes.codes, 32))


def decode(planes: Q80Planes) -> jax.Array:
    """``w = d * q``, f32[..., O, 1, D]; every value is exact."""
    scale = jnp.repeat(per_row(half_to_f32(planes.d)), 32, axis=-2)  # [..., O, D, 1]
    return jnp.swapaxes(scale, -1, -2) * planes.codes[..., None, :].astype(jnp.float32)


Q8_0 = Format(
    name="q8_0",
    ggml_type=GGMLQuantizationType.Q8_0,
    block_weights=32,
    block_bytes=34,
    layout=Q80Planes(codes=Plane(np.int8, 1, True), d=Plane(np.uint16, 32, False)),
    split=split,
    join=join,
    decode=decode,
    count_nonfinite=lambda planes: nonfinite_halves(planes.d),
)
