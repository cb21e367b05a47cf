"""What one warpgroup does with the partial sums of a unit, thread by thread: SwiGLU, or topk_weights.

    h[s, t] = silu(gate_e x[t]) * up_e x[t]           swiglu_epilogue
    out[pair(s, t)] = weight[s, t] * down_e h[s, t]   weighted_epilogue

Each warpgroup's sums are added in a fixed order, so that results are equal from run to run.
"""

from __future__ import annotations

from ._compat import arith, ir, memref, mosaic_utils, pl, plgpu, scf
from .few_tokens import ROWS, Problem
from .registers import i32, index, thread_in_warpgroup


def _sum_parts(parts, warpgroups: int, group: int, row, columns: list):
    total = None
    for w in range(warpgroups):
        for column in columns:
            value = memref.load(parts, [index(w), index(group), row, column])
            total = value if total is None else arith.addf(total, value)
    return total


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


def _place_in_sixteen(row):
    """Where a row goes in a tile of x (registers.py): the middle two of four change places."""
    high, low = arith.andi(row, index(12)), arith.andi(row, index(3))
    swapped = arith.ori(arith.shli(arith.andi(low, index(1)), index(1)), arith.shrui(low, index(1)))
    return arith.ori(high, swapped)


def _below(a, b):
    return arith.cmpi(arith.CmpIPredicate.ult, a, b)


def swiglu_epilogue(problem: Problem, following: Problem):
    """h = silu(g) * u as the ``following`` kernel's x: bf16[P, I/16, R * 16], and its sums f32[P, I/w, sum_rows(R)]."""
    sum_weights, factor = following.sum_weights, following.sums_factor
    groups, tokens, parts = problem.groups, problem.tokens, problem.parts
    height = groups[0].height
    up_group, up_row = len(groups) - 1, (height if groups[0].pieces == 2 else 0)

    def run(parts_ref, slot, unit, _, outputs):
        h_g, sums_g = outputs
        warpgroups = parts_ref.shape[0]
        refs = (
            parts_ref,
            h_g.at[slot, pl.ds(unit * (height // 16), height // 16)],
            sums_g.at[slot, pl.ds(unit * (height // sum_weights), height // sum_weights)],
        )

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 3)
        def epilogue(_, partial, h_ref, sums_ref):
            bf16, f32 = ir.BF16Type.get(), ir.F32Type.get()
            one, scale = mosaic_utils.c(1.0, f32), mosaic_utils.c(-1.4426950408889634, f32)
            # A warp takes 32 rows of a token, so that lanes can add up a sub-block.
            for item, partly in _items(height * tokens):
                row, token = arith.remui(item, index(height)), arith.divui(item, index(height))
                if partly:  # a warp whose token is past the end repeats the last: same values, same places
                    token = arith.minui(token, index(tokens - 1))
                columns = [arith.addi(token, index(part * tokens)) for part in range(parts)]
                g = _sum_parts(partial, warpgroups, 0, row, columns)
                u = _sum_parts(partial, warpgroups, up_group, arith.addi(row, index(up_row)), columns)
                power = mosaic_utils.inline_ptx("ex2.approx.f32 $0, $1;", arith.mulf(g, scale), result_types=f32)
                rest = arith.mulf(arith.divf(g, arith.addf(one, power)), u)
                for part, column in enumerate(columns):
                    term = arith.truncf(bf16, rest)
                    exact = arith.extf(f32, term)
                    place = arith.addi(arith.muli(column, index(16)), _place_in_sixteen(row))
                    memref.store(term, h_ref, [arith.divui(row, index(16)), place])
                    total = exact
                    for distance in (1, 2, 4, 8, 16)[: sum_weights.bit_length() - 1]:
                        total = arith.addf(total, mosaic_utils.shfl_bfly(total, distance))
                    leader = arith.cmpi(arith.CmpIPredicate.eq, arith.remui(row, index(sum_weights)), index(0))
                    with _guarded(leader):
                        total = arith.mulf(total, mosaic_utils.c(factor, f32))
                        memref.store(total, sums_ref, [arith.divui(row, index(sum_weights)), column])
                    if part + 1 < parts:
                        rest = arith.subf(rest, exact)

        epilogue(*refs)

    return run


def weighted_epilogue(problem: Problem):
    """out[pair] = weight * (down h) for the pairs of this slot: inputs pair i32[P, T] (-1: none), weight f32[P, T]."""
    tokens, parts, outputs = problem.tokens, problem.parts, problem.outputs

    def run(parts_ref, slot, unit, inputs, results):
        pair_g, weight_g = inputs
        warpgroups = parts_ref.shape[0]

        @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType(),) * 4, plgpu.Layout.WG_SPLAT))
        def epilogue(_, partial, pair_ref, weight_ref, out_ref, unit):
            base = arith.muli(arith.index_cast(ir.IndexType.get(), unit.registers.item()), index(ROWS))
            for item, partly in _items(ROWS * tokens):
                row, token = arith.remui(item, index(ROWS)), arith.divui(item, index(ROWS))
                if partly:
                    token = arith.minui(token, index(tokens - 1))
                pair = memref.load(pair_ref, [token])
                place = arith.addi(base, row)
                inside = arith.andi(arith.cmpi(arith.CmpIPredicate.sge, pair, i32(0)), _below(place, index(outputs)))
                with _guarded(inside):
                    columns = [arith.addi(token, index(part * tokens)) for part in range(parts)]
                    value = _sum_parts(partial, warpgroups, 0, row, columns)
                    weighted = arith.mulf(value, memref.load(weight_ref, [token]))
                    memref.store(weighted, out_ref, [arith.index_cast(ir.IndexType.get(), pair), place])

        epilogue(parts_ref, pair_g.at[slot], weight_g.at[slot], results[0], unit)

    return run
