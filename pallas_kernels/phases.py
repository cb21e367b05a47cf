"""The two halves of a layer, gate and up, then down: their sizes, and how a block cuts them into units and stages."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp

from .decode import CHUNK, TILE_FORMATS
from .x_tiles import GROUP, group_words

TILE = 64  # rows that a warpgroup decodes at a time: the tensor core's m16 times four warps
LANES = 2  # compute warpgroups


class Phase(NamedTuple):
    """A stage of a unit feeds both lanes. ``by_rows``: a tile each, of one chunk of depth; else they
    share a tile and take a chunk each."""

    formats: tuple[str, ...]  # of gate and up, or of down
    slots: int  # P, the most there can be
    outputs: int  # O of each projection
    depth: int  # D
    tokens: int  # C, of a slot
    parts: int  # bf16 terms that a token's x is split into: 1 where x is bf16, 2 for f16 and f32
    shared_x: bool  # all slots read x[0]
    resident_x: bool  # and it lies in shared memory from the beginning
    by_rows: bool

    @property
    def rows(self) -> int:
        """R, columns of x in use."""
        return self.tokens * self.parts

    @property
    def x_shape(self) -> tuple[int, int, int]:
        """x as the kernel reads it (x_tiles.py), u32."""
        return 1 if self.shared_x else self.slots, self.depth // GROUP, group_words(self.rows, self.parts)

    @property
    def sources(self) -> int:
        """Pieces of ``height`` rows that a unit is copied as: gate and up, or the halves of down's rows."""
        return max(len(self.formats), self.tiles)

    @property
    def tiles(self) -> int:
        return LANES if self.by_rows else 1

    @property
    def pieces(self) -> int:
        """Sources that share a tile."""
        return self.sources // self.tiles

    @property
    def height(self) -> int:
        return TILE // self.pieces

    @property
    def stored(self) -> tuple[tuple[str, int], ...]:
        """(format, tiles) of the arrays that hold a stage's planes."""
        if len(set(self.formats)) > 1:
            return tuple((name, 1) for name in self.formats)
        return ((self.formats[0], self.tiles),)

    @property
    def stage_chunks(self) -> int:
        return 1 if self.by_rows else LANES

    @property
    def chunks(self) -> int:
        return -(-self.depth // CHUNK)

    @property
    def steps(self) -> int:
        """Stages of a unit."""
        return -(-self.chunks // self.stage_chunks)

    @property
    def unit_outputs(self) -> int:
        """Rows of each projection that a unit has."""
        return self.height * self.sources // len(self.formats)

    @property
    def units(self) -> int:
        """Of a slot."""
        return -(-self.outputs // self.unit_outputs)

    @property
    def weight_bytes(self) -> int:
        """Of a stage; a KiB of what the copy engine's alignment adds included."""
        rows = TILE * self.tiles // len(self.formats)
        planes = [plane for name in self.formats for plane in TILE_FORMATS[name].planes]
        chunk = sum(rows * CHUNK // plane.per * jnp.dtype(plane.dtype).itemsize for plane in planes)
        return chunk * self.stage_chunks + 1024

    @property
    def stage_bytes(self) -> int:
        return self.weight_bytes + (0 if self.resident_x else self.stage_groups * self.x_shape[2] * 4)

    @property
    def stage_groups(self) -> int:
        """Groups of x that a stage's depth is."""
        return self.stage_chunks * (CHUNK // GROUP)

    @property
    def resident_shape(self) -> tuple[int, int]:
        """All of x in shared memory, u32: with zeros where the last stage goes past its end."""
        return self.steps * self.stage_groups, self.x_shape[2]

    @property
    def resident_bytes(self) -> int:
        return math.prod(self.resident_shape) * 4

    @property
    def unit_bytes(self) -> int:
        return self.weight_bytes * self.chunks // self.stage_chunks
