"""Counters in global memory by which blocks of one launch tell each other what is written: raise, wait.

They are plain words in global memory, zero before each launch and after it. Pallas' own semaphores reach to the whole
system, and take longer than a block of the same GPU needs.
"""

from __future__ import annotations

from typing import Any

from ._compat import ir, mosaic_utils, plgpu
from .simt import Word, each, store, thread_in_block

# Between what threads do with global memory and what the copy engine does.
FENCE = "fence.proxy.async.global;"


def _pointer(ref, place: Word) -> Any:
    base = mosaic_utils.memref_ptr(ref)
    return mosaic_utils.getelementptr(base, [place.value], ir.IntegerType.get_signless(32))


def add_one(ref, place) -> None:
    """After all that this warpgroup wrote, which others may then read, with the copy engine too."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def add(_, ref, place):
        mosaic_utils.inline_ptx(FENCE, has_side_effects=True)
        mosaic_utils.warpgroup_barrier()
        # The barrier has shown this thread what the others wrote: its release covers that too.
        first = mosaic_utils.single_thread_predicate(mosaic_utils.ThreadSubset.WARPGROUP)
        release(ref, Word(place.registers.item()), first)

    add(ref, place)


def wait(ref, place, value: int) -> None:
    """Until the counter is at ``value``; what was written before that may then be copied by TMA."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def run(_, ref, place):
        spin(ref, Word(place.registers.item()), Word(value))

    run(ref, place)


def release(ref, place: Word, predicate: Any = None, count: int = 1) -> None:
    """So many more, by one thread, in Mosaic; what the copy engine shall read or wrote needs a ``FENCE`` before."""
    text = f"red.release.gpu.global.add.u32 [$0], {count};"
    mosaic_utils.inline_ptx(text, _pointer(ref, place), predicate=predicate, has_side_effects=True)


def spin(ref, place: Word, value: Word) -> None:
    """:func:`wait` in Mosaic."""
    mosaic_utils.inline_ptx(
        "{ .reg .pred low; .reg .u32 seen; again: ld.acquire.gpu.global.b32 seen, [$0];"
        " setp.lt.u32 low, seen, $1; @low bra again; }",
        _pointer(ref, place),
        value.value,
        has_side_effects=True,
    )
    mosaic_utils.inline_ptx(FENCE, has_side_effects=True)


def leave(ref, count: int, blocks: int, of: Any = mosaic_utils.ThreadSubset.WARPGROUP) -> None:
    """For a warp or a warpgroup of each block to call once the block reads no counter any more: the last one sets all
    to zero. ``ref[count]`` counts the blocks. Whatever raises a counter was waited for by some block before it left.

    Zero again, because XLA may give several launches one buffer that it knows to hold zeros.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def run(_, ref):
        word = ir.IntegerType.get_signless(32)
        one = Word(1).where(mosaic_utils.single_thread_predicate(of))
        left = mosaic_utils.inline_ptx(
            "{ .reg .pred one; setp.ne.b32 one, $2, 0; mov.b32 $0, -1;"
            " @one atom.acq_rel.gpu.global.add.u32 $0, [$1], 1; }",
            _pointer(ref, Word(count)),
            one.value,
            result_types=word,
            has_side_effects=True,
        )
        # Its warp zeroes them together.
        with mosaic_utils.when(Word(left).most_of_lanes().equals(blocks - 1)):
            each(thread_in_block() % 32, count + 1, 32, lambda place: store(Word(0), ref, place))

    run(ref)
