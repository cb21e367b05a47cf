"""One launch of many_tokens.py: what it multiplies, by which tiles, and what of it lies in shared memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from . import operands, tiling
from ._compat import plgpu
from .decode import CHUNK, PART
from .factor_table import Table
from .registers import tiled
from .simt import thread_in_block
from .sorted_pairs import MOST_COLUMNS
from .tile_epilogues import Rows

TILE = 64  # rows of weights of a warpgroup
SEATS = 2  # units that the copying warpgroup tells the others of ahead
PARTS = CHUNK // PART
SUMS = CHUNK // 16  # of x in a chunk


class Gather(NamedTuple):
    top_k: int
    sums: bool  # whether x has sums, whose rows are copied too


class Product(NamedTuple):
    """One launch. ``makes``: "h"; "out"; or "gate", f32, for a launch of another format's up that makes h of both."""

    makes: str
    formats: tuple[str, ...]  # of gate and up together, or of one projection
    outputs: int  # O of each
    depth: int  # D
    pairs: int  # R, a multiple of 8
    terms: int  # bf16 terms of x and of weights, 1 or 2
    widths: tuple[int, ...]  # columns that a tile is computed with: one number, or the lower of two that suffices
    warpgroups: int  # that multiply
    gated: bool = True  # whether h takes a gate
    gather: Gather | None = None  # where x is of tokens, and this launch copies it to the pairs' places
    weighted: bool = False  # whether the results are multiplied by their pairs' topk_weights

    @property
    def width(self) -> int:
        """Columns that are copied of a tile."""
        return self.widths[0]

    @property
    def rows(self) -> Rows:
        return Rows(len(self.formats), self.makes == "h" or self.out_type.dtype == jnp.float32)

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
    def narrow(self) -> bool:
        return tiling.is_narrow(self.warpgroups)

    @property
    def packed(self) -> bool:
        return self.formats[0] not in operands.DENSE

    @property
    def whole_scales(self) -> bool:
        """Whether operands are made by :func:`operands.whole_part`."""
        name = self.formats[0]
        # Nothing makes sums of h.
        without_sums = self.makes == "out" and operands.has_mins(name)
        return takes_whole_scales(name, self.terms, self.warpgroups) and not without_sums

    @property
    def takes_sums(self) -> bool:
        """Of x."""
        return self.whole_scales and operands.has_mins(self.formats[0])

    @property
    def table(self) -> Table:
        return Table(self.formats[0], self.whole_scales)

    @property
    def planes(self):
        return operands.planes_of(self.formats[0])

    @property
    def weight_bytes(self) -> int:
        """Of a stage of weights."""
        return self.warpgroups * operands.tile_bytes(self.formats[0])

    @property
    def table_bytes(self) -> int:
        """Of the table of factors."""
        return self.table.nbytes(self.warpgroups) if self.packed else 0

    @property
    def x_bytes(self) -> int:
        """Of a part of x, and of a fourth of a chunk's sums."""
        return self.terms * self.width * PART * 2 + self.takes_sums * self.width * SUMS * 2 // PARTS

    def pipeline(self, others: int = 0) -> tiling.Pipeline:
        """``others``: bytes of shared memory."""
        fixed = self.table_bytes + self.pair_weights * 4 * SEATS
        return tiling.pipeline(self.weight_bytes, self.x_bytes, fixed + others, self.narrow)

    def first_rows(self, blocks: int) -> int:
        """Of x: at most those that the blocks' first units take."""
        return -(-blocks // self.units) * self.width

    @property
    def gate_in_memory(self) -> bool:
        return self.makes == "h" and self.gated and len(self.formats) == 1

    @property
    def pair_weights(self) -> int:
        """Places for topk_weights of a tile's columns, to whole lines: so the copy engine wants them."""
        return -(-self.width // 32) * 32 * self.weighted

    @property
    def operands(self) -> int:
        """Arrays of x that this launch takes: itself, and its sums."""
        return 1 + (self.gather.sums if self.gather else self.takes_sums)

    @property
    def gathered(self) -> list[jax.ShapeDtypeStruct]:
        """x of each sorted pair, and its sums."""
        if not self.gather:
            return []
        shapes = [(self.terms, self.pairs, self.depth)] + [(self.pairs, self.depth // 16)] * self.gather.sums
        return [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]

    @property
    def out_type(self) -> jax.ShapeDtypeStruct:
        if self.makes == "h":
            return jax.ShapeDtypeStruct((self.terms, self.pairs, self.outputs), jnp.bfloat16)
        wide = self.makes == "gate" or self.terms > 1 or tiling.keeps_f32(self.pairs, self.outputs)
        return jax.ShapeDtypeStruct((self.pairs, self.outputs), jnp.float32 if wide else jnp.bfloat16)


def takes_whole_scales(name: str, terms: int, warpgroups: int) -> bool:
    return terms == 1 and tiling.is_narrow(warpgroups) and operands.has_whole_scales(name)


def column_blocks(width: int) -> list[slice]:
    """Of a tile: the columns of one product, and those that only a tile with more of them is multiplied with."""
    return [slice(at, min(at + MOST_COLUMNS, width)) for at in range(0, width, MOST_COLUMNS)]


def scratch(product: Product, pipeline: tiling.Pipeline) -> list[Any]:
    """Stages of weights, the table of factors, topk_weights of units, and stages of x's sums and of x."""
    lead = (pipeline.weights, len(product.formats))
    found = [_stages(lead, plane, product.unit_outputs, product.depth) for plane in product.planes]
    if product.packed:
        found.append(product.table.scratch(product.warpgroups))
    if product.weighted:
        found.append(plgpu.SMEM((SEATS, product.pair_weights), jnp.float32))
    if product.takes_sums:
        found.append(tiled((pipeline.rows, product.width, SUMS), jnp.bfloat16, 2 * SUMS))
    shape = (pipeline.x // pipeline.span, product.terms, product.width, pipeline.span * PART)
    return [*found, tiled(shape, jnp.bfloat16, 2 * PART)]


def swizzle(plane, depth: int) -> int:
    return plane.swizzle(depth) if plane.by_row else 0


def _stages(lead: tuple[int, ...], plane, height: int, depth: int):
    entries = CHUNK // plane.per
    if not plane.by_row:
        return plgpu.SMEM((*lead, entries, height), plane.dtype)
    return tiled((*lead, height, entries), plane.dtype, plane.swizzle(depth))
