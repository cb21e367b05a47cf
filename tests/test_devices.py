"""Arguments on other devices, sharded, from other threads and processes: right numbers or one clear error."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, random_inputs, random_routing, random_stack

from jmoe import RouterConfig, moe_forward, route

DATA = Path(__file__).parent / "data"
CASE = CASES["tiny"]


def run_program(path: Path, program: str, *, timeout: float = 300, **environment: str) -> list[str]:
    """The lines that a fresh process prints, which must end well; a file, because spawn imports it again."""
    path.write_text(program)
    done = subprocess.run(
        [sys.executable, str(path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


TWO_DEVICES = """
import re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from cases import CASES, random_inputs, random_routing, random_stack
from jmoe import RouterConfig, moe_forward, route

case, rng, config = CASES["tiny"], np.random.default_rng(0), RouterConfig(2)
stack, x = random_stack(case), random_inputs(rng, 2, case.hidden_size)
ids, weights = map(jnp.asarray, random_routing(rng, 2, case))
logits = jnp.asarray(rng.standard_normal((2, 4)), jnp.float32)
expected, routed = np.asarray(moe_forward(stack, x, ids, weights)), route(logits, config)
zero, one = jax.devices()

def on(place, *trees):
    placed = [jax.tree.map(lambda leaf: jax.device_put(leaf, place), tree) for tree in trees]
    return placed[0] if len(placed) == 1 else placed

def same(*arguments, **options):
    y = moe_forward(*arguments, **options)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    return y

def refused(words, f, *arguments, **options):
    try:
        f(*arguments, **options)
    except ValueError as error:
        assert re.search(words, str(error)), error
        # Words that say more than jax's own.
        assert "incompatible devices" not in str(error)
    else:
        raise AssertionError(f"{words} was not refused")

# A device of the caller's choice, and what jax may still move to it.
there = on(one, stack)
assert same(there, x, ids, weights).devices() == {one}
assert same(stack, on(one, x), ids, weights).devices() == {one}

refused(r"x is on cpu:0, but stack\\.gate on cpu:1\\. .*device_put", moe_forward, there, on(zero, x), ids, weights)
refused(r"topk_ids is on cpu:0, but x on cpu:1", moe_forward, stack, on(one, x), on(zero, ids), weights)
refused(r"topk_weights is on cpu:0, but stack", moe_forward, there, x, ids, on(zero, weights))
mixed = type(stack)(there.gate, there.up, on(zero, stack.down))
refused(r"stack\\.down is on cpu:0, but stack\\.gate on cpu:1", moe_forward, mixed, x, ids, weights)
layers = on(one, jax.tree.map(lambda leaf: leaf[None], stack))
refused(r"layer is on cpu:0, but", moe_forward, layers, x, ids, weights, layer=on(zero, jnp.int32(0)))

# Inside a user's jit jax speaks for itself.
try:
    jax.jit(moe_forward)(there, on(zero, x), ids, weights)
except ValueError as error:
    assert "incompatible devices" in str(error)
else:
    raise AssertionError("jax took arguments on two devices")

auto = jax.make_mesh((2,), ("ep",), axis_types=(AxisType.Auto,))
by_expert, whole = NamedSharding(auto, P("ep")), NamedSharding(auto, P())
same(on(by_expert, stack), x, ids, weights)
same(on(by_expert, stack), *on(whole, x, ids, weights))
same(on(whole, stack), *on(by_expert, x, ids, weights))
for got, want in zip(route(on(NamedSharding(auto, P(None, "ep")), logits), config), routed):
    np.testing.assert_allclose(got, want, rtol=1e-6)

words = r"x is on cpu:1, but stack\\.gate on cpu:0, cpu:1\\."
refused(words, moe_forward, on(by_expert, stack), on(one, x), ids, weights)
backwards = NamedSharding(Mesh(np.array([one, zero]), ("ep",), axis_types=(AxisType.Auto,)), P())
refused(r"x is on cpu:1, cpu:0, .*same order", moe_forward, on(by_expert, stack), on(backwards, x), ids, weights)

# The default of jax.make_mesh.
explicit = jax.make_mesh((2,), ("ep",), axis_types=(AxisType.Explicit,))
by_row, by_column = NamedSharding(explicit, P("ep")), NamedSharding(explicit, P(None, "ep"))
words = r" sharded by the Explicit mesh axis 'ep'\\. .*AxisType\\.Auto.*shard_map"
refused("stack.gate is" + words, moe_forward, on(by_row, stack), x, ids, weights)
refused("x is" + words, moe_forward, stack, on(by_column, x), ids, weights)
refused("rows of logits are" + words, route, on(by_column, logits), config)
everywhere = on(NamedSharding(explicit, P()), stack)
same(everywhere, x, ids, weights)
specs = (P(), *[P("ep")] * 3)
shard_mapped = jax.shard_map(moe_forward, mesh=explicit, in_specs=specs, out_specs=P("ep"), check_vma=False)
y = jax.jit(shard_mapped)(everywhere, *on(by_row, x, ids, weights))
np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
for got, want in zip(route(on(by_row, logits), config), routed):
    np.testing.assert_allclose(got, want, rtol=1e-6)
print("all held")
"""


def test_arrays_on_two_devices_compute_where_they_are_or_are_refused_at_the_door(tmp_path):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    lines = run_program(tmp_path / "program.py", TWO_DEVICES, XLA_FLAGS=flags, JAX_PLATFORMS="cpu")
    assert lines == ["all held"]


def test_sixteen_threads_compute_what_one_computes(rng):
    stack, jobs = random_stack(CASE), []
    # Numbers of tokens that no other test has: the threads trace and compile at once.
    for tokens in [3, 7] * 16:
        x, routing = random_inputs(rng, tokens, CASE.hidden_size), random_routing(rng, tokens, CASE)
        jobs.append((stack, x, *routing, rng.standard_normal((tokens, 40)).astype(np.float32)))

    def compute(job):
        *arguments, logits = job
        return moe_forward(*arguments), *route(logits, RouterConfig(4))

    with ThreadPoolExecutor(16) as executor:
        together = list(executor.map(compute, jobs))
    for job, results in zip(jobs, together, strict=True):
        for got, want in zip(results, compute(job), strict=True):
            np.testing.assert_array_equal(got, want)


COMMON = f"""
import multiprocessing, os, sys
import numpy as np
from jmoe import ExpertStack, RouterConfig, moe_forward, route

PATH = {str(DATA / "mixtral-Q6_K.gguf")!r}

def compute(stack):
    # NumPy's arrays: in a forked process making one of jax's own would already hang, out of jmoe's reach.
    x = np.ones((3, stack.hidden_size), np.float32)
    ids, weights = route(np.arange(12, dtype=np.float32).reshape(3, 4), RouterConfig(2))
    return np.asarray(moe_forward(stack, x, ids, weights))
"""

SPAWN = (
    COMMON
    + """
def work(stack):
    # The parent's stack, and one of this process's own.
    return [compute(stack), compute(ExpertStack.open_and_load(PATH, 0))]

if __name__ == "__main__":
    stack = ExpertStack.open_and_load(PATH, 0)
    expected = compute(stack)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for got in pool.apply(work, (stack,)):
            np.testing.assert_array_equal(got, expected)
    print("spawned")
"""
)

FORK = (
    COMMON
    + """
def attempts(stack):
    yield lambda: compute(stack)
    one, zero = np.ones((1, 1), np.float32), np.zeros((1, 1), np.int32)
    yield lambda: moe_forward(stack, np.ones((1, 256), np.float32), zero, one)
    yield lambda: route(one, RouterConfig(1))
    yield lambda: ExpertStack.open_and_load(PATH, 0)

def in_child(work):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = work()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def refused():
    for number, attempt in enumerate(attempts(stack)):
        try:
            attempt()
        except RuntimeError as error:
            assert 'get_context("spawn")' in str(error) and str(os.getppid()) in str(error), error
        else:
            return 2 + number
    return 0

# Before anything was loaded a fork is harmless: this child starts a jax of its own.
assert in_child(lambda: int(compute(ExpertStack.open_and_load(PATH, 0)).shape != (3, 256))) == 0
stack = ExpertStack.open_and_load(PATH, 0)
compute(stack)
print(in_child(refused))
compute(stack)
print("the parent lives")
"""
)


def test_a_spawned_process_computes_with_the_stack_that_it_was_sent(tmp_path):
    assert run_program(tmp_path / "program.py", SPAWN) == ["spawned"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_process_is_told_why_it_cannot_compute_instead_of_hanging(tmp_path):
    assert run_program(tmp_path / "program.py", FORK, timeout=120) == ["0", "the parent lives"]


@pytest.mark.parametrize("tokens", [2, 5])
def test_without_jit_the_numbers_are_the_same(tokens, rng):
    stack, x = random_stack(CASE), random_inputs(rng, tokens, CASE.hidden_size)
    ids, weights = random_routing(rng, tokens, CASE)
    ids[0, 0] = -1
    logits = jnp.asarray(rng.standard_normal((tokens, 9)), jnp.float32)
    expected = moe_forward(stack, x, ids, weights), *route(logits, RouterConfig(3))
    with jax.disable_jit():
        results = moe_forward(stack, x, ids, weights), *route(logits, RouterConfig(3))
    for got, want in zip(results, expected, strict=True):
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        # XLA fuses differently.
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
