"""Packed weights as the tensor core's left operand: rounded to bf16, or as the sum of two bf16 terms.

    w[o, k] = s * (a - c) + o,   s = d * scale,   o = c * s + offset

a is the code, c the middle of the codes' range. s and o are rounded to bf16 and the sum once more: what a weight loses
is measured by its distance from the middle, as if it were rounded alone, not by its distance from the block's minimum.
Two terms are those of the weight in f32, 16 bits of it.

A code comes as the number a * 2^(shift - 133) (decode.py), a pair of them in a word. Weights leave times 1 / X_RAISE,
and x comes times X_RAISE: then one fused multiplication and addition makes a pair of weights of a pair of codes, where o
is nothing but the middle of a power of two: s * a - s * c, both exact. Else two: the first gives (a - c) exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._compat import arith, ir, mosaic_utils, plgpu, vector
from .decode import PART, TileFormat
from .registers import LHS, ROW, as_bf16, both_halves, fragmented, i32
from .x_tiles import PRODUCT

PIECE = 32  # weights of depth that are multiplied at a time: the sub-blocks of a part that share nibbles
A = plgpu.Layout.WGMMA

# Codes times 2^-133 need a scale times 2^133, which is no number: x takes a part of that.
X_RAISE = 2.0**40
_CODE = 2.0**-133
# The largest power of two of a bf16.
_RAISE = 2.0**127


def pieces(tile_format: TileFormat, planes: Sequence[Any], part: int, terms: int) -> Iterator[list[jax.Array]]:
    """The terms, bf16[64, PIECE] each, of a part's pieces in the order of depth; ``planes`` as decode.py takes them."""
    tile = tile_format.decode(*planes, parts=(part,))
    first = part * (PART // tile_format.weights)
    together = PIECE // tile_format.weights
    unit = PRODUCT / tile_format.product / X_RAISE
    center = tile_format.center
    # Where the codes' middle is a power of two, and the offset is that alone.
    at_once = terms == 1 and center > 0 and not tile_format.mins and not center & (center - 1)
    for begin in range(0, len(tile.sub_blocks), together):
        blocks = tile.sub_blocks[begin : begin + together]
        scales, offsets = [], []
        for b, block in enumerate(blocks, first + begin):
            # Of the codes as they come, or of the centred ones.
            raised = unit / (_CODE if at_once else _CODE * _RAISE) / (1 << block.shift)
            scale = block.scale * raised if tile.d is None else block.scale * (tile.d * raised)
            scales.append(scale)
            if tile_format.mins:
                assert tile.offset is not None
                middle = (center << block.shift) * (_CODE * _RAISE)
                offsets.append(middle * scale + (tile.offset.scale * unit) * tile.offset.row(b))
        middles = [float(center << block.shift) * _CODE for block in blocks]
        yield _weights([block.values for block in blocks], scales, offsets, middles, terms, at_once)


def _weights(
    values: list, scales: list, offsets: list, middles: list[float], terms: int, at_once: bool
) -> list[jax.Array]:
    count = len(values)
    result = plgpu.ShapeDtypeStruct((64, PIECE), jnp.bfloat16, layout=A)

    @plgpu.inline_mgpu(
        arg_types=(*(LHS,) * count, *(ROW,) * (len(scales) + len(offsets))), return_type=[result] * terms
    )
    def scaled(_, *arrays):
        registers: list[list] = [[] for _ in range(terms)]
        for b in range(count):
            scale = _row_halves(arrays[count + b])
            offset = _row_halves(arrays[2 * count + b]) if offsets else [None, None]
            weigh = _rounded_at_once if at_once else _rounded if terms == 1 else _in_two_terms
            of_half = [weigh(s, o, middles[b]) for s, o in zip(scale, offset, strict=True)]
            # In the order (sixteen weights, pair, half of the rows).
            for i, register in enumerate(arrays[b].registers.flatten()):
                word = mosaic_utils.bitcast(register, ir.IntegerType.get_signless(32))
                for term, weights in zip(registers, of_half[i % 2](word), strict=True):
                    term.append(as_bf16(weights))
        return [fragmented(term, A, (64, PIECE), jnp.bfloat16) for term in registers]

    return scaled(*values, *scales, *offsets)


def _rounded_at_once(scale: Any, offset: Any, middle: float):
    """A function from a pair of codes to the pair of weights, rounded."""
    scale = packed(scale, scale)
    offset = _mul2(scale, _both(-middle))
    return lambda pair: [_fma2(pair, scale, offset)]


def _rounded(scale: Any, offset: Any, middle: float):
    scale = packed(scale, scale)
    if offset is None:
        return lambda pair: [_mul2(_centered(pair, middle), scale)]
    offset = packed(offset, offset)
    return lambda pair: [_fma2(_centered(pair, middle), scale, offset)]


def _in_two_terms(scale: Any, offset: Any, middle: float):
    offset = mosaic_utils.c(0.0, ir.F32Type.get()) if offset is None else offset

    def weigh(pair):
        exact = [
            mosaic_utils.inline_ptx("fma.rn.f32 $0, $1, $2, $3;", value, scale, offset, result_types=value.type)
            for value in unpacked(_centered(pair, middle))
        ]
        high = packed(*exact)
        rest = [arith.subf(value, rounded) for value, rounded in zip(exact, unpacked(high), strict=True)]
        return [high, packed(*rest)]

    return weigh


def _centered(pair: Any, middle: float):
    """Codes less their middle, times _RAISE."""
    return _fma2(pair, _both(_RAISE), _both(-middle * _RAISE))


def _row_halves(array: Any) -> list:
    """A lane's two values of an array [64], f32."""
    return [vector.extract(register, [], [0]) for register in array.registers.flatten()]


def _both(value: float):
    """A constant that bf16 holds exactly, in both halves of a word."""
    exact = np.array(value, jnp.bfloat16)
    assert float(exact) == value
    return both_halves(int(exact.view(np.uint16)))


def _fma2(a, b, c):
    return mosaic_utils.inline_ptx("fma.rn.bf16x2 $0, $1, $2, $3;", a, b, c, result_types=a.type)


def _mul2(a, b):
    return mosaic_utils.inline_ptx("mul.rn.bf16x2 $0, $1, $2;", a, b, result_types=a.type)


def packed(low, high):
    """Two f32 rounded to a pair of bf16."""
    word = ir.IntegerType.get_signless(32)
    return mosaic_utils.inline_ptx("cvt.rn.bf16x2.f32 $0, $1, $2;", high, low, result_types=word)


def unpacked(pair) -> list:
    """The f32 values of a pair of bf16."""
    bits = arith.shli(pair, i32(16)), arith.andi(pair, i32(-65536))
    return [mosaic_utils.bitcast(word, ir.F32Type.get()) for word in bits]
