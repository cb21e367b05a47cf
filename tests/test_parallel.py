"""Experts over many devices: 8 simulated ones, two processes over the network, and CUDA as far as it can be lowered."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import parallel_program
import pytest
from cases import CASES, random_blocks, random_stack
from jax import lax

import jmoe
from jmoe import parallel
from jmoe.parallel import exchange
from jmoe.stack import depth_step, window

TESTS = Path(__file__).parent
CHECKS = [name for name in vars(parallel_program) if name.startswith("check_")]


def environment(devices: int) -> dict[str, str]:
    # Compiling is most of what these tests take: unoptimised, half of it.
    quick = f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {quick}"
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str | None]:
    """Each check's traceback, or None where it held."""
    command = [sys.executable, "-W", "error", str(TESTS / "parallel_program.py")]
    done = subprocess.run(command, env=environment(8), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return {name: error for name, error, _ in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("check", CHECKS)
def test_on_8_devices(check, outcomes):
    assert outcomes[check] is None, outcomes[check]


def test_two_processes_read_their_own_experts_and_compute_as_one(tmp_path):
    case = CASES["many-experts"]
    jmoe.save_gguf(tmp_path / "257.gguf", random_stack(case), architecture="qwen3moe")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, str(TESTS / "parallel_process.py"), str(number), port, str(tmp_path)],
            env=environment(2),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        results = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (out, err) in zip(processes, results, strict=True):
        assert process.returncode == 0, err
        assert out.splitlines()[-1] == "held"


class Sent(NamedTuple):
    """A call of ragged_all_to_all by one device."""

    operand: np.ndarray
    output: np.ndarray
    input_offsets: np.ndarray
    send_sizes: np.ndarray
    output_offsets: np.ndarray
    recv_sizes: np.ndarray


def ragged_all_to_all(calls: list[Sent]) -> list[np.ndarray]:
    """What each device has afterwards, word by word as jax documents it; every index must lie inside its array."""
    results = [call.output.copy() for call in calls]
    for source, call in enumerate(calls):
        by_target = [a.reshape(len(calls), -1) for a in (call.input_offsets, call.send_sizes, call.output_offsets)]
        for target, updates in enumerate(zip(*by_target, strict=True)):
            received = calls[target].recv_sizes.reshape(len(calls), -1)[source]
            np.testing.assert_array_equal(received, updates[1])
            for start, size, place in zip(*map(np.ndarray.tolist, updates), strict=True):
                assert 0 <= start <= start + size <= len(call.operand)
                assert 0 <= place <= place + size <= len(results[target])
                results[target][place : place + size] = call.operand[start : start + size]
    return results


@pytest.mark.parametrize("updates", [1, 4])
@pytest.mark.parametrize(("devices", "tokens", "top_k"), [(2, 5, 8), (8, 3, 2), (3, 1, 1)])
def test_the_ragged_exchange_brings_each_row_where_numpy_says(devices, tokens, top_k, updates, rng, monkeypatch):
    """Device d's tokens carry the number 100 d + t; ten times that comes back to them from each of their devices."""
    monkeypatch.setattr(exchange, "updates", lambda devices, nbytes: updates)
    per_device = 2
    experts = devices * per_device
    number = (100 * np.arange(devices)[:, None] + np.arange(tokens) + 1.0).astype(np.float32)

    # All devices at once: the model stands in for the collective, and a vmapped axis for the mesh.
    def collective(*arrays: Any, axis_name: str) -> jax.Array:
        gathered = [lax.all_gather(array, axis_name) for array in arrays]

        def model(me: np.ndarray, *stacked: np.ndarray) -> np.ndarray:
            calls = [Sent(*(np.asarray(array[d]) for array in stacked)) for d in range(devices)]
            return ragged_all_to_all(calls)[int(me)]

        shape = jax.ShapeDtypeStruct(arrays[1].shape, arrays[1].dtype)
        return jax.pure_callback(model, shape, lax.axis_index(axis_name), *gathered, vmap_method="sequential")

    monkeypatch.setattr(lax, "ragged_all_to_all", collective)

    def on_device(ids: jax.Array, number: jax.Array) -> tuple[jax.Array, ...]:
        (rows, slots, weights), back = exchange.ragged(number[:, None], ids, ids / 2, per_device, "expert")
        return rows, slots, weights, back(10 * rows)

    together = jax.jit(jax.vmap(on_device, axis_name="expert"))
    random = [rng.integers(-1, experts, (devices, tokens, top_k), dtype=np.int32) for _ in range(3)]
    for ids in (*random, np.full_like(random[0], experts - 1), np.full_like(random[0], -1)):
        rows, slots, weights, y = map(np.asarray, together(ids, number))
        for device in range(devices):
            here = np.any((ids >= 0) & (ids // per_device == device), axis=-1)  # bool[devices, tokens]
            # By the device that they came from, ascending; then nothing.
            np.testing.assert_array_equal(rows[device, : here.sum(), 0], number[here])
            np.testing.assert_array_equal(slots[device, : here.sum()], ids[here])
            np.testing.assert_array_equal(weights[device, : here.sum()], ids[here] / 2)
            assert not rows[device, here.sum() :].any()
            assert (slots[device, here.sum() :] == -1).all()
        homes = [[len({e // per_device for e in token if e >= 0}) for token in of_device] for of_device in ids]
        np.testing.assert_array_equal(y[..., 0], 10 * number * np.array(homes))


@pytest.mark.parametrize("count", [1, 4, 32])
def test_the_updates_of_a_slice_are_the_slice(count, rng):
    start, size = rng.integers(0, 100, (2, 7))
    updates = exchange.cut(jnp.asarray(start), jnp.asarray(size), count)
    begins, sizes = (np.asarray(numbers).reshape(7, count) for numbers in updates)
    for i in range(7):
        rows = [row for begin, rows in zip(begins[i], sizes[i], strict=True) for row in range(begin, begin + rows)]
        assert rows == list(range(start[i], start[i] + size[i]))
        assert sizes[i].max() == -(-size[i] // count)


def test_a_peer_s_rows_are_cut_where_the_gpu_s_kernel_copies_an_update_a_block():
    a_token = 7168 * 2
    assert [exchange.updates(n, 2048 * a_token) for n in (2, 4, 8, 16)] == [256, 128, 64, 1]
    assert [exchange.updates(2, nbytes) for nbytes in (0, 32, 2048 * 32, 32 * a_token)] == [1, 1, 4, 16]


def test_for_cuda_one_device_exchanges_nothing():
    stack = random_stack(CASES["mixed"])
    mesh = jax.make_mesh((1,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    sharded = parallel.shard_experts(stack, mesh)
    operands = sharded, *parallel_program.arguments(CASES["mixed"], 8)
    for name in (None, *exchange.EXCHANGES):
        forward = partial(parallel.moe_forward, split_tokens="expert", exchange=name)
        text = jax.jit(forward).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
        assert not [word for word in ("all_to_all", "all_gather", "reduce_scatter") if word in text]


@pytest.mark.parametrize("name", jmoe.FORMATS)
def test_rows_of_every_format_are_cut_where_the_tensor_axis_cuts_them(name, rng):
    """The parts of a row, decoded, are the row: no plane has an entry across the cut."""
    spec = jmoe.FORMATS[name]
    step = depth_step(jmoe.QuantTensor(name, spec.layout))
    whole = jmoe.QuantTensor(name, spec.split(random_blocks(rng, name, (1, 32, 3 * step))))
    parts = [window(whole, (0,), -1, part, 3).dequantise() for part in range(3)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=-1), whole.dequantise()[0])
