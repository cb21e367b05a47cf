"""What tests/test_parallel.py runs in two processes at once: process number, port, a directory with 257.gguf.

Each process has two devices, loads the experts of its own two, and computes with the other over the network.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np
import oracle
import pytest
import tolerances
from cases import CASES, oracle_layer
from jax.sharding import AxisType
from parallel_program import arguments, counting_reads, run_the_example

import jmoe
from jmoe import parallel


def main(number: int, port: str, directory: Path) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=number)
    assert (jax.local_device_count(), jax.device_count()) == (2, 4)
    mesh = jax.make_mesh((4,), ("expert",), axis_types=(AxisType.Auto,))
    sizes = counting_reads()
    sharded = parallel.load_experts(directory / "257.gguf", 0, mesh)
    # 65 a device: 130 for the first process, 127 and three empty ones for the second. Not a byte of any other.
    with jmoe.GgufFile(directory / "257.gguf") as file:
        expert_bytes = sum(info.nbytes for info in file.tensors.values()) // 257
        assert sum(sizes) == expert_bytes * (130, 127)[number], (sum(sizes), expert_bytes)

    x, ids, weights = map(np.asarray, arguments(CASES["many-experts"], 16))
    expected = oracle.moe(oracle_layer(CASES["many-experts"]), x, ids, weights)
    for split in ((), "expert"):
        y = parallel.moe_forward(sharded, x, ids, weights, split_tokens=split)
        assert y.shape == expected.shape
        for shard in y.addressable_shards:
            oracle.assert_within(shard.data, expected[shard.index], tolerances.KERNEL_F32)
    # The same whole stack from each process.
    again = parallel.shard_experts(jmoe.ExpertStack.open_and_load(directory / "257.gguf", 0), mesh)
    for ours, theirs in zip(jax.tree.leaves(sharded), jax.tree.leaves(again), strict=True):
        for one, other in zip(ours.addressable_shards, theirs.addressable_shards, strict=True):
            np.testing.assert_array_equal(one.data, other.data)
    with pytest.raises(ValueError, match="other processes"):
        jmoe.save_gguf(directory / "out.gguf", sharded.stack, architecture="qwen3moe")
    run_the_example()
    jax.distributed.shutdown()
    print("held")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
