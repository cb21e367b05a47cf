"""jax.export: what is written and read again computes the same, for this platform and for one that is not here."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, ONE_FORMAT, Case, random_inputs, random_routing, random_stack, specs

import pallas_kernels
from jmoe import ExpertStack, cpu_kernels, moe_forward
from jmoe.formats import MLX_FORMATS
from jmoe.stack import QuantTensor

pytest.importorskip("flatbuffers")
MIXED = CASES["mixed"]
NATIVE = jax.export.DisabledSafetyCheck.custom_call("jmoe_cpu_moe_layer")
DECODE = Case("decode", 512, 256, 8, 2, "q4_k", "q4_k", "q6_k")
jnp_forward = partial(moe_forward, backend="jnp")


def read_back(f: Any, *args: Any, vjp_order: int = 0, **options: Any) -> jax.export.Exported:
    exported = jax.export.export(jax.jit(f), **options)(*args)
    again = jax.export.deserialize(exported.serialize(vjp_order))
    assert (again.in_tree, again.out_tree, again.platforms) == (exported.in_tree, exported.out_tree, exported.platforms)
    return again


def arguments(case: Case, tokens: int, rng: np.random.Generator) -> tuple[Any, ...]:
    routing = map(jnp.asarray, random_routing(rng, tokens, case))
    return random_stack(case), random_inputs(rng, tokens, case.hidden_size), *routing


@pytest.mark.parametrize("name", ONE_FORMAT)
def test_stacks_of_every_format_go_in_and_come_out(name):
    stack = random_stack(CASES[name])
    again: Any = read_back(lambda stack: (stack, stack.gate_up(1)), stack).call(stack)
    jax.tree.map(np.testing.assert_array_equal, again, (stack, stack.gate_up(1)))
    assert again[0].formats == stack.formats


@pytest.mark.parametrize("name", sorted(MLX_FORMATS))
def test_projections_of_every_mlx_format_go_in_and_come_out(name):
    tensor = QuantTensor(name, MLX_FORMATS[name].plane_specs((2, 32, 64)))
    assert read_back(lambda tensor: tensor, tensor).out_avals == read_back(lambda t: t.planes, tensor).out_avals


def test_a_layer_with_every_leaf_and_a_layer_axis_computes_the_same_and_so_does_its_gradient(rng):
    args: Any
    stack, *args = arguments(MIXED, 3, rng)
    dense = rng.standard_normal((MIXED.num_experts, MIXED.hidden_size)).astype(np.float32)
    stack = ExpertStack(stack.gate, stack.up, stack.down, down_bias=jnp.asarray(dense))
    layers = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), stack)
    f: Any = lambda stack, x, ids, weights, layer: jnp_forward(stack, x, ids, weights, layer=layer)  # noqa: E731
    again = read_back(f, layers, *args, 1, vjp_order=1)
    np.testing.assert_array_equal(again.call(layers, *args, 1), f(layers, *args, 1))
    by_x = lambda f: jax.grad(lambda x: jnp.sum(f(layers, x, *args[1:], 1)))(args[0])  # noqa: E731
    np.testing.assert_allclose(by_x(again.call), by_x(f), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(cpu_kernels.why_unavailable(tokens=1) is not None, reason="no CPU kernels")
def test_native_code_is_exported_where_the_user_says_so_and_runs_in_another_process(rng, tmp_path):
    args = arguments(MIXED, 3, rng)
    with pytest.raises(ValueError, match="jmoe_cpu_moe_layer"):
        jax.export.export(jax.jit(moe_forward))(*args).serialize()
    exported = jax.export.export(jax.jit(moe_forward), disabled_checks=[NATIVE])(*args)
    (tmp_path / "layer").write_bytes(exported.serialize())
    program = """
import sys
import jax, jax.export, numpy as np
import jmoe
from cases import CASES, random_stack
layer = jax.export.deserialize(open(sys.argv[1] + "/layer", "rb").read())
stack, args = random_stack(CASES["mixed"]), np.load(sys.argv[1] + "/args.npz").values()
jmoe.which_backend(stack, np.zeros((1, 256), np.float32))
np.save(sys.argv[1] + "/y", layer.call(stack, *args))
"""
    np.savez(tmp_path / "args", *map(np.asarray, args[1:]))
    command, env = (
        [sys.executable, "-c", program, str(tmp_path)],
        {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), moe_forward(*args))


@pytest.mark.skipif(
    not pallas_kernels.MIN_JAX <= jax.__version_info__ < pallas_kernels.BELOW_JAX, reason="the kernels need another jax"
)
def test_for_cuda_the_kernel_is_written_and_read_on_a_machine_without_one(rng):
    again = read_back(moe_forward, *specs(DECODE, 2), platforms=["cuda"])
    assert again.platforms == ("cuda",)
    assert again.mlir_module().count("custom_call @mosaic_gpu_v2") == 1
    if jax.default_backend() == "cpu":
        with pytest.raises(ValueError, match="exported for platforms"):
            again.call(*arguments(DECODE, 2, rng))


@pytest.mark.gpu
def test_on_a_gpu_the_exported_kernel_computes_the_same(rng):
    args = arguments(DECODE, 2, rng)
    np.testing.assert_array_equal(read_back(moe_forward, *args).call(*args), moe_forward(*args))


def test_jnp_is_exported_for_two_platforms_at_once(rng):
    args = arguments(MIXED, 3, rng)
    again = read_back(jnp_forward, *args, platforms=["cpu", "cuda"])
    assert again.platforms == ("cpu", "cuda")
    if jax.default_backend() == "cpu":
        np.testing.assert_array_equal(again.call(*args), jnp_forward(*args))


def test_the_names_in_an_artefact_are_stable():
    """Artefacts of today must be read tomorrow."""
    stack, *_ = specs(Case("all", 256, 256, 2, 1, "q4_k", "mxfp4", "q5_0"), 1)
    written = jax.export.export(jax.jit(lambda stack: stack))(stack).serialize()
    for name in ("jmoe.ExpertStack", "jmoe.QuantTensor", "jmoe.Q4KPlanes", "jmoe.MXFP4Planes", "jmoe.Q50Planes"):
        assert name.encode() in written
