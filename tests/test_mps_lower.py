"""What Apple GPUs are given can run there, as far as Linux can tell: every operation is one that jax-mps implements."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import cases
import jax
import jax.numpy as jnp
import pytest

import jmoe
import metal_bridge
from jmoe import ExpertStack, moe_forward

JAX_MPS = json.loads((Path(__file__).parent / "data" / "jax_mps_ops.json").read_text())
KNOWN = {*JAX_MPS["operations"], *(f"custom_call {name}" for name in JAX_MPS["custom_calls"])} - {
    "stablehlo.custom_call"
}
# The module itself, which is no operation of a program.
FRAME = {"builtin.module", "func.func"}

FEW, MANY = 1, 17
# What each format becomes on a Mac; q6_k stays, as all that has no MLX form. Beside them, as the file has it:
# dequantised by XLA alone.
CONVERTED = [*metal_bridge.BITS, "q6_k", "tiny", "dense-down"]


@pytest.fixture(autouse=True)
def _partitioner_of_jax_mps():
    """jax-mps turns Shardy off when it starts, whose operations it does not know."""
    before = jax.config.jax_use_shardy_partitioner
    jax.config.update("jax_use_shardy_partitioner", False)
    yield
    jax.config.update("jax_use_shardy_partitioner", before)


def lowered(f: Any, *args: Any, platform: str = "mps") -> Any:
    return jax.jit(f).trace(*args).lower(lowering_platforms=(platform,))


def operations(module: Any) -> set[str]:
    """Every operation of a lowered module, nested ones too; a custom call by its target."""
    found: set[str] = set()
    pending = [module.compiler_ir("stablehlo").operation]
    while pending:
        operation = pending.pop()
        name = operation.name
        if name == "stablehlo.custom_call":
            name = f"custom_call {operation.attributes['call_target_name'].value}"
        found.add(name)
        pending += [inner.operation for region in operation.regions for block in region for inner in block]
    return found - FRAME


def arguments(case: cases.Case, tokens: int, *lead: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    routing = (*lead, tokens, case.top_k)
    shapes = ((*lead, tokens, case.hidden_size), jnp.float32), (routing, jnp.int32), (routing, jnp.float32)
    return tuple(jax.ShapeDtypeStruct(*shape) for shape in shapes)


def converted(name: str) -> tuple[cases.Case, ExpertStack]:
    case = cases.CASES[name]
    return case, jmoe.for_mps(cases.random_stack(case))


def products(module: Any) -> int:
    return module.as_text().count("@mps.quantized_matmul")


def test_the_walk_finds_what_is_nested_and_names_custom_calls():
    def f(x):
        loop = jax.lax.fori_loop(0, 3, lambda _, y: jnp.sin(y), x)
        return jax.ffi.ffi_call("no.such", jax.ShapeDtypeStruct(x.shape, x.dtype))(jnp.linalg.det(loop) + x)

    found = operations(lowered(f, jax.ShapeDtypeStruct((2, 2), jnp.float32), platform="tpu"))
    assert {"stablehlo.sine", "custom_call no.such"} <= found
    assert not found <= KNOWN


@pytest.mark.parametrize("name", CONVERTED)
@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_a_converted_layer_takes_the_quantised_product_and_known_operations(name, tokens):
    case, stack = converted(name)
    module = lowered(moe_forward, stack, *arguments(case, tokens))
    assert operations(module) <= KNOWN
    mlx = sum(str(f).startswith("mlx") for f in stack.formats)
    assert mlx == sum(f in metal_bridge.BITS for f in (case.gate, case.up, case.down))
    assert (products(module) > 0) == (mlx > 0)
    if mlx and tokens == FEW:
        # Straight through, since the host would drive loops and branches. What is left of the choice of a platform are
        # two cases of a constant index, which jax-mps inlines (StableHLO's InlineCaseOpWithConstantBranchIndex).
        assert products(module) == mlx
        assert not {"stablehlo.while", "stablehlo.scatter"} & operations(module)
        assert module.as_text().count('"stablehlo.case"') == 2


@pytest.mark.parametrize("name", cases.ONE_FORMAT)
def test_a_layer_as_the_file_has_it_lowers_to_known_operations(name):
    case = cases.CASES[name]
    assert operations(lowered(moe_forward, cases.random_stack(case), *arguments(case, MANY))) <= KNOWN


def value_and_gradients(stack, x, ids, weights):
    loss = lambda x, weights: jnp.sum(moe_forward(stack, x, ids, weights) ** 2)  # noqa: E731
    return jax.value_and_grad(loss, argnums=(0, 1))(x, weights)


@pytest.mark.parametrize("name", CONVERTED)
def test_gradients_of_a_converted_layer_lower_to_known_operations(name):
    case, stack = converted(name)
    module = lowered(value_and_gradients, stack, *arguments(case, FEW))
    assert operations(module) <= KNOWN
    # The value still takes the product; what differentiates it is XLA's.
    assert (products(module) > 0) == (name != "q6_k")


@pytest.mark.parametrize("name", CONVERTED)
def test_a_batch_of_a_converted_layer_lowers_to_known_operations(name):
    case, stack = converted(name)
    assert operations(lowered(jax.vmap(partial(moe_forward, stack)), *arguments(case, FEW, 3))) <= KNOWN


def test_layers_in_a_scan_lower_to_known_operations():
    case, stack = converted("tiny")
    layers = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), stack)

    def all_layers(layers, x, ids, weights):
        step = lambda x, layer: (moe_forward(layers, x, ids, weights, layer=layer), None)  # noqa: E731
        return jax.lax.scan(step, x, jnp.arange(2))[0]

    module = lowered(all_layers, layers, *arguments(case, FEW))
    assert operations(module) <= KNOWN
    assert products(module) == 2


@pytest.mark.parametrize("transform", [moe_forward, value_and_gradients], ids=["forward", "gradients"])
@pytest.mark.parametrize("platform", ["METAL", "cpu"])
def test_other_platforms_never_see_a_custom_call_of_jax_mps(platform, transform):
    case, stack = converted("tiny")
    assert "mps." not in lowered(transform, stack, *arguments(case, FEW), platform=platform).as_text()


@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize("transform", [moe_forward, value_and_gradients], ids=["forward", "gradients"])
def test_no_scatter_counts_on_indices_outside_being_dropped(tokens, transform):
    """jax-mps writes where such an index points (its issue 240)."""
    case, stack = converted("dense-down")
    jaxpr = jax.make_jaxpr(partial(transform))(stack, *arguments(case, tokens))
    drops = jax.lax.GatherScatterMode.FILL_OR_DROP
    scatters = [eqn for eqn in equations(jaxpr.jaxpr) if eqn.primitive.name.startswith("scatter")]
    assert scatters
    assert [eqn for eqn in scatters if eqn.params["mode"] == drops] == []


def equations(jaxpr: Any):
    """Those of a jaxpr, and of every jaxpr in their parameters."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            if hasattr(inner, "eqns"):
                yield from equations(inner)
            elif hasattr(inner, "jaxpr"):
                yield from equations(inner.jaxpr)
