"""What one warpgroup does with the partial sums of a unit, thread by thread: SwiGLU, or topk_weights.

    h[s, c] = silu(gate_e x[s, c]) * up_e x[s, c]     swiglu_epilogue
    out[pair(s, c)] = weight[s, c] * down_e h[s, c]   weighted_epilogue

Each warpgroup's sums are added in a fixed order, so that results are equal from run to run.
"""

from __future__ import annotations

from . import matrices
from ._compat import arith, ir, memref, mosaic_utils, pl, plgpu, scf
from .decode import TILE_FORMATS
from .phases import LANES, TILE, Phase
from .registers import i32, index, thread_in_warpgroup
from .simt import Word
from .x_tiles import GROUP, store_value


def _sum_parts(phase: Phase, parts, source: int, row, columns: list):
    """y of one row, from the warpgroups' sums f32[WARPGROUPS, TILE, COLUMNS]: rows of gate, of up, or of down."""
    if phase.by_rows:
        lane = index(source) if len(phase.formats) == 2 else arith.divui(row, index(TILE))
        lanes, row = [lane], arith.remui(row, index(TILE))
    else:
        lanes, row = [index(lane) for lane in range(LANES)], arith.addi(row, index(source * phase.height))
    if matrices.readable(phase.formats[source]):
        row = matrices.place_of_row(Word(arith.index_cast(ir.IntegerType.get_signless(32), row))).index
    total = None
    for lane in lanes:
        for column in columns:
            value = memref.load(parts, [lane, row, column])
            total = value if total is None else arith.addf(total, value)
    product = TILE_FORMATS[phase.formats[source]].product
    return arith.mulf(total, mosaic_utils.c(1.0 / product, ir.F32Type.get()))


def _items(count: int):
    """This thread's indices i, 128 apart, from 0 to ``count``, and whether i may lie past the end."""
    thread = thread_in_warpgroup()
    for first in range(0, count, 128):
        yield arith.addi(thread, index(first)), (first + 128 > count)


class _guarded:
    """``with _guarded(condition): ...`` runs the body where the condition holds."""

    def __init__(self, condition):
        self.point = ir.InsertionPoint(scf.IfOp(condition).then_block)

    def __enter__(self):
        self.point.__enter__()

    def __exit__(self, *error):
        scf.yield_([])
        self.point.__exit__(*error)


def _below(a, b):
    return arith.cmpi(arith.CmpIPredicate.ult, a, b)


def swiglu_epilogue(phase: Phase):
    """h = silu(g) * u as phase 2's x (x_tiles.py): u32[P, I / 32, words], of which it gets the slot's."""
    height, tokens, parts = phase.unit_outputs, phase.tokens, phase.parts

    def run(parts_ref, unit, slot_h_ref):
        h_ref = slot_h_ref.at[pl.ds(unit * (height // GROUP), height // GROUP)]

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 2)
        def epilogue(_, partial, h_ref):
            constant = lambda value: mosaic_utils.c(value, ir.F32Type.get())  # noqa: E731

            # A warp takes 32 rows of a token, so that lanes can add up a sub-block.
            for item, partly in _items(height * tokens):
                row, token = arith.remui(item, index(height)), arith.divui(item, index(height))
                if partly:  # a warp whose token is past the end repeats the last: same values, same places
                    token = arith.minui(token, index(tokens - 1))
                columns = [arith.addi(token, index(part * tokens)) for part in range(parts)]
                g, u = (_sum_parts(phase, partial, source, row, columns) for source in range(2))
                power = mosaic_utils.inline_ptx(
                    "ex2.approx.f32 $0, $1;", arith.mulf(g, constant(-1.4426950408889634)), result_types=g.type
                )
                h = arith.mulf(arith.divf(g, arith.addf(constant(1.0), power)), u)
                row, token = (Word(arith.index_cast(ir.IntegerType.get_signless(32), i)) for i in (row, token))
                store_value(h, h_ref, (row // GROUP,), token, row % GROUP, tokens, parts)

        epilogue(parts_ref, h_ref)

    return run


def weighted_epilogue(phase: Phase):
    """out[pair] = weight * (down h) for the pairs of a slot: pair i32[C] (-1: none), weight f32[C]."""
    tokens, parts, height = phase.tokens, phase.parts, phase.unit_outputs

    def run(parts_ref, unit, pair_ref, weight_ref, out_ref):
        @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType(),) * 4, plgpu.Layout.WG_SPLAT))
        def epilogue(_, partial, pair_ref, weight_ref, out_ref, unit):
            base = arith.muli(arith.index_cast(ir.IndexType.get(), unit.registers.item()), index(height))
            for item, partly in _items(height * tokens):
                row, token = arith.remui(item, index(height)), arith.divui(item, index(height))
                if partly:
                    token = arith.minui(token, index(tokens - 1))
                pair = memref.load(pair_ref, [token])
                place = arith.addi(base, row)
                served = arith.cmpi(arith.CmpIPredicate.sge, pair, i32(0))
                with _guarded(arith.andi(served, _below(place, index(phase.outputs)))):
                    columns = [arith.addi(token, index(part * tokens)) for part in range(parts)]
                    value = _sum_parts(phase, partial, 0, row, columns)
                    weighted = arith.mulf(value, memref.load(weight_ref, [token]))
                    memref.store(weighted, out_ref, [arith.index_cast(ir.IndexType.get(), pair), place])

        epilogue(parts_ref, pair_ref, weight_ref, out_ref, unit)

    return run
