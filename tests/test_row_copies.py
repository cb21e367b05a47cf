"""Copying rows of x to their sorted places, by the model of a block."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

import pallas_kernels

if not pallas_kernels.MIN_JAX <= jax.__version_info__ < pallas_kernels.BELOW_JAX:
    pytest.skip("the kernels need another jax", allow_module_level=True)

import simt_model

from pallas_kernels import barriers, counters, row_copies, simt

BLOCKS, TOP_K = 3, 2


class CopyEngine:
    """Bulk copies as late or as early as the hardware may make them: what a place holds is only known while nothing
    is on its way to or from it."""

    def __init__(self, block: simt_model.Block):
        self.block = block
        self.fills: dict[int, int] = {}  # of each place, over all batches
        self.filling: dict[int, Any] = {}  # what is on its way to a place, as a function that copies it
        self.expected: dict[int, int] = {}
        self.stores: list[list[Any]] = []  # groups: [place, what copies it, whether it was read]
        self.open: list[Any] = []
        self.barrier = -1

    def operations(self) -> dict[str, Any]:
        nvvm = SimpleNamespace(mbarrier_arrive_expect_tx=self._expect, mbarrier_try_wait_parity=self._wait)
        return {"nvvm": nvvm, "pointer_of": lambda _, ref, place: int(place.value.data), "_bulk": self._bulk}

    def _expect(self, place: int, size: Any) -> None:
        assert place not in self.filling, "a place is filled twice"
        self.expected[place] = int(size.data)

    def _wait(self, place: int, parity: Any, _: Any) -> None:
        done = self.fills.get(place, 0)
        assert np.broadcast_to(parity.data, self.block.mask.shape)[self.block.mask] == done % 2, "the wrong turn"
        self.filling.pop(place)()
        self.fills[place] = done + 1

    def _bulk(self, text: str, *operands: Any) -> None:
        if text.startswith("shared::cluster.global"):
            target, source, place = operands
            size = int(text.split("[$1], ")[1].split(",")[0])
            assert self.expected.pop(place) == size
            assert all(was_read or at != place for at, _, was_read in self.stores + self.open), "overwritten"
            self.filling[place] = self._copy(target, source, size)
        elif text.startswith("global.shared"):
            target, source = operands
            size = int(text.split("[$1], ")[1].rstrip(";"))
            place = int(self._start(source)) // self.piece_bytes
            assert place not in self.filling, "stored before it is there"
            self.open.append([place, self._copy(target, source, size), False])
        elif text.startswith("commit_group"):
            assert len(self.open) == 1
            self.stores += self.open
            self.open = []
        else:
            kind, left = text.rstrip(";").split()
            for group in self.stores[: len(self.stores) - int(left)]:
                if not group[2]:
                    group[1]()
                group[2] = True
            if kind == "wait_group":
                self.stores = self.stores[len(self.stores) - int(left) :]

    piece_bytes = 0

    def _start(self, pointer: Any) -> Any:
        return np.broadcast_to(pointer.nbytes, self.block.mask.shape)[self.block.mask][0]

    def _copy(self, target: Any, source: Any, size: int) -> Any:
        ends = [(end.memory.view(np.uint8), int(self._start(end))) for end in (target, source)]
        assert not any(start % 16 for _, start in ends), "not aligned"

        def run() -> None:
            (to, there), (origin, here) = ends
            to[there : there + size] = origin[here : here + size]

        return run


def copied(
    monkeypatch: pytest.MonkeyPatch, live: int, first: int, pieces: tuple[int, int], shapes: list[tuple[int, ...]]
) -> None:
    """All blocks one after another, some batches by warps and the others by one lane, and what became of it."""
    rng = np.random.default_rng(live)
    tokens, rows = 29, 200
    pair = rng.permutation(np.arange(rows) % (tokens * TOP_K)).astype(np.int32)
    pair[live:] = 0
    sources = [rng.integers(0, 2048, (*lead, tokens, n)).astype(np.float16) for *lead, n in shapes]
    targets = [np.full((*lead, rows, n), -77, np.float16) for *lead, n in shapes]
    ready = np.zeros(row_copies.counters(rows), np.int32)
    arguments = [pair, np.array([0, live], np.int32), ready, *sources, *targets]
    refs = [argument.view(simt_model.Ref) for argument in arguments]
    half = 3 + len(shapes)
    given = row_copies.Rows(refs[3:half], refs[half:], refs[0], refs[1], refs[2], TOP_K)
    scratch = np.zeros(pieces, np.uint8).view(simt_model.Ref)
    for number in range(BLOCKS):
        warps = simt_model.Block(128)
        lane = simt_model.Block(32)
        warps.number = lane.number = number
        with warps.replaced(simt, counters, row_copies):
            row_copies.copy_first(given, first, 1, BLOCKS)
        with lane.replaced(simt, counters, row_copies):
            engine = CopyEngine(lane)
            engine.piece_bytes = pieces[1]
            for name, stand_in in engine.operations().items():
                monkeypatch.setattr(row_copies, name, stand_in)
            row_copies.copy_others(given, first, barriers.Barriers(scratch, 0, pieces[0], 1), scratch, BLOCKS)
            assert not engine.filling
            assert not engine.stores
    whole = -(-live // row_copies.BATCH) * row_copies.BATCH
    for source, target in zip(sources, targets, strict=True):
        np.testing.assert_array_equal(target[..., :whole, :], source[..., pair[:whole] // TOP_K, :])
        assert (target[..., whole:, :] == -77).all()
    in_buckets = np.clip(whole - np.arange(len(ready)) * row_copies.BUCKET, 0, row_copies.BUCKET)
    np.testing.assert_array_equal(ready, in_buckets)


@pytest.mark.parametrize("live", [0, 1, 8, 101, 200])
@pytest.mark.parametrize("first", [0, 1, 4, 100])
@pytest.mark.parametrize("pieces", [(4, 1024), (8, 1024), (8, 2048)], ids=str)
def test_each_row_comes_to_its_pair_once(
    monkeypatch: pytest.MonkeyPatch, live: int, first: int, pieces: tuple[int, int]
) -> None:
    copied(monkeypatch, live, first, pieces, [(1, 1024), (64,)])


@pytest.mark.parametrize("shapes", [[(2, 2880)], [(1, 64)], [(1, 4608), (288,)]], ids=str)
def test_rows_of_any_length_and_of_two_terms(monkeypatch: pytest.MonkeyPatch, shapes: list[tuple[int, ...]]) -> None:
    copied(monkeypatch, 150, 2, (8, 1024), shapes)


def test_pieces_fit_in_what_is_free() -> None:
    for free in (0, 4095, 4096, 8191, 8192, 16_384, 100_000):
        found = row_copies.pieces(free)
        assert (found is None) == (free < row_copies.LEAST_BYTES)
        assert found is None or found[0] * found[1] <= free
