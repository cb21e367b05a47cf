"""Register-level steps that Pallas cannot say: arrays re-read in another layout without moving a bit.

The tensor core's m16n8k16 wants, of each 16 weights of a row, lane q's pairs (2q, 2q+1) and (2q+8, 2q+9). A load of
four neighbouring bytes gives lane q weights 4q..4q+3. The sum over D does not care for order: weights 4q, 4q+2 take
the first pair's place and 4q+1, 4q+3 the second's, and x is stored in that order (x_tiles.py). So no shuffle, here
or at load, and bytes 0 and 2 of a word are a pair as they lie.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._compat import arith, gpu, ir, memref, mgpu, mosaic_utils, plgpu, vector

LHS_BYTES = plgpu.Layout.MMA_LHS(jnp.int8, m_warps=4)
LHS = plgpu.Layout.MMA_LHS(jnp.bfloat16, m_warps=4)
RHS = plgpu.Layout.MMA_RHS(jnp.bfloat16, m_warps=4)
ACC = plgpu.Layout.MMA_ACC(jnp.bfloat16, m_warps=4)
ROW = ACC.reduce(1)  # [64]: one value a weight row
THREADS = plgpu.Layout.WG_STRIDED((128,), vec_size=1)  # [128]: one a thread


def i32(value: int):
    return mosaic_utils.c(value, ir.IntegerType.get_signless(32))


def index(value: int):
    return mosaic_utils.c(value, ir.IndexType.get())


def thread_in_warpgroup():
    return arith.remui(gpu.thread_id(gpu.Dimension.x), index(128))


def lane_in_warp():
    return arith.remui(thread_in_warpgroup(), index(32))


def rows_of_lane() -> list:
    """A lane's two rows of the tile: of its warp's sixteen, those 8 apart."""
    thread = thread_in_warpgroup()
    warp, lane = arith.divui(thread, index(32)), arith.remui(thread, index(32))
    first = arith.addi(arith.muli(warp, index(16)), arith.divui(lane, index(4)))
    return [first, arith.addi(first, index(8))]


def fragmented(registers, layout, shape, dtype):
    """A FragmentedArray of ``registers`` (a flat list in the layout's order)."""
    tiled = layout.to_mgpu()
    signed = None
    if jnp.issubdtype(dtype, jnp.integer):
        signed = bool(jnp.issubdtype(dtype, jnp.signedinteger))
    array = np.empty(len(registers), object)
    array[:] = registers
    return mgpu.FragmentedArray(
        _registers=array.reshape(tiled.registers_shape(shape)), _layout=tiled, _is_signed=signed
    )


def tiled(shape: tuple[int, ...], dtype: Any, swizzle: int) -> Any:
    """Shared memory as the copy engine fills it with ``swizzle``: rows by eight, of so many bytes."""
    transforms = (plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def single(value):
    """A register of one number, as layouts have it that give a lane one of a row."""
    return vector.broadcast(ir.VectorType.get((1,), value.type), value)


def load_bytes(plane, width: int = 0, parts: tuple[int, ...] = ()) -> jax.Array:
    """A row plane [64, n] in SMEM, or ``width`` bytes of each of those ``parts`` -> [64, bytes] in LHS_BYTES layout."""
    if hasattr(plane, "bytes"):
        return plane.bytes(width, parts)
    if len(parts) * width not in (0, plane.shape[1]):
        raise NotImplementedError("parts of a plane are read through a View")
    return plgpu.load(plane, layout=LHS_BYTES)


def load_rows(ref) -> jax.Array:
    """[J, 64 / J] in SMEM, J pieces of a tile's rows that lie apart -> [64] in ROW layout."""
    if hasattr(ref, "rows"):
        return ref.rows()
    pieces, height = ref.shape
    if pieces == 1:
        return plgpu.load(ref.at[0], layout=ROW)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((64,), ref.dtype, layout=ROW))
    def load(_, ref):
        registers = []
        for row in rows_of_lane():
            value = memref.load(ref, [arith.divui(row, index(height)), arith.remui(row, index(height))])
            registers.append(single(value))
        return fragmented(registers, ROW, (64,), ref_dtype)

    ref_dtype = ref.dtype
    return load(ref)


def load_factors(ref, per: int, shift: int = 0) -> jax.Array:
    """A column plane of small integers, one for ``per`` (16 or 32) weights, [J, 256 / per, 64 / J] in SMEM, pieces of a
    tile's rows that lie apart -> bf16[64, 16] in LHS layout: each of a chunk's 16 sixteens' factor, ``entry >> shift``.
    """
    if hasattr(ref, "factors"):
        return ref.factors(per, shift)
    pieces, _, height = ref.shape
    signed = jnp.issubdtype(ref.dtype, jnp.signedinteger)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((64, 16), jnp.bfloat16, layout=LHS)
    )
    def load(_, ref):
        f32, i32_type = ir.F32Type.get(), ir.IntegerType.get_signless(32)
        quad = arith.remui(lane_in_warp(), index(4))

        def float_bits(entry, row):
            value = memref.load(ref, [arith.divui(row, index(height)), entry, arith.remui(row, index(height))])
            if shift:
                value = arith.shrui(value, mosaic_utils.c(shift, value.type))
            number = arith.sitofp(f32, value) if signed else arith.uitofp(f32, value)
            return mosaic_utils.bitcast(number, i32_type)

        registers = []
        for pair in range(2):  # a lane's sixteens 2q, 2q+1 and 2q+8, 2q+9
            for row in rows_of_lane():
                if per == 32:
                    entries = [arith.addi(quad, index(4 * pair))] * 2
                else:
                    first = arith.addi(arith.muli(quad, index(2)), index(8 * pair))
                    entries = [first, arith.addi(first, index(1))]
                low = float_bits(entries[0], row)
                high = low if per == 32 else float_bits(entries[1], row)
                # The upper halves of two small integers' f32 bits are their bf16 bits.
                registers.append(
                    as_bf16(mosaic_utils.inline_ptx("prmt.b32 $0, $1, $2, 0x7632;", low, high, result_types=i32_type))
                )
        return fragmented(registers, LHS, (64, 16), jnp.bfloat16)

    del pieces
    return load(ref)


def load_half_factors(ref) -> list[jax.Array]:
    """A column plane of f16 bits, one for 32 weights, [J, 8, 64 / J] in SMEM -> two terms, as :func:`load_factors`,
    whose sum is each of a chunk's 16 sixteens' number."""
    height = ref.shape[2]
    term = plgpu.ShapeDtypeStruct((64, 16), jnp.bfloat16, layout=LHS)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=[term, term])
    def load(_, ref):
        f32, bf16 = ir.F32Type.get(), ir.BF16Type.get()
        quad = arith.remui(lane_in_warp(), index(4))
        terms: list[list] = [[], []]
        for pair in range(2):  # a lane's sixteens 2q, 2q+1 and 2q+8, 2q+9 are the two of groups q and q + 4
            entry = arith.addi(quad, index(4 * pair))
            for row in rows_of_lane():
                bits = memref.load(ref, [arith.divui(row, index(height)), entry, arith.remui(row, index(height))])
                rest = arith.extf(f32, mosaic_utils.bitcast(bits, ir.F16Type.get()))
                for registers in terms:
                    rounded = arith.truncf(bf16, rest)
                    registers.append(vector.broadcast(ir.VectorType.get((2,), bf16), rounded))
                    rest = arith.subf(rest, arith.extf(f32, rounded))
        return [fragmented(registers, LHS, (64, 16), jnp.bfloat16) for registers in terms]

    return load(ref)


def constant_factor(value: int, group: int) -> jax.Array:
    """bf16[64, 16] in LHS layout: ``value`` for the two sixteens of a chunk's 32-weight group, zero for the others."""
    bits = int(np.array(value, jnp.bfloat16).view(np.uint16))

    @plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((64, 16), jnp.bfloat16, layout=LHS))
    def make(_):
        mine = arith.cmpi(arith.CmpIPredicate.eq, arith.remui(lane_in_warp(), index(4)), index(group % 4))
        chosen, zero = as_bf16(arith.select(mine, both_halves(bits), i32(0))), as_bf16(i32(0))
        pairs = [chosen if pair == group // 4 else zero for pair in range(2)]
        return fragmented([value for value in pairs for _ in range(2)], LHS, (64, 16), jnp.bfloat16)

    return make()


def words_of(array) -> list:
    """A lane's registers as [sixteen bytes of a row][row, row + 8] words."""
    i32_type = ir.IntegerType.get_signless(32)
    flat = [mosaic_utils.bitcast(register, i32_type) for register in array.registers.flatten()]
    return [flat[i : i + 2] for i in range(0, len(flat), 2)]


def byte_pairs(word) -> tuple:
    """Words whose low bytes of the 16-bit halves are bytes (0, 2) and (1, 3); what stands above is to be masked."""
    return word, arith.shrui(word, i32(8))


def shifted(word, shift: int):
    """``word >> shift``; a negative shift goes left."""
    if shift == 0:
        return word
    return arith.shrui(word, i32(shift)) if shift > 0 else arith.shli(word, i32(-shift))


def masked(pair, mask: int):
    """``pair & mask`` in both halves."""
    return arith.andi(pair, both_halves(mask))


def merged(word, other, mask: int):
    """In each byte the bits of ``word`` where ``mask`` has ones, those of ``other`` where it has zeros: one lop3."""
    return mosaic_utils.inline_ptx(
        "lop3.b32 $0, $1, $2, $3, 0xE4;",
        word,
        other,
        i32(_signed(mask * 0x01010101)),
        result_types=ir.IntegerType.get_signless(32),
    )


def permuted(word, other, places):
    """The four bytes of ``word`` and ``other`` (bytes 4 to 7) that the low four nibbles of ``places`` name."""
    return mosaic_utils.inline_ptx("prmt.b32 $0, $1, $2, $3;", word, other, places, result_types=word.type)


HALF_TWICE = tuple(
    f"{{ .reg .b16 h<2>; mov.b32 {{h0, h1}}, $1; mov.b32 $0, {{{half}, {half}}}; }}" for half in ("h0", "h1")
)


def half_twice(word, half: int):
    """The lower or upper 16 bits of a word in both halves. No instruction: arithmetic in pairs reads either half."""
    return mosaic_utils.inline_ptx(HALF_TWICE[half], word, result_types=word.type)


def both_halves(value: int):
    """A 16-bit constant in both halves of a word."""
    return i32(_signed(value * 0x10001))


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


def as_bf16(pair):
    return mosaic_utils.bitcast(pair, ir.VectorType.get((2,), ir.BF16Type.get()))
