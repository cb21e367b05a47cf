"""The kernel for few tokens, interpreted (interpreted.py).

`interpreted_few.py CASE [FAULT]` says if there were races.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import interpreted
import jax.numpy as jnp
import numpy as np
import pytest
from interpreted import by_row, entries_by_group, hidden
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import few_tokens, matrices, tiling
from pallas_kernels.decode import TILE_FORMATS
from pallas_kernels.phases import LANES, Phase
from pallas_kernels.semantics import Semantics
from pallas_kernels.x_tiles import COLUMNS, GROUP

FINISHES, COPIES_X = LANES, LANES + 1  # threads; those behind copy a source of weights each
# Of the kernel's barriers, by number: of each phase's stages, weights there, x there and free; of sums, there and free;
# and one of h for each slot.
X_FULL, FREE, PARTS_FREE, H_THERE = (1, 4), (2, 5), 7, 8
# Formats of gate and up, of down; D, I, H; columns; whether slots share x, and lanes go by rows.
CASES = {
    "by depth": (("q8_0", "q8_0"), ("q4_k",), 1024, 512, 192, 2, False, False),
    "by rows": (("q4_k", "q4_k"), ("q6_k",), 512, 256, 256, 3, False, True),
    "formats differ": (("q4_k", "q8_0"), ("q8_0",), 512, 256, 256, 2, True, True),
    "no gate": (("q8_0",), ("q8_0",), 512, 512, 128, 1, True, False),
}
H_UNAWAITED, FREE_TOO_EARLY = FAULTS = ("h is not waited for", "stages are free before they are read")


class Call:
    """Random small integers in the places of one call's operands, and the kernel over them."""

    def __init__(self, wide: Phase, tall: Phase, experts: int, rng: np.random.Generator):
        self.wide, self.tall = wide, tall
        slots, tokens = wide.slots, wide.tokens
        self.count = slots - 1  # the last one is not in use
        self.experts = rng.integers(0, experts, slots).astype(np.int32)
        self.pair = np.full((slots, tokens), -1, np.int32)
        places = rng.permutation(self.count * tokens)[:slots]
        self.pair[places // tokens, places % tokens] = rng.permutation(slots)[: len(places)]
        self.weight = rng.integers(1, 4, (slots, tokens)).astype(np.float32)
        self.x = rng.integers(0, 4, wide.x_shape).astype(np.uint32)
        self.planes = [
            interpreted.random_planes(TILE_FORMATS[name].planes, experts, phase.outputs, phase.depth, rng)
            for phase in (wide, tall)
            for name in phase.formats
        ]

    def output(self) -> np.ndarray:
        """What the kernel should give, as :func:`_add_tile` and the epilogues here compute it; -1 where no pair is."""
        *first, down = [self._by_group(i) for i in range(len(self.planes))]
        out = np.full((self.tall.slots, self.tall.outputs), -1, np.float32)
        for slot in range(self.count):
            expert = self.experts[slot]
            x = self.x[0 if self.wide.shared_x else slot, :, : self.wide.tokens].astype(np.int64)
            h = hidden([weights[expert] @ x for weights in first])
            y = down[expert] @ (h.reshape(-1, GROUP, h.shape[-1]).sum(1) % 4)
            for column, pair in enumerate(self.pair[slot]):
                if pair >= 0:
                    out[pair] = self.weight[slot, column] * y[:, column]
        return out

    def _by_group(self, projection: int) -> np.ndarray:
        """i64[experts, O, D / 32]: a projection's planes, added up."""
        kinds = TILE_FORMATS[[*self.wide.formats, *self.tall.formats][projection]].planes
        total = 0
        for number, (plane, array) in enumerate(zip(kinds, self.planes[projection], strict=True), 1):
            total = total + number * entries_by_group(by_row(plane, array).astype(np.int64), plane.per)
        return np.asarray(total)

    def run(self, patch: pytest.MonkeyPatch, fault: str = "") -> np.ndarray:
        block = _Block(self.wide, self.tall, fault)
        block.replace(patch)
        kernel = few_tokens.moe_kernel(self.wide, self.tall, 1, 1, Semantics(), ())
        ready = np.zeros(self.wide.slots + 1, np.int32)
        planes = [jnp.asarray(plane) for planes in self.planes for plane in planes]
        count = np.array([self.count], np.int32)
        _, out = kernel(count, self.experts, self.x, self.pair, self.weight, ready, *planes)
        written = np.zeros(len(out), bool)
        written[self.pair[self.pair >= 0]] = True
        return np.where(written[:, None], np.asarray(out), -1)


class _Block(interpreted.Block):
    def __init__(self, wide: Phase, tall: Phase, fault: str):
        super().__init__(COPIES_X, 1 + max(wide.sources, tall.sources))
        self.wide, self.tall, self.fault = wide, tall, fault

    def replace(self, patch: pytest.MonkeyPatch) -> None:
        """few_tokens.py's names for what the interpreter does not know."""
        replaced = self.modules() | {
            "counters": SimpleNamespace(add_one=self.add_one, wait=self.wait_for_h, leave=lambda *_: None),
            "load_x": lambda ref, rows: ref[...][:, :rows],
            "load_sums": lambda *_: None,
            "add_tile": _add_tile,
            "zero_sums": lambda: jnp.zeros((few_tokens.TILE, COLUMNS), jnp.float32),
            "hidden_epilogue": lambda phase, _: _hidden_epilogue(phase),
            "output_epilogue": lambda phase, _: _output_epilogue(phase),
            "tiled": lambda shape, dtype, _: plgpu.SMEM(shape, dtype),
        }
        for name, value in replaced.items():
            patch.setattr(few_tokens, name, value)
        patch.setattr(few_tokens.Turn, "before", lambda *_: few_tokens.Turn(None, None))
        patch.setattr(matrices, "readable", lambda _: False)

    def arrivals(self, counts: Sequence[int]) -> list[tuple[int, int]]:
        found = []
        for phase, (full, x_full, free) in zip((self.wide, self.tall), (counts[:3], counts[3:6]), strict=True):
            planes = sum(len(TILE_FORMATS[name].planes) for name in phase.formats)
            found += [(planes * phase.sources // len(phase.formats), full), (1, x_full), (LANES, free)]
        return [*found, (LANES, counts[6]), (1, counts[7]), (self.wide.units, self.wide.slots)]

    def awaited(self) -> list[tuple[int, Any, Any]]:
        thread = lax.axis_index("warpgroup")
        copies = [(thread >= COPIES_X) & (thread <= COPIES_X + phase.sources) for phase in (self.wide, self.tall)]
        stages = [(kind, thread < LANES, copying) for kind, copying in zip(FREE, copies, strict=True)]
        return [*stages, (PARTS_FREE, thread == FINISHES, thread < LANES)]

    def add_one(self, _: Any, slot: Any) -> None:
        interpreted.arrive(self.barriers[H_THERE], slot)

    def wait_for_h(self, _: Any, slot: Any, units: int) -> None:
        if self.fault != H_UNAWAITED:
            interpreted.wait(self.barriers[H_THERE], slot)

    def wait(self, barriers: Any, place: Any, parity: Any) -> None:
        """But for what only spares memory: copies that are waited for before others are asked for."""
        if place is None:
            return
        interpreted.wait(barriers, place)
        kind = self.kind_of(barriers)
        if self.fault == FREE_TOO_EARLY and kind in X_FULL:
            interpreted.arrive(self.barriers[kind + 1], place)

    def arrive(self, barriers: Any, place: Any) -> None:
        if self.fault != FREE_TOO_EARLY or self.kind_of(barriers) not in FREE:
            interpreted.arrive(barriers, place)


def _add_tile(total: Any, tile_format: Any, planes: Any, x: Any, _: Any) -> Any:
    """f32[64, 8]: rows' entries of each group of depth, times x's word of it."""
    by_group = 0
    for number, (plane, ref) in enumerate(zip(tile_format.planes, planes, strict=True), 1):
        # A column plane's rows are in pieces.
        entries = by_row(plane, ref[...].astype(jnp.float32)).reshape(few_tokens.TILE, -1)
        by_group = by_group + number * entries_by_group(entries, plane.per)
    product = jnp.asarray(by_group) @ x.astype(jnp.float32)
    return total + jnp.pad(product, ((0, 0), (0, COLUMNS - product.shape[1])))


def _unit_rows(phase: Phase, parts: Any) -> list:
    """Of each source the unit's rows, f32[rows, C]: what lanes have by rows, or added up."""
    sums = parts[...][..., : phase.tokens]
    if phase.by_rows:
        return [sums[0], sums[1]] if len(phase.formats) == 2 else [sums.reshape(-1, phase.tokens)]
    rows = sums.sum(0)
    return [rows[: phase.height], rows[phase.height :]] if len(phase.formats) == 2 else [rows]


def _hidden_epilogue(phase: Phase) -> Any:
    def run(parts, unit, slot_h, expert, weight, biases):
        h = hidden(_unit_rows(phase, parts))
        words = (h.reshape(-1, GROUP, phase.tokens).sum(1) % 4).astype(jnp.uint32)
        words = jnp.pad(words, ((0, 0), (0, slot_h.shape[-1] - phase.tokens)))
        slot_h[pl.ds(unit * len(words), len(words))] = words

    return run


def _output_epilogue(phase: Phase) -> Any:
    def run(parts, unit, pair, weight, out, expert, bias, scale):
        [y] = _unit_rows(phase, parts)
        for column in range(phase.tokens):

            @pl.when(pair[column] >= 0)
            def _(column=column):
                out[pair[column], pl.ds(unit * len(y), len(y))] = weight[column] * y[:, column]

    return run


def main(case: str, fault: str = "") -> None:
    first, down, depth, inner, outputs, tokens, shared_x, by_rows = CASES[case]
    wide = Phase(first, 3, inner, depth, tokens, 1, shared_x, False, by_rows)
    tall = Phase(down, 3, outputs, inner, tokens, 1, False, False, by_rows)
    call = Call(wide, tall, 4, np.random.default_rng(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiling, "MAX_STAGES", 2)  # so that stages come again
        out = call.run(patch, fault)
    interpreted.report(out, call.output(), fault)


if __name__ == "__main__":
    main(*sys.argv[1:])
