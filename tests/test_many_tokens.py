"""The kernel for many tokens, as far as no GPU is needed: columns, layouts, memory, and lowering for CUDA."""

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
