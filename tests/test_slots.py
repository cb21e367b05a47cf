"""What a block of the kernel for few tokens finds for itself before it begins, on NumPy (simt_model.py)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import prepared_model
import pytest
from prepared_model import ROUTINGS

import pallas_kernels

pytestmark = pytest.mark.skipif(
    not pallas_kernels.MIN_JAX <= jax.__version_info__ < pallas_kernels.BELOW_JAX,
    reason="the kernels need another jax",
)
LAYER = 3
UNWRITTEN = -77


def found_slots(ids: np.ndarray, weights: np.ndarray, experts: int, number: int) -> tuple[Any, np.ndarray]:
    """(Slots, live) of block ``number``."""
    import simt_model

    from pallas_kernels import few_tokens, phases, simt, slots

    block = simt_model.Block(128 * few_tokens.WARPGROUPS)
    block.number = number
    unwritten = [simt_model.unwritten(spec) for spec in slots.scratch(ids.size, len(ids))]
    ids, weights, live = (a.view(simt_model.Ref) for a in (ids, weights, np.full(ids.shape, UNWRITTEN, np.int32)))
    layer = np.array([LAYER], np.int32).view(simt_model.Ref)
    for table in unwritten:
        block.races.watch(table)
    with block.replaced(simt, slots):
        found = slots.Slots(*unwritten)
        slots.fetch(found, ids, layer, experts)
        block.barrier()
        slots.find(found, experts)
        with block.warpgroup(phases.LANES):
            slots.assign(found, weights, live, experts)
    return slots.Slots(*(np.asarray(u) for u in unwritten)), np.asarray(live)


@pytest.mark.parametrize("number", range(4))
def test_a_barrier_left_out_is_a_race(number: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each but the last, whose readers are not here."""
    import simt_model

    ids, experts = ROUTINGS["distinct"](rng, 8)
    simt_model.leave_out_barrier(number, monkeypatch)
    with pytest.raises(AssertionError, match="without a barrier between"):
        found_slots(ids.astype(np.int32), rng.random(ids.shape, np.float32), experts, 0)


@pytest.mark.parametrize("number", [0, 5])
@pytest.mark.parametrize("tokens", [2, 3, 5, 8])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_slots_are_those_of_a_plain_model(routing: str, tokens: int, number: int, rng: np.random.Generator) -> None:
    ids, experts = ROUTINGS[routing](rng, tokens)
    ids, weights = ids.astype(np.int32), rng.random(ids.shape, np.float32)
    # Weights of pairs that lead nowhere touch nothing.
    weights[(ids < 0) | (ids >= experts)] = np.nan
    slots, live = found_slots(ids, weights, experts, number)
    sizes = SimpleNamespace(tokens=tokens, top_k=ids.shape[1], experts=experts, width=8, columns=tokens, shared=True)
    chosen, pair, weight, wanted = prepared_model.slots_of(ids, weights, sizes)
    count = int(slots.count)
    assert count == len(chosen)
    # In the order of their first pairs.
    order = np.argsort([np.flatnonzero(ids.reshape(-1) == expert)[0] for expert in chosen])
    np.testing.assert_array_equal(slots.expert(np.arange(count)), chosen[order] + LAYER * experts)
    np.testing.assert_array_equal(slots.pair[:count], pair[order])
    assert (slots.pair[count:] == -1).all()
    np.testing.assert_array_equal(slots.weight[:count][pair[order] >= 0], weight[order][pair[order] >= 0])
    np.testing.assert_array_equal(live, wanted if number == 0 else UNWRITTEN)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_lone_token_has_a_slot_for_each_of_its_pairs(routing: str, rng: np.random.Generator) -> None:
    ids, experts = ROUTINGS[routing](rng, 1)
    ids, weights = ids.astype(np.int32), rng.random(ids.shape, np.float32)
    slots, live = found_slots(ids, weights, experts, 0)
    leads = (ids >= 0) & (ids < experts)
    assert slots.count == ids.size
    np.testing.assert_array_equal(slots.expert(np.arange(ids.size)), np.where(leads, ids, 0)[0] + LAYER * experts)
    np.testing.assert_array_equal(slots.pair[:, 0], np.where(leads, np.arange(ids.size), -1)[0])
    np.testing.assert_array_equal(slots.weight[:, 0][leads[0]], weights[leads])
    np.testing.assert_array_equal(live, leads)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32], ids=["bf16", "f16", "f32"])
@pytest.mark.parametrize("tokens", [1, 3, 4])
@pytest.mark.parametrize(("depth", "groups"), [(32, 8), (160, 5), (576, 24), (2048, 64)])
def test_x_lies_in_shared_memory_with_zeros_past_its_end(
    depth: int, groups: int, tokens: int, dtype: Any, rng: np.random.Generator
) -> None:
    import simt_model

    from pallas_kernels import registers, simt, x_tiles

    parts = x_tiles.x_parts(dtype)
    x = np.asarray(jnp.asarray(cases.random_inputs(rng, tokens, depth), dtype))
    words = np.full((groups, x_tiles.group_words(tokens * parts, parts)), UNWRITTEN, np.int32)
    block = simt_model.Block(128)
    with block.replaced(simt, x_tiles, registers):
        x_tiles.make_resident(x.view(simt_model.Ref), words.view(simt_model.Ref), parts)
    sizes = SimpleNamespace(tokens=tokens, columns=tokens, parts=parts)
    values, sums = prepared_model.read_tiles(words.view(np.uint32)[None], sizes)
    padded = np.zeros((tokens, groups * 32))
    padded[:, :depth] = x.astype(np.float64)
    np.testing.assert_allclose(values[0], padded, rtol=0 if parts == 1 else 2.0**-16)
    by_16 = padded.reshape(tokens, -1, 16)
    assert (np.abs(sums[0] - by_16.sum(2)) <= np.abs(by_16).sum(2) * 2.0**-15).all()
