"""Faults amid a load: a file that changes, memory that runs out, an interrupt. An error, and nothing left behind."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_builder as b
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from jmoe import ExpertStack, QuantTensor
from jmoe.gguf_file import GgufError, placing, planes, stacking
from jmoe.gguf_file.load import load_expert_stacks

SIZES = b.Sizes(num_experts=3, hidden_size=256, expert_intermediate=512)
TESTS = Path(__file__).parent


@pytest.fixture
def path(tmp_path, rng) -> Path:
    """One layer of 2 MB whose last tensor, down, ends the file; written long ago."""
    whole = b.good_file(b.moe_tensors(rng, 0, SIZES, T.Q8_0, T.F32), b.moe_pairs(sizes=SIZES))
    file = b.write(tmp_path / "m.gguf", whole)
    os.utime(file, ns=(1, 1))
    return file


def held() -> tuple[int, int, int]:
    """Descriptors, threads and device arrays of this process, without what other tests left to the collector."""
    gc.collect()
    return b.open_descriptors(), threading.active_count(), len(jax.live_arrays())


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def overwritten(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(path.stat().st_size // 2))


def extended(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


def replaced(path: Path) -> None:
    os.replace(b.write(path.with_suffix(".new"), b"GGUF, but not any more"), path)


@pytest.mark.parametrize("nth_read", [0, 3, -1], ids=["first", "fourth", "last"])
@pytest.mark.parametrize("change", [truncated, emptied, overwritten, extended, replaced, os.unlink])
def test_a_file_that_changes_between_two_reads_gives_an_error_or_the_old_numbers(change, nth_read, path, monkeypatch):
    monkeypatch.setattr(planes, "_PIECE", 1 << 16)
    preadv, reads = os.preadv, []
    monkeypatch.setattr(os, "preadv", lambda *args: reads.append(args) or preadv(*args))
    expected = jax.tree.map(np.array, ExpertStack.open_and_load(path, 0))
    when, before, calls = range(len(reads))[nth_read], held(), iter(range(10_000))

    def changing(*args: Any) -> int:
        if next(calls) == when:
            change(path)
        return preadv(*args)

    monkeypatch.setattr(os, "preadv", changing)
    if change in (replaced, os.unlink):
        # The open file is the old one still.
        stack = ExpertStack.open_and_load(path, 0)
        jax.tree.map(lambda got, want: np.testing.assert_array_equal(np.asarray(got), want), stack, expected)
        del stack
    else:
        with pytest.raises(GgufError, match=r"m\.gguf: .*changed during load"):
            ExpertStack.open_and_load(path, 0)
    assert next(calls) > when
    assert held() == before


def test_files_that_shrink_and_change_while_others_load_them_kill_nobody(path):
    """A mapped file would: reading what was cut off is SIGBUS."""
    program = f"""
import sys, collections
sys.path[:0] = {[*sys.path]!r}
import numpy as np, jax
from jmoe import ExpertStack, GgufError
outcomes = collections.Counter()
print("ready", flush=True)
for line in sys.stdin:
    try:
        stack = ExpertStack.open_and_load({str(path)!r}, 0)
        # Whole in one version: zeros or ones where the writer wrote, never both.
        values = np.unique(np.asarray(stack.down)[-1])
        outcomes["loaded"] += 1
        assert len(values) == 1, values
    except GgufError as error:
        outcomes["refused"] += 1
    print("next", flush=True)
print(dict(outcomes), flush=True)
"""
    whole = path.read_bytes()
    tail = 512 * 256 * 4
    versions = [whole[:-tail] + np.full(tail // 4, value, np.float32).tobytes() for value in (0, 1)]
    path.write_bytes(versions[0])
    rng = np.random.default_rng(0)
    with subprocess.Popen([sys.executable, "-c", program], stdin=-1, stdout=-1, text=True) as child:
        assert child.stdin
        assert child.stdout
        assert child.stdout.readline() == "ready\n"
        for turn in range(120):
            print("load", file=child.stdin, flush=True)
            # Around the moment of its reads.
            time.sleep(rng.random() * 0.006)
            os.truncate(path, int(rng.integers(0, len(whole))) if turn % 2 else len(whole) - 1)
            with open(path, "r+b") as file:
                file.write(versions[turn % 2])
            assert child.stdout.readline() == "next\n"
            # Coarser than the kernel's clock of modification times.
            time.sleep(0.01)
        child.stdin.close()
        outcomes = eval(child.stdout.readline())
    assert child.returncode == 0
    assert min(outcomes.get("loaded", 0), outcomes.get("refused", 0)) > 5, outcomes


def out_of_device_memory(*_: Any) -> Any:
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")


def out_of_host_memory(*_: Any) -> Any:
    raise MemoryError


def interrupted(*_: Any) -> Any:
    raise KeyboardInterrupt


def third_time(wrong: Callable[..., Any], right: Callable[..., Any]) -> Callable[..., Any]:
    calls = iter(range(1000))
    return lambda *args, **options: (wrong if next(calls) == 2 else right)(*args, **options)


@pytest.mark.parametrize("stacked", [False, True], ids=["apart", "stacked"])
@pytest.mark.parametrize(
    ("home", "name", "wrong", "error"),
    [
        (jax, "block_until_ready", out_of_device_memory, GgufError),
        (planes, "aligned_empty", out_of_host_memory, GgufError),
        (jax, "block_until_ready", interrupted, KeyboardInterrupt),
        (planes, "_read_rows", interrupted, KeyboardInterrupt),
    ],
    ids=["device memory", "host memory", "an interrupt", "an interrupt in a thread"],
)
def test_a_load_that_fails_midway_leaves_nothing(home, name, wrong, error, stacked, path, monkeypatch):
    load_expert_stacks(path, stacked=stacked, progress=False)
    before = held()
    with monkeypatch.context() as patch:
        patch.setattr(home, name, third_time(wrong, getattr(home, name)))
        tracemalloc.start()
        try:
            with pytest.raises(error) as caught:
                load_expert_stacks(path, stacked=stacked, progress=False)
            # jax lets go of a deleted array's host buffer at its next call.
            jax.device_put(np.uint8(0))
            gc.collect()
            # While somebody keeps the error, as a debugger does.
            assert caught.value.__traceback__
            kept = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
    assert kept < path.stat().st_size / 10
    assert held() == before
    if error is GgufError:
        assert "needs" in str(caught.value)
        assert "sharding=" in str(caught.value)
    assert load_expert_stacks(path, stacked=stacked, progress=False)


def test_a_device_that_runs_out_while_layers_are_stacked_keeps_no_layer(path, monkeypatch):
    before = held()
    monkeypatch.setattr(stacking, "_write_layer", out_of_device_memory)
    with pytest.raises(GgufError, match=r"needs \d+ bytes on its devices, which are out of memory"):
        load_expert_stacks(path, stacked=True, progress=False)
    assert held() == before


def test_what_is_free_is_asked_after_everything_placed_was_deleted(path, monkeypatch):
    before = held()[-1]
    nbytes = ExpertStack.open_and_load(path, 0).nbytes
    seen: list[int] = []

    def free_bytes(_: Any) -> int:
        seen.append(len(jax.live_arrays()))
        return 10 * nbytes if len(seen) == 1 else 4321

    monkeypatch.setattr(placing, "free_bytes", free_bytes)
    monkeypatch.setattr(jax, "block_until_ready", third_time(out_of_device_memory, jax.block_until_ready))
    words = (
        rf"layer 0 needs {nbytes} bytes on its devices.*bytes free now: 4321 on .*fewer layers.*sharding=.*123 bytes"
    )
    with pytest.raises(GgufError, match=words):
        ExpertStack.open_and_load(path, 0)
    assert seen[1:] == [before]


def test_another_error_of_the_device_passes_as_it_is(path, monkeypatch):
    def broken(*_: Any) -> Any:
        raise jax.errors.JaxRuntimeError("INTERNAL: the device fell off the bus")

    monkeypatch.setattr(jax, "block_until_ready", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="fell off the bus"):
        ExpertStack.open_and_load(path, 0)


@pytest.mark.parametrize(
    ("statistics", "free"),
    [(None, None), ({}, None), ({"bytes_limit": 100, "bytes_in_use": 30}, 70), ({"bytes_limit": 100}, 100)],
)
def test_free_bytes_are_the_devices_own_account(statistics, free):
    class Device:
        def memory_stats(self) -> Any:
            return statistics

    assert placing.free_bytes(Device()) == free


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not keep to RLIMIT_AS")
def test_a_limit_of_address_space_is_an_error_before_anything_is_allocated(tmp_path):
    # 3 x 1 GiB, in a file without a block on the disk.
    entries = [
        b.tensor_entry(f"blk.0.ffn_{kind}_exps.weight", (1 << 14, 1 << 14, 1), int(T.F32), i << 30)
        for i, kind in enumerate(("gate", "up", "down"))
    ]
    path = b.write(tmp_path / "sparse.gguf", b.assemble([], entries))
    os.truncate(path, (3 << 30) + (1 << 16))
    program = f"""
import sys; sys.path[:0] = {[*sys.path]!r}
import os, resource, time, jax
from jmoe import ExpertStack, GgufError
jax.devices()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)
start = time.perf_counter()
try:
    ExpertStack.open_and_load({str(path)!r}, 0)
except GgufError as error:
    print(error, time.perf_counter() - start < 2)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "layer 0 needs 3221225472 bytes of host memory, but" in done.stdout, done.stderr
    assert done.stdout.endswith("True\n")


def test_many_tiny_experts_take_no_piece_each(tmp_path):
    count = 200_000
    values = np.arange(3 * count, dtype=np.float32).reshape(3, count, 1, 1)
    gate, up, down = (b.Tensor(T.F32, v.view(np.uint8)) for v in values)
    apart = {"gate": gate, "up": up, "down": down}
    fused = b.Tensor(T.F32, np.concatenate([gate.blocks, up.blocks], axis=1))
    for tensors in (
        {f"blk.0.ffn_{kind}_exps.weight": tensor for kind, tensor in apart.items()},
        {"blk.0.ffn_gate_up_exps.weight": fused, "blk.0.ffn_down_exps.weight": down},
    ):
        path = b.write(tmp_path / "tiny.gguf", b.good_file(tensors))
        start = time.perf_counter()
        stack = ExpertStack.open_and_load(path, 0)
        assert time.perf_counter() - start < 2
        for leaf, expected in zip((stack.gate, stack.up, stack.down), values, strict=True):
            np.testing.assert_array_equal(np.asarray(leaf), expected)


def test_tiny_packed_experts_are_split_together(tmp_path, rng, monkeypatch):
    sizes = b.Sizes(num_experts=11, hidden_size=64, expert_intermediate=32)
    tensors = b.moe_tensors(rng, 0, sizes, T.Q5_0, T.Q8_0)
    path = b.write(tmp_path / "m.gguf", b.good_file(tensors, b.moe_pairs(sizes=sizes)))
    whole = ExpertStack.open_and_load(path, 0)
    # Four experts a piece, and three in the last.
    monkeypatch.setattr(planes, "_PIECE", 4 * tensors["blk.0.ffn_up_exps.weight"].blocks[0].size)
    cut = ExpertStack.open_and_load(path, 0)
    assert isinstance(cut.up, QuantTensor)
    jax.tree.map(lambda a, c: np.testing.assert_array_equal(np.asarray(a), np.asarray(c)), cut, whole)
