"""Barriers in shared memory on which warps arrive, and the copies that complete them.

Pallas' own barriers take an arrival of each thread, and of each copy too: with fifteen copies a stage these alone took
two thousand cycles. Here one lane of a warp arrives for it, and says at once how many bytes its copies bring. A warp
copies alone; what it waits for, it counts itself: ``parity`` is that of the times that a barrier was completed before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from ._compat import arith, gpu, ir, mgpu, mosaic_utils, nvvm, plgpu
from .simt import Word

SCALAR = plgpu.Layout.WG_SPLAT
WARPS = 4  # of a warpgroup
LINE = 128  # bytes
# L2's policy "evict_first", as createpolicy.fractional makes it for all of an access.
EVICT_FIRST = 0x12F0000000000000
TICKS = 10_000_000  # of a try: how long the hardware may let a warp sleep


class Turn(NamedTuple):
    """A place in a ring, and how often it was passed before, as :func:`wait` takes it."""

    place: Any
    parity: Any

    @classmethod
    def after(cls, count: Any, places: int) -> Turn:
        return cls(jnp.int32(lax.rem(count, places)), jnp.int32(lax.rem(lax.div(count, places), 2)))

    def next(self, places: int) -> Turn:
        last = self.place == places - 1
        return Turn(jnp.where(last, 0, self.place + 1), jnp.where(last, 1 - self.parity, self.parity))

    def before(self, count: int, places: int) -> Turn:
        """So many turns ago, at most a round. What lies before the first turn a new barrier has behind it already."""
        place = self.place - count
        wraps = place < 0
        return Turn(jnp.where(wraps, place + places, place), jnp.where(wraps, 1 - self.parity, self.parity))


class Barriers(NamedTuple):
    """Some of a block's."""

    ref: Any  # that scratch() asks for
    first: int
    count: int
    arrivals: int  # of warps, that complete one


def scratch(counts: Sequence[int]) -> Any:
    return plgpu.SMEM((2 * sum(counts),), jnp.uint32)


def initialised(ref: Any, counts: Sequence[int], arrivals: Sequence[int], warpgroups: int) -> list[Barriers]:
    """By all threads of a block of so many warpgroups, before any is used."""
    firsts = [sum(counts[:i]) for i in range(len(counts))]
    made = [Barriers(ref, *of_one) for of_one in zip(firsts, counts, arrivals, strict=True)]
    total, warps = sum(counts), warpgroups * WARPS

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def run(_, ref):
        # A warp some: one thread would take a thousand cycles for all.
        warp, one = Word(mosaic_utils.warp_idx()), _one_lane()
        for first in range(0, total, warps):
            place = warp + first
            arriving = Word(made[-1].arrivals)
            for some in reversed(made[:-1]):
                arriving = Word(some.arrivals).where(place < some.first + some.count, arriving)
            mine = arith.andi(one, place < total)
            nvvm.mbarrier_init(pointer_of(Barriers(ref, 0, total, 0), ref, place), arriving.value, predicate=mine)
        mosaic_utils.inline_ptx("fence.mbarrier_init.release.cluster;", has_side_effects=True)
        gpu.barrier()

    run(ref)
    return made


def wait(barriers: Barriers, place: Any, parity: Any) -> None:
    """For the completion after an even (``parity`` 0) or an odd number of them. Of a new barrier there is already one
    with parity 1: a ring's producer begins with that, and finds all stages free."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR, SCALAR))
    def run(_, ref, place, parity):
        pointer = pointer_of(barriers, ref, _word(place))
        nvvm.mbarrier_try_wait_parity(pointer, _word(parity).value, Word(TICKS).value)

    run(barriers.ref, jnp.int32(place), jnp.int32(parity))


def arrive(barriers: Barriers, place: Any) -> None:
    """Of each warp, once its lanes are all here."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR))
    def run(_, ref, place):
        mosaic_utils.warp_barrier()
        pointer = pointer_of(barriers, ref, _word(place))
        text = "mbarrier.arrive.release.cta.shared::cta.b64 _, [$0];"
        mosaic_utils.inline_ptx(text, pointer, predicate=_one_lane(), has_side_effects=True)

    run(barriers.ref, jnp.int32(place))


class Copy(NamedTuple):
    """From a window of global memory, (first, count) or one index in each dimension, to ``target[place]``, slices in
    it by eight rows."""

    origin: Any
    window: tuple[Any, ...]
    target: Any
    place: tuple[Any, ...]
    swizzle: int  # 0 where rows lie one behind the other
    number: Any = 0  # which one along the rows
    once: bool = False  # whether these bytes are read once, or by several at the same time: L2 may forget them first

    @property
    def of_line(self) -> int:
        """Copies whose rows share lines of L2, where rows begin with one."""
        size = jnp.dtype(self.target.dtype).itemsize
        row, copied = self.origin.shape[-1] * size, self.window[-1][1] * size
        return LINE // copied if self.swizzle and copied < LINE and row % LINE == 0 else 1


def fill(barriers: Barriers, place: Any, copies: Sequence[Copy]) -> None:
    """Begins the copies, whose bytes complete a barrier; by one warp, which arrives."""
    refs: list[Any] = [barriers.ref]
    kinds: list[Any] = [plgpu.RefType()]
    words: list[Any] = [jnp.int32(place)]
    for copy in copies:
        refs += [copy.origin, copy.target]
        kinds += [plgpu.RefType(), plgpu.RefType(_transforms(copy))]
        words += [jnp.int32(copy.number)] * (copy.of_line > 1)
        words += [
            *(jnp.int32(w[0] if isinstance(w, tuple) else w) for w in copy.window),
            *(jnp.int32(p) for p in copy.place if not isinstance(p, slice)),
        ]

    @plgpu.inline_mgpu(arg_types=(*kinds, *(SCALAR,) * len(words)))
    def run(context, ref, *arguments):
        refs = iter(arguments)
        pairs = [(next(refs), next(refs)) for _ in copies]
        given = map(_word, refs)
        one = _one_lane()
        pointer = pointer_of(barriers, ref, next(given))
        jobs = []
        for copy, (origin, target) in zip(copies, pairs, strict=True):
            is_first = arith.andi(one, (next(given) % copy.of_line).equals(0)) if copy.of_line > 1 else None
            starts = [next(given).index for _ in copy.window]
            window = [
                mgpu.ds(start, w[1]) if isinstance(w, tuple) else start
                for start, w in zip(starts, copy.window, strict=True)
            ]
            places = [_tiles(p, copy.swizzle) if isinstance(p, slice) else next(given).index for p in copy.place]
            jobs.append((copy, origin, window, mosaic_utils.memref_slice(target, tuple(places))))
            if is_first is not None:
                # Memory gives half a line at 70 % of its speed: let it give the other half to L2 now.
                context.async_prefetch(
                    gmem_ref=origin,
                    gmem_slice=(*window[:-1], mgpu.ds(starts[-1], copy.window[-1][1] * copy.of_line)),
                    predicate=is_first,
                )
        total = sum(math.prod(t.type.shape) * mosaic_utils.bytewidth(t.type.element_type) for *_, t in jobs)
        nvvm.mbarrier_arrive_expect_tx(pointer, Word(total).value, predicate=one)
        barrier = mosaic_utils.BarrierRef(pointer, Word(0).value, None, 1)
        for copy, origin, window, target in jobs:
            block = ir.InsertionPoint.current.block
            before = len(block.operations)
            context.async_copy(
                src_ref=origin,
                dst_ref=target,
                gmem_slice=tuple(window),
                gmem_transform=tuple(
                    mgpu.TileTransform(t.tiling) for t in _transforms(copy) if isinstance(t, plgpu.TilingTransform)
                ),
                swizzle=copy.swizzle or None,
                barrier=barrier,
                arrive=False,
                predicate=one,
            )
            if copy.once and copy.of_line == 1:
                # Not what the next copies find there.
                _forget_first(list(block.operations)[before:])

    run(*refs, *words)


def _forget_first(made: Sequence[Any]) -> None:
    """Gives L2 that hint with the copies among these operations; Mosaic has no argument for it."""
    for operation in made:
        if operation.name != "nvvm.cp.async.bulk.tensor.shared.cluster.global":
            continue
        target, descriptor, *coordinates, barrier, predicate = operation.operands
        hint = mosaic_utils.c(EVICT_FIRST, ir.IntegerType.get_signless(64))
        nvvm.cp_async_bulk_tensor_shared_cluster_global(
            target, descriptor, coordinates, barrier, [], l2_cache_hint=hint, predicate=predicate
        )
        operation.erase()


def refill(full: Barriers, free: Barriers, turn: Turn, copies: Sequence[Copy]) -> Turn:
    """A ring's next stage once it is free, begun to be filled; the turn after it."""
    wait(free, turn.place, 1 - turn.parity)
    fill(full, turn.place, copies)
    return turn.next(full.count)


def _tiles(rows: slice, swizzle: int) -> slice:
    return slice(rows.start // 8, rows.stop // 8) if swizzle else rows


def warp_of_warpgroup() -> Any:
    """i32, another one for each warp: of branches that hold nothing but this module's operations."""

    @plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR))
    def run(_):
        warp = arith.remui(mosaic_utils.warp_idx(), Word(WARPS).value)
        return mgpu.FragmentedArray.splat(warp, (), is_signed=True)

    return run()


def _transforms(copy: Copy) -> tuple[Any, ...]:
    if not copy.swizzle:
        return ()
    entries = copy.swizzle // jnp.dtype(copy.target.dtype).itemsize
    return plgpu.TilingTransform((8, entries)), plgpu.SwizzleTransform(copy.swizzle)


def _word(array: Any) -> Word:
    return Word(array.registers.item())


def pointer_of(barriers: Barriers, ref: Any, place: Word) -> Any:
    """Of one of them; in Mosaic."""
    at = place + barriers.first
    return mosaic_utils.getelementptr(mosaic_utils.memref_ptr(ref), [at.value], ir.IntegerType.get_signless(64))


def _one_lane() -> Any:
    return mosaic_utils.single_thread_predicate(mosaic_utils.ThreadSubset.WARP)
