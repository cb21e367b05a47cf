"""NumPy in the place of MLIR for code that each thread runs for itself (pallas_kernels/simt.py): a block in lockstep,
and blocks one after another.

A value is an array of one number a thread, or of a row of several. Conditions become masks, loops run as often as the
thread that runs them most. What one warp writes to shared memory and another reads or writes must have a barrier
between, although the threads are in step here (:class:`Races`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

I1, I8, I32, I64 = (np.dtype(kind) for kind in (np.bool_, np.int8, np.int32, np.int64))
INDEX = I64
BF16, F16, F32 = (np.dtype(kind) for kind in (jnp.bfloat16, np.float16, np.float32))


class Value(NamedTuple):
    data: np.ndarray
    type: Any


class Vector(NamedTuple):
    size: int
    kind: Any

    @property
    def element_type(self) -> Any:
        return self.kind


class Pointer(NamedTuple):
    memory: np.ndarray
    nbytes: Any = 0


class Ref(np.ndarray):
    @property
    def type(self) -> Any:
        return SimpleNamespace(shape=self.shape, element_type=self.dtype)


class Races:
    """Which accesses to shared memory no barrier of the block or of a warpgroup orders: a vector clock for each warp,
    and for each byte each warp's last read, write and addition. Lanes of a warp wait for each other by what they
    exchange."""

    def __init__(self, warps: int):
        self.now = np.ones(warps, int)  # barriers passed, from 1 on
        self.known = np.zeros((warps, warps), int)  # [w, v]: up to which barrier w knows what v did
        self.accesses: dict[int, dict[str, np.ndarray]] = {}

    def watch(self, memory: np.ndarray) -> None:
        shape = memory.nbytes, len(self.now)
        self.accesses[_address(memory)] = {kind: np.zeros(shape, int) for kind in ("read", "written", "added to")}

    def barrier(self, warps: np.ndarray) -> None:
        """Of so many warps, by number."""
        known = self.known[warps].max(0)
        known[warps] = self.now[warps]
        self.known[warps] = known
        self.now[warps] += 1

    def access(self, kind: str, memory: np.ndarray, places: np.ndarray, nbytes: int, warps: np.ndarray) -> None:
        """``places`` in units of ``nbytes``, one of each of the threads, whose ``warps`` are given."""
        found = self.accesses.get(_address(memory))
        if found is None:
            return
        at, warps = (places[:, None] * nbytes + np.arange(nbytes)).reshape(-1), np.repeat(warps, nbytes)
        others = {"read": ("written", "added to"), "added to": ("read", "written")}.get(kind, tuple(found))
        for other in others:
            unknown = found[other][at] > self.known[warps]
            unknown[np.arange(len(at)), warps] = False
            assert not unknown.any(), f"{kind} by a warp what another has {other}, without a barrier between"
        found[kind][at, warps] = self.now[warps]


def _address(memory: np.ndarray) -> int:
    return memory.__array_interface__["data"][0]


class Block:
    """The threads of one block and what they compute with; it takes the place of all blocks in turn."""

    def __init__(self, threads: int):
        self.number = 0
        self.thread = np.arange(threads)
        self.mask = np.ones(threads, bool)
        self.races = Races(threads // 32)

    @contextmanager
    def replaced(self, *modules: Any) -> Iterator[None]:
        """Within it the modules' operations are this block's."""
        operations = self._operations()
        with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
            for module in modules:
                for name, stand_in in operations.items():
                    if hasattr(module, name):
                        patch.setattr(module, name, stand_in)
            yield

    def run(self, kernel: Any, blocks: Iterable[int], *arguments: np.ndarray) -> list[np.ndarray]:
        """A kernel made while operations were replaced, its blocks in the order of ``blocks``; what it does not write
        is -77."""
        inputs = [np.asarray(argument).view(Ref) for argument in arguments]
        outputs = [unwritten(out) for out in jax.tree.leaves(kernel.out_type)]
        for self.number in blocks:
            shared = list(map(unwritten, kernel.scratch_types))
            self.races = Races(len(self.thread) // 32)
            for memory in shared:
                self.races.watch(memory)
            kernel.body(*inputs, *outputs, *shared)
        return [np.asarray(out) for out in outputs]

    def barrier(self, warps: int | None = None) -> None:
        """Of the block's warps, or of each so many of them that take part, and then all do."""
        warps = warps or len(self.races.now)
        threads = self.mask.reshape(-1, 32 * warps)
        for group in threads.any(1).nonzero()[0]:
            assert threads[group].all(), "a barrier that some threads do not come to"
            self.races.barrier(group * warps + np.arange(warps))

    @contextmanager
    def warpgroup(self, number: int) -> Iterator[None]:
        """Only its threads."""
        with self._when(Value(self.thread // 128 == number, I1)):
            yield

    @contextmanager
    def _when(self, condition: Value) -> Iterator[None]:
        before = self.mask
        self.mask = before & condition.data
        yield
        self.mask = before

    def _loop(self, bound: Value, carried: list[Value]) -> Callable[[Any], Any]:
        def decorate(step: Any) -> Any:
            before, now = self.mask, list(carried)
            bounds = np.broadcast_to(bound.data, before.shape)
            for i in range(max(int(bounds[before].max(initial=0)), 0)):
                self.mask = before & (i < bounds)
                made = step(Value(np.full(before.shape, i), I32), now)
                now = [Value(np.where(self.mask, m.data, n.data), n.type) for m, n in zip(made, now, strict=True)]
            self.mask = before
            return SimpleNamespace(results=now)

        return decorate

    def _place(self, place: list[Value]) -> tuple[np.ndarray, ...]:
        return tuple(np.where(self.mask, np.broadcast_to(i.data, self.mask.shape), 0) for i in place)

    def _access(self, kind: str, memory: np.ndarray, places: np.ndarray, threads: np.ndarray) -> None:
        self.races.access(kind, memory, places, memory.itemsize, threads // 32)

    def _load(self, ref: np.ndarray, place: list[Value]) -> Value:
        at = self._place(place)
        self._access("read", ref, np.ravel_multi_index(at, ref.shape)[self.mask], self.thread[self.mask])
        return Value(np.asarray(ref)[at], ref.dtype)

    def _store(self, value: Value, ref: np.ndarray, place: list[Value]) -> None:
        for i, size in zip(self._place(place), ref.shape, strict=True):
            assert ((i >= 0) & (i < size)).all(), "outside"
        at = tuple(i[self.mask] for i in self._place(place))
        values = np.broadcast_to(value.data, self.mask.shape)[self.mask].astype(ref.dtype)
        # Several may write one value.
        new = np.asarray(ref[at]) != values
        self._access("written", ref, np.ravel_multi_index(at, ref.shape)[new], self.thread[self.mask][new])
        ref[at] = values
        assert np.array_equal(np.asarray(ref[at]), values, equal_nan=True), "several values for one place"

    def _places(self, pointer: Pointer, dtype: np.dtype, size: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Memory by numbers of ``dtype``, and the places of the threads that take part, of ``size`` numbers each."""
        memory = pointer.memory.view(dtype)
        nbytes = np.broadcast_to(pointer.nbytes, self.mask.shape)[self.mask]
        assert not (nbytes % (size * dtype.itemsize)).any(), "not aligned"
        first = nbytes // dtype.itemsize
        assert ((first >= 0) & (first + size <= memory.size)).all(), "outside"
        return memory, first[:, None] + np.arange(size)

    def _load_from(self, kind: Vector, pointer: Pointer) -> Value:
        memory, places = self._places(pointer, kind.kind, kind.size)
        found = np.zeros((self.mask.size, kind.size), kind.kind)
        self._access("read", memory, places.reshape(-1), np.repeat(self.thread[self.mask], kind.size))
        found[self.mask] = memory[places]
        return Value(found, kind)

    def _store_to(self, value: Value, pointer: Pointer) -> None:
        kind = value.type if isinstance(value.type, Vector) else Vector(1, value.type)
        memory, places = self._places(pointer, kind.kind, kind.size)
        self._access("written", memory, places.reshape(-1), np.repeat(self.thread[self.mask], kind.size))
        memory[places] = value.data.reshape(-1, kind.size)[self.mask]

    def _words(self, value: Value) -> np.ndarray:
        return np.ascontiguousarray(np.broadcast_to(value.data, self.mask.shape))

    def _bitcast(self, value: Value, kind: Any) -> Value:
        if isinstance(kind, Vector):
            return Value(self._words(value).view(kind.kind).reshape(-1, kind.size), kind)
        return Value(self._words(value).view(kind), kind)

    def _check_warps(self) -> None:
        warps = self.mask.reshape(-1, 32)
        assert warps.all(1)[warps.any(1)].all(), "a warp apart"

    def _butterfly(self, value: Value, distance: int) -> Value:
        self._check_warps()
        return Value(self._words(value)[self.thread ^ distance], value.type)

    def _ptx(self, text: str, value: Any = None, *others: Value, **options: Any) -> Any:
        if text.startswith("fence."):
            return None
        opcode, _, _, *numbers = text.rstrip(";").replace(",", " ").split()
        if opcode == "cvt.rn.bf16x2.f32":  # the first operand is the upper half
            halves = np.stack([self._words(half).astype(BF16) for half in (*others, value)], 1)
            return Value(halves.view(np.int32)[:, 0], I32)
        if opcode == "red.shared.add.u32":
            memory, places = self._places(value, I32)
            self._access("added to", memory, places[:, 0], self.thread[self.mask])
            np.add.at(memory, places[:, 0], 1)
            return None
        if opcode == "red.release.gpu.global.add.u32":
            memory, places = self._places(value, I32)
            predicate = options["predicate"] or Value(self.mask, I1)
            np.add.at(memory, places[predicate.data[self.mask], 0], int(text.split()[-1].rstrip(";")))
            return None
        if opcode == "red.shared.or.b32":
            memory, places = self._places(value, I32)
            self._access("added to", memory, places[:, 0], self.thread[self.mask])
            np.bitwise_or.at(memory, places[:, 0], self._words(others[0])[self.mask])
            return None
        given = np.broadcast_to(value.data, self.mask.shape).reshape(-1, 32)
        lane = np.arange(32)
        if opcode == "popc.b32":
            found = np.bitwise_count(given.astype(np.uint32))
        else:
            self._check_warps()
            if opcode == "match.any.sync.b32":
                same = given[:, :, None] == given[:, None, :]
                found = (same.astype(np.uint64) << lane.astype(np.uint64)).sum(2).astype(np.uint32).view(np.int32)
            elif opcode == "redux.sync.add.s32":
                found = np.repeat(given.sum(1, keepdims=True), 32, 1)
            else:
                assert opcode == "shfl.sync.up.b32", opcode
                found = given[:, np.where(lane >= int(numbers[0]), lane - int(numbers[0]), lane)]
        return Value(found.astype(np.int32).reshape(-1), I32)

    def _operations(self) -> dict[str, Any]:
        def plain(operation: Any) -> Any:
            return lambda a, b: Value(operation(a.data, b.data), a.type)

        def unsigned(operation: Any) -> Any:
            words = lambda value: np.asarray(value.data, np.int32).view(np.uint32)  # noqa: E731
            return lambda a, b: Value(operation(words(a), words(b)).astype(np.int32), a.type)

        compare = {"slt": np.less, "sge": np.greater_equal, "eq": np.equal}
        cast = lambda dtype, a: Value(a.data.astype(dtype), dtype)  # noqa: E731
        kind = lambda get: type("Kind", (), {"get": staticmethod(get)})  # noqa: E731
        arith = SimpleNamespace(
            addi=plain(np.add),
            subi=plain(np.subtract),
            muli=plain(np.multiply),
            divui=unsigned(np.floor_divide),
            remui=unsigned(np.remainder),
            andi=plain(np.bitwise_and),
            ori=plain(np.bitwise_or),
            xori=plain(np.bitwise_xor),
            shli=plain(np.left_shift),
            minui=unsigned(np.minimum),
            cmpi=lambda how, a, b: Value(compare[how](a.data, b.data), I1),
            CmpIPredicate=SimpleNamespace(**{name: name for name in compare}),
            addf=plain(np.add),
            subf=plain(np.subtract),
            mulf=plain(np.multiply),
            extf=cast,
            truncf=cast,
            index_cast=lambda dtype, a: Value(a.data, dtype),
            extui=lambda dtype, a: Value(np.asarray(a.data, np.int32).view(np.uint32).astype(dtype), dtype),
            select=lambda c, a, b: Value(np.where(c.data, a.data, b.data), a.type),
        )
        utils = SimpleNamespace(
            c=lambda value, dtype: Value(np.asarray(value, dtype), dtype),
            thread_idx=lambda: Value(self.thread.astype(np.int32), I32),
            block_idx=lambda: Value(np.asarray(self.number, np.int32), I32),
            memref_ptr=lambda ref: Pointer(np.asarray(ref).reshape(-1)),
            getelementptr=lambda base, place, dtype: Pointer(base.memory, base.nbytes + place[0].data * dtype.itemsize),
            bytewidth=lambda dtype: dtype.itemsize,
            single_thread_predicate=lambda of: Value(self.thread % of == 0, I1),
            ThreadSubset=SimpleNamespace(WARP=32, WARPGROUP=128),
            shfl_bfly=self._butterfly,
            bitcast=self._bitcast,
            when=self._when,
            fori=self._loop,
            inline_ptx=self._ptx,
            warp_barrier=lambda: None,
            warpgroup_barrier=lambda: self.barrier(4),
        )
        plgpu = SimpleNamespace(
            inline_mgpu=lambda arg_types: lambda function: lambda *refs: function(None, *refs),
            RefType=lambda: None,
            kernel=lambda body, **options: SimpleNamespace(body=body, **options),
            CompilerParams=lambda **_: None,
            SMEM=lambda shape, dtype: SimpleNamespace(shape=shape, dtype=dtype),
        )
        types = SimpleNamespace(
            IntegerType=SimpleNamespace(get_signless=lambda bits: {1: I1, 8: I8, 32: I32, 64: I64}[bits]),
            IndexType=kind(lambda: INDEX),
            BF16Type=kind(lambda: BF16),
            F16Type=kind(lambda: F16),
            F32Type=kind(lambda: F32),
            VectorType=kind(lambda shape, dtype: Vector(shape[0], dtype)),
        )
        vectors = SimpleNamespace(
            extract=lambda value, _, place: Value(value.data[:, place[0]], value.type.kind),
            from_elements=lambda kind, values: Value(np.stack([self._words(v) for v in values], 1), kind),
        )
        return {
            "arith": arith,
            "mosaic_utils": utils,
            "memref": SimpleNamespace(load=self._load, store=self._store),
            "llvm": SimpleNamespace(load=self._load_from, store=self._store_to),
            "vector": vectors,
            "ir": types,
            "gpu": SimpleNamespace(barrier=self.barrier),
            "plgpu": plgpu,
        }


def unwritten(spec: Any) -> Ref:
    return np.full(spec.shape, -77).astype(spec.dtype).view(Ref)


def leave_out_barrier(number: int, patch: pytest.MonkeyPatch) -> None:
    """Of those that blocks come to from now on, counted from 0."""
    barrier, counted = Block.barrier, itertools.count()

    def some(self: Block, warps: int | None = None) -> None:
        if next(counted) != number:
            barrier(self, warps)

    patch.setattr(Block, "barrier", some)
