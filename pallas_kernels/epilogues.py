"""What one warpgroup does with the partial sums of a unit, thread by thread (semantics.py).

    h[s, c] = act(gate_e x[s, c], up_e x[s, c])       hidden_epilogue
    out[pair(s, c)] = weight[s, c] * down_e h[s, c]   output_epilogue

Each warpgroup's sums are added in a fixed order, so that results are equal from run to run.
"""

from __future__ import annotations

from . import matrices, simt
from ._compat import arith, ir, memref, mosaic_utils, pl, plgpu, scf
from .decode import TILE_FORMATS
from .phases import LANES, TILE, Phase
from .registers import i32, index, thread_in_warpgroup
from .semantics import Semantics, activate
from .simt import Float, Word
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


def _float(ref, *place) -> Float:
    """One number of any width, as f32."""
    value = memref.load(ref, list(place))
    return Float(value if isinstance(value.type, ir.F32Type) else arith.extf(ir.F32Type.get(), value))


def hidden_epilogue(phase: Phase, semantics: Semantics):
    """h as phase 2's x (x_tiles.py): u32[P, I / 32, words], of which it gets the slot's.

    ``biases``: of gate and of up, float[R, I] each or None, R the experts of all layers; ``expert`` the slot's row.
    """
    height, tokens, parts, outputs = phase.unit_outputs, phase.tokens, phase.parts, phase.outputs
    sources = len(phase.formats)

    def run(parts_ref, unit, slot_h_ref, expert, weight_ref, biases):
        h_ref = slot_h_ref.at[pl.ds(unit * (height // GROUP), height // GROUP)]
        named = {"weight": weight_ref} if semantics.weight_on == "input" else {}
        named |= {source: ref for source, ref in enumerate(biases) if ref is not None}

        @plgpu.inline_mgpu(
            arg_types=(*(plgpu.RefType(),) * (2 + len(named)), plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT)
        )
        def epilogue(_, partial, h_ref, *others):
            *refs, unit, expert = others
            refs = dict(zip(named, refs, strict=True))
            base, expert = (arith.index_cast(ir.IndexType.get(), i.registers.item()) for i in (unit, expert))
            base = arith.muli(base, index(height))

            def value_of(source: int, row, token) -> Float:
                columns = [arith.addi(token, index(part * tokens)) for part in range(parts)]
                value = Float(_sum_parts(phase, partial, source, row, columns))
                if "weight" in refs:
                    value = value * _float(refs["weight"], token)
                return value + _float(refs[source], expert, arith.addi(base, row)) if source in refs else value

            # A warp takes 32 rows of a token, so that lanes can add up a sub-block.
            for item, partly in _items(height * tokens):
                row, token = arith.remui(item, index(height)), arith.divui(item, index(height))
                if partly:  # a warp whose token is past the end repeats the last: same values, same places
                    token = arith.minui(token, index(tokens - 1))

                def finish(row, token):
                    *gate, up = (value_of(source, row, token) for source in range(sources))
                    h = activate(gate[0] if gate else None, up, semantics, simt)
                    row, token = (Word(arith.index_cast(ir.IntegerType.get_signless(32), i)) for i in (row, token))
                    store_value(h.value, h_ref, (row // GROUP,), token, row % GROUP, tokens, parts)

                if outputs % height:  # rows past the end come by whole warps
                    with _guarded(_below(arith.addi(base, row), index(outputs))):
                        finish(row, token)
                else:
                    finish(row, token)

        epilogue(parts_ref, h_ref, *named.values(), unit, expert)

    return run


def output_epilogue(phase: Phase, semantics: Semantics):
    """out[pair] = weight * y for the pairs of a slot: pair i32[C] (-1: none), weight f32[C].

    ``bias``: float[R, H] or None, ``scale`` float[R] or None; ``expert`` the slot's row of them.
    """
    tokens, parts, height = phase.tokens, phase.parts, phase.unit_outputs

    def run(parts_ref, unit, pair_ref, weight_ref, out_ref, expert, bias, scale):
        named = {"weight": weight_ref} if semantics.weight_on == "output" else {}
        named |= {name: ref for name, ref in (("bias", bias), ("scale", scale)) if ref is not None}

        @plgpu.inline_mgpu(
            arg_types=(*(plgpu.RefType(),) * (3 + len(named)), plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT)
        )
        def epilogue(_, partial, pair_ref, out_ref, *others):
            *refs, unit, expert = others
            refs = dict(zip(named, refs, strict=True))
            base, expert = (arith.index_cast(ir.IndexType.get(), i.registers.item()) for i in (unit, expert))
            base = arith.muli(base, index(height))
            for item, partly in _items(height * tokens):
                row, token = arith.remui(item, index(height)), arith.divui(item, index(height))
                if partly:
                    token = arith.minui(token, index(tokens - 1))
                pair = memref.load(pair_ref, [token])
                place = arith.addi(base, row)
                served = arith.cmpi(arith.CmpIPredicate.sge, pair, i32(0))
                with _guarded(arith.andi(served, _below(place, index(phase.outputs)))):
                    columns = [arith.addi(token, index(part * tokens)) for part in range(parts)]
                    value = Float(_sum_parts(phase, partial, 0, row, columns))
                    if "bias" in refs:
                        value = value + _float(refs["bias"], expert, place)
                    if "scale" in refs:
                        value = value * _float(refs["scale"], expert)
                    if "weight" in refs:
                        value = value * _float(refs["weight"], token)
                    memref.store(value.value, out_ref, [arith.index_cast(ir.IndexType.get(), pair), place])

        epilogue(parts_ref, pair_ref, out_ref, *named.values(), unit, expert)

    return run
