"""Packed experts times many tokens: x sorted by expert, weights decoded in registers, tiles of up to 288 columns.

    h[r] = act(gate_e x[r], up_e x[r])     one launch for gate and up of one format, else one each
    out[r] = weight[r] * down_e h[r]       a launch of its own; e the expert that row r was sorted to

A unit is a tile of columns (sorted_pairs.py) times some rows of its expert's weights at their full depth. Persistent
grid: each block takes units in turn; of one warpgroup a warp for each source copies weights with TMA, another x, and
where x is of tokens one more their rows to the pairs' places (row_copies.py); two or four others decode and multiply 64
rows of weights each. A chunk of 256 weights' depth is a stage of weights, a part of 64 a stage of x.
Weights become bf16 in registers, the tensor core's left operand (operands.py), a part at a time: one warpgroup decodes
while another's part is multiplied.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from . import barriers, counters, factor_table, operands, row_copies, sorted_pairs, tile_epilogues, tiling
from ._compat import mosaic_utils, nvvm, pl, plgpu
from .barriers import Copy, Turn
from .decode import CHUNK, PART
from .product import PARTS, SEATS, SUMS, TILE, Product, column_blocks, scratch, swizzle
from .registers import ROW, THREADS
from .semantics import Leaves, Semantics
from .simt import Word, store
from .sorted_pairs import MOST_COLUMNS
from .tile_epilogues import Columns
from .views import View


class Unit(NamedTuple):
    """What a block takes at a time: a tile of columns (sorted_pairs.py) and some rows of its expert's weights."""

    expert: Any
    output: Any  # the first
    begin: Any
    first: Any  # of the group
    count: Any  # of the tile's columns

    @property
    def columns(self) -> Columns:
        # Not up to the group's last: what is behind the tile's is another tile's, and here perhaps not multiplied.
        return Columns(self.begin, self.first, self.begin + self.count)


COUNT = Unit._fields.index("count")


class Ring(NamedTuple):
    """Where a role is: its next stage of weights, and its row of stages of x. Counted on: remainders cost as much as
    many weights."""

    pipeline: tiling.Pipeline
    weights: Turn
    x: Turn

    @classmethod
    def at(cls, pipeline: tiling.Pipeline, chunks: Any) -> Ring:
        """After so many chunks."""
        rows = chunks * (PARTS // pipeline.side)
        return cls(pipeline, Turn.after(chunks, pipeline.weights), Turn.after(rows, pipeline.rows))

    def next_chunk(self) -> Ring:
        return self._replace(weights=self.weights.next(self.pipeline.weights))

    def stage(self, part: int) -> Any:
        """Of x."""
        pipeline = self.pipeline
        return self.x.place if pipeline.whole_chunks else self.x.place * pipeline.side + part % pipeline.side

    def stage_before(self, part: int) -> Any:
        places = self.pipeline.rows if self.pipeline.whole_chunks else self.pipeline.x
        if part % self.pipeline.side:
            return self.stage(part) - 1
        return jnp.where(self.x.place == 0, places, self.stage(0)) - 1

    def after(self, part: int) -> Ring:
        side = self.pipeline.side
        return self if (part + 1) % side else self._replace(x=self.x.next(self.pipeline.rows))

    @property
    def state(self) -> tuple[Turn, Turn]:
        return self.weights, self.x


def grouped_matmul(product: Product, semantics: Semantics, present: tuple[str, ...], num_sms: int) -> Any:
    """The kernel: ``(count i32[2], table i32[tiles, 5], x bf16[terms, R, D], *sums, *planes, *extras) ->
    [product.out_type]``.

    ``sums`` of x where it takes them. ``extras``: gate f32[R, I] where it was made before, f32[R] the weight of each
    sorted pair where they are multiplied in, then the ``present`` leaves of this half, with all layers' experts in one
    axis as the planes have. Where it gathers, x and sums are of tokens, ``pair`` i32[R] and counters
    i32[row_copies.counters(R)] of zeros stand before x, and the rows of all pairs are results too.
    """
    sources, height, consumers = len(product.formats), product.unit_outputs, product.warpgroups * barriers.WARPS
    pipeline = product.pipeline()
    pieces_of_rows = row_copies.pieces(tiling.free_bytes(scratch(product, pipeline)))
    if product.gather and not pieces_of_rows:
        pipeline = product.pipeline(row_copies.LEAST_BYTES + tiling.ENDS_BYTES)
        pieces_of_rows = row_copies.pieces(tiling.free_bytes(scratch(product, pipeline)))
    first_batches = row_copies.first_batches(product.first_rows(num_sms), consumers, num_sms)
    # Half of the warpgroups start so many parts later, and stay behind: while some finish a unit, others multiply.
    lead = pipeline.lead
    x_stages = pipeline.x // pipeline.span
    # Of stages full and free, of units told and done, of the head start, and of pieces of rows.
    counts = (pipeline.weights, pipeline.weights, x_stages, x_stages, SEATS, SEATS, 1, row_copies.MOST)

    def body(count_g, table_g, *refs):
        refs = iter(refs)
        pair_g, ready_g = (next(refs), next(refs)) if product.gather else (None, None)
        operands_g: Any = [next(refs) for _ in range(product.operands)]
        planes_g = [[next(refs) for _ in product.planes] for _ in range(sources)]
        gate_g = next(refs) if product.gate_in_memory else None
        weight_g = next(refs) if product.weighted else None
        leaves = Leaves(**{name: next(refs) for name in present})
        out_g = next(refs)
        gathered_g = [next(refs) for _ in product.gathered]
        x_g, *sums_g = gathered_g or operands_g
        to_gather = None
        if product.gather:
            to_gather = row_copies.Rows(operands_g, gathered_g, pair_g, count_g, ready_g, product.gather.top_k)
        planes_s = [next(refs) for _ in product.planes]
        factors_s: Any = next(refs) if product.packed else None
        weights_s: Any = next(refs) if product.weighted else None
        sums_s: Any = next(refs) if product.takes_sums else None
        x_s: Any = next(refs)
        pieces_s: Any = next(refs) if product.gather else None
        units_s, barriers_s = refs
        arrivals = (sources, consumers, 1, consumers, 1 + product.weighted, consumers, barriers.WARPS, 1)
        weights_full, weights_free, x_full, x_free, unit_full, unit_free, head_start, pieces = barriers.initialised(
            barriers_s, counts, arrivals, product.warpgroups + 1
        )
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
            begin, count = sorted_pairs.bounds(first, last, tiles, lax.rem(local, tiles), product.width)
            return Unit(expert, lax.div(local, tiles) * height, begin, first, count)

        def views(stage, layout=ROW):
            return [
                View(ref.at[stage], product.row_of, swizzle(plane, product.depth), layout)
                for plane, ref in zip(product.planes, planes_s, strict=True)
            ]

        @pl.when(warpgroup < product.warpgroups)
        def multiply():
            if to_gather:
                row_copies.copy_first(to_gather, first_batches, product.warpgroups, num_sms)
            tiling.claim_registers(product.warpgroups, True)
            if lead:
                late = (warpgroup >= product.warpgroups // 2) & (turns * product.chunks > lead // PARTS)
                pl.when(late)(lambda: barriers.wait(head_start, 0, 0))

            def make_table(stage):
                # All have read what the table held before.
                factor_table.barrier()
                product.table.write(factors_s, views(stage, THREADS))
                factor_table.barrier()

            def one_unit(turn, _):
                seat = Turn.after(turn, SEATS)
                barriers.wait(unit_full, *seat)

                def of_width(width):
                    sums = pl.run_scoped(functools.partial(accumulate, width), plgpu.ACC((TILE, width)))
                    finish(sums, seat.place)

                def accumulate(width, acc):
                    state = Ring.at(pipeline, turn * product.chunks).state
                    unit = [jnp.ones(TILE)] * product.whole_scales
                    unit = [plgpu.layout_cast(u, ROW) for u in unit]
                    state, unit = lax.fori_loop(
                        0, product.chunks, functools.partial(one_chunk, width, acc, is_wide, turn), (state, unit)
                    )
                    sums = acc[...]
                    barriers.arrive(x_free, Ring(pipeline, *state).stage_before(0))
                    return functools.reduce(times_rows, unit, sums)

                is_wide = units_s[seat.place, COUNT] > min(product.widths[-1], MOST_COLUMNS)
                if len(product.widths) == 1:
                    of_width(product.width)
                else:
                    pl.when(is_wide)(functools.partial(of_width, product.widths[0]))
                    pl.when(jnp.logical_not(is_wide))(functools.partial(of_width, product.widths[1]))
                barriers.arrive(unit_free, seat.place)

            def times_rows(sums, rows):
                return sums * lax.broadcast_in_dim(rows, sums.shape, (0,))

            def one_chunk(width, acc, is_wide, turn, chunk, carried):
                state, before_unit = carried
                ring = Ring(pipeline, *state)
                count = turn * product.chunks + chunk
                barriers.wait(weights_full, *ring.weights)
                if product.packed:
                    make_table(ring.weights.place)
                planes = views(ring.weights.place)
                unit = []
                for part in range(PARTS):
                    if lead and part == lead % PARTS:
                        is_ahead = (count == lead // PARTS) & (warpgroup == 0)
                        pl.when(is_ahead)(lambda: barriers.arrive(head_start, 0))
                    before, stage = ring.stage_before(part), ring.stage(part)
                    factors = product.table.read(factors_s, part) if product.packed else []
                    if product.whole_scales:
                        terms = [operands.whole_part(product.formats[0], planes, factors, part)]
                    else:
                        terms = operands.part(product.formats[0], planes, factors, part, product.terms)
                    products = len(_term_products(product.terms)) * len(column_blocks(width))
                    if product.takes_sums and part == 0:
                        barriers.wait(x_full, stage, ring.x.parity)
                    if product.whole_scales and part == 0:
                        unit, inverse = product.table.read_units(factors_s)
                        acc[...] = times_rows(acc[...], before_unit[0] * inverse)
                        unit = [unit]
                        if product.takes_sums:
                            sums = sums_s.at[ring.x.place, pl.ds(0, width)]
                            plgpu.wgmma(acc, product.table.read_rests(factors_s), sums.T)
                    # Of a chunk that comes whole each part waits all the same: where no branch lies between what makes
                    # an operand and the products before, the assembler makes each product wait for the last (C7513).
                    barriers.wait(x_full, stage, ring.x.parity)
                    depth = pl.ds(part % pipeline.span * PART, PART)
                    for i, j in _term_products(product.terms):
                        for columns in column_blocks(width):

                            def add_product(weights=terms[i], columns=columns, x=x_s.at[stage, j, columns, depth]):
                                plgpu.wgmma(acc.at[:, columns], weights, x.T)

                            _second_product(is_wide, add_product) if columns.start else add_product()
                    # All but this part's products are done.
                    plgpu.wgmma_wait(products)
                    if part == 0:
                        pl.when(chunk > 0)(lambda before=before: barriers.arrive(x_free, before))
                    elif pipeline.span == 1:
                        barriers.arrive(x_free, before)
                    ring = ring.after(part)
                barriers.arrive(weights_free, ring.weights.place)
                return ring.next_chunk().state, unit

            def finish(sums, seat):
                # Read only now: registers are short while the sums grow.
                unit = Unit(*(units_s[seat, i] for i in range(len(Unit._fields))))
                place = (unit.columns, unit.expert, unit.output)
                if product.makes == "h":
                    biases = (leaves.gate_bias, leaves.up_bias)[-sources:]
                    run = tile_epilogues.hidden(product.rows, semantics, product.outputs, product.terms)
                    run(sums, *place, out_g, gate_g, biases)
                else:
                    run = tile_epilogues.output(product.rows, product.outputs)
                    bias = leaves.gate_bias if product.makes == "gate" else leaves.down_bias
                    weights = weights_s.at[seat] if product.weighted else None
                    run(sums, *place, out_g, bias, leaves.down_scale, weights)

            lax.fori_loop(0, turns, one_unit, None)

        def each_unit(start, visit):
            """``visit(turn, unit, state) -> state`` for this block's units."""

            def one_unit(turn, carried):
                row, state = carried
                # Asked for one unit ahead: memory answers while this one is copied.
                return look_up(turn + 1), visit(turn, unit_of(turn, row), state)

            lax.fori_loop(0, turns, one_unit, (look_up(0), start))

        def copy_weights(source):
            def one_unit(turn, unit, stage):
                return lax.fori_loop(0, product.chunks, functools.partial(one_chunk, unit), stage)

            def one_chunk(unit, chunk, stage):
                rows, copies = (unit.output, height), []
                for plane, origin, target in zip(product.planes, planes_g[source], planes_s, strict=True):
                    entries = (chunk * (CHUNK // plane.per), CHUNK // plane.per)
                    window = (unit.expert, *((rows, entries) if plane.by_row else (entries, rows)))
                    copies.append(
                        Copy(origin, window, target, (stage.place, source), swizzle(plane, product.depth), chunk, True)
                    )
                return barriers.refill(weights_full, weights_free, stage, copies)

            each_unit(Turn.after(0, pipeline.weights), one_unit)

        def tell(unit, seat):
            _write(units_s.at[seat], unit)
            barriers.arrive(unit_full, seat)
            if product.weighted:
                copies = [
                    Copy(weight_g, ((unit.begin + c.start, c.stop - c.start),), weights_s, (seat, c), 0)
                    for c in column_blocks(product.width)
                ]
                barriers.fill(unit_full, seat, copies)

        def copy_x():
            def one_unit(turn, unit, ring):
                seat = Turn.after(turn, SEATS)
                barriers.wait(unit_free, seat.place, 1 - seat.parity)
                tell(unit, seat.place)
                if to_gather:
                    row_copies.wait(ready_g, count_g, unit.begin, unit.count)
                return lax.fori_loop(0, product.chunks, functools.partial(one_chunk, unit), ring)

            def one_chunk(unit, chunk, state):
                ring = Ring(pipeline, *state)
                for part in range(0, PARTS, pipeline.span):
                    stage = ring.stage(part)
                    barriers.wait(x_free, stage, 1 - ring.x.parity)
                    depth = (chunk * CHUNK + part * PART, pipeline.span * PART)
                    copies = []
                    for term in range(product.terms):
                        for columns in column_blocks(product.width):
                            rows = (unit.begin + columns.start, columns.stop - columns.start)
                            copies.append(Copy(x_g, (term, rows, depth), x_s, (stage, term, columns), 2 * PART))
                    if product.takes_sums:
                        rows = (unit.begin, product.width)
                        copies.append(Copy(sums_g[0], (rows, (chunk * SUMS, SUMS)), sums_s, (stage,), 2 * SUMS, chunk))
                    barriers.fill(x_full, stage, copies)
                    ring = ring.after(part + pipeline.span - 1)
                return ring.state

            each_unit(Ring.at(pipeline, 0).state, one_unit)
            if to_gather:
                counters.leave(ready_g, row_copies.buckets(product.pairs), num_sms, mosaic_utils.ThreadSubset.WARP)

        @pl.when(warpgroup == product.warpgroups)
        def copy():
            tiling.claim_registers(product.warpgroups, False)
            warp = barriers.warp_of_warpgroup()
            for source in range(sources):
                pl.when(warp == source)(functools.partial(copy_weights, source))
            pl.when(warp == sources)(copy_x)
            if to_gather:
                others = to_gather, first_batches, pieces, pieces_s, num_sms
                pl.when(warp == sources + 1)(functools.partial(row_copies.copy_others, *others))

    return plgpu.kernel(
        body,
        out_type=[product.out_type, *product.gathered],
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
            *scratch(product, pipeline),
            *([plgpu.SMEM(pieces_of_rows, jnp.uint8)] if product.gather else []),
            plgpu.SMEM((SEATS, len(Unit._fields)), jnp.int32),
            barriers.scratch(counts),
        ],
    )


def _term_products(terms: int) -> list[tuple[int, int]]:
    """Which terms of weights are multiplied with which of x: the product of the two small ones is left out."""
    return [(i, j) for i in range(terms) for j in range(terms) if i + j < terms]


def _second_product(is_wide: Any, add_product: Any) -> None:
    """If the tile is so wide. Either way one group of products more to wait for: else one that holds none."""

    @plgpu.inline_mgpu()
    def commit(_):
        nvvm.wgmma_commit_group_sync_aligned()

    lax.cond(is_wide, add_product, commit)


def _write(ref: Any, unit: Unit) -> None:
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *(plgpu.Layout.WG_SPLAT,) * len(unit)))
    def write(_, ref, *words):
        # All threads the same: each of them arrives at the barrier.
        for i, word in enumerate(words):
            store(Word(word.registers.item()), ref, Word(i))

    write(ref, *unit)
