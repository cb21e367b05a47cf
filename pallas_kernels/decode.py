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
    """What sub-blocks add to their weights, in the form that a kernel asks for. Of a format with a bias and a d for all
    sub-blocks that is the bias."""

    factors: Callable[[], list[jax.Array]]  # bf16[64, 16] each, one for 16 weights of the tile: their sum counts
    row: Callable[[int], jax.Array]  # f32[rows], of the tile's sub-block b
    scale: jax.Array | None  # f32[rows]; None is one


class Scales(NamedTuple):
    """Of a tile's rows: those that a warpgroup multiplies with, or any that its threads take one each."""

    of: Callable[[int], jax.Array]  # f32[rows], of the tile's sub-block b
    d: jax.Array | None = None  # f32[rows], of all sub-blocks
    offset: Offset | None = None


class Tile(NamedTuple):
    sub_blocks: list[SubBlock]
    d: jax.Array | None
    offset: Offset | None


class TileFormat(NamedTuple):
    """What is read of a tile of 64 rows; the planes are SMEM refs, row planes [64, CHUNK / per] and column planes
    [J, CHUNK / per, 64 / J], or views of such (registers.py). The sums that come of it are y times ``product``."""

    planes: tuple[Plane, ...]
    weights: int  # of a sub-block
    bias: int  # of the codes above the numbers that they stand for
    codes: Any  # (*planes, parts) -> bf16[64, PART * n] of those parts of a chunk, PART weights each
    shifts: tuple[int, ...]  # of each 32 weights' codes, over and over
    scales: Any  # (*planes) -> Scales
    product: float = PRODUCT

    @property
    def per_part(self) -> int:
        """Sub-blocks of a part."""
        return PART // self.weights

    def shift(self, b: int) -> int:
        """Of the chunk's sub-block b."""
        return self.shifts[b * self.weights // 32 % len(self.shifts)]

    def decode(self, *planes, parts: Parts = ALL) -> Tile:
        values, scales = self.codes(*planes, parts=parts), self.scales(*planes)
        numbers = [part * self.per_part + i for part in parts for i in range(self.per_part)]
        width = self.weights
        sub_blocks = [
            SubBlock(values[:, i * width : (i + 1) * width], self.shift(b), scales.of(b)) for i, b in enumerate(numbers)
        ]
        return Tile(sub_blocks, scales.d, scales.offset)


# Of codes of 4 + width bits in the sub-blocks of low nibbles and of high ones, by width.
SHIFTS_4BIT = ((0, 4), (0, 1), (0, 2))


def codes_4bit(codes, high=None, width: int = 0, parts: Parts = ALL) -> jax.Array:
    """u8[64, 32 n] in Q4_K's order -> bf16[64, 64 n] in the order of the weights of n parts, shifted by SHIFTS_4BIT.

    ``high`` adds bits above the four, those of all parts: u8[64, 32], bit s of byte j for weight j of sub-block s
    (``width`` 1), or u8[64, 64], bits 2s of byte j of each 32 for weight j + 32 s of 128 (``width`` 2).
    """
    arrays = (codes,) if high is None else (codes, high)
    shape = (64, 2 * codes.shape[1])
    shifts = SHIFTS_4BIT[width]

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

    return unpack(*arrays)


# Of codes of 2 and of 3 bits in each 32 of 128: three bits of the last sub-block would not stay within the byte.
SHIFTS_2BIT, SHIFTS_3BIT = (0, 2, 4, 6), (0, 2, 4, 4)


def codes_2bit(codes, high=None, parts: Parts = ALL) -> jax.Array:
    """u8[64, 64] -> bf16[64, 64 n] in the order of the weights of n parts, shifted by SHIFTS_2BIT or SHIFTS_3BIT.

    Bits 2s of byte j of each 32 are weight j + 32 s of 128. ``high`` adds a third bit: u8[64, 32], bit s of byte j for
    weight j of sub-block s.
    """
    arrays = (codes,) if high is None else (codes, high)
    shifts = SHIFTS_2BIT if high is None else SHIFTS_3BIT
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


def _nibbles(codes, *_, parts: Parts) -> jax.Array:
    return codes_4bit(load_bytes(codes, 32, parts), parts=parts)


def _nibbles_and_bits(width: int, codes, high, *_, parts: Parts) -> jax.Array:
    return codes_4bit(load_bytes(codes, 32, parts), load_bytes(high), width, parts)


def _nibbles_and_words(codes, high, *_, parts: Parts) -> jax.Array:
    words = [load_rows(high.at[:, b]) for part in parts for b in (2 * part, 2 * part + 1)]
    return codes_5bit_words(load_bytes(codes, 32, parts), words)


def _table_places(codes, *_, parts: Parts) -> jax.Array:
    return codes_iq4(load_bytes(codes, 32, parts))


def _with_mins(*planes) -> Scales:
    """Of (..., scales, mins, d, dmin)."""
    scales, mins, d, dmin = planes[-4:]
    offset = Offset(lambda: [load_factors(mins, 32)], _integers(mins), -half(load_rows(dmin.at[:, 0])))
    return Scales(_integers(scales), half(load_rows(d.at[:, 0])), offset)


def _centred(bias: int, per: int, *planes) -> Scales:
    """Of (..., scales, d), codes ``bias`` above the numbers that they stand for."""
    scales, d = planes[-2], half(load_rows(planes[-1].at[:, 0]))
    offset = Offset(lambda: [load_factors(scales, per)], _integers(scales), -float(bias) * d)
    return Scales(_integers(scales), d, offset)


def _scales_and_mins_in_bytes(codes, scales, d, dmin) -> Scales:
    del codes
    both = lambda b: load_rows(scales.at[:, b]).astype(jnp.int32)  # noqa: E731
    mins = lambda b: (both(b) >> 4).astype(jnp.float32)  # noqa: E731
    offset = Offset(lambda: [load_factors(scales, 16, shift=4)], mins, -half(load_rows(dmin.at[:, 0])))
    return Scales(lambda b: (both(b) & 15).astype(jnp.float32), half(load_rows(d.at[:, 0])), offset)


def _own_d(*planes) -> Scales:
    """Of (..., d), an f16 a sub-block."""
    return Scales(_halves(planes[-1]))


def _own_d_and_min(*planes) -> Scales:
    """Of (..., d, m), an f16 each a sub-block, which two bf16 terms hold exactly."""
    d, m = planes[-2:]
    return Scales(_halves(d), offset=Offset(lambda: load_half_factors(m), _halves(m), None))


# Of the scales' range of 2^254 an f32 sum can hold what lies around 1: they come times 2^27, so that scales from 2^-127
# to 2^99 are exact; a larger one gives infinity.
E8M0_SHIFT = 27


def _exponents(codes, e) -> Scales:
    def scale(b: int) -> jax.Array:
        exponent = load_rows(e.at[:, b]).astype(jnp.int32)
        return lax.bitcast_convert_type(jnp.minimum(exponent + E8M0_SHIFT, 255) << 23, jnp.float32)

    del codes
    return Scales(scale)


_u8, _s8, _u16, _u32 = jnp.uint8, jnp.int8, jnp.uint16, jnp.uint32
_CODES, _PER_32, _PER_256 = Plane(_u8, 2, True), functools.partial(Plane, per=32, by_row=False), Plane(_u16, 256, False)
_CODES_2BIT = Plane(_u8, 4, True)

_FIFTH, _SIXTH = (functools.partial(_nibbles_and_bits, width) for width in (1, 2))
_ALIKE = (0,)

TILE_FORMATS: dict[str, TileFormat] = {
    "q4_k": TileFormat(
        (_CODES, _PER_32(_u8), _PER_32(_u8), _PER_256, _PER_256), 32, 0, _nibbles, SHIFTS_4BIT[0], _with_mins
    ),
    "q5_k": TileFormat(
        (_CODES, Plane(_u8, 8, True), _PER_32(_u8), _PER_32(_u8), _PER_256, _PER_256),
        32,
        0,
        _FIFTH,
        SHIFTS_4BIT[1],
        _with_mins,
    ),
    "q6_k": TileFormat(
        (_CODES, Plane(_u8, 4, True), Plane(_s8, 16, False), _PER_256),
        16,
        32,
        _SIXTH,
        SHIFTS_4BIT[2],
        functools.partial(_centred, 32, 16),
    ),
    "q5_0": TileFormat((_CODES, _PER_32(_u32), _PER_32(_u16)), 32, 16, _nibbles_and_words, _ALIKE, _own_d),
    "q8_0": TileFormat(
        (Plane(_s8, 1, True), _PER_32(_u16)),
        32,
        128,
        lambda codes, _, parts: codes_8bit(load_bytes(codes, 64, parts)),
        _ALIKE,
        _own_d,
    ),
    "q4_0": TileFormat((_CODES, _PER_32(_u16)), 32, 8, _nibbles, SHIFTS_4BIT[0], _own_d),
    # An E2M1 code as a bf16 is its value times 2^-126, not 2^-133, and its scales come times 2^E8M0_SHIFT.
    "mxfp4": TileFormat(
        (_CODES, _PER_32(_u8)),
        32,
        0,
        lambda codes, _, parts: values_e2m1(load_bytes(codes, 32, parts)),
        _ALIKE,
        _exponents,
        PRODUCT * 2.0 ** (7 + E8M0_SHIFT),
    ),
    "q3_k": TileFormat(
        (_CODES_2BIT, Plane(_u8, 8, True), Plane(_s8, 16, False), _PER_256),
        16,
        4,
        lambda codes, high, *_, parts: codes_2bit(load_bytes(codes), load_bytes(high), parts),
        SHIFTS_3BIT,
        functools.partial(_centred, 4, 16),
    ),
    "q2_k": TileFormat(
        (_CODES_2BIT, Plane(_u8, 16, False), _PER_256, _PER_256),
        16,
        0,
        lambda codes, *_, parts: codes_2bit(load_bytes(codes), parts=parts),
        SHIFTS_2BIT,
        _scales_and_mins_in_bytes,
    ),
    "q5_1": TileFormat(
        (_CODES, _PER_32(_u32), _PER_32(_u16), _PER_32(_u16)), 32, 0, _nibbles_and_words, _ALIKE, _own_d_and_min
    ),
    "q4_1": TileFormat((_CODES, _PER_32(_u16), _PER_32(_u16)), 32, 0, _nibbles, SHIFTS_4BIT[0], _own_d_and_min),
    "iq4_nl": TileFormat((_CODES, _PER_32(_u16)), 32, IQ4_BIAS, _table_places, _ALIKE, _own_d),
    "iq4_xs": TileFormat(
        (_CODES, _PER_32(_s8), _PER_256),
        32,
        IQ4_BIAS,
        _table_places,
        _ALIKE,
        functools.partial(_centred, IQ4_BIAS, 32),
    ),
}
