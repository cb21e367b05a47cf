"""What becomes of a tile's sums, f32[64, columns] in a warpgroup's registers (semantics.py): h, or y by pair.

    h[row, i] = act(gate_e x[row], up_e x[row])     hidden
    out[row, o] = w[row] * (down_e h[row])[o]       output; w of topk_weights

A lane holds two rows of the tile, 8 apart, and two neighbouring columns of every eight (registers.py). Where gate and
up are computed together the two rows are gate's and up's of the same feature. Pairs of bf16 are transposed by
``movmatrix``, eight by eight, so that a lane stores two neighbouring features of a column. h is stored in the order in
which the weights' codes come (x_rows.py). Columns outside the tile's share of its group are not stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from . import simt
from ._compat import arith, ir, llvm, mosaic_utils, plgpu, vector
from .operands import bf16_terms
from .semantics import Semantics, activate
from .simt import Float, Word, both
from .sorted_pairs import ALIGN
from .x_tiles import X_SCALE

SIXTEEN = 16  # weights of depth that one order is of


class Rows(NamedTuple):
    """Which rows of the weights a warpgroup's tile has: ``sources`` 2 for gate and up; of one, ``neighbours`` where a
    lane has two of them: where they become h's features, and of results in f32."""

    sources: int
    neighbours: bool

    @property
    def features(self) -> int:
        return 64 // self.sources

    def of_lane(self, lane_group: Any, warp: Any, half: Any) -> tuple[Any, Any]:
        """(source, row from the tile's first) of a lane's row ``half``; ``lane_group`` is its four's, of eight."""
        if self.sources == 2:
            return half, warp // 2 * SIXTEEN + lane_group * 2 + warp % 2
        if self.neighbours:
            return 0, warp * SIXTEEN + lane_group * 2 + half
        # Once pairs of bf16 are transposed a lane has four neighbouring features of a column, eight bytes to store.
        return 0, warp * SIXTEEN + lane_group // 2 * 4 + half * 2 + lane_group % 2


class Columns(NamedTuple):
    """A tile's columns: row ``begin`` of the sorted pairs is column 0; its own are ``first`` up to ``last``."""

    begin: Any
    first: Any
    last: Any


class _Lane:
    """This thread's place in its warpgroup."""

    def __init__(self):
        thread = Word(mosaic_utils.thread_idx())
        self.warpgroup, self.warp, self.lane = thread // 128, thread % 128 // 32, thread % 32
        self.group, self.quad = self.lane // 4, self.lane % 4


def hidden(rows: Rows, semantics: Semantics, outputs: int, terms: int) -> Any:
    """``run(sums, columns, expert, feature, h bf16[terms, R, I] times X_SCALE, gate, biases)``: ``feature`` is the
    first of the block's unit; ``gate`` f32[R, I] where gate was computed before up, else None; ``biases`` of the
    sources, float[experts, I] or None each."""

    def run(sums, columns: Columns, expert, feature, h_ref, gate_ref, biases: Sequence[Any]):
        named = {"gate": gate_ref} if gate_ref is not None else {}
        named |= {i: ref for i, ref in enumerate(biases) if ref is not None}

        @_with_scalars(1 + len(named))
        def epilogue(sums, scalars, h_ref, *refs):
            begin, first, last, expert, feature = scalars
            refs, lane = dict(zip(named, refs, strict=True)), _Lane()
            feature = feature + lane.warpgroup * rows.features
            mine = [rows.of_lane(lane.group, lane.warp, half) for half in range(2)]
            at = [(feature + row).where(feature + row < outputs) for _, row in mine]
            bias = [_element(refs[s], expert, row) if s in refs else None for (s, _), row in zip(mine, at, strict=True)]
            # Of eight columns and eight features: features' place in h.
            if rows.sources == 2:
                places = [lane.warp // 2 * SIXTEEN + lane.warp % 2 * 8]
            else:
                places = [lane.warp * SIXTEEN, lane.warp * SIXTEEN + 8]
            places = [feature + place for place in places]
            stores = [[_Stores(h_ref, term, begin, lane, place) for term in range(terms)] for place in places]
            live = [_Live(begin + lane.group, first, last, place < outputs) for place in places]
            for j, eight in enumerate(sums):
                pairs = [
                    [value + b if b is not None else value for value in half]
                    for half, b in zip(eight, bias, strict=True)
                ]
                if rows.sources == 2:
                    results = [[activate(g, u, semantics, simt) for g, u in zip(*pairs, strict=True)]]
                elif "gate" in refs:
                    gates = [
                        [_gate(refs["gate"], begin, first, last, lane, j, c, feature + row, outputs) for c in range(2)]
                        for _, row in mine
                    ]
                    results = [
                        [activate(g, u, semantics, simt) for g, u in zip(*two, strict=True)]
                        for two in zip(gates, pairs, strict=True)
                    ]
                else:
                    results = [[activate(None, u, semantics, simt) for u in half] for half in pairs]
                results = [[h * X_SCALE for h in result] for result in results]
                for result, store_terms, of_place in zip(results, stores, live, strict=True):
                    for word, store in zip(bf16_terms(result, terms), store_terms, strict=True):
                        store(j, [word], of_place[8 * j])

        epilogue(sums, columns, expert, feature, h_ref, *named.values())

    return run


def output(rows: Rows, outputs: int) -> Any:
    """``run(sums, columns, expert, feature, out [R, O], bias float[experts, O] or None, scale float[experts] or None,
    weights f32[columns] in shared memory or None)``; without any of them the projection itself. ``out`` is f32 where
    ``rows`` are neighbours, else bf16."""

    def run(sums, columns: Columns, expert, feature, out_ref, bias_ref, scale_ref, weights_ref):
        extras = {"bias": bias_ref, "scale": scale_ref, "weights": weights_ref}
        named = {name: ref for name, ref in extras.items() if ref is not None}

        @_with_scalars(1 + len(named))
        def epilogue(sums, scalars, out_ref, *refs):
            begin, first, last, expert, feature = scalars
            refs, lane = dict(zip(named, refs, strict=True)), _Lane()
            feature = feature + lane.warpgroup * rows.features
            mine = [feature + rows.of_lane(lane.group, lane.warp, half)[1] for half in range(2)]
            # O is a multiple of 32: a warp's sixteen rows are inside or outside together.
            place = feature + lane.warp * SIXTEEN
            inside = place < outputs
            bias = [_element(refs["bias"], expert, row.where(inside)) if "bias" in refs else None for row in mine]
            scale = _element(refs["scale"], expert) if "scale" in refs else None
            if rows.neighbours:
                column = begin + lane.quad * 2
                here, stride = _pointer(out_ref, column, mine[0]), out_ref.type.shape[-1]
            else:
                column = begin + lane.group
                store = _Stores(out_ref, 0, begin, lane, place, 2)
            live = _Live(column, first, last, inside)
            for j, eight in enumerate(sums):
                halves = [
                    [value + b if b is not None else value for value in half]
                    for half, b in zip(eight, bias, strict=True)
                ]
                if scale is not None:
                    halves = [[value * scale for value in half] for half in halves]
                if "weights" in refs:
                    weights = _neighbours(refs["weights"], lane.quad * 2 + 8 * j)
                    halves = [[value * w for value, w in zip(half, weights, strict=True)] for half in halves]
                if rows.neighbours:
                    for c, two in enumerate(zip(*halves, strict=True), 8 * j):
                        pointer = mosaic_utils.getelementptr(here, [c * stride], ir.F32Type.get())
                        _store([value.value for value in two], pointer, live[c], "f32")
                else:
                    store(j, [word for half in halves for word in bf16_terms(half, 1)], live[8 * j])

        epilogue(sums, columns, expert, feature, out_ref, *named.values())

    return run


def _with_scalars(refs: int) -> Any:
    """A function of ``(sums, columns, expert, feature, *refs)``, in Mosaic: sums as [eight columns][half of the rows]
    [one of a lane's two columns], and the words begin, first, last, expert and feature."""

    def decorate(function):
        def call(sums, columns: Columns, expert, feature, *arguments):
            @plgpu.inline_mgpu(
                arg_types=(plgpu.Layout.WGMMA, *(plgpu.Layout.WG_SPLAT,) * 5, *(plgpu.RefType(),) * refs)
            )
            def run(_, sums, begin, first, last, expert, feature, *arguments):
                scalars = [Word(scalar.registers.item()) for scalar in (begin, first, last, expert, feature)]
                pairs = [_pair(register) for register in sums.registers.flatten()]
                function([pairs[i : i + 2] for i in range(0, len(pairs), 2)], scalars, *arguments)

            run(sums, *columns, expert, feature, *arguments)

        return call

    return decorate


def _pair(register: Any) -> list[Float]:
    return [Float(vector.extract(register, [], [c])) for c in range(2)]


class _Live:
    """Of a lane's ``column`` and the ``j``th after it: whether it is the tile's own, and its features ``inside``."""

    def __init__(self, column: Word, first: Word, last: Word, inside: Any):
        # One comparison with a constant each: only the first eight may lie before the group.
        self.past_last = (column - last).where(inside)
        self.past_first = column - first

    def __getitem__(self, j: int) -> Any:
        live = self.past_last < -j
        return both(live, self.past_first >= -j) if j < ALIGN else live


class _Stores:
    """Neighbouring features of eight columns at a time, ``pairs`` of them a lane, from registers of neighbouring
    columns' pairs."""

    def __init__(self, ref: Any, term: int, begin: Word, lane: _Lane, place: Word, pairs: int = 1):
        self.base = _pointer(ref, begin + lane.group, place + lane.quad * (2 * pairs), lead=term)
        self.stride = ref.type.shape[-1]

    def __call__(self, j: int, words: list, live: Any) -> None:
        moved = [
            mosaic_utils.inline_ptx(
                "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;",
                word,
                result_types=word.type,
                has_side_effects=True,
                convergent=True,
            )
            for word in words
        ]
        pointer = mosaic_utils.getelementptr(self.base, [8 * j * self.stride], ir.BF16Type.get())
        _store(moved, pointer, live, "b32")


def _store(values: list, pointer: Any, live: Any, kind: str) -> None:
    count, names = len(values), ", ".join(f"${i + 1}" for i in range(len(values)))
    kind = f"v{count}.{kind}" if count > 1 else kind
    mosaic_utils.inline_ptx(
        f"st.global.{kind} [$0], {{{names}}};", pointer, *values, predicate=live, has_side_effects=True
    )


def _gate(ref: Any, begin: Word, first: Word, last: Word, lane: _Lane, j: int, c: int, feature: Word, outputs: int):
    """What gate gave for one of a lane's sums; any number for those that are not stored."""
    column = lane.quad * 2 + (8 * j + c)
    live = both((begin + column - first).below(last - first), feature < outputs)
    return _element(ref, (begin + column).where(live, first), feature.where(live))


def _neighbours(ref: Any, place: Word) -> list[Float]:
    """Two numbers of f32[...], from an even place on."""
    pointer = mosaic_utils.getelementptr(mosaic_utils.memref_ptr(ref), [place.value], ir.F32Type.get())
    return _pair(llvm.load(ir.VectorType.get((2,), ir.F32Type.get()), pointer))


def _element(ref: Any, *place: Word) -> Float:
    """One number of a float array of any width, as f32."""
    value = llvm.load(ref.type.element_type, _pointer(ref, *place))
    return Float(value if isinstance(value.type, ir.F32Type) else arith.extf(ir.F32Type.get(), value))


def _pointer(ref: Any, *place: Word, lead: int = 0) -> Any:
    """Of an element in global memory, of which there may be more than 2^31; ``lead``: the index before ``place``."""
    i64 = ir.IntegerType.get_signless(64)
    offset = mosaic_utils.c(lead, i64)
    for size, i in zip(ref.type.shape[-len(place) :], place, strict=True):
        offset = arith.addi(arith.muli(offset, mosaic_utils.c(size, i64)), arith.extsi(i64, i.value))
    return mosaic_utils.getelementptr(mosaic_utils.memref_ptr(ref), [offset], ref.type.element_type)
