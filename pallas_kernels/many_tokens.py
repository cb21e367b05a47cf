"""Packed experts times many tokens: x sorted by expert, weights decoded in registers, tiles of up to 256 columns.

    h[r] = act(gate_e x[r], up_e x[r])     one launch for gate and up of one format, else one each
    out[r] = down_e h[r]                   a launch of its own; e the expert that row r was sorted to

A unit is a tile of columns (sorted_pairs.py) times some rows of its expert's weights at their full depth. Persistent
grid: each block takes units in turn; one warpgroup copies weights and x with TMA, two or four others decode and
multiply 64 rows of weights each. A chunk of 256 weights' depth is a stage of weights, a part of 64 a stage of x.
Weights become bf16 in registers, the tensor core's left operand (operands.py), a part at a time: one warpgroup decodes
while another's part is multiplied.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from . import factor_table, operands, sorted_pairs, tile_epilogues, tiling
from ._compat import pl, plgpu
from .decode import CHUNK, PART
from .registers import ROW, THREADS, tiled
from .semantics import Leaves, Semantics
from .simt import Word, store, thread_in_block
from .tile_epilogues import Columns, Rows
from .views import View

TILE = 64  # rows of weights of a warpgroup
PARTS = CHUNK // PART
HALF = range(PARTS // 2)  # of a chunk
SEATS = 2  # units that the copying warpgroup tells the others of ahead


class Unit(NamedTuple):
    """What a block takes at a time: a tile of columns (sorted_pairs.py) and some rows of its expert's weights."""

    expert: Any
    output: Any  # the first
    begin: Any
    first: Any
    last: Any

    @property
    def columns(self) -> Columns:
        return Columns(self.begin, self.first, self.last)


class Product(NamedTuple):
    """One launch. ``makes``: "h"; "out"; or "gate", f32, for a launch of another format's up that makes h of both."""

    makes: str
    formats: tuple[str, ...]  # of gate and up together, or of one projection
    outputs: int  # O of each
    depth: int  # D
    pairs: int  # R, a multiple of 8
    terms: int  # bf16 terms of x and of weights, 1 or 2
    width: int  # columns of a tile
    warpgroups: int  # that multiply
    gated: bool = True  # whether h takes a gate

    @property
    def rows(self) -> Rows:
        return Rows(len(self.formats), self.makes == "h")

    def row_of(self, warp: Any, group: Any, half: Any) -> tuple[Any, Any]:
        """(source, row in its part of a stage) of a half of a warp's lanes, of this thread's warpgroup (views.py)."""
        source, row = self.rows.of_lane(group, warp, half)
        return source, row + thread_in_block() // 128 * self.rows.features

    @property
    def unit_outputs(self) -> int:
        """Rows of each projection that a unit has."""
        return self.warpgroups * self.rows.features

    @property
    def units(self) -> int:
        """Of a tile."""
        return -(-self.outputs // self.unit_outputs)

    @property
    def chunks(self) -> int:
        return -(-self.depth // CHUNK)

    @property
    def packed(self) -> bool:
        return self.formats[0] not in operands.DENSE

    @property
    def planes(self):
        return operands.planes_of(self.formats[0])

    @property
    def weight_bytes(self) -> int:
        """Of a stage of weights."""
        return self.warpgroups * operands.tile_bytes(self.formats[0])

    @property
    def table_bytes(self) -> int:
        """Of both tables of factors."""
        return factor_table.nbytes(self.formats[0], self.warpgroups) if self.packed else 0

    @property
    def x_bytes(self) -> int:
        """Of a stage of x."""
        return self.terms * self.width * PART * 2

    @property
    def gate_in_memory(self) -> bool:
        return self.makes == "h" and self.gated and len(self.formats) == 1

    @property
    def out_type(self) -> jax.ShapeDtypeStruct:
        if self.makes == "h":
            return jax.ShapeDtypeStruct((self.terms, self.pairs, self.outputs), jnp.bfloat16)
        wide = self.makes == "gate" or self.terms > 1 or tiling.keeps_f32(self.pairs, self.outputs)
        return jax.ShapeDtypeStruct((self.pairs, self.outputs), jnp.float32 if wide else jnp.bfloat16)


class Ring(NamedTuple):
    """Where a role is: its next stage of weights, row of stages of x, and one of two tables of factors. Counted on:
    remainders cost as much as many weights."""

    pipeline: tiling.Pipeline
    weights: Any
    x: Any
    table: Any

    @classmethod
    def at(cls, pipeline: tiling.Pipeline, chunks: Any) -> Ring:
        """After so many chunks."""
        rows = lax.rem(chunks * (PARTS // pipeline.side), pipeline.x // pipeline.side)
        return cls(pipeline, lax.rem(chunks, pipeline.weights), rows, lax.rem(chunks, 2))

    def next_chunk(self) -> Ring:
        return self._replace(weights=_following(self.weights, self.pipeline.weights), table=1 - self.table)

    def stage(self, part: int) -> Any:
        """Of x."""
        return self.x * self.pipeline.side + part % self.pipeline.side

    def stage_before(self, part: int) -> Any:
        if part % self.pipeline.side:
            return self.stage(part) - 1
        return jnp.where(self.x == 0, self.pipeline.x, self.stage(0)) - 1

    def after(self, part: int) -> Ring:
        side = self.pipeline.side
        return self if (part + 1) % side else self._replace(x=_following(self.x, self.pipeline.x // side))

    @property
    def state(self) -> tuple[Any, Any, Any]:
        return self.weights, self.x, self.table


def _following(stage: Any, stages: int) -> Any:
    return jnp.where(stage == stages - 1, 0, stage + 1)


def grouped_matmul(product: Product, semantics: Semantics, present: tuple[str, ...], num_sms: int) -> Any:
    """The kernel: ``(count i32[2], table i32[tiles, 5], x bf16[terms, R, D], *planes, *extras) -> product.out_type``.

    ``extras``: gate f32[R, I] where it was made before, then the ``present`` leaves of this half, with all layers'
    experts in one axis as the planes have.
    """
    pipeline = tiling.pipeline(product.weight_bytes, product.x_bytes, product.table_bytes)
    sources, height = len(product.formats), product.unit_outputs
    # Half of the warpgroups start a chunk later, and stay behind: while some finish a unit, others multiply. The first
    # ones must find the chunk's x in shared memory, of which the late ones have freed nothing.
    staggered = pipeline.x >= PARTS

    def body(count_g, table_g, x_g, *refs):
        refs = iter(refs)
        planes_g = [[next(refs) for _ in product.planes] for _ in range(sources)]
        gate_g = next(refs) if product.gate_in_memory else None
        leaves = Leaves(**{name: next(refs) for name in present})
        out_g = next(refs)
        planes_s = [next(refs) for _ in product.planes]
        factors_s: Any = next(refs) if product.packed else None
        x_s, units_s, weights_full, weights_free, x_full, x_free, unit_full, unit_free, head_start = refs
        block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
        total = count_g[0] * product.units
        turns = lax.div(jnp.maximum(total - block, 0) + (num_sms - 1), num_sms)

        def look_up(turn):
            """Row of the table for this block's unit: of its group's first tile or another one."""
            unit = jnp.clip(block + turn * num_sms, 0, jnp.maximum(total - 1, 0))
            return tuple(table_g[lax.div(unit, product.units), i] for i in range(5))

        def unit_of(turn, row) -> Unit:
            expert, first, last, first_tile, tiles = row
            # A group's tiles side by side: they share weights.
            local = block + turn * num_sms - first_tile * product.units
            begin, _ = sorted_pairs.bounds(first, last, tiles, lax.rem(local, tiles))
            return Unit(expert, lax.div(local, tiles) * height, begin, first, last)

        def views(stage, layout=ROW):
            return [
                View(ref.at[stage], product.row_of, _swizzle(plane, product.depth), layout)
                for plane, ref in zip(product.planes, planes_s, strict=True)
            ]

        @pl.when(warpgroup < product.warpgroups)
        def multiply():
            tiling.claim_registers(product.warpgroups, True)
            if staggered:
                late = (warpgroup >= product.warpgroups // 2) & (turns * product.chunks > 1)
                pl.when(late)(lambda: plgpu.barrier_wait(head_start))

            def one_unit(turn, _):
                seat = lax.rem(turn, SEATS)
                plgpu.barrier_wait(unit_full.at[seat])

                def accumulate(acc):
                    state = Ring.at(pipeline, turn * product.chunks).state
                    state = lax.fori_loop(0, product.chunks, functools.partial(one_chunk, acc, turn), state)
                    sums = acc[...]
                    plgpu.barrier_arrive(x_free.at[Ring(pipeline, *state).stage_before(0)])
                    return sums

                finish(pl.run_scoped(accumulate, plgpu.ACC((TILE, product.width))), seat)
                plgpu.barrier_arrive(unit_free.at[seat])

            def one_chunk(acc, turn, chunk, state):
                ring = Ring(pipeline, *state)
                if staggered:
                    second = turn * product.chunks + chunk == 1
                    pl.when(second & (warpgroup == 0))(lambda: plgpu.barrier_arrive(head_start))
                plgpu.barrier_wait(weights_full.at[ring.weights])
                table: Any = None
                if product.packed:
                    table = factors_s.at[ring.table]
                    of_thread = views(ring.weights, THREADS)
                    factor_table.write(table, [operands.factors(product.formats[0], of_thread, p) for p in HALF])
                planes = views(ring.weights)
                for part in range(PARTS):
                    before, stage = ring.stage_before(part), ring.stage(part)
                    factors = factor_table.read(table, part) if product.packed else []
                    terms = operands.part(product.formats[0], planes, factors, part, product.terms)
                    plgpu.barrier_wait(x_full.at[stage])
                    for i, j in _term_products(product.terms):
                        plgpu.wgmma(acc, terms[i], x_s.at[stage, j].T)
                    # All but this part's products are done.
                    plgpu.wgmma_wait(len(_term_products(product.terms)))
                    if part == 0:
                        pl.when(chunk > 0)(lambda before=before: plgpu.barrier_arrive(x_free.at[before]))
                    else:
                        plgpu.barrier_arrive(x_free.at[before])
                    ring = ring.after(part)
                plgpu.barrier_arrive(weights_free.at[ring.weights])
                return ring.next_chunk().state

            def finish(sums, seat):
                # Read only now: registers are short while the sums grow.
                unit = Unit(*(units_s[seat, i] for i in range(len(Unit._fields))))
                place = (unit.columns, unit.expert, unit.output)
                if product.makes == "h":
                    biases = (leaves.gate_bias, leaves.up_bias)[-sources:]
                    run = tile_epilogues.hidden(product.rows, semantics, product.outputs, product.terms)
                    run(sums, *place, out_g, gate_g, biases)
                else:
                    run = tile_epilogues.output(product.rows, product.outputs, product.out_type.dtype)
                    bias = leaves.gate_bias if product.makes == "gate" else leaves.down_bias
                    run(sums, *place, out_g, bias, leaves.down_scale)

            lax.fori_loop(0, turns, one_unit, None)

        @pl.when(warpgroup == product.warpgroups)
        def copy():
            tiling.claim_registers(product.warpgroups, False)

            def one_unit(turn, row):
                # Asked for one unit ahead: memory answers while this one is copied.
                following, unit = look_up(turn + 1), unit_of(turn, row)
                seat = lax.rem(turn, SEATS)
                pl.when(turn >= SEATS)(lambda: plgpu.barrier_wait(unit_free.at[seat]))
                _tell(units_s.at[seat], unit)
                plgpu.barrier_arrive(unit_full.at[seat])

                def one_chunk(chunk, state):
                    ring = Ring(pipeline, *state)
                    count = turn * product.chunks + chunk
                    pl.when(count >= pipeline.weights)(lambda: plgpu.barrier_wait(weights_free.at[ring.weights]))
                    rows = pl.ds(unit.output, height)
                    for source, planes in enumerate(planes_g):
                        for plane, origin, target in zip(product.planes, planes, planes_s, strict=True):
                            entries = pl.ds(chunk * (CHUNK // plane.per), CHUNK // plane.per)
                            place = (rows, entries) if plane.by_row else (entries, rows)
                            plgpu.copy_gmem_to_smem(
                                origin.at[unit.expert, *place],
                                target.at[ring.weights, source],
                                weights_full.at[ring.weights],
                            )
                    for part in range(PARTS):
                        reused, stage = count * PARTS + part >= pipeline.x, ring.stage(part)
                        pl.when(reused)(lambda stage=stage: plgpu.barrier_wait(x_free.at[stage]))
                        depth = pl.ds(chunk * CHUNK + part * PART, PART)
                        for term in range(product.terms):
                            plgpu.copy_gmem_to_smem(
                                x_g.at[term, pl.ds(unit.begin, product.width), depth],
                                x_s.at[stage, term],
                                x_full.at[stage],
                            )
                        ring = ring.after(part)
                    return ring.next_chunk().state

                lax.fori_loop(0, product.chunks, one_chunk, Ring.at(pipeline, turn * product.chunks).state)
                return following

            lax.fori_loop(0, turns, one_unit, look_up(0))

    return plgpu.kernel(
        body,
        out_type=product.out_type,
        grid=(num_sms,),
        grid_names=("block",),
        num_threads=product.warpgroups + 1,
        thread_name="warpgroup",
        kernel_name={"h": "moe_hidden", "gate": "moe_gate", "out": "moe_down"}[product.makes],
        # Warpgroup semantics take minutes to lower what Lane semantics lower in seconds.
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        scratch_types=[
            *(_scratch((pipeline.weights, sources), plane, height, product.depth) for plane in product.planes),
            *([factor_table.scratch(product.formats[0], product.warpgroups)] if product.packed else []),
            tiled((pipeline.x, product.terms, product.width, PART), jnp.bfloat16, 2 * PART),
            plgpu.SMEM((SEATS, len(Unit._fields)), jnp.int32),
            plgpu.Barrier(num_arrivals=sources * len(product.planes), num_barriers=pipeline.weights),
            plgpu.Barrier(num_arrivals=product.warpgroups, num_barriers=pipeline.weights),
            plgpu.Barrier(num_arrivals=product.terms, num_barriers=pipeline.x),
            plgpu.Barrier(num_arrivals=product.warpgroups, num_barriers=pipeline.x),
            plgpu.Barrier(num_arrivals=1, num_barriers=SEATS),
            plgpu.Barrier(num_arrivals=product.warpgroups, num_barriers=SEATS),
            plgpu.Barrier(num_arrivals=1),
        ],
    )


def _term_products(terms: int) -> list[tuple[int, int]]:
    """Which terms of weights are multiplied with which of x: the product of the two small ones is left out."""
    return [(i, j) for i in range(terms) for j in range(terms) if i + j < terms]


def _tell(ref: Any, unit: Unit) -> None:
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *(plgpu.Layout.WG_SPLAT,) * len(unit)))
    def write(_, ref, *words):
        # All threads the same: each of them arrives at the barrier.
        for i, word in enumerate(words):
            store(Word(word.registers.item()), ref, Word(i))

    write(ref, *unit)


def _swizzle(plane, depth: int) -> int:
    return plane.swizzle(depth) if plane.by_row else 0


def _scratch(lead: tuple[int, ...], plane, height: int, depth: int):
    entries = CHUNK // plane.per
    if not plane.by_row:
        return plgpu.SMEM((*lead, entries, height), plane.dtype)
    return tiled((*lead, height, entries), plane.dtype, plane.swizzle(depth))
