"""The kernel for many tokens, as far as no GPU is needed: sorting, tiles, layouts, memory, and lowering for CUDA."""

from __future__ import annotations

import itertools
import math
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from register_model import x_order

import pallas_kernels
from jmoe import FORMATS
from pallas_kernels import Leaves, Semantics, sorted_pairs

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


@has_kernels
@pytest.mark.parametrize("first", range(40, 48))
@pytest.mark.parametrize("last", [48, 53, 64])
def test_columns_that_a_lane_stores(first: int, last: int) -> None:
    """Of a tile that begins at 40: each lane's column and all after it."""
    import simt_model

    from pallas_kernels import simt, tile_epilogues

    block = simt_model.Block(32)
    with block.replaced(simt, tile_epilogues):
        column = simt.thread_in_block() % 8 + 40
        first_word, last_word, inside = simt.Word(first), simt.Word(last), simt.thread_in_block() < 24
        live = tile_epilogues._Live(column, first_word, last_word, inside)
        found = [np.broadcast_to(live[j].data, 32) for j in range(32)]
    lane, at = np.arange(32), 40 + np.arange(32) % 8
    for j, of_lanes in enumerate(found):
        np.testing.assert_array_equal(of_lanes, (lane < 24) & (at + j >= first) & (at + j < last))


@has_kernels
def test_a_tile_stores_no_columns_of_the_next_one() -> None:
    """Which may not be multiplied: the second product of a tile of less than 257 is left out."""
    from pallas_kernels.many_tokens import Unit

    begin, count = sorted_pairs.bounds(5, 305, 2, 0, 288)
    assert Unit(0, 0, begin, 5, count).columns == (0, 5, count)
    assert count == sorted_pairs.bounds(5, 305, 2, 1, 288)[0]


@pytest.mark.parametrize("width", [8, 256])
def test_one_expert_takes_all_tokens(width: int) -> None:
    check_sorted(np.full((8193, 1), 5, np.int32), 8, width)


def test_more_tiles_than_16_bits_count(rng) -> None:
    check_sorted(rng.integers(0, 3000, (4500, 1)).astype(np.int32), 3000, 32)
    # 12 units a tile of Qwen3-30B-A3B: tiles times units pass 2^16 at this many tokens, and are 32-bit words.
    assert sorted_pairs.most_tiles(65_536 * 8, 128, 256) * 12 < 2**31


@has_kernels
@pytest.mark.parametrize("sources", [1, 2])
def test_h_lies_in_the_order_in_which_codes_are_decoded(sources: int) -> None:
    """Of the features that a warpgroup's lanes hold, each lands where x_order puts it."""
    from pallas_kernels.tile_epilogues import SIXTEEN, Rows

    rows = Rows(sources, True)
    place_of = np.argsort(x_order(np.arange(rows.features)))
    seen = []
    for warp, half, quad, which in itertools.product(range(4), range(2), range(4), range(2)):
        source, feature = rows.of_lane(2 * quad + which, warp, half)
        assert source == (half if sources == 2 else 0)
        if source != sources - 1:
            continue
        first = warp // 2 * SIXTEEN + warp % 2 * 8 if sources == 2 else warp * SIXTEEN + 8 * half
        # movmatrix leaves lane q of four with rows 2q and 2q + 1 of eight, which it stores together.
        assert place_of[feature] == first + 2 * quad + which
        seen.append(feature)
    assert sorted(seen) == list(range(rows.features))


@has_kernels
def test_x_is_put_in_the_order_of_a_lane_s_codes() -> None:

    want = [*range(0, 16, 2), *range(1, 16, 2), *range(16, 32, 2), *range(17, 32, 2)]
    np.testing.assert_array_equal(x_order(np.arange(32)[None]), [want])


def specs(formats: tuple[str | None, str, str], case: cases.Case) -> list[Any]:
    shapes = [case.shape(p) for p in cases.PROJECTIONS]
    return [None if name is None else planes_of(name, shape) for name, shape in zip(formats, shapes, strict=True)]


def planes_of(name: str, shape: tuple[int, ...]) -> tuple[Any, ...]:
    return FORMATS[name].plane_specs(shape) if name in FORMATS else (jax.ShapeDtypeStruct(shape, jnp.dtype(name)),)


def lowered(
    formats: tuple[str | None, str, str],
    case: cases.Case,
    tokens: int,
    dtype: Any = jnp.bfloat16,
    leaves: Leaves = pallas_kernels.NO_LEAVES,
    semantics: Semantics = pallas_kernels.SILU,
    exact: bool = False,
) -> str:
    from pallas_kernels.layer import Packed, moe_many_tokens

    shape = jax.ShapeDtypeStruct

    def run(planes, x, ids, weights, leaves):
        packed: Any = [None if p is None else Packed(name or "", p) for name, p in zip(formats, planes, strict=True)]
        gate, up, down = packed
        return moe_many_tokens(gate, up, down, x, ids, weights, None, leaves, semantics, exact, 1.0)

    pairs = (tokens, case.top_k)
    arguments = (shape((tokens, case.hidden_size), dtype), shape(pairs, jnp.int32), shape(pairs, jnp.float32))
    jitted: Any = jax.jit(run)
    return jitted.trace(specs(formats, case), *arguments, leaves).lower(lowering_platforms=("cuda",)).as_text()


SMALL = cases.Case("small", 512, 768, 8, 3, "q4_k", "q4_k", "q6_k")


@has_kernels
@pytest.mark.parametrize("name", [*sorted(FORMATS), "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
def test_every_format_lowers(name: str, dtype: Any) -> None:
    module = lowered((name, name, name), SMALL, 20, dtype)
    # The sorting, beside which rows of x are made, and two products.
    assert module.count("custom_call @mosaic_gpu_v2") == 3


@has_kernels
@pytest.mark.parametrize(
    ("formats", "options", "launches"),
    [
        (("q4_k", "q6_k", "q5_0"), {}, 4),
        ((None, "q5_k", "q8_0"), {}, 3),
        (("q4_k", "q4_k", "bfloat16"), {}, 3),
        (("q4_k", "q4_k", "q6_k"), {"exact": True}, 3),
        (("q4_k", "q4_k", "q6_k"), {"semantics": Semantics(weight_on="input")}, 4),
        (("q4_k", "q6_k", "q6_k"), {"semantics": Semantics(1.702, 0.0, 1.0, 7.0), "dtype": jnp.float16}, 4),
    ],
    ids=["gate differs from up", "no gate", "dense down", "exact", "weight on input", "gpt-oss's activation"],
)
def test_mixes_and_semantics_lower(formats: tuple, options: dict, launches: int) -> None:
    leaf = jax.ShapeDtypeStruct
    wide, tall = leaf((8, 768), jnp.float32), leaf((8, 512), jnp.bfloat16)
    leaves = Leaves(None if formats[0] is None else wide, wide, tall, leaf((8,), jnp.float32))
    assert lowered(formats, SMALL, 20, leaves=leaves, **options).count("custom_call @mosaic_gpu_v2") == launches


@has_kernels
@pytest.mark.parametrize(
    "case",
    [
        cases.Case("gemma-4", 2816, 704, 128, 8, "q4_k", "q4_k", "q5_0"),
        cases.Case("nemotron depth", 512, 1856, 8, 2, "q5_k", "q5_k", "q8_0"),
        cases.Case("gpt-oss", 2880, 2880, 32, 4, "mxfp4", "mxfp4", "mxfp4"),
    ],
    ids=lambda case: case.name,
)
def test_real_sizes_lower(case: cases.Case) -> None:
    formats = (case.format("gate"), case.format("up"), case.format("down"))
    assert lowered(formats, case, 33).count("custom_call @mosaic_gpu_v2") == 3


@has_kernels
@pytest.mark.parametrize("name", [*sorted(FORMATS), "bfloat16", "float16"])
@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("pairs", [0.5, 64, 2048, 65_536])
def test_stages_fit_in_shared_memory(name: str, terms: int, pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from pallas_kernels import many_tokens, operands, tiling
    from pallas_kernels.product import PARTS, Gather, Product
    from pallas_kernels.semantics import Semantics

    tile = tiling.tile(pairs, 128, terms, operands.tile_bytes(name))
    product = Product("h", (name, name), 768, 2048, 65_536, terms, *tile)
    stages = product.pipeline()
    assert stages.weights >= 2
    assert stages.x >= 2
    assert stages.x % stages.side == 0
    # Those ahead have as many parts in shared memory, and their weights.
    assert stages.lead < stages.x
    assert stages.lead < PARTS * stages.weights
    used = stages.weights * product.weight_bytes + stages.x * product.x_bytes + product.table_bytes
    assert used <= tiling.SMEM_BYTES
    # And all that the kernel asks for, each array on a KiB of its own.
    monkeypatch.setattr(many_tokens.plgpu, "kernel", lambda _, *, scratch_types, **others: scratch_types)
    down = product._replace(makes="out", formats=(name,), weighted=True)
    for launch in (product, product._replace(gather=Gather(8, True)), down):
        scratch = many_tokens.grouped_matmul(launch, Semantics(), (), tiling.NUM_SMS)
        kib = [-(-math.prod(s.shape) * jnp.dtype(s.dtype).itemsize // 1024) for s in scratch]
        assert sum(kib) * 1024 <= tiling.SMEM_BYTES
    assert all(width % 8 == 0 for width in tile.widths)
    assert tile.width * terms <= (tiling.WIDE if terms > 1 else tiling.WIDEST)[0]


@has_kernels
@pytest.mark.parametrize(
    ("of_an_expert", "widths", "warpgroups"),
    [
        (32, (48,), 4),
        (64, (88,), 4),
        (128, (152, 136), 2),
        (256, (288,), 2),
        (512, (280,), 2),  # two tiles, where 256 columns would want three
        (1024, (216, 208), 2),  # five, where 272 columns would spare one
    ],
)
def test_tiles_are_those_that_were_fastest(of_an_expert: int, widths: tuple[int, ...], warpgroups: int) -> None:
    from pallas_kernels import operands, tiling

    assert tiling.tile(8 * of_an_expert, 8, 1, operands.tile_bytes("q6_k")) == (widths, warpgroups)


@has_kernels
@pytest.mark.parametrize("tokens", [64, 512, 4096])
@pytest.mark.parametrize("devices", [2, 8])
def test_a_part_of_the_experts_is_computed_as_all_of_them_are(tokens: int, devices: int) -> None:
    """Experts that lie on many devices get as many pairs each as on one: the same kernel and the same tiles."""
    from pallas_kernels import operands, takes_few, tiling

    experts, top_k, share = 256, 8, 1 / devices
    pairs, weight_bytes = tokens * top_k, operands.tile_bytes("q4_k")
    alone = tiling.tile(pairs, experts, 1, weight_bytes)
    assert tiling.tile(pairs * share, experts // devices, 1, weight_bytes) == alone
    call = {"tokens": tokens, "top_k": top_k, "dtype": jnp.bfloat16}
    few = [
        takes_few(["q4_k"], experts=there, live_share=share, **call)
        for there, share in ((experts, 1.0), (experts // devices, share))
    ]
    assert few == [tokens == 64] * 2


@has_kernels
@pytest.mark.parametrize("places", [1, 2, 3, 8])
def test_turns_that_are_counted_on_are_those_after_a_count(places: int) -> None:
    from pallas_kernels.barriers import Turn

    turn = Turn.after(0, places)
    for count in range(4 * places + 1):
        assert (int(turn.place), int(turn.parity)) == (count % places, count // places % 2)
        assert tuple(map(int, Turn.after(count, places))) == tuple(map(int, turn))
        for back in range(1, places + 1):
            # Before the first turn as a new barrier is: completed with parity 1.
            earlier = Turn.after(count - back, places) if count >= back else Turn((count - back) % places, 1)
            assert tuple(map(int, turn.before(back, places))) == tuple(map(int, earlier))
        turn = turn.next(places)


@has_kernels
@pytest.mark.parametrize(
    ("row", "copied", "dtype", "swizzle", "of_line"),
    [
        (1024, 64, "uint8", 64, 2),
        (1024, 32, "uint8", 32, 4),
        (1024, 128, "uint8", 128, 1),
        (192, 64, "uint8", 64, 1),  # every other row begins within a line
        (1024, 64, "bfloat16", 128, 1),
        (1024, 32, "uint8", 0, 1),  # a column plane
    ],
)
def test_copies_that_share_a_line_of_l2(row: int, copied: int, dtype: str, swizzle: int, of_line: int) -> None:
    from pallas_kernels.barriers import Copy

    origin, target = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((4, 64, row), (2, 64, copied)))
    assert Copy(origin, (0, (0, 64), (0, copied)), target, (0,), swizzle).of_line == of_line


@has_kernels
@pytest.mark.parametrize(
    ("down", "planes"),
    [
        ("q4_0", 2),
        ("q6_k", 3),  # upper bits share lines with those of the next chunk
    ],
)
def test_l2_is_told_to_forget_weights_first_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, down: str, planes: int
) -> None:
    from pallas_kernels import barriers

    hinted, name = [], "cp_async_bulk_tensor_shared_cluster_global"
    real = getattr(barriers.nvvm, name)

    class Recorder:
        def __getattr__(self, other: str) -> Any:
            return record if other == name else getattr(type(self).nvvm, other)

        nvvm = barriers.nvvm

    def record(*operands: Any, l2_cache_hint: Any, **options: Any) -> Any:
        hinted.append(l2_cache_hint)
        return real(*operands, l2_cache_hint=l2_cache_hint, **options)

    monkeypatch.setattr(barriers, "nvvm", Recorder())
    # A size of its own: kernels that were lowered before are kept.
    lowered(("q8_0", "q8_0", down), cases.Case("hints", 320, 512, 6, 2, "q8_0", "q8_0", down), 19)
    # Codes and d of gate and of up, and down's; not x, not h.
    assert len(hinted) == 4 + planes
