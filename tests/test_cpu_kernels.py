"""The CPU kernels on every instruction set that this machine has, against the float64 oracle, and inside JAX."""

from __future__ import annotations

import functools
import itertools
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cases
import cpu_probe
import hypothesis
import hypothesis.strategies as st
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tolerances

from jmoe import FORMATS, Activation, ExpertStack, cpu_kernels, dispatch, moe_forward, which_backend
from jmoe.cpu_kernels import build

built = pytest.mark.skipif(isinstance(cpu_kernels._library(), str), reason=str(cpu_kernels._library()))
TINY = cases.CASES["tiny"]
# Ragged depths with an odd last block, K-quants beside 32-weight formats, gate unlike up.
MIXES = (*cpu_kernels.FORMATS, "one-expert", "ragged", "mixed", "many-experts", "gemma-like")
TOP = Path(__file__).resolve().parents[1]


def instruction_sets() -> list[str]:
    library = cpu_kernels._library()
    names = ("avx512vnni", "avx512vnni-halved", "avx2", "neon", "portable")
    return [] if isinstance(library, str) else [name for name in names if library.jmoe_cpu_isa(name.encode())]


@pytest.fixture(scope="module", params=instruction_sets())
def isa(request: Any) -> Iterator[str]:
    """Forced by the environment; programs that were traced for another are forgotten."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JMOE_CPU_ISA", request.param)
        # Else each program is traced for GPUs as well.
        patch.setattr(dispatch, "_why_no_pallas", lambda *_: "these tests are about CPUs")
        jax.clear_caches()
        yield request.param
    jax.clear_caches()


# Made once a case, not once an instruction set.
stack_of = functools.lru_cache(cases.random_stack)
layer_of = functools.lru_cache(partial(cases.oracle_layer, decoded=True))


def inputs(case: cases.Case, tokens: int, rng: np.random.Generator) -> tuple[Any, Any, Any]:
    return cases.random_inputs(rng, tokens, case.hidden_size), *cases.random_routing(rng, tokens, case)


@built
@pytest.mark.parametrize("name", MIXES)
def test_every_format_and_instruction_set_meets_the_contract(isa, name, rng):
    case = cases.CASES[name]
    stack, layer = stack_of(case), layer_of(case)
    assert which_backend(stack, np.zeros((1, case.hidden_size), np.float32)).why.startswith(f"cpu ({isa})")
    # One column an expert or two, decoded on the way; many, by a tile; more than a tile meets at once in "one-expert".
    for tokens, precision in ((1, None), (40 if case.num_experts > 1 else 150, None), (9, "highest")):
        args = inputs(case, tokens, rng)
        bound = tolerances.KERNEL_F32 if precision is None else tolerances.LAYER["float32"]
        y = moe_forward(stack, *args, backend="cpu", precision=precision)
        oracle.assert_within(y, oracle.moe(layer, *args), bound)


@built
@pytest.mark.parametrize(
    ("hidden", "inner", "gate", "down"),
    [(2304, 64, "q4_k", "q8_0"), (64, 4352, "q8_0", "q6_k"), (64, 4384, "q5_0", "q4_0")],
)
def test_depths_of_several_slabs_are_summed_whole(isa, hidden, inner, gate, down, rng):
    case = cases.Case("deep", hidden, inner, 2, 1, gate, gate, down)
    stack, layer = stack_of(case), layer_of(case)
    # One column an expert, several by a tile, many as words where the instruction set has those.
    for tokens, precision in ((1, None), (12, None), (40, None), (3, "highest")):
        args = inputs(case, tokens, rng)
        bound = tolerances.KERNEL_F32 if precision is None else tolerances.LAYER["float32"]
        y = moe_forward(stack, *args, backend="cpu", precision=precision)
        oracle.assert_within(y, oracle.moe(layer, *args), bound)


ACTIVATIONS = ["silu", "gelu_tanh", "swiglu_oai", Activation("swiglu_clamped", 1.5), "relu2"]


def with_leaves(case: cases.Case, leaves: dict[str, np.ndarray], gated: bool = True) -> tuple[ExpertStack, Any]:
    """The case's stack and oracle layer with biases and scales, and without its gate where it is to have none."""
    stack = replace(stack_of(case), **jax.tree.map(jnp.asarray, leaves))
    layer = replace(layer_of(case), **leaves)
    return (stack, layer) if gated else (replace(stack, gate=None), replace(layer, gate=None))


@built
@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations_biases_and_scales_meet_the_contract(isa, activation, weight_on, rng):
    case, gated = cases.CASES["gemma-like"], activation != "relu2"
    stack, layer = with_leaves(case, cases.random_leaves(case, gated=gated), gated)
    name, limit = activation if isinstance(activation, Activation) else (activation, None)
    options = {"activation": activation, "weight_on": weight_on}
    for tokens, precision in ((1, None), (40, None), (5, "highest")):
        x, ids, weights = inputs(case, tokens, rng)
        ids[0] = ids[0, 0]  # an expert given twice
        bound = tolerances.KERNEL_F32 if precision is None else tolerances.LAYER["float32"]
        y = moe_forward(stack, x, ids, weights, backend="cpu", precision=precision, **options)
        exact = oracle.moe(layer, x, ids, weights, name, limit=limit, weight_on=weight_on)
        oracle.assert_within(y, exact, bound)


@built
@pytest.mark.parametrize("leaf", ["gate_bias", "up_bias", "down_bias", "down_scale"])
def test_each_leaf_counts_by_itself_and_by_layer(leaf, rng):
    both = [with_leaves(TINY, {leaf: cases.random_leaves(TINY, seed=seed)[leaf]}) for seed in (0, 1)]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(stack for stack, _ in both))
    args = inputs(TINY, 3, rng)
    forward = partial(moe_forward, together, *args, backend="cpu")
    _, scanned = jax.lax.scan(lambda carry, index: (carry, forward(layer=index)), 0, jnp.arange(2))
    for index, (_, layer) in enumerate(both):
        exact = oracle.moe(layer, *args)
        oracle.assert_within(forward(layer=index), exact, tolerances.KERNEL_F32)
        np.testing.assert_array_equal(scanned[index], forward(layer=index))


@built
@pytest.mark.parametrize("activation", ACTIVATIONS[:-1], ids=str)
def test_gates_far_beyond_the_range_of_exp_give_the_formula(isa, activation, rng):
    """Every sign and size; where the sigmoid is next to nothing, the others of the row decide."""
    leaves = cases.random_leaves(TINY)
    sizes = np.array([0, 30, -30, 86, -86, 200, -200, 3e20, -3e20], np.float32)
    leaves["gate_bias"] += sizes[np.arange(TINY.expert_intermediate) % len(sizes)]
    name, limit = activation if isinstance(activation, Activation) else (activation, None)
    for largest in (200, 3e20):
        bent = {**leaves, "gate_bias": np.clip(leaves["gate_bias"], -largest, largest)}
        stack, layer = with_leaves(TINY, bent)
        args = inputs(TINY, 2, rng)
        for precision, bound in ((None, tolerances.KERNEL_F32), ("highest", tolerances.LAYER["float32"])):
            y = moe_forward(stack, *args, backend="cpu", precision=precision, activation=activation)
            oracle.assert_within(y, oracle.moe(layer, *args, name, limit=limit), bound)


@built
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_a_bad_token_touches_no_other_with_any_activation(isa, activation, rng):
    gated = activation != "relu2"
    stack, _ = with_leaves(TINY, cases.random_leaves(TINY, gated=gated), gated)
    x, ids, weights = inputs(TINY, 3, rng)
    forward = partial(moe_forward, stack, backend="cpu", activation=activation, weight_on="input")
    for precision in (None, "highest"):
        clean = np.asarray(forward(x, ids, weights, precision=precision))
        spoilt = np.asarray(forward(x.at[1, 7].set(np.nan), ids, weights, precision=precision))
        np.testing.assert_array_equal(np.delete(spoilt, 1, 0), np.delete(clean, 1, 0))
        assert not np.isfinite(spoilt[1]).any()


@built
@pytest.mark.parametrize("name", ["q6_k", "q8_0"])
def test_the_largest_codes_and_integers_do_not_overflow(isa, name, rng):
    """Codes of all ones against x whose integers are all the largest there are, of either sign."""
    case = cases.CASES[name]
    stack = cases.random_stack(case)

    def full(plane: jax.Array) -> np.ndarray:
        return np.full(plane.shape, -128 if plane.dtype == np.int8 else np.iinfo(plane.dtype).max, plane.dtype)

    codes = {
        field: full(getattr(stack.gate.planes, field))
        for field in ("codes", "high")
        if hasattr(stack.gate.planes, field)
    }
    wide = jax.tree.map(jnp.asarray, stack.gate.planes._replace(**codes))
    weights = stack.gate.spec.dequantise(wide)
    tensor = type(stack.gate)(name, wide)
    for sign, tokens in itertools.product((1, -1), (1, 4, 20)):
        x = np.full((tokens, case.hidden_size), sign, np.float32)
        ids, w = np.zeros((tokens, 1), np.int32), np.ones((tokens, 1), np.float32)
        loud = type(stack)(tensor, stack.up, stack.down)
        dense = oracle.Layer(
            oracle.Weight("float32", np.asarray(weights)),
            cases.oracle_layer(case).up,
            cases.oracle_layer(case).down,
        )
        exact = oracle.moe(dense, x, ids, w)
        oracle.assert_within(moe_forward(loud, x, ids, w, backend="cpu"), exact, tolerances.KERNEL_F32)


@built
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_a_bad_token_touches_no_other(isa, bad, rng):
    stack = cases.random_stack(TINY)
    for tokens in (2, 40):
        x, ids, weights = inputs(TINY, tokens, rng)
        ids[:] = ids[0]
        clean = np.asarray(moe_forward(stack, x, ids, weights))
        spoilt = np.asarray(moe_forward(stack, x.at[1, 7].set(bad), ids, weights))
        np.testing.assert_array_equal(np.delete(spoilt, 1, 0), np.delete(clean, 1, 0))
        assert bad == 3e38 or not np.isfinite(spoilt[1]).any()


@built
@hypothesis.settings(max_examples=25)
@hypothesis.given(data=st.data())
def test_any_shape_formats_and_routing_give_the_oracle_s_sum(data):
    draw = data.draw
    gate, up, down = (draw(st.sampled_from(sorted(cpu_kernels.FORMATS)), label=name) for name in cases.PROJECTIONS)
    block = lambda *names: max(FORMATS[name].block_weights for name in names)  # noqa: E731
    hidden = block(gate, up) * draw(st.integers(1, 3), label="blocks of H")
    inner = block(down) * draw(st.integers(1, 3), label="blocks of I")
    experts, top_k = draw(st.integers(1, 6), label="E"), draw(st.integers(1, 4), label="K")
    case = cases.Case("drawn", hidden, inner, experts, top_k, gate, up, down)
    rng = np.random.default_rng(draw(st.integers(0, 2**16), label="seed"))
    tokens = draw(st.integers(1, 40), label="T")
    x = cases.random_inputs(rng, tokens, hidden)
    ids = rng.integers(-1, experts + 1, (tokens, top_k), np.int32)
    weights = rng.standard_normal((tokens, top_k)).astype(np.float32)
    exact = oracle.moe(cases.oracle_layer(case), x, ids, weights)
    oracle.assert_within(moe_forward(cases.random_stack(case), x, ids, weights), exact, tolerances.KERNEL_F32)


@built
def test_a_batch_of_tokens_is_more_tokens(rng):
    stack = cases.random_stack(TINY)
    x, ids, weights = inputs(TINY, 12, rng)
    flat = moe_forward(stack, x, ids, weights)
    parts = (a.reshape(3, 4, -1) for a in (x, jnp.asarray(ids), jnp.asarray(weights)))
    batched = jax.vmap(partial(moe_forward, stack))
    np.testing.assert_array_equal(batched(*parts).reshape(flat.shape), flat)
    one = jax.vmap(lambda x, i, w: moe_forward(stack, x[None], i[None], w[None])[0])
    np.testing.assert_array_equal(one(x, jnp.asarray(ids), jnp.asarray(weights)), flat)


@built
def test_neither_threads_nor_shards_change_a_bit():
    """One thread, and five, of a process of its own each: XLA's pool is made once."""

    def run(threads: int) -> list[str]:
        env = {**os.environ, "NPROC": str(threads), "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, cpu_probe.__file__], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    one, five = run(1), run(5)
    assert one[1:] == five[1:] == cpu_probe.digests()
    if sys.platform == "linux":
        assert int(five[0]) > int(one[0])


@pytest.mark.skipif("avx512vnni" not in instruction_sets(), reason="needs AVX-512 VNNI")
@pytest.mark.parametrize("name", cpu_kernels.FORMATS)
def test_halved_products_change_no_bit(name, rng, monkeypatch):
    case = cases.Case("two experts", 512, 256, 2, 1, name, name, name)
    stack = cases.random_stack(case)
    # Some 30 columns an expert: by twelve, by four and one by one.
    x, *routing = map(jnp.asarray, inputs(case, 60, rng))

    def run(isa: str) -> np.ndarray:
        monkeypatch.setenv("JMOE_CPU_ISA", isa)
        assert f"({isa})" in which_backend(stack, x, platform="cpu").why
        jax.clear_caches()  # of programs that were traced for the other
        return np.asarray(moe_forward(stack, x, *routing))

    np.testing.assert_array_equal(run("avx512vnni-halved"), run("avx512vnni"))


@built
def test_an_export_needs_a_word_of_the_caller_or_jnp(rng):
    stack = cases.random_stack(TINY)
    x, ids, weights = inputs(TINY, 3, rng)
    args = (x, jnp.asarray(ids), jnp.asarray(weights))
    forward = jax.jit(partial(moe_forward, stack))
    with pytest.raises(ValueError, match=cpu_kernels.TARGET):
        jax.export.export(forward)(*args)
    allowed = [jax.export.DisabledSafetyCheck.custom_call(cpu_kernels.TARGET)]
    native = jax.export.export(forward, disabled_checks=allowed)(*args)
    np.testing.assert_array_equal(native.call(*args), forward(*args))
    portable = jax.export.export(jax.jit(partial(moe_forward, stack, backend="jnp")), platforms=("cpu", "cuda"))(*args)
    oracle.assert_within(portable.call(*args), oracle.as_f64(forward(*args)), tolerances.KERNEL_F32)


def test_which_backend_says_why_it_is_not_the_kernels(monkeypatch):
    packed, x = cases.random_stack(TINY), np.zeros((1, TINY.hidden_size), np.float32)

    def why(stack: Any = packed, x: Any = x, **options: Any) -> str:
        choice = which_backend(stack, x, platform="cpu", **options)
        assert choice.name == "jnp"
        return choice.why

    dense = cases.CASES["dense-down"]
    assert "down is dense" in why(cases.random_stack(dense), np.zeros((1, dense.hidden_size), np.float32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_kernels, "FORMATS", ("q4_k",))
        assert "there is no kernel for down's format q6_k" in why()
    assert "no pair of a token and an expert" in why(x=x[:0])
    assert "no pair of a token and an expert" in why(topk_ids=np.zeros((1, 0), np.int32))
    monkeypatch.setattr(cpu_kernels, "_library", lambda: "the CPU kernels were not built")
    assert "were not built" in why()
    with pytest.raises(ValueError, match=r"backend='cpu' cannot run this call: cpu, but .* were not built"):
        moe_forward(packed, x, np.zeros((1, 1), np.int32), np.ones((1, 1), np.float32), backend="cpu")


@built
def test_an_instruction_set_that_is_not_here_is_named(monkeypatch):
    monkeypatch.setenv("JMOE_CPU_ISA", "avx1024")
    choice = which_backend(cases.random_stack(TINY), np.zeros((1, TINY.hidden_size), np.float32), platform="cpu")
    assert choice.name == "jnp"
    assert "JMOE_CPU_ISA='avx1024'" in choice.why


def test_the_build_knows_every_source_and_header_and_only_those():
    (extension,) = tomllib.loads((TOP / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]
    folder = TOP / "jmoe" / "cpu_kernels"
    for key, pattern in (("sources", "*.cc"), ("depends", "*.h")):
        assert sorted(extension[key]) == sorted(f"jmoe/cpu_kernels/{path.name}" for path in folder.glob(pattern))
    assert extension["optional"]


def test_a_source_has_the_flags_of_its_own_architecture_only():
    assert "-mavx2" in build.flags_of("a/avx2.cc", "linux-x86_64")
    assert build.flags_of("a/avx2.cc", "linux-aarch64") == []
    assert build.flags_of("a/neon.cc", "linux-aarch64") == ["-march=armv8.2-a+dotprod"]
    assert build.flags_of("a/avx2.cc", "macosx-11.0-universal2")[:2] == ["-Xarch_x86_64", "-mavx2"]
    assert build.flags_of("a/entry.cc", "linux-x86_64") == []


def test_the_planes_layouts_in_cpp_are_those_of_the_formats():
    text = (Path(cpu_kernels.__file__).parent / "layouts.cc").read_text()
    rows = re.findall(r'\{"(\w+)", (\d+), (\d+), \{(.*)\}\},', text)
    assert [name for name, *_ in rows] == list(cpu_kernels.FORMATS)
    for name, block, count, planes in rows:
        layout = FORMATS[name].layout
        assert (int(block), int(count)) == (FORMATS[name].block_weights, len(layout))
        found = re.findall(r"\{(\d), (\d+), (true|false)\}", planes)
        assert found == [(str(np.dtype(p.dtype).itemsize), str(p.per), str(p.by_row).lower()) for p in layout]
