"""Code that each thread of a block runs for itself, on words and floats of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._compat import arith, gpu, ir, llvm, memref, mosaic_utils, plgpu, vector


class Word:
    """An i32 of a thread, with Python's operators; a comparison, signed, gives a condition."""

    def __init__(self, value: Any):
        if isinstance(value, int):
            value = mosaic_utils.c(value, ir.IntegerType.get_signless(32))
        self.value = value.value if isinstance(value, Word) else value

    def __add__(self, other):
        return Word(arith.addi(self.value, _like(self, other)))

    def __sub__(self, other):
        return Word(arith.subi(self.value, _value(other)))

    def __mul__(self, other):
        return Word(arith.muli(self.value, _like(self, other)))

    def __floordiv__(self, other):
        return Word(arith.divui(self.value, _value(other)))

    def __mod__(self, other):
        return Word(arith.remui(self.value, _value(other)))

    def __and__(self, other):
        return Word(arith.andi(self.value, _value(other)))

    def __or__(self, other):
        return Word(arith.ori(self.value, _value(other)))

    def __xor__(self, other):
        return Word(arith.xori(self.value, _value(other)))

    def __lshift__(self, other):
        return Word(arith.shli(self.value, _value(other)))

    def __lt__(self, other):
        return self._compared("slt", other)

    def __ge__(self, other):
        return self._compared("sge", other)

    def equals(self, other):
        return self._compared("eq", other)

    def below(self, other):
        """Of numbers without a sign."""
        return self._compared("ult", other)

    def _compared(self, how: str, other):
        return arith.cmpi(getattr(arith.CmpIPredicate, how), self.value, _value(other))

    @property
    def index(self):
        return arith.index_cast(ir.IndexType.get(), self.value)

    def where(self, condition, otherwise: int | Word = 0) -> Word:
        """This word where ``condition`` holds."""
        return Word(arith.select(condition, self.value, _value(otherwise)))

    def at_most(self, other) -> Word:
        return Word(arith.minui(self.value, _value(other)))

    def ones(self) -> Word:
        """How many bits are set."""
        return Word(mosaic_utils.inline_ptx("popc.b32 $0, $1;", self.value, result_types=self.value.type))

    def fellows(self) -> Word:
        """A bit for each lane of the warp that has the same word."""
        return self._of_all_lanes("match.any.sync.b32 $0, $1, 0xffffffff;")

    def sum_of_lanes(self) -> Word:
        return self._of_all_lanes("redux.sync.add.s32 $0, $1, 0xffffffff;")

    def most_of_lanes(self) -> Word:
        return self._of_all_lanes("redux.sync.max.s32 $0, $1, 0xffffffff;")

    def from_before(self, distance: int) -> Word:
        """That of the lane so many before this one, its own where there is none."""
        return self._of_all_lanes(f"shfl.sync.up.b32 $0, $1, {distance}, 0, 0xffffffff;")

    def _of_all_lanes(self, ptx: str) -> Word:
        kind = self.value.type
        return Word(mosaic_utils.inline_ptx(ptx, self.value, result_types=kind, has_side_effects=True, convergent=True))

    def from_lane(self, distance: int) -> Word:
        """That of the lane whose number differs in the bit ``distance``."""
        return Word(mosaic_utils.shfl_bfly(self.value, distance))


def _value(other: int | Word):
    return Word(other).value


def _like(word: Word, other: int | Word):
    """``other``'s value in the bits of ``word``."""
    return mosaic_utils.c(other, word.value.type) if isinstance(other, int) else other.value


class Float:
    """An f32 of a thread, with Python's operators."""

    def __init__(self, value: Any):
        if isinstance(value, int | float):
            value = mosaic_utils.c(float(value), ir.F32Type.get())
        self.value = value.value if isinstance(value, Float) else value

    def __add__(self, other):
        return Float(arith.addf(self.value, Float(other).value))

    def __mul__(self, other):
        return Float(arith.mulf(self.value, Float(other).value))

    def from_lane(self, distance: int) -> Float:
        """That of the lane whose number differs in the bit ``distance``."""
        return Float(mosaic_utils.shfl_bfly(self.value, distance))

    def __truediv__(self, other):
        """To two units in the last place, by a divisor from 2^-126 to 2^126; by a larger one zero."""
        other = Float(other).value
        reciprocal = mosaic_utils.inline_ptx("rcp.approx.ftz.f32 $0, $1;", other, result_types=other.type)
        return self * Float(reciprocal)


def minimum(a: Float, b: float) -> Float:
    """NaN where ``a`` is."""
    return Float(arith.minimumf(a.value, Float(b).value))


def maximum(a: Float, b: float) -> Float:
    """NaN where ``a`` is."""
    return Float(arith.maximumf(a.value, Float(b).value))


def exp2(a: Float) -> Float:
    """Zero below f32's normal numbers."""
    return Float(mosaic_utils.inline_ptx("ex2.approx.ftz.f32 $0, $1;", a.value, result_types=a.value.type))


def both(first, *others):
    """Whether all conditions hold."""
    for other in others:
        first = arith.andi(first, other)
    return first


def negated(condition):
    return arith.xori(condition, mosaic_utils.c(1, condition.type))


def extended(word: Word) -> Word:
    """In 64 bits; it is not negative."""
    return Word(arith.extui(ir.IntegerType.get_signless(64), word.value))


def load_word(ref, *place: Word) -> Word:
    return Word(memref.load(ref, [p.index for p in place]))


def load_four(ref, first: Word) -> list[Word]:
    """Neighbouring words, from a multiple of four on."""
    four = ir.VectorType.get((4,), ir.IntegerType.get_signless(32))
    pointer = mosaic_utils.getelementptr(mosaic_utils.memref_ptr(ref), [first.value], ir.IntegerType.get_signless(32))
    words = llvm.load(four, pointer)
    return [Word(vector.extract(words, [], [i])) for i in range(4)]


def load_float(ref, *place: Word) -> Float:
    return Float(memref.load(ref, [p.index for p in place]))


def store(value, ref, *place: Word) -> None:
    memref.store(value.value if isinstance(value, Word) else value, ref, [p.index for p in place])


def increment(ref, place: Word) -> None:
    """One more in shared memory, whatever other threads do to it meanwhile."""
    _reduce("red.shared.add.u32 [$0], 1;", ref, place)


def set_bits(ref, place: Word, bits: Word) -> None:
    """These bits in shared memory too, whatever other threads do to it meanwhile."""
    _reduce("red.shared.or.b32 [$0], $1;", ref, place, bits.value)


def _reduce(ptx: str, ref, place: Word, *operands) -> None:
    pointer = mosaic_utils.getelementptr(mosaic_utils.memref_ptr(ref), [place.value], place.value.type)
    mosaic_utils.inline_ptx(ptx, pointer, *operands, has_side_effects=True)


def thread_in_block() -> Word:
    return Word(mosaic_utils.thread_idx())


def block() -> Word:
    return Word(mosaic_utils.block_idx())


def items(count: int, threads: int):
    """This thread's numbers below ``count``, ``threads`` apart. A thread without one of its own repeats the last, so
    that all stay together: it writes the same to the same place."""
    for first in range(0, count, threads):
        yield (thread_in_block() + first).at_most(count - 1)


def each(start: Word, stop: int | Word, step: int, visit) -> None:
    """``visit(i)`` for i from ``start`` below ``stop``."""
    steps = (Word(stop) - start + (step - 1)) // step
    # Unsigned division: a start past the stop must not wrap around.
    steps = steps.where(start < stop)

    @mosaic_utils.fori(steps.value, [])
    def _(i, _):
        visit(start + Word(i) * step)
        return []


def sums_before(mine: Word, sums_s: Any) -> Word:
    """The sum over all threads of the block before this one; ``sums_s`` of 32. Another call may follow after a
    barrier."""
    warp, lane = thread_in_block() // 32, thread_in_block() % 32
    total = mine
    for distance in (1, 2, 4, 8, 16):
        total = total + total.from_before(distance).where(lane >= distance)
    with mosaic_utils.when(lane.equals(31)):
        store(total, sums_s, warp)
    gpu.barrier()
    return load_word(sums_s, lane).where(lane < warp).sum_of_lanes() + total - mine


def kernel(run: Any, *, out_type: Any, blocks: int, warpgroups: int, name: str, scratch: Sequence[Any] = ()) -> Any:
    """A launch whose threads each run ``run(*inputs, *outputs, *scratch)``; it says itself where they wait."""

    def body(*refs):
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
        def each_thread(_, *refs):
            run(*refs)

        each_thread(*refs)

    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        scratch_types=scratch,
    )


def words(*shape: int) -> jax.ShapeDtypeStruct:
    """An array of i32."""
    return jax.ShapeDtypeStruct(shape, jnp.int32)
