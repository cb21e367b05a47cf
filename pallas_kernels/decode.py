"""A tile of packed weights in registers: integer codes as bf16 without a conversion; TILE_FORMATS has every format.

A bf16 number whose upper byte is zero is its lower byte times 2^-133 (the subnormal numbers and the first normal ones
lie equally spaced), so the bits of a code are an operand of the tensor core as they stand, wherever in the byte the
format keeps them. x comes scaled up (x_tiles.py), so that products are normal numbers. With a[o, k] the code of weight
k of row o, a sub-block b's codes all shifted by shift_b bits, and X[j, n] the sum of x over sixteen weights,

    y[o, n] = d[o] * sum_b s[o, b] * 2^-shift_b * sum_{k in b} 2^shift_b * (a[o, k] - bias) * x[k, n]
              + z[o] * sum_j f[o, j] * X[j, n]

has no rounded weight in it: codes, biases and factors f are exact in bf16, sums and scales are f32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
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
    byte_pairs,
    fragmented,
    i32,
    index,
    lane_in_warp,
    load_bytes,
    load_factors,
    load_half_factors,
    load_rows,
    masked,
    merged,
    permuted,
    shifted,
    words_of,
)
from .x_tiles import PRODUCT

CHUNK = 256  # weights of a row that a tile spans: a K-quant's super-block
PART = 64  # weights whose nibbles share bytes
ALL = tuple(range(CHUNK // PART))


Parts = tuple[int, ...]


class Plane(NamedTuple):
    """``per`` weights share an entry; a row plane is [E, O, D / per], a column plane [E, D / per, O]."""

    dtype: Any
    per: int
    by_row: bool

    def swizzle(self, depth: int) -> int:
        """Of a row plane, in bytes: as many as a row, and a chunk of it, are a multiple of."""
        row, chunk = (n // self.per * jnp.dtype(self.dtype).itemsize for n in (depth, CHUNK))
        return next(s for s in (128, 64, 32) if row % s == 0 and chunk % s == 0)


class SubBlock(NamedTuple):
    values: jax.Array  # bf16[64, weights], codes times 2^shift
    shift: int
    scale: jax.Array  # f32[64]


class Offset(NamedTuple):
    """What sub-blocks add to their weights, in the form that a kernel asks for."""

    factors: Callable[[], list[jax.Array]]  # bf16[64, 16] each, one for 16 weights of the tile: their sum counts
    row: Callable[[int], jax.Array]  # f32[64], of the tile's sub-block b
    scale: jax.Array  # f32[64]


class Tile(NamedTuple):
    sub_blocks: list[SubBlock]
    d: jax.Array | None = None  # f32[64], of all sub-blocks
    offset: Offset | None = None


class TileFormat(NamedTuple):
    """``decode(*planes, parts=...) -> Tile`` of 64 rows and those ``parts`` of CHUNK weights, PART each; the planes are
    SMEM refs, row planes [64, CHUNK / per] and column planes [J, CHUNK / per, 64 / J], or views of such (registers.py).
    The sums that come of it are y times ``product``."""

    planes: tuple[Plane, ...]
    weights: int  # of a sub-block
    bias: int
    decode: Any
    product: float = PRODUCT


def codes_4bit(codes, high=None, width: int = 0, parts: Parts = ALL) -> tuple[jax.Array, tuple[int, int]]:
    """u8[64, 32 n] in Q4_K's order -> bf16[64, 64 n] in the order of the weights of n parts, and the codes' shift in
    the sub-blocks of low nibbles and of high ones.

    ``high`` adds bits above the four, those of all parts: u8[64, 32], bit s of byte j for weight j of sub-block s
    (``width`` 1), or u8[64, 64], bits 2s of byte j of each 32 for weight j + 32 s of 128 (``width`` 2).
    """
    arrays = (codes,) if high is None else (codes, high)
    shape = (64, 2 * codes.shape[1])
    shifts = (0, {0: 4, 1: 1, 2: 2}[width])

    @plgpu.inline_mgpu(
        arg_types=(LHS_BYTES,) * len(arrays), return_type=plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=LHS)
    )
    def unpack(_, codes, high=None):
        words = words_of(codes)
        high_words = words_of(high) if high is not None else []
        out = np.empty((shape[1] // 16, 2, 2), object)  # sixteen weights, pair, row half
        for sixteen, row_half in np.ndindex(len(words), 2):
            place, step = divmod(sixteen, 2)  # 32 bytes hold a part: the low nibbles' sub-block, the high ones'
            part = parts[place]
            word = words[sixteen][row_half]
            if width == 0:
                low = high_nibbles = word
            elif width == 1:  # bit 2 part to bit 4, the next one with it to bit 5
                fifth = shifted(high_words[step][row_half], 2 * part - 4)
                low, high_nibbles = merged(word, fifth, 0x0F), merged(shifted(word, 3), fifth, 0x1E)
            else:  # bits 4 part (of two) to bits 4 and 5, the next two with them to 6 and 7
                upper = shifted(high_words[2 * (part // 2) + step][row_half], 4 * (part % 2) - 4)
                low, high_nibbles = merged(word, upper, 0x0F), merged(shifted(word, 2), upper, 0x3C)
            ones = (1 << (4 + width)) - 1
            for nibble, bits in enumerate((low, high_nibbles)):
                for pair, value in enumerate(byte_pairs(bits)):
                    out[2 * (2 * place + nibble) + step, pair, row_half] = as_bf16(
                        masked(value, ones << shifts[nibble])
                    )
        return fragmented(list(out.flatten()), LHS, shape, jnp.bfloat16)

    return unpack(*arrays), shifts


def codes_2bit(codes, high=None, parts: Parts = ALL) -> tuple[jax.Array, tuple[int, ...]]:
    """u8[64, 64] -> bf16[64, 64 n] in the order of the weights of n parts, and the codes' shift in each 32 of 128.

    Bits 2s of byte j of each 32 are weight j + 32 s of 128. ``high`` adds a third bit: u8[64, 32], bit s of byte j for
    weight j of sub-block s.
    """
    arrays = (codes,) if high is None else (codes, high)
    # Three bits of the last sub-block would not stay within the byte.
    shifts = (0, 2, 4, 6) if high is None else (0, 2, 4, 4)
    shape = (64, PART * len(parts))

    @plgpu.inline_mgpu(
        arg_types=(LHS_BYTES,) * len(arrays), return_type=plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=LHS)
    )
    def unpack(_, codes, high=None):
        words = words_of(codes)
        high_words = words_of(high) if high is not None else []
        out = np.empty((shape[1] // 16, 2, 2), object)  # sixteen weights, pair, row half
        for place, sub_block, step, row_half in np.ndindex(len(parts), 2, 2, 2):
            group, s = divmod(2 * parts[place] + sub_block, 4)
            shift = shifts[s]
            bits, ones = words[2 * group + step][row_half], 3
            if high is not None:
                third = shifted(high_words[step][row_half], 4 * group + s - (shift + 2))
                bits, ones = merged(shifted(bits, 2 * s - shift), third, 3 << shift), 7
            for pair, value in enumerate(byte_pairs(bits)):
                out[2 * (2 * place + sub_block) + step, pair, row_half] = as_bf16(masked(value, ones << shift))
        return fragmented(list(out.flatten()), LHS, shape, jnp.bfloat16)

    return unpack(*arrays), shifts


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
            value = masked(shifted(words[sixteen][row_half], 4 * nibble + 8 * pair), 0xF)
            # Weights i and i + 2 to bit 4 of either half: bit 0 moves by 4, bit 2 by 18.
            two = arith.andi(arith.shrui(mine[sub_block][row_half], i32(16 * step + pair)), i32(5))
            fifth = masked(arith.muli(two, i32(1 << 4 | 1 << 18)), 0x10)
            out[2 * sub_block + step, pair, row_half] = as_bf16(arith.ori(value, fifth))
        return fragmented(list(out.flatten()), LHS, shape, jnp.bfloat16)

    return unpack(codes, *high)


def codes_8bit(codes) -> jax.Array:
    """s8[64, n] -> bf16[64, n] of 128 + code."""
    width = codes.shape[1]

    @plgpu.inline_mgpu(
        arg_types=(LHS_BYTES,), return_type=plgpu.ShapeDtypeStruct((64, width), jnp.bfloat16, layout=LHS)
    )
    def unpack(_, codes):
        out = np.empty((width // 16, 2, 2), object)  # sixteen, pair, row half
        for sixteen, words in enumerate(words_of(codes)):
            for row_half, word in enumerate(words):
                unsigned = arith.xori(word, i32(-0x7F7F7F80))  # 0x80 in each byte: code + 128
                for pair, value in enumerate(byte_pairs(unsigned)):
                    out[sixteen, pair, row_half] = as_bf16(masked(value, 0xFF))
        return fragmented(list(out.flatten()), LHS, (64, width), jnp.bfloat16)

    return unpack(codes)


def values_e2m1(codes) -> jax.Array:
    """u8[64, n] of E2M1 codes in Q4_K's order -> bf16[64, 2 n], their value times 2^-126, exact."""
    shape = (64, 2 * codes.shape[1])

    @plgpu.inline_mgpu(arg_types=(LHS_BYTES,), return_type=plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=LHS))
    def unpack(_, codes):
        out = np.empty((shape[1] // 16, 2, 2), object)
        for sixteen, words in enumerate(words_of(codes)):
            chunk, step = divmod(sixteen, 2)
            for row_half, pair, nibble in np.ndindex(2, 2, 2):
                # Sign to bit 15, exponent and mantissa to bits 8..6: bf16's own, subnormal numbers included.
                at = 8 * pair + 4 * nibble
                sign, rest = (shifted(words[row_half], at - up) for up in (12, 6))
                bits = arith.ori(masked(sign, 1 << 15), masked(rest, 7 << 6))
                out[2 * (2 * chunk + nibble) + step, pair, row_half] = as_bf16(bits)
        return fragmented(list(out.flatten()), LHS, shape, jnp.bfloat16)

    return unpack(codes)


IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
IQ4_BIAS = 127


def codes_iq4(codes) -> jax.Array:
    """u8[64, n] of IQ4 codes in Q4_K's order -> bf16[64, 2 n] of IQ4_BIAS + value."""
    shape = (64, 2 * codes.shape[1])
    # Four bytes a word, the first one lowest.
    table = np.array([value + IQ4_BIAS for value in IQ4_VALUES], np.uint8).view("<u4").astype(np.int32).tolist()

    @plgpu.inline_mgpu(arg_types=(LHS_BYTES,), return_type=plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=LHS))
    def unpack(_, codes):
        first, second, third, fourth = (i32(word) for word in table)
        out = np.empty((shape[1] // 16, 2, 2), object)
        for sixteen, words in enumerate(words_of(codes)):
            chunk, step = divmod(sixteen, 2)
            for row_half, word in enumerate(words):
                # prmt takes four nibbles at a time for places among eight bytes: of the first eight entries, of the
                # last eight, and then of both by the nibbles' upper bits.
                within = arith.andi(word, i32(0x77777777))
                upper = arith.ori(shifted(arith.andi(word, i32(-0x77777778)), 1), i32(0x32103210))

                def found(bits: int, within=within, upper=upper):
                    """Of the two bytes from ``bits`` on: low nibble, high nibble of each."""
                    small = permuted(first, second, shifted(within, bits))
                    large = permuted(third, fourth, shifted(within, bits))
                    return permuted(small, large, shifted(upper, bits))

                lower, higher = found(0), found(16)
                for pair, places in enumerate((0x5410, 0x7632)):
                    both = permuted(lower, higher, i32(places))  # of bytes (0, 2) or (1, 3)
                    for nibble, value in enumerate(byte_pairs(both)):
                        out[2 * (2 * chunk + nibble) + step, pair, row_half] = as_bf16(masked(value, 0xFF))
        return fragmented(list(out.flatten()), LHS, shape, jnp.bfloat16)

    return unpack(codes)


def half(bits: jax.Array) -> jax.Array:
    """u16 f16 bits -> f32."""
    return lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)


def _integers(plane) -> Callable[[int], jax.Array]:
    """f32[64] of the tile's sub-block b, from a column plane of small integers."""

    def read(b: int) -> jax.Array:
        row = load_rows(plane.at[:, b])
        if row.dtype != jnp.int8:
            return row.astype(jnp.float32)
        # As the last bits of an f32 from 2^23 on: converting an i8 takes eight times as long as this.
        bits = row.astype(jnp.int32) + (0x4B000000 + 128)
        return lax.bitcast_convert_type(bits, jnp.float32) - (2.0**23 + 128)

    return read


def _halves(plane) -> Callable[[int], jax.Array]:
    return lambda b: half(load_rows(plane.at[:, b]))


def _sub_blocks(values: jax.Array, weights: int, shifts: tuple[int, ...], scale, parts: Parts) -> list[SubBlock]:
    """``shifts`` of 32 weights each, over and over; ``scale(b)`` of the tile's sub-block b."""
    numbers = [part * (PART // weights) + i for part in parts for i in range(PART // weights)]
    return [
        SubBlock(values[:, i * weights : (i + 1) * weights], shifts[b * weights // 32 % len(shifts)], scale(b))
        for i, b in enumerate(numbers)
    ]


def _q4_k(codes, scales, mins, d, dmin, *, parts: Parts = ALL):
    return _with_mins(codes_4bit(load_bytes(codes, 32, parts), parts=parts), scales, mins, d, dmin, parts)


def _q5_k(codes, high, scales, mins, d, dmin, *, parts: Parts = ALL):
    values_and_shifts = codes_4bit(load_bytes(codes, 32, parts), load_bytes(high), 1, parts)
    return _with_mins(values_and_shifts, scales, mins, d, dmin, parts)


def _with_mins(values_and_shifts, scales, mins, d, dmin, parts):
    values, shifts = values_and_shifts
    sub_blocks = _sub_blocks(values, 32, shifts, _integers(scales), parts)
    offset = Offset(lambda: [load_factors(mins, 32)], _integers(mins), -half(load_rows(dmin.at[:, 0])))
    return Tile(sub_blocks, half(load_rows(d.at[:, 0])), offset)


def _q6_k(codes, high, scales, d, *, parts: Parts = ALL):
    values, shifts = codes_4bit(load_bytes(codes, 32, parts), load_bytes(high), 2, parts)
    sub_blocks = _sub_blocks(values, 16, shifts, _integers(scales), parts)
    d = half(load_rows(d.at[:, 0]))
    return Tile(sub_blocks, d, _scaled(scales, 16, -32.0 * d))


def _q3_k(codes, high, scales, d, *, parts: Parts = ALL):
    values, shifts = codes_2bit(load_bytes(codes), load_bytes(high), parts)
    sub_blocks = _sub_blocks(values, 16, shifts, _integers(scales), parts)
    d = half(load_rows(d.at[:, 0]))
    return Tile(sub_blocks, d, _scaled(scales, 16, -4.0 * d))


def _q2_k(codes, scales, d, dmin, *, parts: Parts = ALL):
    values, shifts = codes_2bit(load_bytes(codes), parts=parts)
    both = lambda b: load_rows(scales.at[:, b]).astype(jnp.int32)  # noqa: E731
    sub_blocks = _sub_blocks(values, 16, shifts, lambda b: (both(b) & 15).astype(jnp.float32), parts)
    mins = lambda b: (both(b) >> 4).astype(jnp.float32)  # noqa: E731
    offset = Offset(lambda: [load_factors(scales, 16, shift=4)], mins, -half(load_rows(dmin.at[:, 0])))
    return Tile(sub_blocks, half(load_rows(d.at[:, 0])), offset)


def _scaled(scales, per: int, scale: jax.Array) -> Offset:
    """What a bias of the codes comes to: ``scale`` times each sub-block's own."""
    return Offset(lambda: [load_factors(scales, per)], _integers(scales), scale)


def _q4_0(codes, d, *, parts: Parts = ALL):
    values, shifts = codes_4bit(load_bytes(codes, 32, parts), parts=parts)
    return Tile(_sub_blocks(values, 32, shifts, _halves(d), parts))


def _q5_0(codes, high, d, *, parts: Parts = ALL):
    words = [load_rows(high.at[:, b]) for part in parts for b in (2 * part, 2 * part + 1)]
    values = codes_5bit_words(load_bytes(codes, 32, parts), words)
    return Tile(_sub_blocks(values, 32, (0, 0), _halves(d), parts))


def _q4_1(codes, d, m, *, parts: Parts = ALL):
    values, shifts = codes_4bit(load_bytes(codes, 32, parts), parts=parts)
    return Tile(_sub_blocks(values, 32, shifts, _halves(d), parts), None, _own_mins(m))


def _q5_1(codes, high, d, m, *, parts: Parts = ALL):
    return _q5_0(codes, high, d, parts=parts)._replace(offset=_own_mins(m))


def _own_mins(m) -> Offset:
    """An f16 for each sub-block, which two bf16 terms hold exactly."""
    one = plgpu.layout_cast(jnp.ones(64, jnp.float32), ROW)
    return Offset(lambda: load_half_factors(m), _halves(m), one)


def _iq4_nl(codes, d, *, parts: Parts = ALL):
    return Tile(_sub_blocks(codes_iq4(load_bytes(codes, 32, parts)), 32, (0,), _halves(d), parts))


def _iq4_xs(codes, scales, d, *, parts: Parts = ALL):
    sub_blocks = _sub_blocks(codes_iq4(load_bytes(codes, 32, parts)), 32, (0,), _integers(scales), parts)
    d = half(load_rows(d.at[:, 0]))
    return Tile(sub_blocks, d, _scaled(scales, 32, -float(IQ4_BIAS) * d))


def _q8_0(codes, d, *, parts: Parts = ALL):
    return Tile(_sub_blocks(codes_8bit(load_bytes(codes, 64, parts)), 32, (0, 0), _halves(d), parts))


# Of the scales' range of 2^254 an f32 sum can hold what lies around 1: they come times 2^27, so that scales from 2^-127
# to 2^99 are exact; a larger one gives infinity.
E8M0_SHIFT = 27


def _mxfp4(codes, e, *, parts: Parts = ALL):
    def scale(b):
        exponent = load_rows(e.at[:, b]).astype(jnp.int32)
        return lax.bitcast_convert_type(jnp.minimum(exponent + E8M0_SHIFT, 255) << 23, jnp.float32)

    return Tile(_sub_blocks(values_e2m1(load_bytes(codes, 32, parts)), 32, (0, 0), scale, parts))


_u8, _s8, _u16, _u32 = jnp.uint8, jnp.int8, jnp.uint16, jnp.uint32
_CODES, _PER_32, _PER_256 = Plane(_u8, 2, True), functools.partial(Plane, per=32, by_row=False), Plane(_u16, 256, False)
_CODES_2BIT = Plane(_u8, 4, True)

TILE_FORMATS: dict[str, TileFormat] = {
    "q4_k": TileFormat((_CODES, _PER_32(_u8), _PER_32(_u8), _PER_256, _PER_256), 32, 0, _q4_k),
    "q5_k": TileFormat((_CODES, Plane(_u8, 8, True), _PER_32(_u8), _PER_32(_u8), _PER_256, _PER_256), 32, 0, _q5_k),
    "q6_k": TileFormat((_CODES, Plane(_u8, 4, True), Plane(_s8, 16, False), _PER_256), 16, 0, _q6_k),
    "q5_0": TileFormat((_CODES, _PER_32(_u32), _PER_32(_u16)), 32, 16, _q5_0),
    "q8_0": TileFormat((Plane(_s8, 1, True), _PER_32(_u16)), 32, 128, _q8_0),
    "q4_0": TileFormat((_CODES, _PER_32(_u16)), 32, 8, _q4_0),
    # An E2M1 code as a bf16 is its value times 2^-126, not 2^-133, and its scales come times 2^E8M0_SHIFT.
    "mxfp4": TileFormat((_CODES, _PER_32(_u8)), 32, 0, _mxfp4, PRODUCT * 2.0 ** (7 + E8M0_SHIFT)),
    "q3_k": TileFormat((_CODES_2BIT, Plane(_u8, 8, True), Plane(_s8, 16, False), _PER_256), 16, 0, _q3_k),
    "q2_k": TileFormat((_CODES_2BIT, Plane(_u8, 16, False), _PER_256, _PER_256), 16, 0, _q2_k),
    "q5_1": TileFormat((_CODES, _PER_32(_u32), _PER_32(_u16), _PER_32(_u16)), 32, 0, _q5_1),
    "q4_1": TileFormat((_CODES, _PER_32(_u16), _PER_32(_u16)), 32, 0, _q4_1),
    "iq4_nl": TileFormat((_CODES, _PER_32(_u16)), 32, IQ4_BIAS, _iq4_nl),
    "iq4_xs": TileFormat((_CODES, _PER_32(_s8), _PER_256), 32, 0, _iq4_xs),
}
