"""The launch before the kernel for few tokens, its blocks on NumPy (simt_model.py)."""

from __future__ import annotations

from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import prepared_model
import pytest
from prepared_model import ROUTINGS, distinct

import pallas_kernels

pytestmark = pytest.mark.skipif(
    not pallas_kernels.MIN_JAX <= jax.__version_info__ < pallas_kernels.BELOW_JAX,
    reason="the kernels need another jax",
)
LAYER = 3


def prepared(ids: np.ndarray, weights: np.ndarray, x: Any, sizes: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernel's outputs, by few blocks, so that each has much to do."""
    import simt_model

    from pallas_kernels import prepare, simt, slots, tiling, x_tiles

    monkeypatch.setattr(tiling, "NUM_SMS", 3)
    block = simt_model.Block(prepare.THREADS)
    with block.replaced(simt, slots, prepare, x_tiles):
        kernel = prepare.prepare_kernel.__wrapped__(sizes)
        return prepare.Prepared(*block.run(kernel, range(*kernel.grid), ids, weights, np.array([LAYER], np.int32), x))


def check(ids: np.ndarray, experts: int, dtype: Any, rng: np.random.Generator, patch: Any, depth: int = 64) -> None:
    from pallas_kernels.prepare import Sizes

    sizes = Sizes(ids.shape[0], ids.shape[1], experts, depth, jnp.dtype(dtype).name)
    weights = rng.random(ids.shape, np.float32)
    x = np.asarray(jnp.asarray(cases.random_inputs(rng, len(ids), depth), dtype))
    ids = ids.astype(np.int32)
    # Weights of pairs that lead nowhere touch nothing.
    weights[(ids < 0) | (ids >= experts)] = np.nan
    found = prepared(ids, weights, x, sizes, patch)
    prepared_model.check(found, ids, weights, x, sizes, LAYER)
    # Nothing else is written.
    assert (found.experts[int(found.count[0]) :] == -77).all()
    assert (found.weight[found.pair < 0] == -77).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("tokens", [2, 5, 9, 16, 33, 64])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_slots_are_those_of_a_plain_model(routing: str, tokens: int, dtype: Any, rng, monkeypatch) -> None:
    ids, experts = ROUTINGS[routing](rng, tokens)
    check(ids, experts, dtype, rng, monkeypatch)


@pytest.mark.parametrize("number", range(8))
def test_a_barrier_left_out_is_a_race(number: int, rng, monkeypatch) -> None:
    """Each of a block's."""
    import simt_model

    ids, experts = ROUTINGS["distinct"](rng, 33)
    simt_model.leave_out_barrier(number, monkeypatch)
    with pytest.raises(AssertionError, match="without a barrier between"):
        check(ids, experts, jnp.bfloat16, rng, monkeypatch)


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"),
    [
        pytest.param(16, 70, 70, id="more pairs than threads"),
        pytest.param(64, 16, 256, id="twice as many"),
        pytest.param(60, 8, 70_000, id="more words of chosen experts than threads"),
    ],
)
def test_tables_that_have_several_words_for_a_thread(tokens: int, top_k: int, experts: int, rng, monkeypatch) -> None:
    check(distinct(rng, tokens, top_k, experts), experts, jnp.bfloat16, rng, monkeypatch)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32], ids=["bf16", "f16", "f32"])
@pytest.mark.parametrize("tokens", [3, 17])
@pytest.mark.parametrize("depth", [32, 160, 576])
def test_x_of_any_depth(depth: int, tokens: int, dtype: Any, rng, monkeypatch) -> None:
    check(rng.integers(0, 6, (tokens, 3)), 6, dtype, rng, monkeypatch, depth)
