"""NumPy in the place of MLIR: what pallas_kernels does with a warpgroup's registers, run on any machine.

A value is an array of numbers, one for each of 128 threads (or one for all). ``replaced`` puts the stand-ins where
decode.py and registers.py look for the operations; a function under ``inline_mgpu`` then takes and gives whole arrays,
cut into registers as the tensor core's layouts do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

THREADS = np.arange(128)
WORD = np.dtype(np.uint32)


class Value(NamedTuple):
    data: Any
    type: Any


class Fragment(NamedTuple):
    """The registers of an array, in the layout's order."""

    registers: np.ndarray
    shape: tuple[int, ...] = ()


class RowPlane:
    """A row plane u8[64, n]."""

    def __init__(self, data: np.ndarray):
        self.data = data

    def bytes(self, width: int, parts: tuple[int, ...]) -> np.ndarray:
        pieces = [self.data[:, part * width : (part + 1) * width] for part in parts]
        return np.concatenate(pieces, axis=1) if pieces else self.data


class ColumnPlane:
    """A column plane [1, n, 64]."""

    def __init__(self, data: np.ndarray):
        self.data, self.shape, self.dtype = data[None], (1, *data.shape), data.dtype

    @property
    def at(self) -> ColumnPlane:
        return self

    def __getitem__(self, place: tuple[slice, int]) -> Any:
        return SimpleNamespace(rows=lambda: jnp.asarray(self.data[0, place[1]]))


def x_order(x: np.ndarray) -> np.ndarray:
    """[..., D] with the even ones of each sixteen before the odd ones: what a lane's four codes are multiplied with
    (registers.py)."""
    pairs = x.reshape(*x.shape[:-1], x.shape[-1] // 16, 8, 2)
    return np.swapaxes(pairs, -1, -2).reshape(x.shape)


@contextmanager
def replaced(*modules: Any) -> Iterator[None]:
    """Within it the modules' operations are NumPy's."""
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        for module in modules:
            plgpu = SimpleNamespace(
                inline_mgpu=lambda arg_types=(), return_type=None: _inline(arg_types, return_type),
                ShapeDtypeStruct=lambda shape, dtype, layout: (shape, layout),
                RefType=lambda *_: None,
                layout_cast=lambda array, layout: array,
            )
            for name, stand_in in {**_OPERATIONS, "plgpu": plgpu, "fragmented": _fragmented}.items():
                if hasattr(module, name):
                    patch.setattr(module, name, stand_in)
        yield


def _inline(arg_types: Any, return_type: Any) -> Any:
    def decorate(function: Any) -> Any:
        from pallas_kernels.registers import LHS, LHS_BYTES, ROW, THREADS

        def run(*args: Any) -> Any:
            kinds = {
                LHS_BYTES: _from_bytes,
                LHS: _from_pairs,
                ROW: _from_rows,
                THREADS: _from_threads,
                None: lambda array: array,
            }
            given = [kinds[kind](array) for kind, array in zip(arg_types, args, strict=True)]
            found = function(None, *given)
            if isinstance(return_type, list):
                return [to_array(*of_one) for of_one in zip(found, return_type, strict=True)]
            return to_array(found, return_type)

        def to_array(found: Any, kind: tuple[Any, Any]) -> jax.Array:
            return _to_threads(found) if kind[1] == THREADS else _to_pairs(found)

        return run

    return decorate


def _fragmented(registers: list, layout: Any, shape: tuple[int, ...], dtype: Any) -> Fragment:
    return Fragment(np.array([np.broadcast_to(r.data, THREADS.shape) for r in registers]), shape)


def _row(half: int) -> np.ndarray:
    return THREADS // 32 * 16 + THREADS % 32 // 4 + 8 * half


def _registers(words: list[np.ndarray]) -> Fragment:
    registers = np.empty(len(words), object)
    registers[:] = [Value(word, word.dtype) for word in words]
    return Fragment(registers)


def _from_bytes(array: np.ndarray) -> Fragment:
    """u8 or s8 [64, n]: a word is four neighbouring bytes of sixteen of a row, then of the row 8 below."""
    words = np.ascontiguousarray(array).view("<u4")
    quad = THREADS % 4
    return _registers([words[_row(half), 4 * s + quad] for s in range(words.shape[1] // 4) for half in range(2)])


def _from_rows(array: jax.Array) -> Fragment:
    return _registers([np.asarray(array)[_row(half)] for half in range(2)])


def _from_threads(array: jax.Array) -> Fragment:
    """[64], of the rows: what thread t has is row t % 64's."""
    return _registers([np.asarray(array)[THREADS % 64]])


def _to_threads(fragment: Fragment) -> jax.Array:
    [register] = fragment.registers
    return jnp.asarray(register[:64])


def _from_pairs(array: jax.Array) -> Fragment:
    """The inverse of :func:`_to_pairs`."""
    bits = np.asarray(jax.lax.bitcast_convert_type(array, jnp.uint16)).astype(np.uint32)
    words = []
    for sixteen, pair, half in np.ndindex(bits.shape[1] // 16, 2, 2):
        low, high = (bits[_row(half), 16 * sixteen + 8 * pair + 2 * (THREADS % 4) + place] for place in range(2))
        words.append(low | high << np.uint32(16))
    return _registers(words)


def _to_pairs(fragment: Fragment) -> jax.Array:
    """bf16[64, n] of pairs: of sixteen, columns 2q and 2q + 1 of either half, of a row and of the row 8 below."""
    bits = np.zeros(fragment.shape, np.uint16)
    for i, word in enumerate(fragment.registers):
        sixteen, pair, half = i // 4, i // 2 % 2, i % 2
        for place in range(2):
            bits[_row(half), 16 * sixteen + 8 * pair + 2 * (THREADS % 4) + place] = word >> 16 * place & 0xFFFF
    return jax.lax.bitcast_convert_type(jnp.asarray(bits), jnp.bfloat16)


def _elementwise(operation: Any) -> Any:
    return lambda a, b: Value(operation(a.data, b.data), a.type)


def _constant(value: Any, kind: Any) -> Value:
    return Value(np.asarray(value).astype(kind), kind)


def _cast(kind: Any, value: Value) -> Value:
    return Value(value.data.astype(kind), kind)


def _bitcast(value: Value, kind: Any) -> Value:
    return Value(value.data if kind is PAIR else value.data.view(kind), WORD if kind is PAIR else kind)


def _broadcast(kind: Any, value: Value) -> Value:
    if kind is not PAIR:
        assert kind == value.type
        return value
    half = value.data.view(np.uint16).astype(np.uint32)
    return Value(half | half << np.uint32(16), WORD)


def _load(ref: ColumnPlane, place: list[Value]) -> Value:
    return Value(ref.data[tuple(index.data for index in place)], np.dtype(f"u{ref.dtype.itemsize}"))


def _inline_ptx(text: str, *operands: Value, result_types: Any) -> Value:
    from pallas_kernels.registers import HALF_TWICE

    if text in HALF_TWICE:
        return _half_twice(operands[0], HALF_TWICE.index(text))
    opcode, *places = text.rstrip(";").replace(",", " ").split()
    given = [operands[int(p[1:]) - 1].data if p[0] == "$" else _immediate(p) for p in places[1:]]
    run = _INSTRUCTIONS[opcode]
    return Value(run(*np.broadcast_arrays(*given)), result_types)


def _half_twice(word: Value, half: int) -> Value:
    bits = word.data >> np.uint32(16 * half) & np.uint32(0xFFFF)
    return Value(bits | bits << np.uint32(16), WORD)


def _immediate(text: str) -> Any:
    """PTX: a float's bits in hexadecimal after 0f, or an integer."""
    if text.startswith("0f"):
        return np.uint32(int(text[2:], 16)).view(np.float32)
    return np.uint32(int(text, 0))


def _prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """PTX: each nibble of the selector names a byte of b a; its upper bit takes the byte's sign alone."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros(a.shape, np.uint32)
    for i in range(4):
        nibble = selector >> np.uint32(4 * i) & np.uint32(15)
        byte = (both >> (8 * (nibble & 7)).astype(np.uint64) & np.uint64(255)).astype(np.uint32)
        byte = np.where(nibble >= 8, np.where(byte >= 128, 255, 0), byte).astype(np.uint32)
        result |= byte << np.uint32(8 * i)
    return result


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """PTX: bit 4 a + 2 b + c of the table, for each bit."""
    result = np.zeros(a.shape, np.uint32)
    for bit in range(32):
        place = np.uint32(0)
        for operand in (a, b, c):
            place = 2 * place + (operand >> np.uint32(bit) & np.uint32(1))
        result |= (table >> place & np.uint32(1)) << np.uint32(bit)
    return result


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """But for a rounding to float64 first, which matters once in 2^29."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _rounded_pair(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    upper, lower = (part.astype(jnp.bfloat16).view(np.uint16).astype(np.uint32) for part in (high, low))
    return upper << np.uint32(16) | lower


def _bf16_pairs(run: Any) -> Any:
    """On both halves of words; the result is rounded once."""

    def instruction(*words: np.ndarray) -> np.ndarray:
        halves = [np.ascontiguousarray(word).view(jnp.bfloat16).astype(np.float64) for word in words]
        return run(*halves).astype(jnp.bfloat16).view(np.uint32)

    return instruction


_INSTRUCTIONS = {
    "fma.rn.bf16x2": _bf16_pairs(lambda a, b, c: a * b + c),
    "mul.rn.bf16x2": _bf16_pairs(np.multiply),
    "prmt.b32": _prmt,
    "lop3.b32": _lop3,
    "fma.rn.f32": _fma,
    "mul.rn.f32": np.multiply,
    "cvt.rn.bf16x2.f32": _rounded_pair,
}

PAIR = object()
_OPERATIONS: dict[str, Any] = {
    "ir": SimpleNamespace(
        IntegerType=SimpleNamespace(get_signless=lambda bits: np.dtype(f"u{bits // 8}")),
        IndexType=SimpleNamespace(get=lambda: np.dtype(np.int64)),
        F16Type=SimpleNamespace(get=lambda: np.dtype(np.float16)),
        F32Type=SimpleNamespace(get=lambda: np.dtype(np.float32)),
        BF16Type=SimpleNamespace(get=lambda: np.dtype(jnp.bfloat16)),
        VectorType=SimpleNamespace(get=lambda shape, kind: {(2,): PAIR, (1,): kind}[shape]),
    ),
    "arith": SimpleNamespace(
        andi=_elementwise(np.bitwise_and),
        ori=_elementwise(np.bitwise_or),
        xori=_elementwise(np.bitwise_xor),
        shli=_elementwise(np.left_shift),
        shrui=_elementwise(np.right_shift),
        addi=_elementwise(np.add),
        muli=_elementwise(np.multiply),
        divui=_elementwise(np.floor_divide),
        remui=_elementwise(np.remainder),
        subf=_elementwise(np.subtract),
        extf=_cast,
        truncf=_cast,
        uitofp=_cast,
        sitofp=lambda kind, value: _cast(kind, Value(value.data.view(f"i{value.type.itemsize}"), kind)),
        index_cast=_cast,
    ),
    "mosaic_utils": SimpleNamespace(c=_constant, bitcast=_bitcast, inline_ptx=_inline_ptx),
    "vector": SimpleNamespace(broadcast=_broadcast, extract=lambda value, _, place: value),
    "memref": SimpleNamespace(load=_load),
    "gpu": SimpleNamespace(
        Dimension=SimpleNamespace(x=0), thread_id=lambda _: Value(THREADS.astype(np.int64), np.dtype(np.int64))
    ),
}
