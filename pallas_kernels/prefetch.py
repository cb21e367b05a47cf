"""Ask for the weights that the layer's kernel reads first to be brought into the L2 cache, while it is being launched.

From the moment that the slots are known until the kernel's own copies run, memory would stand idle for some 4 us.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from . import simt
from ._compat import arith, ir, mosaic_utils
from .simt import Word

# About as much as memory can bring in the time; the cache holds twice as much.
BYTES = 24 << 20
PIECE = 4096


class Stretch(NamedTuple):
    """What to fetch of one plane: of each of the first ``slots`` experts, of each of ``rows``, the first ``wanted``
    bytes. Whatever order the plane is in, these are the weights of its first outputs."""

    plane: Any
    slots: int
    rows: int
    row_bytes: int
    wanted: int

    @property
    def pieces(self) -> int:
        """Of a slot."""
        return self.rows * -(-self.wanted // PIECE)


def stretches(phases: Sequence[Sequence[tuple[Any, bool]]], slots: int) -> Iterator[Stretch]:
    """As far as BYTES reach in the order in which the kernel reads: gate and up of all slots, then down.

    ``phases``: (plane, whether a row plane) of gate and up, and of down; a plane is anything with a memref's ``type``.
    """
    left = BYTES
    for planes in phases:
        sizes = [_bytes(plane) for plane, _ in planes]
        reached = min(slots, left // sum(sizes))
        share = 1.0 if reached else left / sum(sizes)
        for (plane, by_row), size in zip(planes, sizes, strict=True):
            rows = 1 if by_row else plane.type.shape[1]
            row_bytes = size // rows
            wanted = min(row_bytes, math.ceil(share * row_bytes / 128) * 128)
            yield Stretch(plane, max(reached, 1), rows, row_bytes, wanted)
        if reached < slots:
            return
        left -= reached * sum(sizes)


def _bytes(plane: Any) -> int:
    """Of an expert."""
    return math.prod(plane.type.shape[1:]) * mosaic_utils.bytewidth(plane.type.element_type)


def prefetch(stretch: Stretch, experts, count: Word, warp: Word, warps: int) -> None:
    """This warp's share: ``experts`` are the slots' rows in the plane, of which ``count`` are in use."""
    base = mosaic_utils.memref_ptr(stretch.plane)
    a_row = stretch.pieces // stretch.rows
    i64 = ir.IntegerType.get_signless(64)

    def fetch(item: Word) -> None:
        slot, piece = item // stretch.pieces, item % stretch.pieces
        row, first = piece // a_row, piece % a_row * PIECE
        size = (Word(stretch.wanted) - first).at_most(PIECE)
        within = row * stretch.row_bytes + first
        expert = arith.extui(i64, simt.load_word(experts, slot).value)
        place = arith.muli(expert, mosaic_utils.c(stretch.rows * stretch.row_bytes, i64))
        place = arith.addi(place, arith.extui(i64, within.value))
        address = mosaic_utils.getelementptr(base, [place], ir.IntegerType.get_signless(8))
        with mosaic_utils.when((simt.thread_in_block() % 32).equals(0)):
            mosaic_utils.inline_ptx(
                "cp.async.bulk.prefetch.L2.global [$0], $1;", address, size.value, has_side_effects=True
            )

    simt.each(warp, count.at_most(stretch.slots) * stretch.pieces, warps, fetch)
