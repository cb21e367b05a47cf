"""Rows of x copied to their sorted places in the launch that multiplies them, while it does.

    to[..., r, :] = from[..., pair[r] // K, :]

Eight rows are a batch, batches are dealt to the blocks in turn, and a counter says how many rows of a bucket have come.
Tiles are taken in the order of their rows: those of the blocks' first units are copied by the warps that will multiply
them, a row each, in registers; all others by one lane of each block, with bulk copies through shared memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from ._compat import ir, llvm, mosaic_utils, nvvm, plgpu
from .barriers import SCALAR, TICKS, WARPS, Barriers, pointer_of
from .counters import FENCE, release, spin
from .simt import Word, both, each, extended, load_word, thread_in_block

BATCH = 8  # rows
BUCKET = 64  # rows
# Pieces of rows on their way: the fewest, and the most that are worth their memory. Both divide a batch's.
FEWEST, MOST = 4, 8
SMALL, LARGE = 1024, 2048  # bytes of one
LEAST_BYTES = FEWEST * SMALL
VECTOR = 16  # bytes that a lane copies at once
VECTORS = 16  # that it has on their way


class Rows(NamedTuple):
    """What is copied: each ``sources[i]`` [..., T, n] to ``targets[i]`` [..., R, n]."""

    sources: Sequence[Any]
    targets: Sequence[Any]
    pair: Any  # i32[R]
    count: Any  # of sorted_pairs.Tiles
    ready: Any  # i32[counters(R)]
    top_k: int

    @property
    def refs(self) -> list[Any]:
        return [self.pair, self.count, self.ready, *self.sources, *self.targets]

    def of(self, refs: Sequence[Any]) -> Rows:
        """The same of Mosaic's."""
        pair, count, ready, *others = refs
        half = len(self.sources)
        return self._replace(pair=pair, count=count, ready=ready, sources=others[:half], targets=others[half:])

    @property
    def batches(self) -> Word:
        return (load_word(self.count, Word(1)) + (BATCH - 1)) // BATCH


def buckets(rows: int) -> int:
    return -(-rows // BUCKET)


def counters(rows: int) -> int:
    """One a bucket, and one of the blocks that are done with them."""
    return buckets(rows) + 1


def pieces(free_bytes: int) -> tuple[int, int] | None:
    """(pieces on their way, bytes of one) that shared memory has room for."""
    forms = ((MOST, LARGE), (MOST, SMALL), (FEWEST, SMALL))
    return next((form for form in forms if form[0] * form[1] <= free_bytes), None)


def first_batches(rows: int, warps: int, blocks: int) -> int:
    """For :func:`copy_first` of a block: ``rows`` of all blocks, each of whose ``warps`` takes as many.

    Measured with twice as many and with all, H100, us a layer of Qwen3-30B-A3B: T = 1024 280 to 288 and 286, T = 2048
    405 to 408 and 427, T = 4096 692 to 686 and 846.
    """
    return -(-rows // (warps * blocks)) * warps // BATCH


def copy_first(rows: Rows, batches: int, warpgroups: int, blocks: int) -> None:
    """The first ``batches`` of each block, by all warps of so many warpgroups."""
    warps = warpgroups * WARPS

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(rows.refs))
    def run(_, *refs):
        mine, block = rows.of(refs), Word(mosaic_utils.block_idx())
        stop = mine.batches

        def copy() -> None:
            numbers = [thread_in_block() // 32 + i * warps for i in range(batches * BATCH // warps)]
            batch_of = [block + number // BATCH * blocks for number in numbers]
            inside = [batch < stop for batch in batch_of]
            # Past the end: the first row again, by whoever.
            places = [
                (batch * BATCH + number % BATCH).where(there)
                for batch, number, there in zip(batch_of, numbers, inside, strict=True)
            ]
            tokens = [load_word(mine.pair, place) // rows.top_k for place in places]
            jobs = [_jobs(mine, token, place) for token, place in zip(tokens, places, strict=True)]
            for same in zip(*jobs, strict=True):
                _copy_by_warp(same)
            mosaic_utils.inline_ptx(FENCE, has_side_effects=True)
            mosaic_utils.warp_barrier()
            one = mosaic_utils.single_thread_predicate(mosaic_utils.ThreadSubset.WARP)
            for place, there in zip(places, inside, strict=True):
                release(mine.ready, place // BUCKET, both(one, there))

        with mosaic_utils.when(block < stop):
            copy()

    run(*rows.refs)


def copy_others(rows: Rows, first: int, arrived: Barriers, pieces_s: Any, blocks: int) -> None:
    """All batches after the ``first`` of each block, by one warp of it."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * (2 + len(rows.refs)))
    def run(_, arrived_s, pieces_s, *refs):
        mine, block = rows.of(refs), Word(mosaic_utils.block_idx())
        start = block + first * blocks

        def one_batch(batch: Word) -> None:
            places = [batch * BATCH + i for i in range(BATCH)]
            tokens = [load_word(mine.pair, place) // rows.top_k for place in places]
            size = pieces_s.type.shape[1]
            jobs = [
                piece
                for token, place in zip(tokens, places, strict=True)
                for job in _jobs(mine, token, place)
                for piece in job.pieces(size)
            ]
            _copy_through(arrived, arrived_s, pieces_s, (batch - start) // blocks, jobs)
            mosaic_utils.inline_ptx(FENCE, has_side_effects=True)
            release(mine.ready, batch // (BUCKET // BATCH), count=BATCH)

        with mosaic_utils.when(mosaic_utils.single_thread_predicate(mosaic_utils.ThreadSubset.WARP)):
            each(start, mine.batches, blocks, one_batch)

    run(arrived.ref, pieces_s, *rows.refs)


def wait(ready: Any, count: Any, begin: Any, columns: Any) -> None:
    """Until the rows of a tile are there, and may be copied; by one warp."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), SCALAR, SCALAR))
    def run(_, ready, count, begin, columns):
        begin, columns = Word(begin.registers.item()), Word(columns.registers.item())
        bucket = begin // BUCKET + thread_in_block() % 32
        # A batch comes whole, though its last rows may lead nowhere.
        there = (load_word(count, Word(1)) + (BATCH - 1)) // BATCH * BATCH
        rows = (there - bucket * BUCKET).at_most(BUCKET)
        with mosaic_utils.when(both(columns >= 1, bucket * BUCKET < begin + columns)):
            spin(ready, bucket, rows)
        mosaic_utils.warp_barrier()

    run(ready, count, jnp.int32(begin), jnp.int32(columns))


class _Job(NamedTuple):
    """A row, or a piece of it: ``bytes`` from byte ``start`` on."""

    source: Any
    target: Any
    token: Word
    place: Word
    lead: int  # of [lead, rows, n]
    start: int
    bytes: int

    def pieces(self, size: int) -> Iterator[_Job]:
        for start in range(0, self.bytes, size):
            yield self._replace(start=self.start + start, bytes=min(size, self.bytes - start))

    @property
    def origin(self) -> Any:
        return self._of(self.source, self.token)

    @property
    def goal(self) -> Any:
        return self._of(self.target, self.place)

    def _of(self, ref: Any, row: Word) -> Any:
        # Made where it is wanted: registers are short.
        *_, rows, entries = ref.type.shape
        bytes_of_row = entries * mosaic_utils.bytewidth(ref.type.element_type)
        return _pointer(ref, extended(row) * bytes_of_row + (self.lead * rows * bytes_of_row + self.start))


def _jobs(rows: Rows, token: Word, place: Word) -> Iterator[_Job]:
    """All that one pair has."""
    for source, target in zip(rows.sources, rows.targets, strict=True):
        *leads, _, entries = source.type.shape
        bytes_of_row = entries * mosaic_utils.bytewidth(source.type.element_type)
        for lead in range(leads[0] if leads else 1):
            yield _Job(source, target, token, place, lead, 0, bytes_of_row)


def _pointer(ref: Any, byte: Word) -> Any:
    return _byte(mosaic_utils.memref_ptr(ref), byte)


def _copy_by_warp(jobs: Sequence[_Job]) -> None:
    """The same of several rows together, in registers."""
    four_words = ir.VectorType.get((4,), ir.IntegerType.get_signless(32))
    lane, line = thread_in_block() % 32 * VECTOR, 32 * VECTOR
    for parts in zip(*(job.pieces(max(1, VECTORS // len(jobs)) * line) for job in jobs), strict=True):
        copied, goals = [], []
        for part in parts:
            origin, goal = part.origin, part.goal
            for start in range(0, part.bytes, line):
                place = lane + start
                if start + line > part.bytes:
                    # Past the end: the last bytes again, to the same place.
                    place = place.at_most(part.bytes - VECTOR)
                copied.append(llvm.load(four_words, _byte(origin, extended(place))))
                goals.append(_byte(goal, extended(place)))
        for vector, goal in zip(copied, goals, strict=True):
            llvm.store(vector, goal)


def _byte(pointer: Any, place: Word) -> Any:
    return mosaic_utils.getelementptr(pointer, [place.value], ir.IntegerType.get_signless(8))


def _copy_through(arrived: Barriers, arrived_s: Any, pieces_s: Any, turn: Word, jobs: Sequence[_Job]) -> None:
    """All of them, from memory to memory; ``turn``: how often as many were copied before."""
    places, size = pieces_s.type.shape
    ahead = places // 2
    assert len(jobs) % places == 0
    for number in range(len(jobs) + ahead):
        if number < len(jobs):
            job, place = jobs[number], number % places
            if number >= places:
                # What was stored from this place has been read.
                _bulk(f"wait_group.read {places - ahead - 1};")
            barrier = pointer_of(arrived, arrived_s, Word(place))
            nvvm.mbarrier_arrive_expect_tx(barrier, Word(job.bytes).value)
            text = f"shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], {job.bytes}, [$2];"
            _bulk(text, _pointer(pieces_s, Word(place * size)), job.origin, barrier)
        if number >= ahead:
            job = jobs[number - ahead]
            round_, place = divmod(number - ahead, places)
            parity = (turn * (len(jobs) // places) + round_) % 2
            barrier = pointer_of(arrived, arrived_s, Word(place))
            nvvm.mbarrier_try_wait_parity(barrier, parity.value, Word(TICKS).value)
            text = f"global.shared::cta.bulk_group [$0], [$1], {job.bytes};"
            _bulk(text, job.goal, _pointer(pieces_s, Word(place * size)))
            _bulk("commit_group;")
    _bulk("wait_group 0;")


def _bulk(text: str, *operands: Any) -> None:
    mosaic_utils.inline_ptx("cp.async.bulk." + text, *operands, has_side_effects=True)
