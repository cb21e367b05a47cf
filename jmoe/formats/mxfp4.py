"""MXFP4: 32 weights in 17 bytes, 4.25 bits a weight (ggml-common.h: block_mxfp4; OCP Microscaling v1.0).

offset  bytes  field
     0      1  e   E8M0 exponent: the block's scale is 2^(e - 127)
     1     16  qs  4-bit codes (E2M1: sign, two exponent bits, one mantissa bit), byte i: |7 6 5 4|3 2 1 0|
                                                                                          w[i+16]   w[i]

w = 2^(e - 128) * v(q),  v: twice the E2M1 value, so that all are integers: 0 1 2 3 4 6 8 12 and their negatives
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType
from jax import lax

from ._bits import blocks_of, column_plane, entry_bytes, pack_pairs, paired_blocks, per_row, rows_of, unpack_pairs
from ._format import Format, Plane


class MXFP4Planes(NamedTuple):
    """4.25 bits a weight, as in the file."""

    codes: Any  # u8 [..., O, D/2]   in Q4_K's order
    e: Any  # u8 [..., D/32, O]  exponents


def split(rows: np.ndarray) -> MXFP4Planes:
    """u8[..., O, D/32 * 17] -> planes."""
    b = blocks_of(rows, 17)
    return MXFP4Planes(pack_pairs(b[..., 1:]), column_plane(b[..., 0]))


def join(planes: MXFP4Planes) -> np.ndarray:
    """planes -> u8[..., O, D/32 * 17]."""
    return rows_of(entry_bytes(planes.e), paired_blocks(planes.codes))


def doubled_e2m1(codes: jax.Array) -> jax.Array:
    """u8 codes 0..15 -> s8 ``v``: 0 1 2 3 4 6 8 12, and negated where bit 3 is set."""
    m = (codes & 7).astype(jnp.int8)
    # The steps are 1, then 2, then 4: the greatest of three lines.
    v = jnp.maximum(m, jnp.maximum(2 * m - 4, 4 * m - 16))
    return jnp.where(codes >= 8, -v, v)


def power_of_two(exponent: jax.Array) -> jax.Array:
    """i32 exponent in [-126, 127] -> f32 ``2^exponent``, by its bits: exact, where ``exp2`` need not be."""
    return lax.bitcast_convert_type((exponent + 127).astype(jnp.uint32) << 23, jnp.float32)


def decode(planes: MXFP4Planes) -> jax.Array:
    """``w = 2^(e - 128) * v(q)``, f32[..., O, D/32, 32].

    2^(e - 128) itself is subnormal for e < 2, which XLA flushes to zero on the CPU: so the scale is applied as two
    normal powers of two, and only weights that are subnormal themselves are lost there.
    """
    v = doubled_e2m1(unpack_pairs(planes.codes)).astype(jnp.float32)
    e = planes.e.astype(jnp.int32)
    large, small = jnp.maximum(e, 64) - 128, jnp.minimum(e, 64) - 64
    return (v * per_row(power_of_two(large))) * per_row(power_of_two(small))


MXFP4 = Format(
    name="mxfp4",
    ggml_type=GGMLQuantizationType.MXFP4,
    block_weights=32,
    block_bytes=17,
    layout=MXFP4Planes(codes=Plane(np.uint8, 2, True), e=Plane(np.uint8, 32, False)),
    split=split,
    join=join,
    decode=decode,
    # 255 is E8M0's NaN; ggml reads it as 2^127, which no quantiser writes.
    count_nonfinite=lambda planes: int(np.count_nonzero(np.asarray(planes.e) == 255)),
)
