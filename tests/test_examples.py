"""Each example runs as a user would run it, and gives what it claims."""

from __future__ import annotations

import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
import tolerances

from jmoe import ExpertStack, RouterConfig, moe_forward, route

ROOT = Path(__file__).parents[1]
PICTURE = "expert_utilisation.png"
QWEN = str(ROOT / "tests" / "data" / "qwen3moe-Q4_K_M.gguf")


def example(name: str) -> dict:
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))


@pytest.fixture(autouse=True)
def jax_as_users_have_it():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_every_example_has_a_test():
    tested = {"one_layer", "all_layers", "train_router", "train_lora", "flax_module", "equinox_module"}
    tested |= {"expert_utilisation", "checkpoint", "many_devices"}
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


def test_adapters_learn_beside_packed_experts_through_two_layers():
    pytest.importorskip("optax")
    losses = example("train_lora")["main"](QWEN)
    assert losses[-1] < 0.2 * losses[0]


def test_inside_a_flax_module_the_router_learns_and_the_experts_stay():
    pytest.importorskip("flax")
    program = example("flax_module")
    losses = program["main"](QWEN)
    assert losses[-1] < 0.7 * losses[0]
    # The whole module is a pytree that nnx splits, and a call of it is the layer's.
    nnx, stack = program["nnx"], ExpertStack.open_and_load(QWEN, 0)
    model = program["MoEBlock"](stack, RouterConfig(2), rngs=nnx.Rngs(0))
    graph, parameters, frozen = nnx.split(model, nnx.Param, program["Frozen"])
    assert {leaf.dtype.kind for leaf in jax.tree.leaves(parameters)} == {"f"}
    assert len(jax.tree.leaves(frozen)) == len(jax.tree.leaves(stack))
    x = jax.random.normal(jax.random.key(1), (3, stack.hidden_size))
    h = model.norm(x)
    expected = x + moe_forward(stack, h, *route(model.router(h), RouterConfig(2)))
    np.testing.assert_allclose(nnx.merge(graph, parameters, frozen)(x), expected, rtol=1e-6, atol=1e-6)


def test_inside_an_equinox_module_the_router_learns_and_the_experts_stay():
    equinox = pytest.importorskip("equinox")
    program = example("equinox_module")
    losses = program["main"](QWEN)
    assert losses[-1] < 0.7 * losses[0]
    stack = ExpertStack.open_and_load(QWEN, 0)
    model = program["MoEBlock"](stack, RouterConfig(2), key=jax.random.key(0))
    assert jax.tree.leaves(equinox.filter(model, equinox.is_inexact_array).experts) == []


def test_a_layer_over_all_devices_is_the_layer(capsys):
    """On one here; tests/test_parallel.py runs it on eight, and in two processes."""
    program = example("many_devices")
    one, many = program["main"](QWEN)
    rng, stack = np.random.default_rng(0), ExpertStack.open_and_load(QWEN, 0)
    x, logits = (rng.standard_normal((one.shape[0], size), np.float32) for size in (256, 8))
    expected = moe_forward(stack, x, *route(logits, program["CONFIG"]))
    for y in (one, many):
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    assert "ShardedStack(8 experts over" in capsys.readouterr().out


def test_a_packed_stack_survives_an_orbax_checkpoint(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    program = example("checkpoint")
    for path in (QWEN, str(ROOT / "tests" / "data" / "mixtral-Q6_K.gguf")):
        directory = tmp_path / Path(path).stem
        stack, restored = program["main"](path, str(directory))
        assert restored.formats == stack.formats
        assert jax.tree.structure(restored) == jax.tree.structure(stack)
        jax.tree.map(np.testing.assert_array_equal, restored, stack)
        # On the disk, too, it takes what its planes take: the router and orbax's own files are small beside them.
        assert sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()) < 1.1 * stack.nbytes


def test_the_picture_of_the_readme_is_the_example_s(tmp_path):
    pytest.importorskip("matplotlib").use("agg")
    from matplotlib import pyplot

    counts = example("expert_utilisation")["main"](QWEN, str(tmp_path / "picture.png"))
    pyplot.close("all")
    assert (counts.sum(axis=1) == 128 * 2).all()
    drawn, committed = (path.read_bytes() for path in (tmp_path / "picture.png", ROOT / "examples" / PICTURE))
    # Fonts and losses differ from machine to machine: the size of the picture does not.
    assert drawn[:24] == committed[:24]
