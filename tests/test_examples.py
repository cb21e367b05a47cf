"""Each example runs as a user would run it, and gives what it claims."""

from __future__ import annotations

import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
import tolerances

from jmoe import ExpertStack, moe_forward, route

ROOT = Path(__file__).parents[1]
QWEN = str(ROOT / "tests" / "data" / "qwen3moe-Q4_K_M.gguf")


def example(name: str) -> dict:
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))


def test_every_example_has_a_test():
    tested = {"one_layer", "all_layers", "train_router"}
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == tested


@pytest.mark.parametrize("name", ["qwen3moe-Q4_K_M.gguf", "mixtral-Q6_K.gguf"])
def test_packed_and_dense_experts_give_the_same_layer(name, capsys):
    # Both multiply the same weights: in another order, or with x as integers.
    assert example("one_layer")["main"](str(ROOT / "tests" / "data" / name)) <= tolerances.KERNEL_F32.max_over_rms
    assert "differ by at most" in capsys.readouterr().out


def test_scanned_layers_are_the_layers_one_by_one():
    program = example("all_layers")
    y = program["main"](QWEN)
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (5, 256))
    for layer, logits in enumerate(jax.random.normal(keys[1], (2, 5, 8))):
        x = x + moe_forward(ExpertStack.open_and_load(QWEN, layer), x, *route(logits, program["CONFIG"]))
    np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-5)


def test_a_router_learns_through_the_experts():
    losses = example("train_router")["main"](QWEN)
    assert losses[-1] < 0.9 * losses[0]
