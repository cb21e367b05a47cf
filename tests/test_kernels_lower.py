"""Every kernel configuration lowers for CUDA on a machine without a GPU, and what no kernel takes says why."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from jmoe import Activation, ExpertStack, moe_forward, which_backend

has_kernels = pytest.mark.skipif(
    not pallas_kernels.MIN_JAX <= jax.__version_info__ < pallas_kernels.BELOW_JAX,
    reason="the kernels need another jax, and say so (tested below)",
)


def specs_of(case: cases.Case, layers: int | None = None) -> ExpertStack:
    """The stack as shapes only: lowering reads no weight."""
    return cases.specs(case, 1, () if layers is None else (layers,))[0]


def lowered_for_cuda(stack: ExpertStack, tokens: int, top_k: int, dtype: Any = jnp.bfloat16, **options) -> str:
    shape = jax.ShapeDtypeStruct
    x = shape((tokens, stack.hidden_size), dtype)
    ids, weights = shape((tokens, top_k), jnp.int32), shape((tokens, top_k), jnp.float32)
    forward: Any = jax.jit(partial(moe_forward, **options))
    return forward.trace(stack, x, ids, weights).lower(lowering_platforms=("cuda",)).as_text()


def kernels_in(module: str) -> list[str]:
    names = (
        "moe_prepare",
        "moe_few_tokens",
        "moe_sort",
        "moe_rows",
        "moe_gather",
        "moe_gate",
        "moe_hidden",
        "moe_down",
    )
    return [name for name in names if name in module]


@has_kernels
@pytest.mark.parametrize(
    ("name", "tokens", "dtype"),
    [
        *((name, 5, jnp.float32) for name in sorted(pallas_kernels.DEPTHS)),
        # One of each kind of block: without what prepares, a format decodes as with it.
        *((name, 1, jnp.bfloat16) for name in ("q4_k", "q6_k", "mxfp4", "iq4_xs")),
    ],
)
def test_each_format_lowers_to_a_kernel_and_what_prepares_it(name: str, tokens: int, dtype: Any) -> None:
    case = cases.Case("lowered", 512, 768, 8, 3, name, name, name)
    wanted = ["moe_few_tokens"] if tokens == 1 else ["moe_prepare", "moe_few_tokens"]
    assert kernels_in(lowered_for_cuda(specs_of(case), tokens, case.top_k, dtype)) == wanted


@has_kernels
@pytest.mark.parametrize(
    "case",
    [
        cases.Case("gate differs from up", 512, 320, 8, 2, "q4_k", "q6_k", "q5_0"),
        cases.Case("gemma-4", 2816, 704, 128, 8, "q4_k", "q4_k", "q5_0"),
        cases.Case("nemotron depth", 512, 1856, 8, 2, "q5_k", "q5_k", "q8_0"),
        cases.Case("gpt-oss", 2880, 2880, 32, 4, "mxfp4", "mxfp4", "mxfp4"),
        cases.Case("deepseek-v3", 7168, 2048, 256, 8, "q4_k", "q4_k", "q6_k"),
    ],
    ids=lambda case: case.name,
)
def test_real_sizes_and_mixes_of_formats_lower(case: cases.Case) -> None:
    assert len(kernels_in(lowered_for_cuda(specs_of(case), 16, case.top_k))) == 2


def with_leaves(stack: ExpertStack, case: cases.Case, *, gated: bool, dtype: Any = jnp.float32) -> ExpertStack:
    """The stack with every leaf that it may have, as shapes."""
    leaves = cases.random_leaves(case, gated=gated)
    as_specs = {name: jax.ShapeDtypeStruct(leaf.shape, dtype) for name, leaf in leaves.items()}
    return replace(stack, gate=stack.gate if gated else None, **as_specs)


ACTIVATIONS = ["silu", "gelu_tanh", "swiglu_oai", Activation("swiglu_clamped", 7.0), "relu2"]


@has_kernels
@pytest.mark.parametrize(
    ("activation", "weight_on"), [*((a, "output") for a in ACTIVATIONS), ("silu", "input"), ("relu2", "input")], ids=str
)
def test_every_activation_with_every_leaf_lowers(activation: Any, weight_on: str) -> None:
    case = cases.Case("lowered", 512, 768, 8, 3, "q4_k", "q4_k", "q6_k")
    stack = with_leaves(specs_of(case), case, gated=activation != "relu2")
    # Three pairs of one token are three tokens where their weights go on the input.
    module = lowered_for_cuda(stack, 1, case.top_k, activation=activation, weight_on=weight_on)
    assert kernels_in(module) == ["moe_few_tokens"]


@has_kernels
@pytest.mark.parametrize("tokens", [1, 16])
def test_units_without_a_gate_end_before_their_rows_do(tokens: int) -> None:
    # Nemotron's sizes: units of 64 or 128 rows of up, and 1856 is no multiple of 128.
    case = cases.Case("nemotron", 2688, 1856, 128, 6, "q5_0", "q5_0", "q8_0")
    stack = with_leaves(specs_of(case), case, gated=False, dtype=jnp.bfloat16)
    assert "moe_few_tokens" in lowered_for_cuda(stack, tokens, case.top_k, activation="relu2")


@has_kernels
def test_a_layer_index_reaches_the_leaves() -> None:
    case = cases.Case("layers", 512, 256, 8, 2, "mxfp4", "mxfp4", "mxfp4")
    stack = specs_of(case, layers=3)
    leaves = {
        name: jax.ShapeDtypeStruct((3, *leaf.shape), leaf.dtype) for name, leaf in cases.random_leaves(case).items()
    }
    module = lowered_for_cuda(replace(stack, **leaves), 2, case.top_k, layer=1, activation="swiglu_oai")
    assert kernels_in(module) == ["moe_few_tokens"]
    assert "tensor<24x256xf32>" in module


@has_kernels
def test_a_stack_of_layers_lowers_without_slicing_a_layer_out() -> None:
    case = cases.Case("layers", 512, 256, 8, 2, "q4_k", "q4_k", "q6_k")
    module = lowered_for_cuda(specs_of(case, layers=3), 2, case.top_k, layer=1)
    assert kernels_in(module) == ["moe_few_tokens"]
    # A layer's planes on their own: 8 experts of 512 outputs and 256 / 2 bytes.
    assert "tensor<24x512x128xui8>" in module
    assert "tensor<8x512x128xui8>" not in module


@has_kernels
def test_the_same_call_twice_in_a_jit_lowers_its_kernels_once() -> None:
    case = cases.Case("twice", 512, 256, 8, 2, "q4_k", "q4_k", "q6_k")
    stack, shape = specs_of(case), jax.ShapeDtypeStruct

    @jax.jit
    def two_layers(a, b, x, ids, weights):
        return moe_forward(b, moe_forward(a, x, ids, weights), ids, weights)

    x, ids, weights = shape((9, 512), jnp.bfloat16), shape((9, 2), jnp.int32), shape((9, 2), jnp.float32)
    module = two_layers.trace(stack, stack, x, ids, weights).lower(lowering_platforms=("cuda",)).as_text()
    assert module.count("@mosaic_gpu_v2") == 2


@has_kernels
@pytest.mark.parametrize(
    ("tokens", "top_k", "hidden", "dtype", "launches"),
    [
        (8, 8, 2048, jnp.bfloat16, 1),
        pytest.param(9, 2, 512, jnp.bfloat16, 2, id="more tokens than columns"),
        pytest.param(5, 2, 512, jnp.float32, 2, id="more terms of tokens than columns"),
        pytest.param(5, 13, 512, jnp.bfloat16, 2, id="more pairs than bits"),
        pytest.param(8, 2, 4096, jnp.bfloat16, 2, id="more x than shared memory has room for"),
        pytest.param(4, 2, 4096, jnp.bfloat16, 1, id="as much x as it has room for"),
    ],
)
def test_of_few_pairs_the_kernel_finds_the_slots_itself(
    tokens: int, top_k: int, hidden: int, dtype: Any, launches: int
) -> None:
    case = cases.Case("slots", hidden, 256, 16, top_k, "q4_k", "q4_k", "q6_k")
    wanted = ["moe_prepare", "moe_few_tokens"][-launches:]
    assert kernels_in(lowered_for_cuda(specs_of(case), tokens, top_k, dtype)) == wanted


@has_kernels
@pytest.mark.parametrize("name", sorted(pallas_kernels.DEPTHS))
def test_the_kernel_that_decodes_a_tile_lowers(name: str) -> None:
    import tile_decoder

    run: Any = jax.jit(tile_decoder.decoder(name))
    run.trace(*tile_decoder.plane_specs(name)).lower(lowering_platforms=("cuda",))


@has_kernels
def test_which_backend_says_pallas_and_why() -> None:
    stack = specs_of(cases.Case("decode", 512, 256, 8, 2, "q4_k", "q4_k", "q6_k"))
    choice = which_backend(stack, jax.ShapeDtypeStruct((4, 512), jnp.bfloat16), platform="cuda")
    assert choice.name == "pallas"
    assert all(word in choice.why for word in ("q4_k", "q6_k", "4 tokens"))


@has_kernels
@pytest.mark.parametrize(
    ("case", "tokens", "why"),
    [
        (cases.Case("no tokens", 512, 256, 8, 2, "q4_k", "q4_k", "q6_k"), 0, "this call has 0 tokens"),
        (cases.Case("too many", 512, 256, 8, 2, "q4_k", "q4_k", "q6_k"), 2**23 + 1, "at most 2^33 numbers"),
        (cases.Case("depth", 96, 96, 8, 2, "q4_0", "q4_0", "q4_0"), 1, "96"),
        (cases.Case("outputs", 256, 48, 8, 2, "q8_0", "q8_0", "float32"), 1, "gate's outputs must be a multiple of 32"),
        (cases.Case("f32", 512, 256, 8, 2, "q8_0", "q8_0", "float32"), 40, "no kernel for down's format float32"),
        (
            cases.Case("few dense", 512, 256, 8, 2, "q8_0", "bfloat16", "q8_0"),
            16,
            "up is dense, which the kernels take from 17 tokens",
        ),
        (cases.Case("dense depth", 512, 96, 8, 2, "q8_0", "q8_0", "float16"), 40, "multiple of 64 for float16"),
    ],
    ids=lambda value: value.name if isinstance(value, cases.Case) else None,
)
def test_what_no_kernel_takes_goes_through_xla_and_says_why(case: cases.Case, tokens: int, why: str) -> None:
    stack, x, ids, _ = cases.specs(case, tokens)
    choice = which_backend(stack, x, ids, platform="cuda")
    assert choice.name == "jnp"
    assert why in choice.why
    assert kernels_in(lowered_for_cuda(stack, tokens, case.top_k, jnp.float32)) == []


@has_kernels
@pytest.mark.parametrize("tokens", [16, 17, 2**16 + 1])
def test_any_number_of_tokens_up_to_the_limit_is_kernels(tokens: int) -> None:
    case = cases.Case("tokens", 512, 256, 8, 2, "q4_k", "q4_k", "q6_k")
    for count in (tokens, 2**23):
        x, ids = jax.ShapeDtypeStruct((count, 512), jnp.bfloat16), jax.ShapeDtypeStruct((count, 2), jnp.int32)
        assert which_backend(specs_of(case), x, ids, platform="cuda").name == "pallas"
    wanted = ["moe_prepare", "moe_few_tokens"] if tokens <= 16 else ["moe_sort", "moe_hidden", "moe_down"]
    assert kernels_in(lowered_for_cuda(specs_of(case), tokens, 2)) == wanted


@has_kernels
@pytest.mark.parametrize(
    ("tokens", "dtype", "few"),
    [(64, jnp.bfloat16, True), (65, jnp.bfloat16, False), (64, jnp.float32, False), (32, jnp.float32, True)],
)
def test_tokens_spread_over_many_experts_are_few(tokens: int, dtype: Any, few: bool) -> None:
    case = cases.Case("spread", 512, 256, 32, 2, "q4_k", "q4_k", "q6_k")
    found = kernels_in(lowered_for_cuda(specs_of(case), tokens, 2, dtype))
    assert ("moe_few_tokens" in found) == few
    assert ("moe_sort" in found) != few
    stack, x, ids, _ = cases.specs(case, tokens, (), dtype)
    choice = which_backend(stack, x, ids, platform="cuda")
    assert choice.why.endswith(f"{tokens} tokens, by the kernel for {'few' if few else 'many'} tokens")
    # How many experts a token chooses may decide.
    assert ("kernel for" in which_backend(stack, x, platform="cuda").why) == (tokens > 64)


@has_kernels
@pytest.mark.parametrize(
    ("case", "layers", "kernels"),
    [
        (cases.Case("bf16", 512, 768, 8, 3, "bfloat16", "bfloat16", "bfloat16"), None, 3),
        (cases.Case("f16 of two layers", 576, 704, 8, 3, "float16", "float16", "float16"), 2, 3),
        (cases.Case("packed down", 512, 768, 8, 3, "bfloat16", "bfloat16", "q6_k"), None, 3),
        (cases.Case("each of its own", 512, 768, 8, 3, "float16", "bfloat16", "q4_k"), None, 4),
    ],
    ids=lambda value: value.name if isinstance(value, cases.Case) else None,
)
def test_dense_stacks_are_kernels_for_many_tokens(case: cases.Case, layers: int | None, kernels: int) -> None:
    stack, x, ids, _ = cases.specs(case, 40, () if layers is None else (layers,), jnp.bfloat16)
    choice = which_backend(stack, x, ids, platform="cuda")
    assert choice.name == "pallas"
    assert all(name in choice.why for name in (case.gate, case.down))
    module = lowered_for_cuda(stack, 40, case.top_k, layer=None if layers is None else 1)
    assert len(kernels_in(module)) == module.count("custom_call @mosaic_gpu_v2") == kernels


@has_kernels
@pytest.mark.parametrize("outputs", [32, 2048, 2**16])
@pytest.mark.parametrize("experts", [1, 128, 2**24])
@pytest.mark.parametrize("terms", [1, 2])
def test_32_bit_words_count_the_units_of_the_most_tokens(outputs: int, experts: int, terms: int) -> None:
    from pallas_kernels import operands, sort_kernel, sorted_pairs, tiling, x_rows
    from pallas_kernels.product import PARTS, Product

    pairs = pallas_kernels.MAX_OUTPUTS // outputs
    for name, makes, sources in (("q8_0", "out", 1), ("q2_k", "h", 2)):
        tile = tiling.tile(pairs, experts, terms, operands.tile_bytes(name))
        product = Product(makes, (name,) * sources, outputs, 2**15, pairs, terms, *tile)
        units = sorted_pairs.most_tiles(pairs, experts, tile.width) * product.units
        assert units + tiling.NUM_SMS < 2**31
        assert -(-units // tiling.NUM_SMS) * product.chunks * PARTS < 2**31
    # Pairs of one that sorts and eights of numbers of one that makes rows, the last block's that are past the end too.
    assert pairs + sort_kernel.THREADS < 2**31
    assert pallas_kernels.MAX_OUTPUTS // x_rows.PIECE + sort_kernel.THREADS * x_rows.PIECES < 2**31


@has_kernels
def test_weights_on_the_input_count_pairs() -> None:
    """From 17 pairs on it is the kernel for many tokens."""
    case = cases.Case("pairs", 512, 256, 8, 3, "q4_k", "q4_k", "q6_k")
    few, many = (kernels_in(lowered_for_cuda(specs_of(case), n, 3, weight_on="input")) for n in (5, 6))
    assert few == ["moe_prepare", "moe_few_tokens"]
    assert many == ["moe_sort", "moe_gather", "moe_hidden", "moe_down"]


def test_a_call_that_chooses_no_expert_gives_zeros_without_a_kernel() -> None:
    case = cases.CASES["tiny"]
    stack, x, none = cases.random_stack(case), jnp.ones((3, case.hidden_size)), np.zeros((3, 0))
    ids, weights = none.astype(np.int32), none.astype(np.float32)
    np.testing.assert_array_equal(moe_forward(stack, x, ids, weights), jnp.zeros_like(x))
    assert which_backend(stack, x, ids, platform="cuda").name == "jnp"
    assert kernels_in(lowered_for_cuda(stack, 3, 0, jnp.float32)) == []


@has_kernels
def test_without_jit_the_kernels_decline_and_say_why() -> None:
    stack = specs_of(cases.Case("decode", 512, 256, 8, 2, "q4_k", "q4_k", "q6_k"))
    with jax.disable_jit():
        choice = which_backend(stack, jax.ShapeDtypeStruct((4, 512), jnp.bfloat16), platform="cuda")
    assert choice.name == "jnp"
    assert "jax_disable_jit" in choice.why


@pytest.mark.parametrize("version", [(0, 10, 2), (0, 13, 0)], ids=lambda version: ".".join(map(str, version)))
def test_an_older_or_unknown_jax_is_named_as_the_reason(version: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "__version_info__", version)
    stack = specs_of(cases.Case("decode", 512, 256, 8, 2, "q4_k", "q4_k", "q6_k"))
    choice = which_backend(stack, jax.ShapeDtypeStruct((4, 512), jnp.bfloat16), platform="cuda")
    assert choice.name == "jnp"
    assert "the kernels need jax >= 0.11.0 and < 0.13.0" in choice.why


class Half(NamedTuple):
    """What the schedule looks at of a phase."""

    units: int
    unit_bytes: int


@pytest.mark.parametrize("blocks", [1, 7, 132])
@pytest.mark.parametrize(
    "phases", [(Half(24, 5), Half(32, 2)), (Half(1, 1), Half(3, 4)), (Half(448, 1), Half(64, 5))], ids=str
)
def test_the_blocks_of_a_grid_take_every_unit_once(blocks: int, phases: tuple[Half, Half]) -> None:
    from pallas_kernels.schedule import Schedule

    for num_slots in (0, 1, 2, 9, 50):
        schedule = Schedule(phases, jnp.int32(num_slots), jnp.arange(blocks), blocks)
        load = np.zeros(blocks)
        for number, phase in enumerate(phases):
            turns = np.broadcast_to(schedule.turns(number), (blocks,))
            turn = np.repeat(np.arange(turns.max(initial=0), dtype=np.int32)[:, None], blocks, axis=1)
            slot, unit = map(np.asarray, jax.jit(jax.vmap(partial(schedule.slot_and_unit, number)))(turn))
            taken = (slot * phase.units + unit)[turn < turns]
            assert sorted(taken) == list(range(num_slots * phase.units))
            load += turns * phase.unit_bytes
        assert load.max() - load.min() <= 2 * max(phase.unit_bytes for phase in phases)


@has_kernels
@pytest.mark.parametrize("model", ["qwen3-30b-a3b", "mixtral-8x7b", "deepseek-v3"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
def test_units_are_dealt_so_that_nobody_waits_long(model: str, tokens: int) -> None:
    """Time as bytes that stages hold: the last block ends at most a sixth after the mean, a quarter where a round and a
    half of phase 1 is all there is, h of a slot being there 48 KiB after all its units of phase 1 are done."""
    from jmoe.synthetic import MODELS
    from pallas_kernels.layer import phase_of
    from pallas_kernels.prepare import Sizes
    from pallas_kernels.schedule import Schedule

    hidden, inner, experts, top_k, gate, down = MODELS[model]
    slots, blocks = tokens * top_k, 132
    sizes = Sizes(tokens, top_k, experts, hidden, "bfloat16")
    wide, tall = phase_of((gate, gate), sizes, inner, hidden, True), phase_of((down,), sizes, hidden, inner)
    schedule = Schedule((wide, tall), slots, np.arange(blocks), blocks)
    time, there = np.zeros(blocks), np.zeros(slots)
    for number, phase in enumerate((wide, tall)):
        turns = np.broadcast_to(schedule.turns(number), (blocks,))
        for turn in range(turns.max()):
            mine = turn < turns
            slot = np.asarray(schedule.slot_and_unit(number, np.full(blocks, turn))[0])[mine]
            time[mine] = np.maximum(time[mine], there[slot] if number else 0) + phase.steps * phase.weight_bytes
            if number == 0:
                np.maximum.at(there, slot, time[mine] + 48 * 1024)
    mean = slots * sum(phase.units * phase.steps * phase.weight_bytes for phase in (wide, tall)) / blocks
    assert time.max() <= mean * (5 / 4 if (model, tokens) == ("qwen3-30b-a3b", 1) else 7 / 6)


@has_kernels
@pytest.mark.parametrize("name", sorted(pallas_kernels.DEPTHS))
def test_all_that_the_kernel_for_few_tokens_keeps_fits_in_shared_memory(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each array on a KiB of its own."""
    from pallas_kernels import few_tokens, tiling
    from pallas_kernels.layer import finds_slots, phase_of
    from pallas_kernels.prepare import Sizes
    from pallas_kernels.semantics import Semantics

    monkeypatch.setattr(few_tokens.plgpu, "kernel", lambda _, *, scratch_types, **others: scratch_types)
    finding = set()
    for hidden, inner, top_k in ((512, 256, 2), (2048, 768, 8), (2816, 2816, 4), (4096, 14336, 2), (7168, 2048, 8)):
        for dtype, tokens in itertools.product(("bfloat16", "float32"), (1, 2, 3, 4, 5, 8, 16)):
            sizes = Sizes(tokens, top_k, 128, hidden, dtype)
            finding.add(finds_slots(sizes))
            wide = phase_of((name, name), sizes, inner, hidden, sizes.shared, finds_slots(sizes))
            tall = phase_of((name,), sizes, hidden, inner)
            scratch = few_tokens.moe_kernel(wide, tall, tiling.NUM_SMS, 128, Semantics(), ())
            kib = [-(-math.prod(s.shape) * jnp.dtype(s.dtype).itemsize // 1024) for s in scratch]
            assert sum(kib) * 1024 <= tiling.SMEM_BYTES
    assert finding == {True, False}
