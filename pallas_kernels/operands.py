"""Packed weights as the tensor core's left operand: rounded to bf16, or as the sum of two bf16 terms.

    w[o, k] = s * (a - c) + o,   s = d * scale,   o = c * s + offset

a is the code, c the middle of the codes' range. s and o are rounded to bf16 and the sum once more: what a weight loses
is measured by its distance from the middle, as if it were rounded alone, not by its distance from the block's minimum.
Two terms are those of the weight in f32, 16 bits of it.

A code comes as the number a * 2^shift * 2^-133 (decode.py). Two fused multiplications and additions a pair of weights:
the first gives (a - c) * 2^(shift - 6) exactly, the second the weight.
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

# The largest power of two of a bf16: codes times 2^-133 become codes times 2^-6.
_RAISE = 127
_RAISED = _RAISE - 133


def pieces(tile_format: TileFormat, planes: Sequence[Any], part: int, terms: int) -> Iterator[list[jax.Array]]:
    """The terms, bf16[64, PIECE] each, of a part's pieces in the order of depth; ``planes`` as decode.py takes them."""
    tile = tile_format.decode(*planes, parts=(part,))
    first = part * (PART // tile_format.weights)
    d = 1.0 if tile.d is None else tile.d
    together = PIECE // tile_format.weights
    for begin in range(0, len(tile.sub_blocks), together):
        blocks = tile.sub_blocks[begin : begin + together]
        scales, offsets = [], []
        for b, block in enumerate(blocks, first + begin):
            scale = block.scale * d * (PRODUCT / tile_format.product)
            scales.append(scale * 2.0 ** (-_RAISED - block.shift))
            if tile_format.mins:
                assert tile.offset is not None
                offsets.append(tile_format.center * scale + tile.offset.scale * tile.offset.row(b))
        middles = [float(tile_format.center << block.shift) * 2.0**_RAISED for block in blocks]
        yield _weights([block.values for block in blocks], scales, offsets, middles, terms)


def _weights(values: list, scales: list, offsets: list, middles: list[float], terms: int) -> list[jax.Array]:
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
            weigh = _rounded if terms == 1 else _in_two_terms
            of_half = [weigh(s, o) for s, o in zip(scale, offset, strict=True)]
            # In the order (sixteen weights, pair, half of the rows).
            for i, register in enumerate(arrays[b].registers.flatten()):
                centered = _fma2(_word(register), _both(2.0**_RAISE), _both(-middles[b]))
                for term, word in zip(registers, of_half[i % 2](centered), strict=True):
                    term.append(as_bf16(word))
        return [fragmented(term, A, (64, PIECE), jnp.bfloat16) for term in registers]

    return scaled(*values, *scales, *offsets)


def _rounded(scale: Any, offset: Any):
    """A function from a pair of centred codes to the pair of weights, rounded."""
    scale = packed(scale, scale)
    if offset is None:
        return lambda pair: [mosaic_utils.inline_ptx("mul.rn.bf16x2 $0, $1, $2;", pair, scale, result_types=pair.type)]
    offset = packed(offset, offset)
    return lambda pair: [_fma2(pair, scale, offset)]


def _in_two_terms(scale: Any, offset: Any):
    offset = mosaic_utils.c(0.0, ir.F32Type.get()) if offset is None else offset

    def weigh(pair):
        exact = [
            mosaic_utils.inline_ptx("fma.rn.f32 $0, $1, $2, $3;", value, scale, offset, result_types=value.type)
            for value in unpacked(pair)
        ]
        high = packed(*exact)
        rest = [arith.subf(value, rounded) for value, rounded in zip(exact, unpacked(high), strict=True)]
        return [high, packed(*rest)]

    return weigh


def _row_halves(array: Any) -> list:
    """A lane's two values of an array [64], f32."""
    return [vector.extract(register, [], [0]) for register in array.registers.flatten()]


def _word(register: Any):
    return mosaic_utils.bitcast(register, ir.IntegerType.get_signless(32))


def _both(value: float):
    """A constant that bf16 holds exactly, in both halves of a word."""
    exact = np.array(value, jnp.bfloat16)
    assert float(exact) == value
    return both_halves(int(exact.view(np.uint16)))


def _fma2(a, b, c):
    return mosaic_utils.inline_ptx("fma.rn.bf16x2 $0, $1, $2, $3;", a, b, c, result_types=a.type)


def packed(low, high):
    """Two f32 rounded to a pair of bf16."""
    word = ir.IntegerType.get_signless(32)
    return mosaic_utils.inline_ptx("cvt.rn.bf16x2.f32 $0, $1, $2;", high, low, result_types=word)


def unpacked(pair) -> list:
    """The f32 values of a pair of bf16."""
    bits = arith.shli(pair, i32(16)), arith.andi(pair, i32(-65536))
    return [mosaic_utils.bitcast(word, ir.F32Type.get()) for word in bits]
