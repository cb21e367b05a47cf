"""Weights as the tensor core's left operand: rounded to bf16, or as the sum of two bf16 terms.

    w[o, k] = s * a + z,   s = d * scale,   z = offset - bias * s,   in f32, then rounded once

A code comes as the bf16 number a * 2^(shift - 133) (decode.py), a pair of them in a word, which are the upper halves of
the f32 numbers to multiply. Weights leave times 1 / X_SCALE, and x comes times X_SCALE: a scale times 2^133 would be no
number. Two terms are 16 bits of the weight.

bf16's own multiplication takes half the instructions. But s and z rounded to bf16 each cost as much as rounding the
weight: of a layer's largest error, 0.029 to 0.036 of the rms, they make 0.037 to 0.052, and the contract is 0.05. Where
scales are whole, integers and a d for all of a chunk, they need not be rounded:

    w[o, k] = d * (s * a + z) + d * r,   s = scale,   z = offset / d - bias * s in bf16,   r what that left of it

with s * a + z rounded once, d multiplied into the sums, and r times sums of x (x_rows.py) added to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ._compat import arith, ir, mosaic_utils, plgpu, vector
from .decode import CHUNK, PART, TILE_FORMATS, Plane
from .registers import LHS, ROW, THREADS, as_bf16, both_halves, fragmented, half_twice, i32, single
from .simt import Float
from .x_tiles import CODE, PRODUCT, X_SCALE

A = plgpu.Layout.WGMMA


# A dense projection is a format of one plane.
DENSE = {dtype.__name__: (Plane(dtype, 1, True),) for dtype in (jnp.bfloat16, jnp.float16)}


def planes_of(name: str) -> tuple[Plane, ...]:
    return DENSE[name] if name in DENSE else TILE_FORMATS[name].planes


def tile_bytes(name: str) -> int:
    """Of 64 rows of a chunk of weights in shared memory, half a KiB for the alignment of their planes included."""
    return 512 + sum(64 * CHUNK // plane.per * jnp.dtype(plane.dtype).itemsize for plane in planes_of(name))


def has_whole_scales(name: str) -> bool:
    """Whether sub-blocks' scales are integers and super-blocks have a d, so that :func:`whole_part` can take it: a bias
    times a scale must be exact in bf16."""
    if name in DENSE:
        return False
    bias = TILE_FORMATS[name].bias
    return bias & (bias - 1) == 0 and any(plane.per == CHUNK for plane in planes_of(name))


def has_mins(name: str) -> bool:
    return has_whole_scales(name) and TILE_FORMATS[name].bias == 0


def stored_factors(name: str, whole: bool) -> int:
    """Words that :func:`factors`, or :func:`whole_factors`, gives for a row of a part."""
    numbers = TILE_FORMATS[name].per_part * (1 + _has_offsets(name))
    return numbers // 2 if whole else numbers


def _has_offsets(name: str) -> bool:
    """Whether z is stored beside s, and not made of it: where sub-blocks are few, or have mins."""
    tile_format = TILE_FORMATS[name]
    return tile_format.weights == 32 or not tile_format.bias


def factors(name: str, planes: Sequence[Any], parts: Sequence[int]) -> list[jax.Array]:
    """s, or s and z, f32[rows], of each sub-block of some parts: what a row's weights take beside their codes."""
    tile_format = TILE_FORMATS[name]
    scales = tile_format.scales(*planes)
    found = []
    for b in _sub_blocks(tile_format, parts):
        unit = 1 / tile_format.product / (1 << tile_format.shift(b))
        scale = scales.of(b)
        found.append(scale * unit if scales.d is None else scale * (scales.d * unit))
        if not _has_offsets(name):
            continue
        if scales.offset is None:
            found.append(scale * (-tile_format.bias * (PRODUCT / tile_format.product) / X_SCALE))
        elif scales.offset.scale is None:
            found.append(scales.offset.row(b) * (1 / X_SCALE))
        else:
            found.append((scales.offset.scale / X_SCALE) * scales.offset.row(b))
    return found


class WholeFactors(NamedTuple):
    """What a row's weights take beside their codes where scales are whole, by row."""

    words: list[jax.Array]  # u32, two bf16: s and z of each sub-block, or s of two
    rests: list[jax.Array]  # u32: what z in bf16 left of it, of two sub-blocks
    unit: jax.Array  # f32: what the sums are multiples of
    inverse: jax.Array  # f32


def whole_factors(name: str, planes: Sequence[Any], parts: Sequence[int]) -> WholeFactors:
    """Of each sub-block of some parts; 32-bit numbers [rows] in THREADS layout."""
    tile_format = TILE_FORMATS[name]
    scales = tile_format.scales(*planes)
    assert scales.d is not None
    # A super-block of zeros may still have mins.
    is_zero = scales.d == 0
    unit = jnp.where(is_zero, 1.0, scales.d)
    inverse = 1 / unit
    one = jnp.where(is_zero, 0.0, 1.0)
    s, z = [], []
    for b in _sub_blocks(tile_format, parts):
        s.append(scales.of(b) * (one * (1 / PRODUCT / (1 << tile_format.shift(b)))))
        if has_mins(name):
            z.append(scales.offset.row(b) * (scales.offset.scale * inverse * (1 / X_SCALE)))
        elif _has_offsets(name):
            z.append(scales.of(b) * (one * (-tile_format.bias / X_SCALE)))
    rows = unit.shape
    word = plgpu.ShapeDtypeStruct(rows, jnp.uint32, layout=THREADS)
    # Two of a lane's sixteens lie 32 weights apart: in the order of x_rows.py's sums.
    step = 32 // tile_format.weights
    firsts = [i + j for i in range(0, len(z), 2 * step) for j in range(step)] if has_mins(name) else []

    low, high = (s, z) if z else (s[::2], s[1::2])
    count = len(low)

    @plgpu.inline_mgpu(arg_types=(THREADS,) * (2 * count), return_type=[word] * (count + len(firsts)))
    def rounded(_, *numbers):
        numbers = [vector.extract(number.registers.item(), [], [0]) for number in numbers]
        words = [packed(low, high) for low, high in zip(numbers[:count], numbers[count:], strict=True)]
        rests = [arith.subf(n, unpacked(w)[1]) for n, w in zip(numbers[count:], words, strict=True)]
        words += [packed(rests[i], rests[i + step]) for i in firsts]
        return [fragmented([single(word)], THREADS, rows, jnp.uint32) for word in words]

    words = rounded(*low, *high)
    return WholeFactors(words[:count], words[count:], unit, inverse)


def _sub_blocks(tile_format: Any, parts: Sequence[int]) -> list[int]:
    return [part * tile_format.per_part + i for part in parts for i in range(tile_format.per_part)]


def whole_part(name: str, planes: Sequence[Any], words: Sequence[jax.Array], part: int) -> jax.Array:
    """bf16[64, PART] of a part of a chunk, in units of d; ``words`` u32[64] as :func:`whole_factors` gives them."""
    tile_format = TILE_FORMATS[name]
    values = tile_format.codes(*planes, parts=(part,))
    count, first = tile_format.per_part, part * tile_format.per_part

    @plgpu.inline_mgpu(
        arg_types=(LHS, *(ROW,) * len(words)),
        return_type=plgpu.ShapeDtypeStruct((64, PART), jnp.bfloat16, layout=A),
    )
    def scaled(_, values, *words):
        registers, codes = [], values.registers.flatten()
        words = [_row_halves(word) for word in words]
        for b in range(count):
            if _has_offsets(name):
                scale = [half_twice(word, 0) for word in words[b]]
                offset = [half_twice(word, 1) for word in words[b]]
            else:
                # Two sub-blocks of a word are of one 32, whose codes are shifted alike.
                multiple = -tile_format.bias * CODE * (1 << tile_format.shift(first + b))
                scale = [half_twice(word, b % 2) for word in words[b // 2]]
                offset = [half_twice(_times_bf16(word, multiple), b % 2) for word in words[b // 2]]
            # In the order (sixteen weights, pair, half of the rows).
            for i, register in enumerate(codes[b * len(codes) // count : (b + 1) * len(codes) // count]):
                word = mosaic_utils.bitcast(register, ir.IntegerType.get_signless(32))
                registers.append(as_bf16(_fma_bf16(word, scale[i % 2], offset[i % 2])))
        return fragmented(registers, A, (64, PART), jnp.bfloat16)

    return scaled(values, *words)


def _fma_bf16(a, b, c):
    # Codes are subnormal numbers, which bf16's arithmetic keeps.
    return mosaic_utils.inline_ptx("fma.rn.bf16x2 $0, $1, $2, $3;", a, b, c, result_types=a.type)


def _times_bf16(a, factor: float):
    bits = int(np.array(factor, jnp.bfloat16).view(np.uint16))
    return mosaic_utils.inline_ptx("mul.rn.bf16x2 $0, $1, $2;", a, both_halves(bits), result_types=a.type)


def part(name: str, planes: Sequence[Any], factors: Sequence[jax.Array], part: int, terms: int) -> list[jax.Array]:
    """The terms, bf16[64, PART] each, of a part of a chunk; ``planes`` as decode.py takes them, ``factors`` f32[64] as
    the function of that name gives them."""
    if name in DENSE:
        return _dense_weights(planes[0].halves((part,), PART), terms)
    tile_format = TILE_FORMATS[name]
    values = tile_format.codes(*planes, parts=(part,))
    # An integer that stands below another one adds 2^-8 of a code at most; a sign bit, as E2M1 codes have, does more.
    clean = terms > 1 or tile_format.product != PRODUCT
    if _has_offsets(name):
        return _weights(values, factors[::2], factors[1::2], terms, clean)
    first, unit = part * tile_format.per_part, tile_format.product / X_SCALE
    multiples = [-tile_format.bias * unit * (1 << tile_format.shift(first + i)) for i in range(len(factors))]
    return _weights(values, factors, multiples, terms, clean)


def _dense_weights(values: jax.Array, terms: int) -> list[jax.Array]:
    result = plgpu.ShapeDtypeStruct((64, PART), jnp.bfloat16, layout=A)

    @plgpu.inline_mgpu(arg_types=(LHS,), return_type=[result] * terms)
    def scaled(_, array):
        f32 = ir.F32Type.get()
        registers: list[list] = [[] for _ in range(terms)]
        for register in array.registers.flatten():
            numbers = [arith.extf(f32, vector.extract(register, [], [i])) for i in range(2)]
            _append_terms(registers, [arith.mulf(n, mosaic_utils.c(1 / X_SCALE, f32)) for n in numbers])
        return [fragmented(term, A, (64, PART), jnp.bfloat16) for term in registers]

    return scaled(values)


def _append_terms(registers: list[list], rest: list) -> None:
    """To each term's registers the pair of bf16 that is nearest to what the ones before it left of two f32."""
    for term in registers:
        pair = packed(*rest)
        term.append(as_bf16(pair))
        rest = [arith.subf(value, rounded) for value, rounded in zip(rest, unpacked(pair), strict=True)]


def _weights(values: jax.Array, scales: Sequence, offsets: Sequence, terms: int, clean: bool) -> list[jax.Array]:
    """``offsets`` f32[64] each, or how many times the scale each is."""
    count, rows = len(scales), [*scales, *(o for o in offsets if not isinstance(o, float))]
    result = plgpu.ShapeDtypeStruct((64, PART), jnp.bfloat16, layout=A)

    @plgpu.inline_mgpu(arg_types=(LHS, *(ROW,) * len(rows)), return_type=[result] * terms)
    def scaled(_, values, *rows):
        registers: list[list] = [[] for _ in range(terms)]
        pairs = values.registers.flatten()
        for b in range(count):
            scale, multiple = _row_halves(rows[b]), offsets[b]
            if isinstance(multiple, float):
                offset = [_times(value, multiple) for value in scale]
            else:
                offset = _row_halves(rows[count + b])
            # In the order (sixteen weights, pair, half of the rows).
            for i, register in enumerate(pairs[b * len(pairs) // count : (b + 1) * len(pairs) // count]):
                word = mosaic_utils.bitcast(register, ir.IntegerType.get_signless(32))
                low, high = unpacked(word, clean)
                _append_terms(registers, [_fma(value, scale[i % 2], offset[i % 2]) for value in (low, high)])
        return [fragmented(term, A, (64, PART), jnp.bfloat16) for term in registers]

    return scaled(values, *rows)


def _row_halves(array: Any) -> list:
    """A lane's two values of an array [64]."""
    return [vector.extract(register, [], [0]) for register in array.registers.flatten()]


def _fma(a, b, c):
    # Codes are subnormal numbers: not ftz.
    return mosaic_utils.inline_ptx("fma.rn.f32 $0, $1, $2, $3;", a, b, c, result_types=a.type)


def _times(a, factor: float):
    # The factor may be subnormal too.
    bits = int(np.float32(factor).view(np.uint32))
    return mosaic_utils.inline_ptx(f"mul.rn.f32 $0, $1, 0f{bits:08X};", a, result_types=a.type)


def bf16_terms(values: Sequence[Float], terms: int) -> list:
    """Words of two bf16 each, whose sum is the two ``values`` to 8 bits a term."""
    words = []
    for _ in range(terms):
        words.append(packed(*(value.value for value in values)))
        rounded = unpacked(words[-1])
        values = [Float(arith.subf(v.value, r)) for v, r in zip(values, rounded, strict=True)]
    return words


def packed(low, high):
    """Two f32 rounded to a pair of bf16."""
    word = ir.IntegerType.get_signless(32)
    return mosaic_utils.inline_ptx("cvt.rn.bf16x2.f32 $0, $1, $2;", high, low, result_types=word)


def unpacked(pair, clean: bool = True) -> list:
    """The f32 values of a pair of bf16; unless ``clean`` the lower one's bits stay behind the upper one's."""
    bits = arith.shli(pair, i32(16)), arith.andi(pair, i32(-65536)) if clean else pair
    return [mosaic_utils.bitcast(word, ir.F32Type.get()) for word in bits]
