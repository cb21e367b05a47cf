"""Register-level steps that Pallas cannot say: arrays re-read in another layout without moving a bit.

The tensor core's m16n8k16 wants, of each 16 weights of a row, lane q's pairs (2q, 2q+1) and (2q+8, 2q+9). A load of
four neighbouring bytes gives lane q weights 4q..4q+3. The sum over D does not care for order: weights 4q, 4q+2 take
the first pair's place and 4q+1, 4q+3 the second's, and x is stored in that order (layer.sixteens). So no shuffle, here
or at load, and bytes 0 and 2 of a word are a pair as they lie.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ._compat import arith, gpu, ir, llvm, memref, mgpu, mosaic_utils, plgpu, vector

LHS_BYTES = plgpu.Layout.MMA_LHS(jnp.int8, m_warps=4)
LHS = plgpu.Layout.MMA_LHS(jnp.bfloat16, m_warps=4)
RHS = plgpu.Layout.MMA_RHS(jnp.bfloat16, m_warps=4)
ACC = plgpu.Layout.MMA_ACC(jnp.bfloat16, m_warps=4)
ROW = ACC.reduce(1)  # [64]: one value a weight row
COL = ACC.reduce(0)  # [N]: one value a column of x


def i32(value: int):
    return mosaic_utils.c(value, ir.IntegerType.get_signless(32))


def index(value: int):
    return mosaic_utils.c(value, ir.IndexType.get())


def thread_in_warpgroup():
    return arith.remui(gpu.thread_id(gpu.Dimension.x), index(128))


def lane_in_warp():
    return arith.remui(thread_in_warpgroup(), index(32))


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


def load_rows(ref) -> jax.Array:
    """[J, 64 / J] in SMEM, J pieces of a tile's rows that lie apart -> [64] in ROW layout."""
    pieces, height = ref.shape
    if pieces == 1:
        return plgpu.load(ref.at[0], layout=ROW)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((64,), ref.dtype, layout=ROW))
    def load(_, ref):
        thread = thread_in_warpgroup()
        warp, lane = arith.divui(thread, index(32)), arith.remui(thread, index(32))
        first = arith.addi(arith.muli(warp, index(16)), arith.divui(lane, index(4)))
        registers = []
        for eight in (0, 8):  # a lane's two rows of its warp's sixteen
            row = arith.addi(first, index(eight))
            value = memref.load(ref, [arith.divui(row, index(height)), arith.remui(row, index(height))])
            registers.append(vector.broadcast(ir.VectorType.get((1,), value.type), value))
        return fragmented(registers, ROW, (64,), ref_dtype)

    ref_dtype = ref.dtype
    return load(ref)


def load_x(ref, rows: int, columns: int) -> jax.Array:
    """x tiles of sixteen weights, bf16[k / 16, rows * 16] in SMEM -> bf16[k, columns] in RHS layout.

    Column n reads row n % rows: columns beyond the rows repeat them, so no column ever holds what was not written.
    """
    tiles = ref.shape[0]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct((tiles * 16, columns), jnp.bfloat16, layout=RHS),
    )
    def load(_, ref):
        bf16 = ir.BF16Type.get()
        four, pair = ir.VectorType.get((4,), bf16), ir.VectorType.get((2,), bf16)
        lane = lane_in_warp()
        base = mosaic_utils.memref_ptr(ref)
        registers = np.empty((tiles, columns // 8, 2), object)
        for n8 in range(columns // 8):
            column = arith.addi(arith.divui(lane, index(4)), index(8 * n8))
            offset = arith.addi(
                arith.muli(arith.remui(column, index(rows)), index(16)),
                arith.muli(arith.remui(lane, index(4)), index(4)),
            )
            offset = arith.index_cast(ir.IntegerType.get_signless(32), offset)
            for tile in range(tiles):
                at = arith.addi(offset, i32(tile * rows * 16))
                values = llvm.load(four, mosaic_utils.getelementptr(base, [at], bf16))
                for half in range(2):
                    piece = mosaic_utils.vector_slice(values, slice(2 * half, 2 * half + 2))
                    registers[tile, n8, half] = mosaic_utils.bitcast(piece, pair)
        return fragmented(list(registers.flatten()), RHS, (tiles * 16, columns), jnp.bfloat16)

    return load(ref)


def load_columns(ref, rows: int, columns: int) -> jax.Array:
    """f32[>= rows] in SMEM -> f32[columns] in COL layout; column n reads entry n % rows, as in :func:`load_x`."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((columns,), jnp.float32, layout=COL)
    )
    def load(_, ref):
        pair = ir.VectorType.get((2,), ir.F32Type.get())
        first = arith.muli(arith.remui(lane_in_warp(), index(4)), index(2))
        registers = []
        for n8 in range(columns // 8):
            values = [
                memref.load(ref, [arith.remui(arith.addi(first, index(8 * n8 + i)), index(rows))]) for i in range(2)
            ]
            registers.append(vector.from_elements(pair, values))
        return fragmented(registers, COL, (columns,), jnp.float32)

    return load(ref)


def words_of(array) -> list:
    """A lane's registers as [sixteen bytes of a row][row, row + 8] words."""
    i32_type = ir.IntegerType.get_signless(32)
    flat = [mosaic_utils.bitcast(register, i32_type) for register in array.registers.flatten()]
    return [flat[i : i + 2] for i in range(0, len(flat), 2)]


def byte_pairs(word) -> tuple:
    """Words whose low bytes of the 16-bit halves are bytes (0, 2) and (1, 3); what stands above is to be masked."""
    return word, arith.shrui(word, i32(8))


def field(pair, shift: int, mask: int, base):
    """``base | (pair >> shift) & mask`` in both halves; a negative shift goes left.

    lop3 by name: with two constants in one expression the assembler would spend two instructions.
    """
    if shift > 0:
        pair = arith.shrui(pair, i32(shift))
    elif shift < 0:
        pair = arith.shli(pair, i32(-shift))
    return mosaic_utils.inline_ptx(
        "lop3.b32 $0, $1, $2, $3, 0xEA;", pair, i32(mask * 0x10001), base, result_types=ir.IntegerType.get_signless(32)
    )


def both_halves(value: int):
    """A 16-bit constant in both halves of a word. As a bf16, 0x4300 | v is 128 + v and 0x4500 | v is 2048 + 16 v."""
    return i32(value * 0x10001)


def as_bf16(pair):
    return mosaic_utils.bitcast(pair, ir.VectorType.get((2,), ir.BF16Type.get()))
