"""Packed experts times few tokens: each chosen expert's weights cross the memory bus once.

    h[s, c] = silu(gate_e x[s, c]) * up_e x[s, c]     expert_matmul with SwiGLU in its epilogue
    out[pair(s, c)] = weight[s, c] * down_e h[s, c]   the same, with topk_weights in its epilogue

A slot s is a chosen expert e with up to eight columns c, which is what a tensor core tile has: all tokens where they
are that few (unused columns cost nothing), those that chose e otherwise. Only the pairs that were routed leave the
second kernel. Persistent grid; a block takes units of 64 weight rows (32 of gate and 32 of up), one producer warpgroup
copies stages of the planes with TMA, the compute warpgroups split a stage's depth among them and add up in shared
memory, in a fixed order.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from . import tiling
from ._compat import pl, plgpu
from .decode import CHUNK, TILE_FORMATS, TileFormat
from .registers import ACC, constant_factor
from .x_tiles import COLUMNS, GROUP, group_words, load_sums, load_x, sum_terms

ROWS = 64  # of a weight tile: the tensor core's m16 times a warpgroup's four warps
EPILOGUES = 2  # units whose partial sums may wait for their epilogue at a time


class Group(NamedTuple):
    """Projections that share a tile: one with 64 rows, or gate and up of one format with 32 each."""

    format: str
    pieces: int

    @property
    def tile(self) -> TileFormat:
        return TILE_FORMATS[self.format]

    @property
    def height(self) -> int:
        return ROWS // self.pieces


class Problem(NamedTuple):
    """What one kernel is compiled for."""

    groups: tuple[Group, ...]
    slots: int  # P, the most there can be
    outputs: int  # O of each projection
    depth: int  # D
    tokens: int  # of a slot
    parts: int  # bf16 terms that a token's x is split into: 1 where x is bf16, 2 for f16 and f32
    shared_x: bool  # all slots read x[0]

    @property
    def rows(self) -> int:  # R, columns of x in use
        return self.tokens * self.parts

    @property
    def chunks(self) -> int:
        return -(-self.depth // CHUNK)

    @property
    def x_shape(self) -> tuple[int, int, int]:
        """x as the kernel reads it (x_tiles.py), u32."""
        return 1 if self.shared_x else self.slots, self.depth // GROUP, group_words(self.rows, self.parts)

    @property
    def units(self) -> int:
        return -(-self.outputs // self.groups[0].height)


def _tiled(shape: tuple[int, ...], dtype: Any, row_bytes: int, chunk_bytes: int):
    """SMEM whose rows are swizzled as widely as a row of the plane, and of a chunk, allows."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = next(s for s in (128, 64, 32) if row_bytes % s == 0 and chunk_bytes % s == 0)
    transforms = (plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def _column_rows(entries: int, height: int, dtype: Any) -> int:
    """Rows of a column plane's stage, padded so that each piece begins on the copy engine's 128 bytes."""
    step = 128 // math.gcd(128, height * jnp.dtype(dtype).itemsize)
    return -(-entries // step) * step


def _plane_scratch(problem: Problem, group: Group, chunks: int, stages: int):
    for plane in group.tile.planes:
        entries = chunks * CHUNK // plane.per
        if plane.by_row:
            itemsize = jnp.dtype(plane.dtype).itemsize
            row_bytes, chunk_bytes = (n // plane.per * itemsize for n in (problem.depth, CHUNK))
            yield _tiled((stages, ROWS, entries), plane.dtype, row_bytes, chunk_bytes)
        else:
            rows = _column_rows(entries, group.height, plane.dtype)
            yield plgpu.SMEM((stages, group.pieces, rows, group.height), plane.dtype)


def _stage_bytes_per_chunk(problem: Problem) -> int:
    planes = sum(
        ROWS * CHUNK // plane.per * jnp.dtype(plane.dtype).itemsize for g in problem.groups for plane in g.tile.planes
    )
    return planes + CHUNK // GROUP * 4 * group_words(problem.rows, problem.parts) + 512


def expert_matmul(problem: Problem, epilogue: Any, out_type: Any, name: str, mode: str = "full", config=None):
    """The kernel: ``(num_slots i32[1], experts i32[P], x u32[x_shape], *planes, *epilogue inputs) -> out_type``.

    Planes have all experts in one leading axis. ``epilogue(parts, slot, unit, inputs, outputs)`` is run by one
    warpgroup on the partial sums f32[W, groups, 64, COLUMNS] of a unit. ``mode="copy only"`` leaves the arithmetic
    out: what is left is the time that the pipeline of copies needs. ``config`` overrides tiling's choice.
    """
    groups, units = problem.groups, problem.units
    partial_bytes = EPILOGUES * len(groups) * ROWS * COLUMNS * 4
    if config is None:
        config = tiling.few_tokens(problem.chunks, _stage_bytes_per_chunk(problem), 4 * partial_bytes)
    warpgroups, stages = config
    per_stage = warpgroups  # chunks
    steps = -(-problem.chunks // per_stage)
    x_groups = CHUNK // GROUP
    plane_counts = [len(g.tile.planes) for g in groups]
    inputs = sum(g.pieces * n for g, n in zip(groups, plane_counts, strict=True))
    outputs = len(jax.tree.leaves(out_type))

    def body(num_slots_g, experts_g, x_g, *refs):
        planes_g, refs = refs[:inputs], refs[inputs:]
        scratch = refs[-(sum(plane_counts) + 6) :]
        extra = refs[: len(refs) - len(scratch)]
        planes_s, (x_s, parts_s, full, free, parts_full, parts_free) = scratch[:-6], scratch[-6:]
        block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
        mine = lax.div(num_slots_g[0] * units - block + (tiling.NUM_SMS - 1), tiling.NUM_SMS)

        def slot_and_unit(turn):
            unit = block + turn * tiling.NUM_SMS
            return lax.div(unit, units), lax.rem(unit, units)

        def stage_of(group: int, stage):
            """The chunk of this warpgroup in each plane of a stage."""
            refs = planes_s[sum(plane_counts[:group]) :]
            for plane, ref in zip(groups[group].tile.planes, refs, strict=False):
                part = pl.ds(warpgroup * (CHUNK // plane.per), CHUNK // plane.per)
                yield ref.at[stage, :, part]

        @pl.when(warpgroup < warpgroups)
        def compute():
            plgpu.set_max_registers(tiling.REGISTERS[warpgroups], action="increase")

            def one_unit(turn, _):
                slot, unit = slot_and_unit(turn)

                def one_stage(step, totals):
                    stage = lax.rem(turn * steps + step, stages)
                    plgpu.barrier_wait(full.at[stage])
                    if mode != "copy only":
                        x_ref = x_s.at[stage, pl.ds(warpgroup * x_groups, x_groups)]
                        x = load_x(x_ref, problem.rows)
                        sums = [load_sums(x_ref, problem.rows, i) for i in range(sum_terms(problem.parts))]
                        totals = tuple(
                            add_tile(total, g.tile, list(stage_of(i, stage)), x, sums)
                            for i, (g, total) in enumerate(zip(groups, totals, strict=True))
                        )
                    plgpu.barrier_arrive(free.at[stage])
                    return totals

                zero = tuple(zero_sums() for _ in groups)
                totals = lax.fori_loop(0, steps, one_stage, zero)
                seat = lax.rem(turn, EPILOGUES)

                @pl.when(turn >= EPILOGUES)
                def _():
                    plgpu.barrier_wait(parts_free.at[seat])

                for i, total in enumerate(totals):
                    parts_s.at[seat, warpgroup, i][...] = total
                plgpu.barrier_arrive(parts_full.at[seat])

                @pl.when(warpgroup == lax.rem(seat, warpgroups))
                def _():
                    plgpu.barrier_wait(parts_full.at[seat])
                    epilogue(parts_s.at[seat], slot, unit, extra[: len(extra) - outputs], extra[len(extra) - outputs :])
                    plgpu.barrier_arrive(parts_free.at[seat])

            lax.fori_loop(0, mine, one_unit, None)

        @pl.when(warpgroup == warpgroups)
        def produce():
            plgpu.set_max_registers(tiling.PRODUCER_REGISTERS, action="decrease")

            def one_unit(turn, _):
                slot, unit = slot_and_unit(turn)
                expert = experts_g[slot]
                source = 0 if problem.shared_x else slot

                def one_stage(step, _):
                    count = turn * steps + step
                    stage = lax.rem(count, stages)

                    @pl.when(count >= stages)
                    def _():
                        plgpu.barrier_wait(free.at[stage])

                    first = step * per_stage
                    copies = list(_copies(groups, planes_g, planes_s, stage, expert, unit, first, per_stage))
                    copies.append((x_g.at[source, pl.ds(first * x_groups, per_stage * x_groups)], x_s.at[stage]))
                    for origin, target in copies:
                        plgpu.copy_gmem_to_smem(origin, target, full.at[stage])

                lax.fori_loop(0, steps, one_stage, None)

            lax.fori_loop(0, mine, one_unit, None)

    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(tiling.NUM_SMS,),
        grid_names=("block",),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        kernel_name=name,
        # Every value that a warpgroup stores to shared memory passes a barrier before another reads it.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        scratch_types=[
            *(s for g in groups for s in _plane_scratch(problem, g, per_stage, stages)),
            plgpu.SMEM((stages, per_stage * x_groups, problem.x_shape[2]), jnp.uint32),
            plgpu.SMEM((EPILOGUES, warpgroups, len(groups), ROWS, COLUMNS), jnp.float32),
            plgpu.Barrier(num_arrivals=inputs + 1, num_barriers=stages),
            plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
            plgpu.Barrier(num_arrivals=warpgroups, num_barriers=EPILOGUES),
            plgpu.Barrier(num_arrivals=1, num_barriers=EPILOGUES),
        ],
    )


def _copies(groups, planes_g, planes_s, stage, expert, unit, first_chunk, chunks):
    """(origin, target) of every plane's part of a stage: ``chunks`` chunks of the unit's rows."""
    planes_g, planes_s = iter(planes_g), iter(planes_s)
    for group in groups:
        targets = [next(planes_s) for _ in group.tile.planes]
        rows = pl.ds(unit * group.height, group.height)
        for piece in range(group.pieces):
            for plane, target in zip(group.tile.planes, targets, strict=True):
                entries = chunks * CHUNK // plane.per
                part = pl.ds(first_chunk * (CHUNK // plane.per), entries)
                origin = next(planes_g)
                if plane.by_row:
                    yield (
                        origin.at[expert, rows, part],
                        target.at[stage, pl.ds(piece * group.height, group.height)],
                    )
                else:
                    yield origin.at[expert, part, rows], target.at[stage, piece, pl.ds(0, entries)]


def zero_sums() -> jax.Array:
    return plgpu.layout_cast(jnp.zeros((ROWS, COLUMNS), jnp.float32), ACC)


def add_tile(total, tile_format: TileFormat, planes, x, sums):
    """``total`` plus a tile's product with x bf16[CHUNK, COLUMNS] and its sums bf16[16, COLUMNS] (decode.py)."""
    by_row = functools.partial(lax.broadcast_in_dim, shape=total.shape, broadcast_dimensions=[0])
    tile = tile_format.decode(*planes)
    by_shift: dict[int, jax.Array] = {}
    for i, block in enumerate(tile.sub_blocks):
        first = i * tile_format.weights
        product = plgpu.mma(zero_sums(), block.values, x[first : first + tile_format.weights])
        if tile_format.bias:
            product = _mma_each(product, constant_factor(-tile_format.bias << block.shift, i), sums)
        scaled = by_row(block.scale) * product
        by_shift[block.shift] = by_shift[block.shift] + scaled if block.shift in by_shift else scaled
    if tile.offset is not None:
        total = total + by_row(tile.offset.scale) * _mma_each(zero_sums(), tile.offset.factors, sums)
    for shift, part in by_shift.items():
        factor = 2.0**-shift
        if tile.d is None:
            total = total + part * factor
        else:
            total = total + by_row(tile.d * factor) * part
    return total


def _mma_each(product, factors, sums):
    for term in sums:
        product = plgpu.mma(product, factors, term)
    return product
