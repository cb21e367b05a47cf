"""Pairs sorted by expert, rows of x made beside it, and the tiles of groups: by XLA and by the kernel that sorts."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from register_model import x_order

import pallas_kernels
from pallas_kernels import sorted_pairs

has_kernels = pytest.mark.skipif(
    not pallas_kernels.MIN_JAX <= jax.__version_info__ < pallas_kernels.BELOW_JAX,
    reason="the kernels need another jax",
)
SORT: Any = jax.jit(sorted_pairs.sort_pairs, static_argnames=("experts", "width"))


def check_sorted(ids: np.ndarray, experts: int, width: int, layer: int = 3) -> None:
    """Each pair that leads somewhere is in one tile of its expert, which is at most ``width`` wide and aligned."""
    weights = np.arange(ids.size, dtype=np.float32).reshape(ids.shape)
    check_found(jax.tree.map(np.asarray, SORT(ids, weights, experts, layer, width)), ids, experts, width, layer)


def check_found(found: sorted_pairs.SortedPairs, ids: np.ndarray, experts: int, width: int, layer: int) -> None:
    count, table = int(found.tiles.count[0]), found.tiles.table
    assert count <= len(table) == sorted_pairs.most_tiles(ids.size, experts, width)
    live = (ids >= 0) & (ids < experts)
    assert int(found.tiles.count[1]) == live.sum()
    served = np.zeros(ids.size, int)
    for t in range(count):
        expert, first, last, first_tile, tiles = (int(word) for word in table[t])
        assert first_tile <= t < first_tile + tiles
        begin, columns = (int(n) for n in sorted_pairs.bounds(first, last, tiles, t - first_tile, width))
        assert begin % sorted_pairs.ALIGN == 0
        assert 0 < columns <= width
        mine = found.pair[max(begin, first) : min(begin + columns, last)]
        assert (ids.reshape(-1)[mine] + layer * experts == expert).all()
        served[mine] += 1
    np.testing.assert_array_equal(served, live.reshape(-1))
    # Where the sum over a token's pairs finds them.
    np.testing.assert_array_equal(found.pair[found.place[live]], np.flatnonzero(live))
    assert (found.place[~live] == -1).all()
    np.testing.assert_array_equal(found.weight[found.place[live]], np.flatnonzero(live))


def sorted_by_the_kernel(ids: np.ndarray, experts: int, width: int, backwards: bool = False) -> list[np.ndarray]:
    """The kernel's outputs, by the model of a block."""
    import simt_model

    from pallas_kernels import simt, sort_kernel

    weights, layer = np.arange(ids.size, dtype=np.float32), np.array([3], np.int32)
    block = simt_model.Block(sort_kernel.THREADS)
    with block.replaced(simt, sort_kernel):
        kernel = sort_kernel.sort_kernel.__wrapped__(ids.size, experts, width)
        blocks = range(*kernel.grid)
        return block.run(kernel, blocks[::-1] if backwards else blocks, ids.reshape(-1), weights, layer)


def check_kernel(ids: np.ndarray, experts: int, width: int) -> None:
    pair, weight, place, *tiles = sorted_by_the_kernel(ids, experts, width)
    found = sorted_pairs.SortedPairs(pair, weight, place.reshape(ids.shape), sorted_pairs.Tiles(*tiles))
    check_found(found, ids, experts, width, 3)
    # Stable: pairs of one expert in the order of their numbers, and the same as XLA's.
    weights = np.arange(ids.size, dtype=np.float32).reshape(ids.shape)
    theirs = jax.tree.map(np.asarray, SORT(ids, weights, experts, 3, width))
    live = int(((ids >= 0) & (ids < experts)).sum())
    np.testing.assert_array_equal(found.pair[:live], theirs.pair[:live])
    np.testing.assert_array_equal(found.place, theirs.place)
    count = int(theirs.tiles.count[0])
    np.testing.assert_array_equal(found.tiles.table[:count], theirs.tiles.table[:count])
    # Where XLA gathers x it finds a pair everywhere; beyond the others nothing else is written.
    assert (found.pair[live:] == 0).all()
    assert (found.weight[live:] == -77).all()
    assert (found.tiles.table[count:] == -77).all()


@has_kernels
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "width"),
    [
        (1, 1, 1, 32),
        (5, 3, 7, 32),
        (128, 8, 128, 256),
        (300, 8, 128, 256),
        (700, 2, 257, 64),
        (1025, 1, 3, 32),
        (40, 3, 1024, 32),
        (4001, 5, 1000, 128),
        pytest.param(8200, 8, 128, 256, marks=pytest.mark.slow),
    ],
)
def test_the_kernel_that_sorts_does_the_same(rng, tokens: int, top_k: int, experts: int, width: int) -> None:
    check_kernel(rng.integers(-1, experts + 1, (tokens, top_k)).astype(np.int32), experts, width)


@has_kernels
def test_the_kernel_leaves_out_ids_at_the_ends_of_blocks(rng) -> None:
    ids = rng.integers(0, 7, (3500, 1)).astype(np.int32)
    ends = [0, 1023, 1024, 2047, 2048, 3071, 3072, 3499]
    ids[ends, 0] = np.tile([-1, 7, -(2**31), 2**31 - 1], 2)
    ids[1020:1030] = -1
    check_kernel(ids, 7, 64)


@has_kernels
@pytest.mark.parametrize("expert", [-1, 0, 5, 7, 8])
def test_the_kernel_sorts_pairs_of_one_expert(expert: int) -> None:
    check_kernel(np.full((2500, 1), expert, np.int32), 8, 256)


@has_kernels
def test_the_kernel_that_sorts_is_the_same_in_every_order_of_blocks(rng) -> None:
    ids = rng.integers(-1, 65, (1200, 4)).astype(np.int32)
    for one, other in zip(sorted_by_the_kernel(ids, 64, 128), sorted_by_the_kernel(ids, 64, 128, True), strict=True):
        np.testing.assert_array_equal(one, other)


X_TERMS = [("bfloat16", 1), ("bfloat16", 2), ("float16", 2), ("float32", 2)]


@has_kernels
@pytest.mark.parametrize(("dtype", "terms"), X_TERMS)
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("depth", [144, 512])
def test_rows_with_weights_are_made_for_pairs_that_lead_somewhere_and_no_others(
    rng, dtype: str, terms: int, share: float, depth: int
) -> None:
    import simt_model

    from pallas_kernels import operands, registers, simt, x_rows

    tokens, top_k, sums = 61, 3, depth % 256 == 0
    ids = np.where(rng.random((tokens, top_k)) < share, rng.integers(0, 7, (tokens, top_k)), -1).astype(np.int32)
    weights = rng.standard_normal(ids.shape, np.float32)
    found = jax.tree.map(np.asarray, SORT(ids, weights, 7, 3, 32))
    x = np.asarray(jnp.asarray(rng.standard_normal((tokens, depth)), dtype))
    block = simt_model.Block(x_rows.THREADS)
    with block.replaced(simt, x_rows, operands, registers):
        kernel = x_rows.pair_rows.__wrapped__(dtype, terms, top_k, depth, found.pair.size, sums)
        made = block.run(kernel, range(*kernel.grid), x, found.pair, found.tiles.count, found.weight)
    live = int((ids >= 0).sum())
    check_rows(made, x[found.pair[:live] // top_k].astype(np.float32) * found.weight[:live, None])


def check_rows(made: list[np.ndarray], rest: np.ndarray) -> None:
    """Rows of x in bf16 terms and their sums; what lies behind is not written."""
    from pallas_kernels.x_tiles import X_SCALE

    (out, *of_sixteens), (live, depth) = made, rest.shape
    for got in of_sixteens:
        # A sub-block's two sixteens lie 8 apart.
        in_order = got.reshape(-1, depth // 256, 2, 8).swapaxes(2, 3).reshape(got.shape)[:live].astype(np.float64)
        want, most = (f(rest).reshape(live, depth // 16, 16).sum(2) * X_SCALE for f in (np.float64, np.abs))
        assert (np.abs(in_order - want) <= np.abs(want) * 2.0**-8 + most * 2.0**-20).all()
        assert (got[live:] == -77).all()
    for term in out:
        rounded = rest.astype(jnp.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(term[:live].astype(np.float32), x_order(rounded) * np.float32(X_SCALE))
        assert (term[live:] == -77).all()
        rest = rest - rounded


@has_kernels
@pytest.mark.parametrize(("dtype", "terms"), X_TERMS)
@pytest.mark.parametrize("beside_sorting", [False, True])
@pytest.mark.parametrize("depth", [144, 512])
def test_tokens_rows_are_made_beside_sorting_or_alone(
    rng, dtype: str, terms: int, beside_sorting: bool, depth: int
) -> None:
    import simt_model

    from pallas_kernels import operands, registers, simt, sort_kernel, x_rows

    tokens, sums = 61, depth % 256 == 0
    x = np.asarray(jnp.asarray(rng.standard_normal((tokens, depth)), dtype))
    rows = x_rows.TokenRows(dtype, terms, tokens, depth, sums, 5000)
    block = simt_model.Block(sort_kernel.THREADS if beside_sorting else x_rows.THREADS)
    with block.replaced(simt, x_rows, sort_kernel, operands, registers):
        if beside_sorting:
            ids, weights = rng.integers(-1, 8, tokens * 3).astype(np.int32), np.ones(tokens * 3, np.float32)
            kernel = sort_kernel.sort_kernel.__wrapped__(ids.size, 7, 32, rows)
            inputs = [ids, weights, np.array([3], np.int32), x]
        else:
            kernel, inputs = x_rows.token_rows.__wrapped__(rows), [x]
        *made, zeros = block.run(kernel, range(*kernel.grid), *inputs)[5 * beside_sorting :]
    check_rows(made, x.astype(np.float32))
    assert zeros.shape == (5000,)
    assert not zeros.any()


@has_kernels
@pytest.mark.parametrize(("tokens", "experts"), [(30, 1025), (2**18 + 1, 2)])
def test_more_than_the_kernel_sorts_is_left_to_xla(rng, tokens: int, experts: int) -> None:
    """On a CPU, where the kernel does not run."""
    from pallas_kernels import sort_kernel

    ids = rng.integers(-1, experts + 1, (tokens, 1)).astype(np.int32)
    weights = np.arange(tokens, dtype=np.float32)[:, None]
    found = sort_kernel.sort_pairs(jnp.asarray(ids), jnp.asarray(weights), experts, jnp.asarray(3, jnp.int32), 256)
    check_found(jax.tree.map(np.asarray, found), ids, experts, 256, 3)


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "width"),
    [(1, 1, 1, 32), (5, 3, 7, 32), (33, 1, 4, 64), (300, 8, 128, 256), (8193, 2, 8, 256)],
)
def test_every_pair_is_in_one_tile_of_its_expert(rng, tokens: int, top_k: int, experts: int, width: int) -> None:
    check_sorted(rng.integers(-1, experts + 1, (tokens, top_k)).astype(np.int32), experts, width)


def test_all_patterns_of_empty_groups_of_eight_experts(rng) -> None:
    for chosen in itertools.product((False, True), repeat=8):
        among = np.flatnonzero(chosen)
        ids = rng.choice(among, (21, 2)) if len(among) else np.full((21, 2), 8)
        check_sorted(ids.astype(np.int32), 8, 32)


@pytest.mark.parametrize("width", [264, 280, 288])
def test_tiles_of_more_columns_than_one_product_has(width: int) -> None:
    """As few of them as hold the group, and as few of those with a second product."""
    for rows in (*range(1, 4 * width, 37), 256, 257, width, width + 1, 2 * 256, 2 * 256 + 1, 2 * width, 2 * width + 1):
        for first in (0, 5):
            tiles = -(-(rows + first) // width)
            cut = [sorted_pairs.bounds(first, first + rows, tiles, i, width) for i in range(tiles)]
            starts, columns = np.array(cut).T
            ends = np.add(starts, columns)
            np.testing.assert_array_equal(starts[1:], ends[:-1])
            assert (starts[0], ends[-1]) == (0, first + rows)
            assert 0 < min(columns) <= max(columns) <= width
            over = max(sorted_pairs.rounded_up(rows + first) - tiles * 256, 0)
            assert sum(columns > 256) == -(-over // (width - 256))


@pytest.mark.parametrize("width", [8, 256])
def test_one_expert_takes_all_tokens(width: int) -> None:
    check_sorted(np.full((8193, 1), 5, np.int32), 8, width)


def test_more_tiles_than_16_bits_count(rng) -> None:
    check_sorted(rng.integers(0, 3000, (4500, 1)).astype(np.int32), 3000, 32)
    # 12 units a tile of Qwen3-30B-A3B: tiles times units pass 2^16 at this many tokens, and are 32-bit words.
    assert sorted_pairs.most_tiles(65_536 * 8, 128, 256) * 12 < 2**31
