"""What pallas_kernels/prepare.py must find, in plain NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def distinct(rng: np.random.Generator, tokens: int, top_k: int, experts: int) -> np.ndarray:
    return np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)])


# (ids [T, K], E)
ROUTINGS: dict[str, Callable[[np.random.Generator, int], tuple[np.ndarray, int]]] = {
    "distinct": lambda rng, tokens: (distinct(rng, tokens, 8, 128), 128),
    "skewed": lambda rng, tokens: (distinct(rng, tokens, 8, 11), 11),
    "repeated and out of range": lambda rng, tokens: (rng.integers(-2, 8, (tokens, 5)), 6),
    "one expert": lambda rng, tokens: (np.full((tokens, 3), 4), 5),
    "nowhere": lambda rng, tokens: (rng.choice([-1, 7, -(2**31), 2**31 - 1], (tokens, 2)), 7),
    "many experts": lambda rng, tokens: (rng.integers(-100, 6200, (tokens, 6)), 6144),
}


def check(found: Any, ids: np.ndarray, weights: np.ndarray, x: Any, sizes: Any, layer: int) -> None:
    """All that a ``Prepared`` says of a call, x within what its terms hold."""
    experts, pair, weight, live = slots_of(ids, weights, sizes)
    count = int(found.count[0])
    assert count == len(experts)
    np.testing.assert_array_equal(found.experts[:count], experts + layer * sizes.experts)
    np.testing.assert_array_equal(found.pair[:count], pair)
    assert (found.pair[count:] == -1).all()
    np.testing.assert_array_equal(found.weight[:count][pair >= 0], weight[pair >= 0])
    np.testing.assert_array_equal(found.live, live)
    assert not found.ready.any()
    values, sums = read_tiles(found.x, sizes)
    exact = np.asarray(x).astype(np.float64)
    used = zip(*np.nonzero(pair >= 0), pair[pair >= 0] // sizes.top_k, strict=True)
    for slot, column, token in ((0, t, t) for t in range(sizes.tokens)) if sizes.shared else used:
        np.testing.assert_allclose(values[slot, column], exact[token], rtol=0 if sizes.parts == 1 else 2.0**-16)
        by_16 = exact[token].reshape(-1, 16)
        assert (np.abs(sums[slot, column] - by_16.sum(1)) <= np.abs(by_16).sum(1) * 2.0**-15).all()


def slots_of(ids: np.ndarray, weights: np.ndarray, sizes: Any) -> tuple[np.ndarray, ...]:
    """Of the slots in use: experts, pairs [S, C] and their weights; and which pairs are live, [T, K]."""
    experts, rows, live = [], [], np.zeros_like(ids)
    for expert in np.unique(ids[(ids >= 0) & (ids < sizes.experts)]):
        tokens = np.flatnonzero((ids == expert).any(1))
        for first in range(0, 1 if sizes.shared else len(tokens), sizes.width):
            experts.append(expert)
            rows.append([(-1, 0.0)] * sizes.columns)
            for column, token in enumerate(tokens[first : first + sizes.width]):
                chosen = np.flatnonzero(ids[token] == expert)
                total = np.float32(0)
                for k in chosen:
                    total += weights[token, k]
                live[token, chosen[0]] = 1
                rows[-1][token if sizes.shared else column] = (token * sizes.top_k + chosen[0], total)
    slots = np.array(rows).reshape(-1, sizes.columns, 2)
    return np.array(experts, np.int32), slots[..., 0].astype(np.int32), slots[..., 1].astype(np.float32), live


def read_tiles(words: np.ndarray, sizes: Any) -> tuple[np.ndarray, np.ndarray]:
    """As x_tiles.py says: values f64[S, C, D] and sums f64[S, C, D / 16] of each slot's columns."""
    from pallas_kernels import x_tiles

    slots, rows, terms = len(words), sizes.columns * sizes.parts, x_tiles.sum_terms(sizes.parts)
    # Columns that serve no pair are not written.
    with np.errstate(invalid="ignore", over="ignore"):
        numbers = (words.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        # slot, group, part, column, lane, half, pair, one of it
        values = numbers[..., : rows * 32].reshape(slots, -1, sizes.parts, sizes.columns, 4, 2, 2, 2).sum(2)
        sums = numbers[..., rows * 32 : rows * (32 + 2 * terms)]
        sums = sums.reshape(slots, -1, terms, sizes.parts, sizes.columns, 2).sum((2, 3)) / x_tiles.PRODUCT
    values = np.transpose(values / x_tiles.X_SCALE, (0, 2, 1, 4, 3, 6, 5)).reshape(slots, sizes.columns, -1)
    return values, np.transpose(sums, (0, 2, 1, 3)).reshape(slots, sizes.columns, -1)
