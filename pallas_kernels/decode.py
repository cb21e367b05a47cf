"""A tile of packed weights in registers: integer codes as exact bf16, and their scales; TILE_FORMATS has every format.

Every format is read as ``w = s * (a - bias) - z``: ``a`` is what the tensor core multiplies (the code plus a bias that
makes it a bf16 by one bitwise or), ``s`` and ``z`` belong to a sub-block b and a row o. With
X[b, n] = -bias * sum_{d in b} x[d, n]

    y[o, n] = sum_b s[o, b] * (X[b, n] + sum_{d in b} a[o, d] x[d, n]) + (z[o, b] / bias) * X[b, n]

has no rounded weight in it: a and x are exact in bf16, sums and scales are f32, and X enters as the accumulator's
first value.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._compat import arith, ir, mosaic_utils, plgpu
from .registers import (
    LHS,
    LHS_BYTES,
    ROW,
    as_bf16,
    both_halves,
    byte_pairs,
    field,
    fragmented,
    i32,
    index,
    lane_in_warp,
    load_rows,
    words_of,
)

CHUNK = 256  # weights of a row that a tile spans: a K-quant's super-block


class Plane(NamedTuple):
    """``per`` weights share an entry; a row plane is [E, O, D / per], a column plane [E, D / per, O]."""

    dtype: Any
    per: int
    by_row: bool


class SubBlock(NamedTuple):
    operands: tuple[jax.Array, ...]  # bf16[64, weights], to be multiplied by the same x and added
    scale: jax.Array  # f32[64]
    offset: jax.Array | None  # f32[64], z / bias


class TileFormat(NamedTuple):
    """``decode(planes) -> [SubBlock]`` of a tile of 64 rows and CHUNK weights; the planes are SMEM refs, row planes
    [64, CHUNK / per] and column planes [J, CHUNK / per, 64 / J]."""

    planes: tuple[Plane, ...]
    weights: int  # of a sub-block
    bias: float
    decode: Any


def codes_4bit(codes, high=None, width: int = 0) -> jax.Array:
    """u8[64, 128] in Q4_K's order -> bf16[64, 256] of 128 + code, in the order of the weights.

    ``high`` adds bits above the four: u8[64, 32], bit s of byte j for weight j of sub-block s (``width`` 1), or
    u8[64, 64], bits 2s of byte j of each 32 for weight j + 32 s of 128 (``width`` 2).
    """
    arrays = (codes,) if high is None else (codes, high)
    shape = (64, 2 * codes.shape[1])

    @plgpu.inline_mgpu(
        arg_types=(LHS_BYTES,) * len(arrays), return_type=plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=LHS)
    )
    def unpack(_, codes, high=None):
        words = words_of(codes)
        high_pairs = [[byte_pairs(w) for w in row] for row in words_of(high)] if high is not None else []
        out = np.empty((shape[1] // 16, 2, 2), object)  # sixteen weights, pair, row half
        for sixteen, row_half, pair, nibble in np.ndindex(len(words), 2, 2, 2):
            chunk, step = divmod(sixteen, 2)  # 32 bytes hold 64 weights: the low nibbles' sub-block, the high ones'
            sub_block = 2 * chunk + nibble
            value = field(byte_pairs(words[sixteen][row_half])[pair], 4 * nibble, 0xF, both_halves(0x4300))
            if width == 1:
                value = field(high_pairs[step][row_half][pair], sub_block - 4, 0x10, value)
            elif width == 2:
                bits = high_pairs[2 * (sub_block // 4) + step][row_half][pair]
                value = field(bits, 2 * (sub_block % 4) - 4, 0x30, value)
            out[2 * sub_block + step, pair, row_half] = as_bf16(value)
        return fragmented(list(out.flatten()), LHS, shape, jnp.bfloat16)

    return unpack(*arrays)


def codes_5bit_words(codes, high: list[jax.Array]) -> jax.Array:
    """As :func:`codes_4bit`, the fifth bits in a word a row and sub-block (u32[64] each): bit i is weight i's."""
    shape = (64, 2 * codes.shape[1])

    @plgpu.inline_mgpu(
        arg_types=(LHS_BYTES, *(ROW for _ in high)),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=LHS),
    )
    def unpack(_, codes, *high):
        i32_type = ir.IntegerType.get_signless(32)
        words = words_of(codes)
        shift = arith.index_cast(i32_type, arith.muli(arith.remui(lane_in_warp(), index(4)), index(4)))
        mine = [
            [arith.shrui(mosaic_utils.bitcast(r, i32_type), shift) for r in array.registers.flatten()] for array in high
        ]
        out = np.empty((shape[1] // 16, 2, 2), object)
        for sixteen, row_half, pair, nibble in np.ndindex(len(words), 2, 2, 2):
            chunk, step = divmod(sixteen, 2)
            sub_block = 2 * chunk + nibble
            value = field(byte_pairs(words[sixteen][row_half])[pair], 4 * nibble, 0xF, both_halves(0x4300))
            # Weights i and i + 2 to bit 4 of either half: bit 0 moves by 4, bit 2 by 18.
            two = arith.andi(arith.shrui(mine[sub_block][row_half], i32(16 * step + pair)), i32(5))
            value = field(arith.muli(two, i32(1 << 4 | 1 << 18)), 0, 0x10, value)
            out[2 * sub_block + step, pair, row_half] = as_bf16(value)
        return fragmented(list(out.flatten()), LHS, shape, jnp.bfloat16)

    return unpack(codes, *high)


def codes_8bit(codes) -> jax.Array:
    """s8[64, 256] -> bf16[64, 512]: per sub-block of 32 first 128 + low nibble, then 2048 + 16 * (high nibble + 8).

    Their sum is 2176 + 128 + code; eight bits do not fit a bf16's seven.
    """
    width = codes.shape[1]

    @plgpu.inline_mgpu(
        arg_types=(LHS_BYTES,), return_type=plgpu.ShapeDtypeStruct((64, 2 * width), jnp.bfloat16, layout=LHS)
    )
    def unpack(_, codes):
        out = np.empty((width // 32, 2, 2, 2, 2), object)  # sub-block, nibble, sixteen, pair, row half
        for sixteen, words in enumerate(words_of(codes)):
            for row_half, word in enumerate(words):
                unsigned = arith.xori(word, i32(-0x7F7F7F80))  # 0x80 in each byte: code + 128
                for pair, value in enumerate(byte_pairs(unsigned)):
                    for nibble, exponent in enumerate((0x4300, 0x4500)):
                        out[sixteen // 2, nibble, sixteen % 2, pair, row_half] = as_bf16(
                            field(value, 4 * nibble, 0xF, both_halves(exponent))
                        )
        return fragmented(list(out.flatten()), LHS, (64, 2 * width), jnp.bfloat16)

    return unpack(codes)


def values_e2m1(codes) -> jax.Array:
    """u8[64, 128] of E2M1 codes in Q4_K's order -> bf16[64, 256], twice their value, exact."""
    shape = (64, 2 * codes.shape[1])

    @plgpu.inline_mgpu(arg_types=(LHS_BYTES,), return_type=plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=LHS))
    def unpack(_, codes):
        # Sign to bit 15, exponent and mantissa to bits 8..6: E2M1 times 2^-126, subnormals included.
        double = as_bf16(both_halves(0x7F00))  # 2^127
        out = np.empty((shape[1] // 16, 2, 2), object)
        for sixteen, words in enumerate(words_of(codes)):
            chunk, step = divmod(sixteen, 2)
            for row_half, word in enumerate(words):
                for pair, value in enumerate(byte_pairs(word)):
                    for nibble in range(2):
                        bits = field(value, 4 * nibble - 12, 1 << 15, field(value, 4 * nibble - 6, 7 << 6, i32(0)))
                        product = arith.mulf(as_bf16(bits), double)
                        out[2 * (2 * chunk + nibble) + step, pair, row_half] = product
        return fragmented(list(out.flatten()), LHS, shape, jnp.bfloat16)

    return unpack(codes)


def half(bits: jax.Array) -> jax.Array:
    """u16 f16 bits -> f32."""
    return lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)


def bytes_of(ref) -> jax.Array:
    return plgpu.load(ref, layout=LHS_BYTES)


def _sub_blocks(values: jax.Array, weights: int, scale_and_offset) -> list[SubBlock]:
    return [
        SubBlock((values[:, b * weights : (b + 1) * weights],), *scale_and_offset(b))
        for b in range(values.shape[1] // weights)
    ]


def _q4_k(codes, scales, mins, d, dmin):
    return _affine(codes_4bit(bytes_of(codes)), scales, mins, d, dmin)


def _q5_k(codes, high, scales, mins, d, dmin):
    return _affine(codes_4bit(bytes_of(codes), bytes_of(high), 1), scales, mins, d, dmin)


def _affine(values, scales, mins, d, dmin):
    d, dmin = half(load_rows(d.at[:, 0])), half(load_rows(dmin.at[:, 0])) * (1.0 / 128.0)

    def scale_and_offset(b):
        s = d * load_rows(scales.at[:, b]).astype(jnp.float32)
        return s, dmin * load_rows(mins.at[:, b]).astype(jnp.float32)

    return _sub_blocks(values, 32, scale_and_offset)


def _q6_k(codes, high, scales, d):
    d = half(load_rows(d.at[:, 0]))

    def scale_and_offset(b):
        return d * load_rows(scales.at[:, b]).astype(jnp.float32), None

    return _sub_blocks(codes_4bit(bytes_of(codes), bytes_of(high), 2), 16, scale_and_offset)


def _symmetric(values, d):
    return _sub_blocks(values, 32, lambda b: (half(load_rows(d.at[:, b])), None))


def _q4_0(codes, d):
    return _symmetric(codes_4bit(bytes_of(codes)), d)


def _q5_0(codes, high, d):
    words = [load_rows(high.at[:, b]) for b in range(CHUNK // 32)]
    return _symmetric(codes_5bit_words(bytes_of(codes), words), d)


def _q8_0(codes, d):
    values = codes_8bit(bytes_of(codes))

    def sub_block(b):
        low, high = (values[:, (2 * b + i) * 32 : (2 * b + i + 1) * 32] for i in range(2))
        return SubBlock((low, high), half(load_rows(d.at[:, b])), None)

    return [sub_block(b) for b in range(CHUNK // 32)]


def _mxfp4(codes, e):
    def scale_and_offset(b):
        exponent = load_rows(e.at[:, b]).astype(jnp.int32)
        # 2^(e - 128); e < 2, a scale below every f32 weight's reach, counts as zero.
        return lax.bitcast_convert_type(jnp.maximum(exponent - 1, 0) << 23, jnp.float32), None

    return _sub_blocks(values_e2m1(bytes_of(codes)), 32, scale_and_offset)


_u8, _s8, _u16, _u32 = jnp.uint8, jnp.int8, jnp.uint16, jnp.uint32
_CODES, _PER_32, _PER_256 = Plane(_u8, 2, True), functools.partial(Plane, per=32, by_row=False), Plane(_u16, 256, False)

TILE_FORMATS: dict[str, TileFormat] = {
    "q4_k": TileFormat((_CODES, _PER_32(_u8), _PER_32(_u8), _PER_256, _PER_256), 32, 128.0, _q4_k),
    "q5_k": TileFormat((_CODES, Plane(_u8, 8, True), _PER_32(_u8), _PER_32(_u8), _PER_256, _PER_256), 32, 128.0, _q5_k),
    "q6_k": TileFormat((_CODES, Plane(_u8, 4, True), Plane(_s8, 16, False), _PER_256), 16, 128.0 + 32.0, _q6_k),
    "q5_0": TileFormat((_CODES, _PER_32(_u32), _PER_32(_u16)), 32, 128.0 + 16.0, _q5_0),
    "q8_0": TileFormat((Plane(_s8, 1, True), _PER_32(_u16)), 32, 2176.0 + 128.0, _q8_0),
    "q4_0": TileFormat((_CODES, _PER_32(_u16)), 32, 128.0 + 8.0, _q4_0),
    "mxfp4": TileFormat((_CODES, _PER_32(_u8)), 32, 0.0, _mxfp4),
}
