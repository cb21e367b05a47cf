"""Statistics of routing against NumPy's counting, under jit, vmap and scan; and the heat map of them."""

from __future__ import annotations

import sys

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe import co_activation, load_imbalance, tokens_per_expert
from jmoe.grouping import group_by_expert

ROWS = st.lists(st.lists(st.integers(-2, 7), min_size=3, max_size=3), min_size=5, max_size=5)


@hypothesis.given(ROWS)
def test_counts_are_those_of_the_ids_inside(rows):
    ids = np.array(rows, np.int32)
    counted = [np.sum(ids == expert) for expert in range(6)]
    np.testing.assert_array_equal(tokens_per_expert(ids, 6), counted)
    np.testing.assert_array_equal(tokens_per_expert(ids, 6), group_by_expert(jnp.asarray(ids), 6).sizes)


@hypothesis.given(ROWS)
def test_co_activation_counts_the_tokens_that_chose_both(rows):
    ids = np.array(rows, np.int32)
    both = [[sum(a in row and b in row for row in rows) for b in range(6)] for a in range(6)]
    np.testing.assert_array_equal(co_activation(ids, 6), both)


@pytest.mark.parametrize(
    ("counts", "imbalance"),
    [([3, 3, 3, 3], 1.0), ([12, 0, 0, 0], 4.0), ([1, 2, 3, 2], 1.5), ([0, 0], 1.0), ([7], 1.0)],
)
def test_load_imbalance_is_the_largest_load_over_the_mean(counts, imbalance):
    assert load_imbalance(np.array(counts, np.int32)) == imbalance


def test_a_wide_id_is_not_narrowed_to_an_expert():
    ids = np.array([[2**32 + 1, 1]])
    np.testing.assert_array_equal(tokens_per_expert(ids, 3), [0, 1, 0])


def test_they_run_under_jit_vmap_and_scan(rng):
    ids = jnp.asarray(rng.integers(-1, 6, (4, 7, 2)), jnp.int32)

    def statistics(ids):
        counts = tokens_per_expert(ids, 5)
        return counts, load_imbalance(counts), co_activation(ids, 5)

    one_by_one = jax.tree.map(lambda *parts: jnp.stack(parts), *map(statistics, ids))
    _, scanned = jax.lax.scan(lambda _, ids: (None, statistics(ids)), None, ids)
    for got in (jax.jit(jax.vmap(statistics))(ids), scanned):
        jax.tree.map(np.testing.assert_array_equal, got, one_by_one)


@pytest.mark.parametrize("ids", [np.zeros((2, 3)), np.zeros(3, np.int32), np.zeros((1, 2, 3), np.int32)])
def test_what_is_no_array_of_ids_is_refused(ids):
    for statistic in (tokens_per_expert, co_activation):
        with pytest.raises(AssertionError, match=r"topk_ids must be integer\[\?,\?\]"):
            statistic(ids, 4)


def test_the_heat_map_shows_each_load_over_an_even_share():
    pytest.importorskip("matplotlib").use("agg")
    from matplotlib import pyplot

    from jmoe import plot

    axes = plot.expert_utilisation([[1, 2, 3], [0, 0, 0]], rows="step")
    (image,) = axes.get_images()
    np.testing.assert_array_equal(image.get_array(), [[0.5, 1, 1.5], [1, 1, 1]])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("expert", "step")
    assert plot.expert_utilisation(np.ones(4), ax=axes) is axes
    pyplot.close("all")
    with pytest.raises(ValueError, match=r"\[R, E\] or \[E\], got \[1, 2, 3\]"):
        plot.expert_utilisation(np.ones((1, 2, 3)))


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    from jmoe import plot

    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"jmoe\[plot\]"):
        plot.expert_utilisation(np.ones((2, 3)))
