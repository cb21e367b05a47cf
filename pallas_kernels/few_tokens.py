"""Packed experts times few tokens, the whole layer in one launch: each chosen expert's weights cross the bus once.

    h[s, c] = act(gate_e x[s, c], up_e x[s, c])       phase 1, the activation in its epilogue
    out[pair(s, c)] = weight[s, c] * down_e h[s, c]   phase 2, topk_weights in its epilogue

Biases, scales, an up without a gate and weights on x are the epilogues' too (semantics.py).

A slot s is a chosen expert e with up to eight columns c, which is what a tensor core tile has: all tokens where they
are that few (unused columns cost nothing), those that chose e otherwise. Only the pairs that were routed leave phase 2.

Persistent grid, one block a multiprocessor. A unit is a number of weight rows at their full depth; its stages are
copied with TMA by the warps of a producer warpgroup, two compute warpgroups share each stage, by depth or by rows. A
block's units of phase 2 follow those of phase 1 without a pause: their weights are on their way before h is there, and
h of a slot is waited for by a counter that phase 1's epilogues raise. No block asks for more weights at a time than
memory needs to be busy: h would wait behind them.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import barriers, counters, matrices, slots, tiling
from ._compat import pl, plgpu
from .barriers import Copy, Turn
from .decode import CHUNK, TILE_FORMATS, TileFormat
from .epilogues import hidden_epilogue, output_epilogue
from .phases import LANES, TILE, Phase
from .registers import ACC, constant_factor, tiled
from .schedule import Schedule
from .semantics import Leaves, Semantics
from .views import View
from .x_tiles import COLUMNS, GROUP, load_sums, load_x, make_resident, sum_terms

WARPGROUPS = LANES + 2
EPILOGUES = 2  # units whose partial sums may wait for their epilogue at a time


def moe_kernel(
    wide: Phase,
    tall: Phase,
    num_sms: int,
    num_experts: int,
    semantics: Semantics,
    present: tuple[str, ...],
    copy_only: bool = False,
) -> Any:
    """The kernel: ``(num_slots i32[1], experts i32[P], x, pair i32[P, C], weight f32[P, C], ready i32[> P], *planes,
    *leaves) -> (h, out)``; where x is resident ``(layer i32[1], ids i32[T, K], x [T, D], weights f32[T, K], ready, ...)
    -> (h, out, live i32[T, K])``, and it finds the slots itself.

    x and h u32[x_shape] (x_tiles.py), out f32[P, H]: a row a pair that some slot serves, the others not written. Planes
    of gate (where there is one), up and down, and the leaves (semantics.py) that are ``present``, have all experts in
    one leading axis. ``ready`` holds zeros, before the launch and after it: the epilogues of phase 1 by slot, and the
    blocks that need them no more. ``copy_only`` leaves the arithmetic out: what is left is the time that the pipeline
    of copies needs.
    """
    phases = wide, tall
    finish_hidden, finish_output = hidden_epilogue(wide, semantics), output_epilogue(tall, semantics)
    fixed_bytes = EPILOGUES * LANES * TILE * COLUMNS * 4
    if wide.resident_x:
        fixed_bytes += wide.resident_bytes + slots.scratch_bytes(wide.slots, wide.tokens)
    stages = tiling.stages([phase.stage_bytes for phase in phases], fixed_bytes)
    computing = LANES * barriers.WARPS
    # (how many, arrivals): of each phase's stages, weights there, x there and free; of sums, there and free.
    wanted: list[tuple[int, int]] = []
    for phase, n in zip(phases, stages, strict=True):
        wanted += [(n, phase.sources), (1, barriers.WARPS) if phase.resident_x else (n, 1), (n, computing)]
    wanted += [(EPILOGUES, computing), (EPILOGUES, barriers.WARPS)]
    counts, arrivals = zip(*wanted, strict=True)
    plane_counts = [[len(TILE_FORMATS[name].planes) for name in phase.formats] for phase in phases]

    def body(*refs):
        refs = iter(refs)
        if wide.resident_x:
            layer_g, ids_g, x_g, weights_g, ready = (next(refs) for _ in range(5))
        else:
            count_g, experts_g, x_g, pair_g, weight_g, ready = (next(refs) for _ in range(6))
        planes_g = [[[next(refs) for _ in range(n)] for n in counts] for counts in plane_counts]
        leaves = Leaves(**{name: next(refs) for name in present})
        h_g, out_g = next(refs), next(refs)
        live_g = next(refs) if wide.resident_x else None
        rings = [_Ring(phase, n, refs) for phase, n in zip(phases, stages, strict=True)]
        parts_s, barriers_s, *own = refs
        if wide.resident_x:
            rings[0].x, *tables = own
            found = slots.Slots(*tables)
            slots.fetch(found, ids_g, layer_g, num_experts)
        *of_rings, parts_full, parts_free = barriers.initialised(barriers_s, counts, arrivals, WARPGROUPS)
        for i, ring in enumerate(rings):
            ring.full, ring.x_full, ring.free = of_rings[3 * i : 3 * i + 3]
        if wide.resident_x:
            slots.find(found, num_experts)
            count, row_of_expert, pair_of, weight_of = found.count, found.expert, found.pair, found.weight
        else:
            count, row_of_expert, pair_of, weight_of = count_g[0], lambda slot: experts_g[slot], pair_g, weight_g
        block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
        schedule = Schedule(phases, count, block, num_sms)

        def each_unit(visit):
            """``visit(phase number, turn in it, turns before it)`` for this block's units, phase after phase."""
            for number in range(2):
                before = schedule.turns(0) if number else 0
                lax.fori_loop(0, schedule.turns(number), lambda turn, _, n=number, b=before: visit(n, turn, b), None)

        def compute(lane):
            plgpu.set_max_registers(tiling.COMPUTE_REGISTERS, action="increase")
            if wide.resident_x:
                barriers.wait(rings[0].x_full, 0, 0)

            def one_unit(number, turn, before):
                phase, ring = phases[number], rings[number]

                def one_stage(step, carried):
                    stage, total = carried
                    barriers.wait(ring.full, *stage)
                    if not phase.resident_x:
                        barriers.wait(ring.x_full, *stage)
                    if not copy_only:
                        name, planes, x_ref = ring.tile(stage.place, lane, step)
                        x = load_x(x_ref, phase.rows)
                        sums = [load_sums(x_ref, phase.rows, i) for i in range(sum_terms(phase.parts))]
                        total = add_tile(total, TILE_FORMATS[name], planes, x, sums)
                    barriers.arrive(ring.free, stage.place)
                    return stage.next(ring.stages), total

                start = Turn.after(turn * phase.steps, ring.stages), zero_sums()
                _, total = lax.fori_loop(0, phase.steps, one_stage, start)
                seat = Turn.after(before + turn, EPILOGUES)
                barriers.wait(parts_free, seat.place, 1 - seat.parity)
                parts_s.at[seat.place, lane][...] = total
                barriers.arrive(parts_full, seat.place)

            each_unit(one_unit)

        if len(set(wide.formats)) == 1:
            pl.when(warpgroup < LANES)(lambda: compute(warpgroup))
        else:  # lanes decode different formats: each has code of its own
            for lane in range(LANES):
                pl.when(warpgroup == lane)(functools.partial(compute, lane))

        @pl.when(warpgroup == LANES)
        def finish_units():
            plgpu.set_max_registers(tiling.OTHER_REGISTERS, action="decrease")
            if wide.resident_x:
                make_resident(x_g, rings[0].x, wide.parts)
                barriers.arrive(rings[0].x_full, 0)
                slots.assign(found, weights_g, live_g, num_experts)

            def one_unit(number, turn, before):
                slot, unit = schedule.slot_and_unit(number, turn)
                seat = Turn.after(before + turn, EPILOGUES)
                # Read before the wait; where no leaf is there, not at all.
                expert = row_of_expert(slot) if present else slot
                barriers.wait(parts_full, *seat)
                if number == 0:
                    # An up without a gate is the only source.
                    biases = (leaves.gate_bias, leaves.up_bias)[-len(wide.formats) :]
                    finish_hidden(parts_s.at[seat.place], unit, h_g.at[slot], expert, weight_of.at[slot], biases)
                    counters.add_one(ready, slot)
                else:
                    of_slot = pair_of.at[slot], weight_of.at[slot]
                    finish_output(
                        parts_s.at[seat.place], unit, *of_slot, out_g, expert, leaves.down_bias, leaves.down_scale
                    )
                barriers.arrive(parts_free, seat.place)

            each_unit(one_unit)

        def copy_weights(source):
            for number, (phase, ring) in enumerate(zip(phases, rings, strict=True)):
                if source < phase.sources:
                    copy_weights_of(number, phase, ring, source)

        def copy_weights_of(number, phase, ring, source):
            def expert_of(turn):
                slot, _ = schedule.slot_and_unit(number, turn)
                return row_of_expert(jnp.clip(slot, 0, phase.slots - 1))

            def one_unit(turn, carried):
                expert, stage = carried
                # Asked for one unit ahead: memory answers while this one is copied.
                following = expert_of(turn + 1)
                _, unit = schedule.slot_and_unit(number, turn)

                def one_stage(step, stage):
                    copies = ring.weight_copies(planes_g[number], source, stage.place, expert, unit, step)
                    barriers.wait(ring.full, *stage.before(ring.in_flight, ring.stages))
                    return barriers.refill(ring.full, ring.free, stage, copies)

                return following, lax.fori_loop(0, phase.steps, one_stage, stage)

            if number == 1:
                # Gate's and up's last stage is there first: others wait for h, and down's copies would slow it. (For a
                # source that gate and up do not have, and that never filled their ring, this may end a round early.)
                copied = Turn.after(schedule.turns(0) * wide.steps, rings[0].stages)
                barriers.wait(rings[0].full, *copied.before(1, rings[0].stages))
            start = expert_of(0), Turn.after(0, ring.stages)
            lax.fori_loop(0, schedule.turns(number), one_unit, start)

        def copy_x():
            if not wide.resident_x:
                copy_x_of(0, wide, rings[0], x_g)
            copy_x_of(1, tall, rings[1], h_g)
            counters.leave(ready, wide.slots, num_sms)

        def copy_x_of(number, phase, ring, origin):
            def one_unit(turn, carried):
                known, stage = carried
                slot, _ = schedule.slot_and_unit(number, turn)
                if number == 1:
                    pl.when(slot != known)(lambda: counters.wait(ready, slot, wide.units))

                def one_stage(step, stage):
                    row, words = 0 if phase.shared_x else slot, phase.x_shape[2]
                    window = row, (step * phase.stage_groups, phase.stage_groups), (0, words)
                    copy = Copy(origin, window, ring.x, (stage.place,), 0)
                    return barriers.refill(ring.x_full, ring.free, stage, [copy])

                return slot, lax.fori_loop(0, phase.steps, one_stage, stage)

            lax.fori_loop(0, schedule.turns(number), one_unit, (jnp.int32(-1), Turn.after(0, ring.stages)))

        @pl.when(warpgroup == LANES + 1)
        def produce():
            plgpu.set_max_registers(tiling.OTHER_REGISTERS, action="decrease")
            warp = barriers.warp_of_warpgroup()
            pl.when(warp == 0)(copy_x)
            for source in range(max(phase.sources for phase in phases)):
                pl.when(warp == 1 + source)(functools.partial(copy_weights, source))

    out_type = [
        jax.ShapeDtypeStruct(tall.x_shape, jnp.uint32),
        # A slot serves a token at most once: P slots, P pairs.
        jax.ShapeDtypeStruct((tall.slots, tall.outputs), jnp.float32),
    ]
    own_scratch = []
    if wide.resident_x:
        out_type.append(jax.ShapeDtypeStruct((wide.tokens, wide.slots // wide.tokens), jnp.int32))
        own_scratch = [
            plgpu.SMEM(wide.resident_shape, jnp.uint32),
            *slots.scratch(wide.slots, wide.tokens),
        ]
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(num_sms,),
        grid_names=("block",),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        kernel_name="moe_few_tokens",
        # Every value that a warpgroup stores to shared memory passes a barrier before another reads it.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        scratch_types=[
            *(scratch for phase, n in zip(phases, stages, strict=True) for scratch in _ring_scratch(phase, n)),
            plgpu.SMEM((EPILOGUES, LANES, TILE, COLUMNS), jnp.float32),
            barriers.scratch(counts),
            *own_scratch,
        ],
    )


def column_rows(entries: int, height: int, dtype: Any) -> int:
    """Rows of a column plane's stage, padded so that each piece begins on the copy engine's 128 bytes."""
    step = 128 // math.gcd(128, height * jnp.dtype(dtype).itemsize)
    return -(-entries // step) * step


def _ring_scratch(phase: Phase, stages: int):
    for name, tiles in phase.stored:
        for plane in TILE_FORMATS[name].planes:
            entries = phase.stage_chunks * CHUNK // plane.per
            if plane.by_row:
                yield tiled((stages, tiles, TILE, entries), plane.dtype, plane.swizzle(phase.depth))
            else:
                rows = column_rows(entries, phase.height, plane.dtype)
                yield plgpu.SMEM((stages, tiles, phase.pieces, rows, phase.height), plane.dtype)
    if not phase.resident_x:
        yield plgpu.SMEM((stages, phase.stage_groups, phase.x_shape[2]), jnp.uint32)


class _Ring:
    """A phase's stages in shared memory: planes of weights, and x of each stage or all of x; and their barriers."""

    full: barriers.Barriers  # weights are there
    x_full: barriers.Barriers
    free: barriers.Barriers

    def __init__(self, phase: Phase, stages: int, refs):
        self.phase, self.stages = phase, stages
        self.in_flight = tiling.in_flight(phase.weight_bytes, stages)
        self.planes = [[next(refs) for _ in TILE_FORMATS[name].planes] for name, _ in phase.stored]
        self.x: Any = None if phase.resident_x else next(refs)

    def tile(self, stage, lane, step) -> tuple[str, list, Any]:
        """(format, planes, x) of what a lane decodes of a stage."""
        phase = self.phase
        stored = lane if len(phase.stored) > 1 else 0
        tile = lane if phase.by_rows and len(phase.stored) == 1 else 0
        chunk = 0 if phase.by_rows else lane
        name, _ = phase.stored[stored]
        planes = []
        for plane, ref in zip(TILE_FORMATS[name].planes, self.planes[stored], strict=True):
            part = ref.at[stage, tile, :, pl.ds(chunk * (CHUNK // plane.per), CHUNK // plane.per)]
            if matrices.readable(name):
                part = (
                    View(part, matrices.row_of, plane.swizzle(phase.depth))
                    if plane.by_row
                    else matrices.ColumnMatrix(part)
                )
            planes.append(part)
        groups = pl.ds(chunk * (CHUNK // GROUP), CHUNK // GROUP)
        if phase.resident_x:
            groups = pl.ds(step * phase.stage_groups + chunk * (CHUNK // GROUP), CHUNK // GROUP)
        return name, planes, self.x.at[groups] if phase.resident_x else self.x.at[stage, groups]

    def weight_copies(self, planes_g, source, stage, expert, unit, step) -> list[Copy]:
        """Of every plane's part of a stage, of one source."""
        phase, copies = self.phase, []
        stored = source if len(phase.stored) > 1 else 0
        tile, piece = (source, 0) if phase.by_rows else (0, source)
        tile = 0 if len(phase.stored) > 1 else tile
        name, _ = phase.stored[stored]
        if len(phase.formats) == 2:
            origins, rows = planes_g[source], (unit * phase.height, phase.height)
        else:
            origins, rows = planes_g[0], ((unit * phase.sources + source) * phase.height, phase.height)
        for plane, origin, target in zip(TILE_FORMATS[name].planes, origins, self.planes[stored], strict=True):
            entries = phase.stage_chunks * CHUNK // plane.per
            part = (step * entries, entries)
            if plane.by_row:
                place = stage, tile, slice(piece * phase.height, (piece + 1) * phase.height)
                copies.append(Copy(origin, (expert, rows, part), target, place, plane.swizzle(phase.depth), step, True))
            else:
                place = stage, tile, piece, slice(0, entries)
                copies.append(Copy(origin, (expert, part, rows), target, place, 0, once=True))
        return copies


def zero_sums() -> jax.Array:
    return plgpu.layout_cast(jnp.zeros((TILE, COLUMNS), jnp.float32), ACC)


def add_tile(total, tile_format: TileFormat, planes, x, sums):
    """``total`` plus a tile's product with x bf16[CHUNK, COLUMNS] and its sums bf16[16, COLUMNS] (decode.py)."""
    by_row = functools.partial(lax.broadcast_in_dim, shape=total.shape, broadcast_dimensions=[0])
    tile = tile_format.decode(*planes)
    by_shift: dict[int, jax.Array] = {}
    for i, block in enumerate(tile.sub_blocks):
        first = i * tile_format.weights
        product = plgpu.mma(zero_sums(), block.values, x[first : first + tile_format.weights])
        if tile_format.bias and tile.offset is None:
            product = _mma_each(product, constant_factor(-tile_format.bias << block.shift, i), sums)
        scaled = by_row(block.scale) * product
        by_shift[block.shift] = by_shift[block.shift] + scaled if block.shift in by_shift else scaled
    if tile.offset is not None:
        offset = zero_sums()
        for factors in tile.offset.factors():
            offset = _mma_each(offset, factors, sums)
        total = total + (offset if tile.offset.scale is None else by_row(tile.offset.scale) * offset)
    for shift, part in by_shift.items():
        factor = 2.0**-shift if tile.d is None else by_row(tile.d * 2.0**-shift)
        total = total + factor * part
    return total


def _mma_each(product, factors, sums):
    for term in sums:
        product = plgpu.mma(product, factors, term)
    return product
