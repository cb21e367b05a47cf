"""Counters in global memory by which blocks of one launch tell each other what is written: raise, wait.

They are plain words in global memory, zero before each launch and after it. Pallas' own semaphores reach to the whole
system, and take longer than a block of the same GPU needs.
"""

from __future__ import annotations

from ._compat import ir, mosaic_utils, plgpu
from .simt import Word, each, store


def _pointer(ref, place):
    base = mosaic_utils.memref_ptr(ref)
    return mosaic_utils.getelementptr(base, [place.registers.item()], ir.IntegerType.get_signless(32))


def add_one(ref, place) -> None:
    """After all that this warpgroup wrote, which others may then read, with the copy engine too."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def add(_, ref, place):
        mosaic_utils.inline_ptx("fence.proxy.async.global;", has_side_effects=True)
        mosaic_utils.warpgroup_barrier()
        # The barrier has shown this thread what the others wrote: its release covers that too.
        mosaic_utils.inline_ptx(
            "red.release.gpu.global.add.u32 [$0], 1;",
            _pointer(ref, place),
            predicate=mosaic_utils.single_thread_predicate(mosaic_utils.ThreadSubset.WARPGROUP),
            has_side_effects=True,
        )

    add(ref, place)


def wait(ref, place, value: int) -> None:
    """Until the counter is at ``value``; what was written before that may then be copied by TMA."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def spin(_, ref, place):
        mosaic_utils.inline_ptx(
            "{ .reg .pred low; .reg .u32 seen; again: ld.acquire.gpu.global.b32 seen, [$0];"
            f" setp.lt.u32 low, seen, {value}; @low bra again; }}",
            _pointer(ref, place),
            has_side_effects=True,
        )
        mosaic_utils.inline_ptx("fence.proxy.async.global;", has_side_effects=True)

    spin(ref, place)


def leave(ref, count: int, blocks: int) -> None:
    """For each block to call once it reads no counter any more: the last one sets all to zero. ``ref[count]`` counts
    the blocks. Whatever raises a counter was waited for by some block before it left.

    Zero again, because XLA may give several launches one buffer that it knows to hold zeros.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def run(_, ref):
        word = ir.IntegerType.get_signless(32)
        base = mosaic_utils.memref_ptr(ref)
        with mosaic_utils.when(mosaic_utils.single_thread_predicate(mosaic_utils.ThreadSubset.WARPGROUP)):
            left = mosaic_utils.inline_ptx(
                "atom.acq_rel.gpu.global.add.u32 $0, [$1], 1;",
                mosaic_utils.getelementptr(base, [count], word),
                result_types=word,
                has_side_effects=True,
            )
            with mosaic_utils.when(Word(left).equals(blocks - 1)):
                each(Word(0), count + 1, 1, lambda place: store(Word(0), ref, place))

    run(ref)
