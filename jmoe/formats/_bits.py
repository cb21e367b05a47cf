"""Bit handling shared by the formats. NumPy between blocks and planes, jnp where planes are read."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def blocks_of(rows: np.ndarray, block_bytes: int) -> np.ndarray:
    """u8[..., O, row bytes] -> u8[..., O, B, block_bytes], B the blocks of a row."""
    if rows.dtype != np.uint8 or rows.ndim < 2 or rows.shape[-1] % block_bytes:
        raise ValueError(
            f"split wants u8[..., O, n * {block_bytes}] as the file holds it, got {rows.dtype}{list(rows.shape)}"
        )
    return rows.reshape(*rows.shape[:-1], rows.shape[-1] // block_bytes, block_bytes)


def rows_of(*fields: np.ndarray) -> np.ndarray:
    """The fields of a block in the file's order, u8[..., O, B, n] each -> u8[..., O, row bytes]; undoes blocks_of."""
    blocks = np.concatenate(fields, axis=-1)
    return blocks.reshape(*blocks.shape[:-2], -1)


def column_plane(values: np.ndarray) -> np.ndarray:
    """[..., O, N] -> contiguous [..., N, O]: a kernel reads one entry of many rows at once."""
    return np.ascontiguousarray(np.swapaxes(values, -1, -2))


def half_bits(pairs: np.ndarray) -> np.ndarray:
    """u8[..., O, B, 2] little-endian f16 -> its bits, u16[..., B, O]."""
    return column_plane(np.ascontiguousarray(pairs).view("<u2").astype(np.uint16, copy=False)[..., 0])


def column_words(quads: np.ndarray) -> np.ndarray:
    """u8[..., O, B, 4] little-endian words -> u32[..., B, O]."""
    return column_plane(np.ascontiguousarray(quads).view("<u4").astype(np.uint32, copy=False)[..., 0])


def entry_bytes(plane: np.ndarray) -> np.ndarray:
    """A column plane [..., B, O] -> the entries' little-endian bytes, u8[..., O, B, n]."""
    entries = np.ascontiguousarray(np.swapaxes(plane, -1, -2))[..., None]
    return entries.astype(entries.dtype.newbyteorder("<"), copy=False).view(np.uint8)


def row_bytes(plane: np.ndarray, width: int) -> np.ndarray:
    """A row plane of bytes [..., O, B * width] -> u8[..., O, B, width]."""
    return plane.view(np.uint8).reshape(*plane.shape[:-1], -1, width)


def pack_pairs(blocks: np.ndarray) -> np.ndarray:
    """u8[..., O, B, 16] of 32-weight blocks (weight i low, i + 16 high) -> u8[..., O, 16 B] in Q4_K's order.

    Two neighbouring blocks become 32 bytes: byte j holds weight j of the first (low) and of the second (high).
    An odd last block has no partner and keeps the file's order.
    """
    *lead, count, _ = blocks.shape
    out = np.empty((*lead, count, 16), np.uint8)
    even = count - count % 2
    first, second = blocks[..., 0:even:2, :], blocks[..., 1:even:2, :]
    pairs = out[..., :even, :].reshape(*lead, even // 2, 2, 16)
    np.bitwise_or(first & 15, second << 4, out=pairs[..., 0, :])
    np.bitwise_or(first >> 4, second & 240, out=pairs[..., 1, :])
    out[..., :even, :] = pairs.reshape(*lead, even, 16)
    out[..., even:, :] = blocks[..., even:, :]
    return out.reshape(*lead, count * 16)


def paired_blocks(codes: np.ndarray) -> np.ndarray:
    """u8[..., O, 16 B] in Q4_K's order -> u8[..., O, B, 16] as in the file; undoes pack_pairs."""
    *lead, nbytes = codes.shape
    count = nbytes // 16
    even = count - count % 2
    out = codes.reshape(*lead, count, 16).copy()
    pairs = codes[..., : even * 16].reshape(*lead, even // 2, 2, 16)
    first, second = pairs[..., 0, :], pairs[..., 1, :]
    np.bitwise_or(first & 15, second << 4, out=out[..., 0:even:2, :])
    np.bitwise_or(first >> 4, second & 240, out=out[..., 1:even:2, :])
    return out


def unpack_pairs(codes: jax.Array) -> jax.Array:
    """u8[..., O, D/2] in Q4_K's order -> u8[..., O, D/32, 32]: the 4-bit codes, one row per sub-block.

    Each 32 bytes hold 64 weights, j in the low nibble and j + 32 in the high one; an odd last sub-block is
    16 bytes of (i, i + 16).
    """
    *lead, nbytes = codes.shape
    even = nbytes - nbytes % 32

    def unpack(part: jax.Array, width: int) -> jax.Array:
        # A shift by 0 or 4, not a concatenation of the two halves: XLA turns that into a branch a weight.
        pairs = part.reshape(*lead, part.shape[-1] // width, 1, width)
        return ((pairs >> ramp(pairs, -2, 2, step=4)) & 15).reshape(*lead, part.shape[-1] // 16, 32)

    if even == nbytes:
        return unpack(codes, 32)
    return jnp.concatenate([unpack(codes[..., :even], 32), unpack(codes[..., even:], 16)], axis=-2)


def unpack_crumbs(codes: jax.Array) -> jax.Array:
    """u8[..., O, D/4] -> u8[..., O, D/32, 32]: 2-bit codes, of which bits 2s of byte j of 32 are weight j + 32 s's."""
    return _unpack_bits(codes, 2)


def unpack_eighths(bits: jax.Array) -> jax.Array:
    """u8[..., O, D/8] -> u8[..., O, D/32, 32]: single bits, of which bit s of byte j of 32 is weight j + 32 s's."""
    return _unpack_bits(bits, 1)


def _unpack_bits(plane: jax.Array, width: int) -> jax.Array:
    *lead, nbytes = plane.shape
    groups = plane.reshape(*lead, nbytes // 32, 1, 32)
    each = (groups >> ramp(groups, -2, 8 // width, step=width)) & (2**width - 1)
    return each.reshape(*lead, nbytes // (4 * width), 32)


def per_row(plane: jax.Array) -> jax.Array:
    """[..., N, O] -> [..., O, N, 1]: a column plane as a factor of codes [..., O, N, weights]."""
    return jnp.swapaxes(plane, -1, -2)[..., None]


def by_sixteens(plane: jax.Array) -> jax.Array:
    """[..., D/16, O] -> [..., O, D/32, 32]: a column plane of what 16 weights share as a factor of codes."""
    pairs = per_row(plane)
    return jnp.repeat(pairs.reshape(*pairs.shape[:-2], pairs.shape[-2] // 2, 2), 16, axis=-1)


def ramp(like: jax.Array, axis: int, length: int, step: int = 1) -> jax.Array:
    """``0, step, 2 step, ...`` along ``axis`` (counted from the end), in ``like``'s dtype and rank: shifts for it."""
    shape = [1] * like.ndim
    shape[axis] = length
    return lax.broadcasted_iota(like.dtype, shape, like.ndim + axis) * jnp.asarray(step, like.dtype)


def half_to_f32(bits: jax.Array) -> jax.Array:
    """u16 f16 bits -> f32, exact (a subnormal f16 is a normal f32)."""
    return lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)


def nonfinite_halves(*planes: np.ndarray) -> int:
    """How many f16 bit patterns are NaN or infinite."""
    return sum(int(np.count_nonzero((np.asarray(p) & 0x7C00) == 0x7C00)) for p in planes)
