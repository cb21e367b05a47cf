"""The Apple path off a Mac: the conversion is exact, its stacks compute anywhere, and every reason names the remedy."""

from __future__ import annotations

import dataclasses
import platform
import re
import subprocess
import sys
from functools import partial
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tolerances

import metal_bridge
from jmoe import (
    FORMATS,
    ExpertStack,
    QuantTensor,
    cpu_kernels,
    dispatch,
    for_mps,
    gathered,
    moe_forward,
    selfcheck,
    which_backend,
)
from jmoe.formats import LAYOUTS, MLX_FORMATS
from metal_bridge import __main__ as selftest
from metal_bridge import plugin

F32 = tolerances.LAYER["float32"]
TINY, RAGGED = cases.CASES["tiny"], cases.CASES["ragged"]
# An odd number of blocks of 32 and a single one; one super-block and several.
DEPTHS = {32: (32, 96, 160, 256), 256: (256, 768)}


dequantise = jax.jit(QuantTensor.dequantise)


def projection(name: str, blocks: np.ndarray) -> ExpertStack:
    """A stack that holds the blocks three times."""
    tensor = QuantTensor(name, jax.tree.map(jnp.asarray, FORMATS[name].split(blocks)))
    return ExpertStack(tensor, tensor, tensor)


@pytest.mark.parametrize(
    ("name", "depth"), [(name, d) for name in metal_bridge.BITS for d in DEPTHS[FORMATS[name].block_weights]]
)
def test_converted_planes_hold_gguf_s_weights_in_the_stated_bits(name, depth, rng):
    shape = (2, 3, 8, depth)
    blocks = rng.integers(0, 256, (*shape[:-1], FORMATS[name].row_bytes(depth)), np.uint8)
    each = blocks.reshape(-1, FORMATS[name].block_bytes)
    for offset in cases.HALVES[name]:
        cases.set_halves(each, offset, rng.choice([65504.0, -65504.0, 2.0**-24, -3e-5, 0.0, 0.37], len(each)))
    if name == "mxfp4":
        each[:, 0] = rng.integers(2, 252, len(each))
    up = for_mps(projection(name, blocks)).up
    assert (up.format, up.shape) == (f"mlx{metal_bridge.BITS[name]}", shape)
    assert 8 * up.nbytes / np.prod(shape) == {"mlx4": 6, "mlx5": 7, "mlx8": 10}[up.format]
    assert all(jnp.issubdtype(leaf.dtype, jnp.integer) for leaf in jax.tree.leaves(up))
    np.testing.assert_array_equal(dequantise(up), oracle.dequantise(blocks, name))


@pytest.mark.parametrize("name", MLX_FORMATS)
def test_planes_fit_the_specs_and_index_like_arrays(name, rng):
    origin = next(f for f, bits in metal_bridge.BITS.items() if name == f"mlx{bits}")
    case = cases.CASES[origin]
    up = for_mps(cases.random_stack(case)).up
    specs = MLX_FORMATS[name].plane_specs(case.shape("up"))
    assert [(p.shape, p.dtype) for p in up.planes] == [(s.shape, s.dtype) for s in specs]
    everything = np.asarray(dequantise(up))
    np.testing.assert_array_equal(dequantise(up[2]), everything[2])
    np.testing.assert_array_equal(dequantise(up[np.array([3, 0])]), everything[[3, 0]])


def test_formats_with_groups_of_32_and_even_steps_have_an_mlx_form():
    assert set(metal_bridge.BITS) == set(FORMATS) - {"q6_k", "q3_k", "q2_k", "iq4_nl", "iq4_xs"}
    assert {f"mlx{bits}" for bits in metal_bridge.BITS.values()} == set(MLX_FORMATS)


def test_mxfp4_blocks_too_small_for_f32_become_zero_and_too_large_ones_are_refused(rng):
    blocks = cases.random_blocks(rng, "mxfp4", (2, 4, 64))
    each = blocks.reshape(-1, 17)
    each[:2, 0] = 0, 1
    converted = np.asarray(dequantise(for_mps(projection("mxfp4", blocks)).up))
    expected = oracle.dequantise(blocks, "mxfp4")
    np.testing.assert_array_equal(converted.reshape(-1, 32)[:2], 0)
    np.testing.assert_array_equal(converted.reshape(-1, 32)[2:], expected.reshape(-1, 32)[2:])
    each[3, 0] = 252
    with pytest.raises(ValueError, match="exponent byte 252, at most 251 fits"):
        for_mps(projection("mxfp4", blocks))


@pytest.mark.parametrize("name", [name for name in metal_bridge.BITS if cases.HALVES[name]])
def test_weights_of_scales_that_are_no_numbers_are_none(name, rng):
    depth = DEPTHS[FORMATS[name].block_weights][-1]
    blocks = cases.random_blocks(rng, name, (1, 8, depth))
    for row, offset, bad in ((1, 0, np.nan), (4, -1, np.inf), (6, 0, -np.inf)):
        at = cases.HALVES[name][offset]
        cases.set_halves(blocks[0, row : row + 1].reshape(-1, FORMATS[name].block_bytes)[:1], at, bad)
    finite = np.isfinite(oracle.dequantise(blocks, name))
    assert not finite.all()
    np.testing.assert_array_equal(np.isfinite(dequantise(for_mps(projection(name, blocks)).up)), finite)


def test_what_has_no_mlx_form_stays_as_it_is_and_converting_twice_changes_nothing(rng):
    bias = jnp.asarray(rng.standard_normal((TINY.num_experts, TINY.hidden_size)), jnp.float32)
    stack = dataclasses.replace(cases.random_stack(TINY), down_bias=bias)
    converted = for_mps(stack)
    assert converted.formats == ("mlx4", "mlx4", "q6_k")
    assert converted.down is stack.down
    assert converted.down_bias is bias
    again = for_mps(converted)
    assert (again.gate, again.up) == (converted.gate, converted.up)
    dense = cases.random_stack(cases.CASES["dense"])
    assert for_mps(dense).up is dense.up


def test_only_the_formats_that_are_asked_for_are_converted():
    stack = cases.random_stack(RAGGED)
    assert for_mps(stack, formats=["q8_0"]).formats == ("q5_0", "q4_0", "mlx8")
    assert for_mps(stack, formats=[]).formats == stack.formats
    with pytest.raises(ValueError, match=r"formats must be among q4_k, .*, got q6_k: the others have no MLX form"):
        for_mps(stack, formats=["q8_0", "q6_k"])


@pytest.mark.parametrize("tokens", [2, 17])
def test_a_converted_stack_meets_the_contract_on_this_platform(tokens, rng):
    stack = for_mps(cases.random_stack(RAGGED))
    x, (ids, weights) = cases.random_inputs(rng, tokens, 96), cases.random_routing(rng, tokens, RAGGED)
    ids[0, 0], ids[1, 1] = -1, RAGGED.num_experts
    y = oracle.moe(cases.oracle_layer(RAGGED), x, ids, weights)
    oracle.assert_within(moe_forward(stack, x, ids, weights), y, F32)


def test_a_batch_of_a_converted_stack_meets_the_contract(rng):
    stack = for_mps(cases.random_stack(RAGGED))
    x, (ids, weights) = cases.random_inputs(rng, 1, 96), cases.random_routing(rng, 1, RAGGED)
    batch = jax.vmap(partial(moe_forward, stack))(*(jnp.stack([jnp.asarray(a)] * 2) for a in (x, ids, weights)))
    oracle.assert_within(batch[1], oracle.moe(cases.oracle_layer(RAGGED), x, ids, weights), F32)


def test_gradients_of_a_converted_stack_are_those_of_the_packed_one_dense_leaves_too(rng):
    case = cases.CASES["dense-down"]
    packed = cases.random_stack(case)
    packed = dataclasses.replace(packed, down=packed.down.astype(jnp.float32))
    x, (ids, weights) = cases.random_inputs(rng, 2, case.hidden_size), cases.random_routing(rng, 2, case)

    def gradients(stack: ExpertStack):
        loss = lambda down, x, w: jnp.sum(moe_forward(dataclasses.replace(stack, down=down), x, ids, w) ** 2)  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(stack.down, x, weights)

    for got, want in zip(gradients(for_mps(packed)), gradients(packed), strict=True):
        assert np.any(want)
        oracle.assert_within(got, oracle.as_f64(want), tolerances.GRADIENT)


def test_a_stack_of_layers_is_converted_whole(rng):
    stacks = [cases.random_stack(TINY, seed) for seed in (1, 2)]
    layers = for_mps(jax.tree.map(lambda *leaves: jnp.stack(leaves), *stacks))
    x, (ids, weights) = cases.random_inputs(rng, 2, 256), cases.random_routing(rng, 2, TINY)
    for layer, seed in enumerate((1, 2)):
        y = moe_forward(layers, x, ids, weights, layer=layer)
        oracle.assert_within(y, oracle.moe(cases.oracle_layer(TINY, seed), x, ids, weights), F32)


def specs_of(name: str) -> ExpertStack:
    case = cases.CASES[name]
    formats = {
        p: f"mlx{metal_bridge.BITS[f]}" if (f := case.format(p)) in metal_bridge.BITS else f for p in cases.PROJECTIONS
    }
    return ExpertStack(**{p: QuantTensor(f, LAYOUTS[f].plane_specs(case.shape(p))) for p, f in formats.items()})


def test_pairs_are_gathered_up_to_a_bound_that_a_token_of_every_model_meets():
    products = dispatch._MLX_PRODUCTS
    for name in cases.REAL:
        assert gathered.can_gather(specs_of(name), cases.CASES[name].top_k, products), name
    largest = specs_of("deepseek-v3")
    assert (
        round(8 * sum(gathered._expert_bytes(p, products) for p in (largest.gate, largest.up, largest.down)) / 1e6)
        == 646
    )
    assert not gathered.can_gather(largest, 16, products)
    # No more experts than there are: then each is read once at most.
    assert gathered.can_gather(specs_of("ragged"), 31, products)
    assert not gathered.can_gather(specs_of("ragged"), 32, products)
    assert not gathered.can_gather(specs_of("ragged"), 0, products)


# Reasons.


@pytest.fixture
def machine(monkeypatch):
    """Makes this machine look like another one."""

    def pretend(
        packages: dict[str, str],
        *,
        system: str = "darwin",
        arch: str = "arm64",
        macos: str = "15.1",
        jax_: str = "0.11.2",
    ):
        monkeypatch.setattr(sys, "platform", system)
        monkeypatch.setattr(platform, "machine", lambda: arch)
        monkeypatch.setattr(platform, "mac_ver", lambda: (macos, ("", "", ""), arch))
        monkeypatch.setattr(plugin, "installed_version", packages.get)
        monkeypatch.setattr(jax, "__version_info__", tuple(map(int, jax_.split("."))))
        monkeypatch.setattr(jax, "__version__", jax_)

    return pretend


@pytest.mark.parametrize(
    ("packages", "other", "words"),
    [
        ({}, {"system": "linux", "arch": "x86_64"}, ("jax-mps", "macOS on Apple silicon")),
        ({}, {"arch": "x86_64"}, ("Apple silicon", "x86_64")),
        ({"jax-mps": "0.11.1"}, {"macos": "13.6"}, ("macOS 14 or newer", "13.6")),
        ({}, {}, ("jax-mps", "not installed", "pip install 'jmoe[mps]'")),
        ({"jax-metal": "0.1.1"}, {}, ("jax-metal 0.1.1", "jax-mps takes its place", "pip install 'jmoe[mps]'")),
        ({"jax-mps": "0.10.8"}, {"jax_": "0.10.2"}, ("0.10.8 has no quantised product", "--upgrade")),
        ({"jax-mps": "0.11.1"}, {"jax_": "0.12.0"}, ("built for jax 0.11, this is jax 0.12.0", "jax==0.11.*")),
    ],
)
def test_why_unavailable_names_what_is_missing_and_the_remedy(packages, other, words, machine):
    machine(packages, **other)
    why = metal_bridge.why_unavailable()
    assert why is not None
    assert all(word in why for word in words), why


@pytest.mark.parametrize(("version", "jax_"), [("0.11.1", "0.11.2"), ("0.10.11", "0.10.2"), ("0.11.2rc1", "0.11.0")])
def test_nothing_is_missing_on_a_mac_with_a_fitting_jax_mps(version, jax_, machine):
    machine({"jax-mps": version, "jax-metal": "0.1.1"}, jax_=jax_)
    assert metal_bridge.why_unavailable() is None


def test_why_unavailable_says_what_this_machine_is():
    why = metal_bridge.why_unavailable()
    if sys.platform != "darwin":
        assert why is not None
        assert why.endswith(f"this is {platform.system()} {platform.machine()}")


def test_on_a_mac_with_jax_metal_which_backend_names_its_successor(machine, monkeypatch):
    machine({"jax-metal": "0.1.1"})
    monkeypatch.setattr(cpu_kernels, "why_unavailable", lambda *_, **__: "the CPU kernels were not built")
    for on in ("METAL", "cpu"):
        choice = which_backend(cases.random_stack(TINY), np.ones((1, 256), np.float32), platform=on)
        assert choice.name == "jnp"
        assert "jax-mps takes its place: pip install 'jmoe[mps]'" in choice.why


def test_the_abandoned_platform_gets_the_jnp_path_and_the_reason():
    choice = which_backend(for_mps(cases.random_stack(TINY)), np.ones((1, 256), np.float32), platform="METAL")
    assert choice.name == "jnp"
    assert (metal_bridge.why_unavailable() or "METAL") in choice.why


def test_which_backend_on_mps_is_the_product_once_a_stack_is_converted():
    stack, x = cases.random_stack(TINY), np.ones((1, 256), np.float32)
    packed = which_backend(stack, x, platform="mps")
    assert packed.name == "jnp"
    assert "q4_k must be converted once, by jmoe.for_mps(stack)" in packed.why
    converted = which_backend(for_mps(stack), x, platform="mps")
    assert converted.name == "mps"
    assert "mlx4, mlx4, q6_k" in converted.why
    q6_k = cases.random_stack(cases.CASES["q6_k"])
    assert which_backend(q6_k, x, platform="mps").why.startswith("mps, but none of q6_k is an MLX format")


def test_a_plugin_too_old_for_the_product_leaves_xla(machine, monkeypatch):
    machine({"jax-mps": "0.10.8"}, jax_="0.10.2")
    monkeypatch.setattr(jax, "default_backend", lambda: "mps")
    choice = which_backend(for_mps(cases.random_stack(TINY)), np.ones((1, 256), np.float32))
    assert choice.name == "jnp"
    assert "jax-mps 0.10.8 has no quantised product" in choice.why


@pytest.mark.skipif(jax.default_backend() == "mps", reason="it can run here")
def test_forcing_the_backend_where_it_cannot_run_says_why(rng):
    x, (ids, weights) = cases.random_inputs(rng, 1, 256), cases.random_routing(rng, 1, TINY)
    with pytest.raises(ValueError, match=r"backend='mps' cannot run this call: jax-mps.* Leave backend=None"):
        moe_forward(for_mps(cases.random_stack(TINY)), x, ids, weights, backend="mps")


# The self-test.


def test_the_self_test_prints_what_an_issue_needs():
    run = [sys.executable, "-m", "metal_bridge", "--small", "--formats", "q8_0"]
    done = subprocess.run(run, env={**selfcheck_env()}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "metal_bridge self-test"
    assert lines[1].startswith(f"Python {platform.python_version()}, ")
    assert re.fullmatch(r"(?:[a-z-]+ (?:not installed|\d\S*|\(.*\))(?:, |$))+", lines[2])
    assert [part.split()[0] for part in lines[2].split(", ")] == list(selftest.PACKAGES)
    assert re.match(r"platform \w+ \(.*\); Apple GPU through JAX: ", lines[3])
    assert lines[5].split()[:3] == ["format", "computed", "by"]
    rows = [line for line in lines[6:] if line.startswith("q8_0")]
    number, time = r"\d\.\de[-+]\d\d <= \de-\d\d", r"[\d.]+ (?:s|ms|us)"
    for row in rows:
        assert re.fullmatch(rf"q8_0(?: as mlx8)? +\w+, T=\d+ +\w+ +{number} +{number} +{time} +{time} +ok", row), row
    assert len(rows) == 8
    assert lines[-1] == "passed: 8 checks"
    if sys.platform != "darwin":
        assert "platform cpu" in lines[3]
        assert lines[-2].startswith("Metal kernels for MLX (q4_k, q6_k): not run, MLX ")


def test_the_self_test_reports_errors_that_are_too_large_and_what_raises(monkeypatch, capsys):
    exact, bound = np.ones((2, 3)), selfcheck.Errors(1e-10, 1e-4)

    def broken():
        raise RuntimeError("stablehlo.no_such_op: handler returned false\nand more")

    runs = {
        "right": lambda: exact,
        "wrong": lambda: exact + 1e-3,
        "no number": lambda: exact * np.nan,
        "broken": broken,
    }
    rows = [selftest.Row("q4_0", what, "mps", *selftest.check(run, exact, bound)) for what, run in runs.items()]
    assert [row.verdict for row in rows[:3]] == ["ok", "FAILED", "FAILED"]
    monkeypatch.setattr(selftest, "check_layer", lambda model: rows)
    assert selftest.main(["--formats", "q4_0"]) == 1
    out = capsys.readouterr().out
    assert "FAILED: 3 of 4 checks" in out
    assert re.search(r"^q4_0 +wrong +mps .* FAILED$", out, re.MULTILINE)
    assert re.search(r"^q4_0 +broken .* RuntimeError: stablehlo.no_such_op: handler returned false$", out, re.MULTILINE)


def selfcheck_env() -> dict[str, Any]:
    import os

    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
