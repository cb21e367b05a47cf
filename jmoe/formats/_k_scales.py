"""The 6-bit scales and mins that Q4_K and Q5_K share.

12 bytes s hold sc[8] and m[8] of a super-block's eight sub-blocks (ggml-common.h, K_SCALE_SIZE):

    byte j      |7 6        |5 .. 0|      byte j + 4  |7 6        |5 .. 0|      byte j + 8  |7 .. 4      |3 .. 0      |
                 sc[j+4] 5-4 sc[j]                     m[j+4] 5-4  m[j]                      m[j+4] 3-0   sc[j+4] 3-0
    for j = 0..3
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ._bits import half_to_f32, per_row


def unpack_k_scales(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """u8[..., O, B, 12] -> (scales, mins), u8[..., 8 B, O] each, values 0..63."""
    *lead, rows, blocks, _ = packed.shape
    # Rows last first: the bit operations then run over contiguous bytes.
    s = np.ascontiguousarray(np.moveaxis(packed, -3, -1))  # [..., B, 12, O]
    low, mid, high = s[..., 0:4, :], s[..., 4:8, :], s[..., 8:12, :]
    scales = np.empty((*lead, blocks, 8, rows), np.uint8)
    mins = np.empty_like(scales)
    np.bitwise_and(low, 63, out=scales[..., :4, :])
    np.bitwise_and(mid, 63, out=mins[..., :4, :])
    np.bitwise_or(high & 15, (low >> 6) << 4, out=scales[..., 4:, :])
    np.bitwise_or(high >> 4, (mid >> 6) << 4, out=mins[..., 4:, :])
    return scales.reshape(*lead, blocks * 8, rows), mins.reshape(*lead, blocks * 8, rows)


def pack_k_scales(scales: np.ndarray, mins: np.ndarray) -> np.ndarray:
    """(scales, mins), u8[..., 8 B, O] each -> u8[..., O, B, 12]; undoes unpack_k_scales."""
    *lead, subs, rows = scales.shape
    sc, m = (plane.reshape(*lead, subs // 8, 8, rows) for plane in (scales, mins))
    packed = np.empty((*lead, subs // 8, 12, rows), np.uint8)
    np.bitwise_or(sc[..., :4, :], sc[..., 4:, :] >> 4 << 6, out=packed[..., 0:4, :])
    np.bitwise_or(m[..., :4, :], m[..., 4:, :] >> 4 << 6, out=packed[..., 4:8, :])
    np.bitwise_or(sc[..., 4:, :] & 15, m[..., 4:, :] << 4, out=packed[..., 8:12, :])
    return np.moveaxis(packed, -1, -3)


def affine(codes: jax.Array, scales: jax.Array, mins: jax.Array, d: jax.Array, dmin: jax.Array) -> jax.Array:
    """``w = (d * sc) * q - dmin * m``, f32[..., O, D/32, 32], of codes [..., O, D/32, 32].

    Both products are exact in f32, so the subtraction rounds once, in whatever order they are formed.
    """
    scale = jnp.repeat(half_to_f32(d), 8, axis=-2) * scales.astype(jnp.float32)
    low = jnp.repeat(half_to_f32(dmin), 8, axis=-2) * mins.astype(jnp.float32)
    return per_row(scale) * codes.astype(jnp.float32) - per_row(low)
