"""NumPy in the place of MLIR for code that each thread runs for itself (pallas_kernels/simt.py): a block in lockstep,
and blocks one after another.

A value is an array of one number a thread. Conditions become masks, loops run as often as the thread that runs them
most. Barriers do nothing here: what forgets one is not found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

I1, I32, INDEX, F32 = (np.dtype(kind) for kind in (np.bool_, np.int32, np.int64, np.float32))
I64 = INDEX
F16 = np.dtype(np.float16)
SIXTEEN_BYTES, FOUR_BYTES = np.dtype("V16"), np.dtype("V4")


class Value(NamedTuple):
    data: np.ndarray
    type: Any


class Pointer(NamedTuple):
    words: np.ndarray
    place: Any = 0


class Block:
    """The threads of one block and what they compute with; it takes the place of all blocks in turn."""

    def __init__(self, threads: int):
        self.number = 0
        self.thread = np.arange(threads)
        self.mask = np.ones(threads, bool)

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
        outputs = [np.full(out.shape, -77, out.dtype) for out in jax.tree.leaves(kernel.out_type)]
        for self.number in blocks:
            scratch = [np.full(spec.shape, -77, spec.dtype) for spec in kernel.scratch_types]
            kernel.body(*arguments, *outputs, *scratch)
        return outputs

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

    def _load(self, ref: np.ndarray, place: list[Value]) -> Value:
        return Value(ref[self._place(place)], ref.dtype)

    def _store(self, value: Value, ref: np.ndarray, place: list[Value]) -> None:
        for i, size in zip(self._place(place), ref.shape, strict=True):
            assert ((i >= 0) & (i < size)).all(), "outside"
        at = tuple(i[self.mask] for i in self._place(place))
        ref[at] = np.broadcast_to(value.data, self.mask.shape)[self.mask]

    def _vectors(self, pointer: Pointer) -> tuple[np.ndarray, np.ndarray]:
        """Memory by sixteen bytes, and each thread's."""
        memory, place = pointer.words.view(SIXTEEN_BYTES), np.broadcast_to(pointer.place.data, self.mask.shape)
        place = np.where(self.mask, place, 0)
        assert (place % 16 == 0).all(), "misaligned"
        assert ((place >= 0) & (place < 16 * memory.size)).all(), "outside"
        return memory, place // 16

    def _load_vector(self, _: Any, pointer: Pointer) -> Value:
        memory, place = self._vectors(pointer)
        return Value(memory[place], SIXTEEN_BYTES)

    def _store_vector(self, value: Value, pointer: Pointer) -> None:
        memory, place = self._vectors(pointer)
        memory[place[self.mask]] = value.data[self.mask]

    def _extract(self, value: Value, _: Any, place: list[int]) -> Value:
        kind = I32 if value.type is SIXTEEN_BYTES else F16
        size = value.type.itemsize // kind.itemsize
        return Value(np.ascontiguousarray(value.data).view(kind).reshape(-1, size)[:, place[0]], kind)

    def _from_elements(self, kind: np.dtype, values: list[Value]) -> Value:
        words = np.stack([np.broadcast_to(value.data, self.mask.shape).view(I32) for value in values], axis=1)
        return Value(np.ascontiguousarray(words).view(kind)[:, 0], kind)

    def _from_lane(self, value: Any, distance: int) -> Any:
        return np.broadcast_to(value, self.mask.shape).reshape(-1, 32)[:, np.arange(32) ^ distance].reshape(-1)

    def _ptx(self, text: str, value: Any, *more: Any, **others: Any) -> Any:
        opcode, _, _, *numbers = text.rstrip(";").replace(",", " ").split()
        if opcode == "cvt.rn.bf16x2.f32":
            halves = [np.broadcast_to(v.data, self.mask.shape).astype(jnp.bfloat16) for v in (*more, value)]
            return Value(np.stack(halves, axis=1).view(np.int32)[:, 0], I32)
        if opcode == "red.shared.add.u32":
            place = np.broadcast_to(value.place.data, self.mask.shape)[self.mask]
            assert ((place >= 0) & (place < value.words.size)).all(), "outside"
            np.add.at(value.words, place, 1)
            return None
        given = np.broadcast_to(value.data, self.mask.shape).reshape(-1, 32)
        lane = np.arange(32)
        if opcode == "popc.b32":
            found = np.bitwise_count(given.astype(np.uint32))
        else:
            assert self.mask.reshape(-1, 32).all(1)[self.mask.reshape(-1, 32).any(1)].all(), "a warp apart"
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
        kind = lambda dtype: SimpleNamespace(get=lambda: dtype)  # noqa: E731
        arith = SimpleNamespace(
            addi=plain(np.add),
            subi=plain(np.subtract),
            muli=plain(np.multiply),
            divui=unsigned(np.floor_divide),
            remui=unsigned(np.remainder),
            andi=plain(np.bitwise_and),
            ori=plain(np.bitwise_or),
            shli=plain(np.left_shift),
            minui=unsigned(np.minimum),
            cmpi=lambda how, a, b: Value(compare[how](a.data, b.data), I1),
            CmpIPredicate=SimpleNamespace(**{name: name for name in compare}),
            index_cast=lambda dtype, a: Value(a.data, dtype),
            extui=lambda dtype, a: Value(np.asarray(a.data, np.int32).view(np.uint32).astype(dtype), dtype),
            select=lambda c, a, b: Value(np.where(c.data, a.data, b.data), a.type),
            mulf=plain(np.multiply),
            subf=plain(np.subtract),
            extf=lambda dtype, a: Value(a.data.astype(dtype), dtype),
        )
        utils = SimpleNamespace(
            c=lambda value, dtype: Value(np.asarray(value, dtype), dtype),
            thread_idx=lambda: Value(self.thread.astype(np.int32), I32),
            block_idx=lambda: Value(np.asarray(self.number, np.int32), I32),
            memref_ptr=lambda ref: Pointer(ref.reshape(-1)),
            getelementptr=lambda base, place, dtype: Pointer(base.words, place[0]),
            when=self._when,
            fori=self._loop,
            inline_ptx=self._ptx,
            warp_barrier=lambda: None,
            bitcast=lambda a, dtype: Value(np.broadcast_to(a.data, self.mask.shape).view(dtype), dtype),
            shfl_bfly=lambda a, distance: Value(self._from_lane(a.data, distance), a.type),
        )
        plgpu = SimpleNamespace(
            inline_mgpu=lambda arg_types: lambda function: lambda *refs: function(None, *refs),
            RefType=lambda: None,
            kernel=lambda body, **options: SimpleNamespace(body=body, **options),
            CompilerParams=lambda **_: None,
            SMEM=lambda shape, dtype: SimpleNamespace(shape=shape, dtype=dtype),
        )
        integers = SimpleNamespace(get_signless=lambda bits: {1: I1, 8: None, 32: I32, 64: I64}[bits])
        vectors = SimpleNamespace(get=lambda shape, _: {(4,): SIXTEEN_BYTES, (2,): FOUR_BYTES}[shape])
        return {
            "arith": arith,
            "mosaic_utils": utils,
            "memref": SimpleNamespace(load=self._load, store=self._store),
            "llvm": SimpleNamespace(load=self._load_vector, store=self._store_vector),
            "vector": SimpleNamespace(extract=self._extract, from_elements=self._from_elements),
            "ir": SimpleNamespace(
                IntegerType=integers, IndexType=kind(INDEX), F32Type=kind(F32), F16Type=kind(F16), VectorType=vectors
            ),
            "gpu": SimpleNamespace(barrier=lambda: None),
            "plgpu": plgpu,
        }
