"""What tests/test_parallel.py runs in a process of 8 simulated devices: names of checks as arguments, or all of them.

Each check compares with ``jmoe.moe_forward`` on one device, which the other tests compare with the float64 oracle, or
with the oracle itself.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tolerances
from cases import CASES, Case, oracle_layer, random_inputs, random_routing, random_stack, with_experts
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jmoe
from jmoe import ExpertStack, dispatch, parallel

TESTS = Path(__file__).parent
EXPLICIT = AxisType.Explicit
# E of 31 over 8 devices: four each, and the last one has three and an empty one.
RAGGED = CASES["ragged"]
# 13 over 8: two each, one of the seventh device's and both of the eighth's empty.
FEW = with_experts(RAGGED, 13, 2)
WIDE = Case("wide", 256, 512, 6, 2, "q4_k", "mxfp4", "q6_k")


def mesh(*kind: AxisType, **axes: int) -> Mesh:
    """Auto axes, or all of ``kind``."""
    count = int(np.prod(list(axes.values())))
    return jax.make_mesh(
        tuple(axes.values()),
        tuple(axes),
        axis_types=(kind or (AxisType.Auto,)) * len(axes),
        devices=jax.devices()[:count],
    )


def arguments(case: Case, tokens: int, seed: int = 0, dtype: Any = jnp.float32) -> tuple[Any, ...]:
    """x, ids and weights; some ids are nobody's, one is given twice and one token has none."""
    rng = np.random.default_rng(seed)
    x = random_inputs(rng, tokens, case.hidden_size, dtype)
    ids, weights = random_routing(rng, tokens, case)
    ids[0, 0], ids[1, -1], ids[2] = -1, case.num_experts, np.resize([-7, 2**30, case.num_experts + 1], ids.shape[1])
    ids[3, :2] = ids[3, 0]
    return x, jnp.asarray(ids), jnp.asarray(weights)


# The CPU kernels round what a layer gets to 15 bits: sums of the layer before in another order may go the other way.
AFTER_A_LAYER = 1e-3


def close(y: Any, expected: Any, limit: float = 1e-5) -> None:
    """Equal but for the order of sums, and where both are rounded to 16 bits."""
    limit = limit if expected.dtype == jnp.float32 else 2e-3
    y, expected = np.asarray(y, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(y, expected, rtol=limit, atol=limit * float(np.sqrt(np.mean(expected**2)) + 1e-9))


def refused(error: type[Exception], words: str, f: Callable[..., Any], *args: Any, **options: Any) -> None:
    with pytest.raises(error, match=words):
        f(*args, **options)


def ragged_by_gathering(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """``lax.ragged_all_to_all`` by its documentation, for CPUs: everyone sees everything and takes what is its own."""
    me = lax.axis_index(axis_name)
    gather = lambda array: lax.all_gather(array, axis_name)  # noqa: E731
    operands, starts, sizes, places = map(gather, (operand, input_offsets, send_sizes, output_offsets))
    row = lax.iota(jnp.int32, output.shape[0])
    devices = operands.shape[0]
    starts, sizes, places = (table.reshape(devices, devices, -1)[:, me] for table in (starts, sizes, places))
    for source, update in np.ndindex(starts.shape):
        offset = row - places[source, update]
        mine = (offset >= 0) & (offset < sizes[source, update])
        taken = operands[source].at[starts[source, update] + offset].get(mode="clip")
        output = jnp.where(mine.reshape(-1, *(1,) * (output.ndim - 1)), taken, output)
    return output


WAYS = ({}, {"split_tokens": "expert", "exchange": "dense"}, {"split_tokens": "expert", "exchange": "ragged"})


@contextlib.contextmanager
def ragged_on_cpu() -> Iterator[None]:
    real, lax.ragged_all_to_all = lax.ragged_all_to_all, ragged_by_gathering
    try:
        yield
    finally:
        lax.ragged_all_to_all = real


def each_way(sharded: parallel.ShardedStack, args: tuple[Any, ...], ways: Any = WAYS, **options: Any) -> list[Any]:
    """The layer with tokens everywhere, and with tokens spread, by either exchange."""
    with ragged_on_cpu():
        return [parallel.moe_forward(sharded, *args, **way, **options) for way in ways]


def vectors(case: Case) -> dict[str, jax.Array]:
    """Random biases, and scales around 1, for ``replace``."""
    rng, (experts, inner, hidden) = np.random.default_rng(9), case.shape("up")
    shapes = {"gate_bias": (experts, inner), "up_bias": (experts, inner), "down_bias": (experts, hidden)}
    made = {name: jnp.asarray(rng.normal(0, 0.3, shape), jnp.float32) for name, shape in shapes.items()}
    return {**made, "down_scale": jnp.asarray(rng.uniform(0.5, 2, experts), jnp.float32)}


def check_257_experts_over_8_devices_keep_the_contract() -> None:
    """33 each, and seven of the last device's are empty."""
    case = CASES["many-experts"]
    sharded = parallel.shard_experts(random_stack(case), mesh(expert=8))
    assert (sharded.num_experts, sharded.experts_per_device, sharded.stack.num_experts) == (257, 33, 264)
    x, ids, weights = arguments(case, 16)
    ids = ids.at[5, :3].set(jnp.array([257, 260, 263]))
    expected = oracle.moe(oracle_layer(case), x, ids, weights)
    for y in each_way(sharded, (x, ids, weights)):
        oracle.assert_within(y, expected, tolerances.KERNEL_F32)
        assert not np.asarray(y[2]).any()
    y = parallel.moe_forward(sharded, x, ids, weights, backend="jnp")
    oracle.assert_within(y, expected, tolerances.LAYER["float32"])


def check_every_kind_of_stack_and_option_gives_what_one_device_gives() -> None:
    on = mesh(expert=8)
    packed = random_stack(FEW)
    full = replace(packed, **vectors(FEW))
    clamped = jmoe.Activation("swiglu_clamped", 1.0)
    for case, stack, ways, options in (
        (CASES["dense"], random_stack(CASES["dense"]), WAYS[:1], {"weight_on": "input"}),
        (FEW, full, WAYS[:1], {"activation": "swiglu_oai"}),
        (FEW, full, WAYS[1:], {"activation": clamped, "precision": "highest", "weight_on": "input"}),
        (FEW, replace(packed, gate=None), WAYS[:1], {"activation": "relu2"}),
        (FEW, jax.tree.map(lambda a, b: jnp.stack([a, b]), packed, random_stack(FEW, 1)), WAYS[:1], {"layer": 1}),
    ):
        args = arguments(case, 8)
        expected = jmoe.moe_forward(stack, *args, **options)
        for y in each_way(parallel.shard_experts(stack, on), args, ways, **options):
            close(y, expected)


def check_16_bit_tokens_keep_their_dtype_and_bound() -> None:
    sharded = parallel.shard_experts(random_stack(RAGGED), mesh(expert=8))
    args = arguments(RAGGED, 16, dtype=jnp.bfloat16)
    expected = oracle.moe(oracle_layer(RAGGED), *args)
    for y in each_way(sharded, args, WAYS[1:]):
        assert y.dtype == jnp.bfloat16
        oracle.assert_within(y, expected, tolerances.LAYER["bfloat16"])


def check_no_token_is_dropped_when_all_choose_the_same_expert() -> None:
    sharded = parallel.shard_experts(random_stack(RAGGED), mesh(expert=8))
    x, ids, weights = arguments(RAGGED, 40)
    for expert in (0, 30):
        same = jnp.full_like(ids, expert)
        expected = jmoe.moe_forward(random_stack(RAGGED), x, same, weights)
        assert np.asarray(jnp.abs(expected).max(axis=1) > 0).all()
        for y in each_way(sharded, (x, same, weights), WAYS[1:]):
            close(y, expected)
    empty = x[:0], ids[:0], weights[:0]
    assert all(y.shape == (0, 96) for y in each_way(sharded, empty, WAYS[1:]))


def check_the_intermediate_axis_is_split_between_blocks_and_biases_count_once() -> None:
    stack, on = random_stack(WIDE), mesh(expert=4, tensor=2)
    sharded = parallel.shard_experts(stack, on, tensor_axis="tensor")
    assert {s.data.shape for s in sharded.stack.down.planes.codes.addressable_shards} == {(2, 256, 128)}
    assert {s.data.shape for s in sharded.stack.up.planes[0].addressable_shards} == {(2, 256, 128)}
    args = arguments(WIDE, 8)
    expected = jmoe.moe_forward(stack, *args)
    for y in each_way(sharded, args, (WAYS[0], WAYS[2])):
        close(y, expected)
    # In XLA, for no kernel takes biases.
    full = replace(stack, **vectors(WIDE))
    y = parallel.moe_forward(parallel.shard_experts(full, on, tensor_axis="tensor"), *args)
    close(y, jmoe.moe_forward(full, *args))
    words = r"512 does not split over the 4 .* down \(q6_k\) can be cut every 256 .* allows 1, 2 equal"
    refused(ValueError, words, parallel.shard_experts, stack, mesh(expert=2, tensor=4), tensor_axis="tensor")
    # Of a dense one every weight is a place to cut.
    small = random_stack(CASES["dense"])
    args = arguments(CASES["dense"], 8)
    cut = parallel.shard_experts(small, mesh(expert=1, tensor=8), tensor_axis="tensor")
    close(parallel.moe_forward(cut, *args), jmoe.moe_forward(small, *args))


def check_data_parallel_groups_have_their_own_tokens() -> None:
    sharded = parallel.shard_experts(random_stack(RAGGED), mesh(data=2, expert=4))
    args = arguments(RAGGED, 16)
    expected = jmoe.moe_forward(random_stack(RAGGED), *args)
    y = parallel.moe_forward(sharded, *args, split_tokens="data")
    assert y.sharding.shard_shape(y.shape) == (8, 96)
    close(y, expected)
    for exchange in ("dense", None):
        y = parallel.moe_forward(sharded, *args, split_tokens=("data", "expert"), exchange=exchange)
        assert y.sharding.shard_shape(y.shape) == (2, 96)
        close(y, expected)


def check_grad_jit_vmap_and_scan_compose() -> None:
    stack, on = random_stack(CASES["dense"]), mesh(expert=8)
    sharded = parallel.shard_experts(stack, on)
    x, ids, weights = arguments(CASES["dense"], 8)

    def loss(f: Any, stack: Any, x: Any, weights: Any, **options: Any) -> Any:
        return jnp.sum(jnp.sin(f(stack, x, ids, weights, **options)))

    grads = jax.jit(jax.grad(lambda *args: loss(jmoe.moe_forward, *args), (0, 1, 2)))(stack, x, weights)
    for way in (WAYS[0], WAYS[2]):
        with ragged_on_cpu():
            f = jax.jit(jax.grad(lambda *args: loss(parallel.moe_forward, *args, **way), (0, 1, 2)))  # noqa: B023
            got = f(sharded, x, weights)
        jax.tree.map(lambda a, b: close(a[: len(b)], b), (got[0].stack, *got[1:]), grads)
        # Of the empty experts nothing is learnt.
        assert not any(np.asarray(leaf[5:]).any() for leaf in jax.tree.leaves(got[0]))

    packed = parallel.shard_experts(random_stack(RAGGED), on)
    batch = [jnp.stack(pair) for pair in zip(*(arguments(RAGGED, 8, seed) for seed in range(2)), strict=True)]
    expected = jax.vmap(lambda *args: jmoe.moe_forward(random_stack(RAGGED), *args))(*batch)
    for split in ((), "expert"):
        close(jax.vmap(lambda *args: parallel.moe_forward(packed, *args, split_tokens=split))(*batch), expected)  # noqa: B023

    layers = [random_stack(RAGGED, seed) for seed in range(3)]
    stacked = parallel.shard_experts(jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers), on)
    args = arguments(RAGGED, 8)

    @jax.jit
    def network(stacked: Any, x: Any) -> Any:
        step = lambda x, l: (x + parallel.moe_forward(stacked, x, *args[1:], layer=l), None)  # noqa: E731
        return lax.scan(step, x, jnp.arange(3))[0]

    x = args[0]
    for layer in layers:
        x = x + jmoe.moe_forward(layer, x, *args[1:])
    close(network(stacked, args[0]), x, AFTER_A_LAYER)


def check_for_cuda_the_ragged_exchange_is_lowered_forwards_and_backwards() -> None:
    """On CPUs' mesh; which exchange is the default is the platform's affair."""
    sharded = parallel.shard_experts(random_stack(CASES["mixed"]), mesh(expert=2))
    operands = sharded, *arguments(CASES["mixed"], 8)

    def forward(*operands: Any) -> Any:
        return parallel.moe_forward(*operands, split_tokens="expert", exchange="ragged")

    def text(f: Any) -> str:
        return jax.jit(f).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()

    # x, ids and weights there, y back; and the gradient's way.
    assert text(forward).count("@ragged_all_to_all") == 4
    gradient = text(lambda stack, x, *args: jax.grad(lambda x: jnp.sum(forward(stack, x, *args)))(x))
    assert gradient.count("@ragged_all_to_all") >= 4


def check_kernels_are_told_what_share_of_the_pairs_to_expect() -> None:
    told: list[float] = []
    real = dispatch.compute

    def compute(*operands: Any, live_share: float, **options: Any) -> Any:
        told.append(live_share)
        return real(*operands, live_share=live_share, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "compute", compute)
        for case, axes in ((FEW, {"expert": 8}), (FEW, {"data": 2, "expert": 4}), (FEW, {"expert": 1})):
            sharded = parallel.shard_experts(random_stack(case), mesh(**axes))
            jax.eval_shape(lambda *args: parallel.moe_forward(*args), sharded, *arguments(case, 8))
    assert told == [2 / 13, 4 / 13, 1]


def check_explicit_axes_compute_the_same() -> None:
    on = mesh(EXPLICIT, expert=8)
    sharded = parallel.shard_experts(random_stack(RAGGED), on)
    args = arguments(RAGGED, 16)
    expected = jmoe.moe_forward(random_stack(RAGGED), *args)
    rows, columns, whole = (NamedSharding(on, spec) for spec in (P("expert"), P(None, "expert"), P()))
    for place, split in ((rows, ()), (columns, "expert"), (whole, "expert")):
        x = jax.device_put(args[0], place)
        close(parallel.moe_forward(sharded, x, *args[1:], split_tokens=split), expected)
    inside = jax.jit(lambda s, x: parallel.moe_forward(s, 2 * x, *args[1:], split_tokens="expert"))
    close(inside(sharded, jax.device_put(args[0] / 2, rows)), expected)
    args = arguments(FEW, 8)
    sharded = parallel.shard_experts(random_stack(FEW), on)
    grad = jax.jit(jax.grad(lambda x: jnp.sum(parallel.moe_forward(sharded, x, *args[1:]))))
    close(
        grad(jax.device_put(args[0], rows)),
        jax.grad(lambda x: jnp.sum(jmoe.moe_forward(random_stack(FEW), x, *args[1:])))(args[0]),
    )


def check_wrong_use_is_refused_with_its_fix() -> None:
    on, stack = mesh(expert=8), random_stack(RAGGED)
    sharded, args = parallel.shard_experts(stack, on), arguments(RAGGED, 16)
    forward, shard = parallel.moe_forward, parallel.shard_experts
    refused(TypeError, "must be a ShardedStack, got ExpertStack", forward, stack, *args)
    refused(TypeError, "stack must be an ExpertStack", shard, sharded, on)
    refused(TypeError, "mesh must be a jax.sharding.Mesh, got str", shard, stack, "mesh")
    refused(ValueError, "expert_axis must be one of .*'expert'.*, got 'ep'", shard, stack, on, expert_axis="ep")
    refused(ValueError, "tensor_axis must be one of", shard, stack, on, tensor_axis="tp")
    refused(ValueError, "must differ, got 'expert'", shard, stack, on, tensor_axis="expert")
    refused(AssertionError, r"x must be .*\[\?,96\]", forward, sharded, args[0][:, :64], *args[1:])
    refused(ValueError, "split_tokens must name different axes", forward, sharded, *args, split_tokens="data")
    refused(ValueError, "split_tokens must name", forward, sharded, *args, split_tokens=("expert", "expert"))
    fifteen = [a[:15] for a in args]
    words = "15 tokens do not divide over the 8 devices .*topk_ids are -1"
    refused(ValueError, words, forward, sharded, *fifteen, split_tokens="expert")
    refused(ValueError, "exchange must be one of", forward, sharded, *args, split_tokens="expert", exchange="some")
    refused(ValueError, "give split_tokens='expert'", forward, sharded, *args, exchange="dense")
    refused(ValueError, "activation must be one of", forward, sharded, *args, activation="tanh")
    refused(ValueError, "backend='pallas' cannot run this call", forward, sharded, *args, backend="pallas")
    refused(ValueError, "x is on .*device_put", forward, sharded, jax.device_put(args[0], jax.devices()[1]), *args[1:])


def counting_reads() -> list[int]:
    """The sizes of all reads of tensors from here on; headers are read by ``os.pread``."""
    sizes: list[int] = []
    real = os.preadv

    def counted(*arguments: Any) -> int:
        sizes.append(real(*arguments))
        return sizes[-1]

    os.preadv = counted
    return sizes


def layer_of_257() -> Path:
    """A file of 257 experts with biases, scales and three formats."""
    path, case = DIRECTORY / "257.gguf", CASES["many-experts"]
    jmoe.save_gguf(path, replace(random_stack(case), **vectors(case)), architecture="qwen3moe")
    return path


def check_a_loaded_stack_is_the_sharded_one_and_no_byte_is_read_twice() -> None:
    path = layer_of_257()
    whole = ExpertStack.open_and_load(path, 0)
    sizes = counting_reads()
    for axes, tensor_axis in (({"expert": 8}, None), ({"data": 2, "expert": 4}, None), ({"expert": 8, "t": 1}, "t")):
        sizes.clear()
        on = mesh(**axes)
        loaded = parallel.load_experts(path, 0, on, tensor_axis=tensor_axis)
        wanted = parallel.shard_experts(whole, on, tensor_axis=tensor_axis)
        assert jax.tree.structure(loaded) == jax.tree.structure(wanted)
        jax.tree.map(np.testing.assert_array_equal, loaded, wanted)
        same_place = lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim)  # noqa: E731
        assert jax.tree.all(jax.tree.map(same_place, loaded, wanted))
        with jmoe.GgufFile(path) as file:
            assert sum(sizes) == sum(info.nbytes for info in file.tensors.values())
    args = arguments(CASES["many-experts"], 16)
    close(parallel.moe_forward(loaded, *args), jmoe.moe_forward(whole, *args))
    # Depths of one block of 32 cannot be cut; those of two formats can.
    refused(ValueError, "does not split", parallel.load_experts, path, 0, mesh(expert=4, t=2), tensor_axis="t")
    jmoe.save_gguf(DIRECTORY / "wide.gguf", replace(random_stack(WIDE), **vectors(WIDE)), architecture="qwen3moe")
    on = mesh(expert=4, t=2)
    loaded = parallel.load_experts(DIRECTORY / "wide.gguf", 0, on, tensor_axis="t")
    wanted = parallel.shard_experts(ExpertStack.open_and_load(DIRECTORY / "wide.gguf", 0), on, tensor_axis="t")
    jax.tree.map(np.testing.assert_array_equal, loaded, wanted)


def check_a_damaged_expert_is_reported_and_nothing_stays_behind() -> None:
    path, case = DIRECTORY / "bad.gguf", CASES["tiny"]
    jmoe.save_gguf(path, random_stack(case), architecture="qwen3moe")
    with jmoe.GgufFile(path) as file:
        info = file.info("blk.0.ffn_down_exps.weight")
    raw = bytearray(path.read_bytes())
    # d of the last expert's last block.
    raw[info.offset + info.nbytes - 2 : info.offset + info.nbytes] = b"\x00\x7c"
    path.write_bytes(raw)
    before = len(jax.live_arrays())
    refused(
        jmoe.GgufError, "ffn_down_exps.weight has 1 scales that are NaN", parallel.load_experts, path, 0, mesh(expert=4)
    )
    assert len(jax.live_arrays()) == before
    parallel.load_experts(path, 0, mesh(expert=4), check_finite=False)


def run_the_example() -> None:
    """Its two ways give what one device gives."""
    examples, path = TESTS.parent / "examples", TESTS / "data" / "qwen3moe-Q4_K_M.gguf"
    program = runpy.run_path(str(examples / "many_devices.py"))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        ours = program["main"](str(path))
    # Which exchange it takes is the platform's affair; the numbers are not.
    rng, tokens = np.random.default_rng(0), 4 * jax.device_count()
    x, logits = (rng.standard_normal((tokens, size), np.float32) for size in (256, 8))
    expected = jmoe.moe_forward(ExpertStack.open_and_load(path, 0), x, *jmoe.route(logits, jmoe.RouterConfig(2)))
    for y in ours:
        for shard in y.addressable_shards:
            close(shard.data, expected[shard.index])
    shown = f"on {jax.device_count()} device(s) of {jax.process_count()} process(es)"
    assert (shown in printed.getvalue()) == (jax.process_index() == 0)


def check_the_example_runs_on_all_devices() -> None:
    run_the_example()


def check_an_orbax_checkpoint_restores_a_sharded_stack_to_another_mesh() -> None:
    from orbax import checkpoint as ocp

    sharded = parallel.shard_experts(random_stack(RAGGED), mesh(expert=8))
    # 32 experts with the empty one: as many as four devices want, too.
    fewer = parallel.shard_experts(random_stack(RAGGED), mesh(expert=4, data=2))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(DIRECTORY / "checkpoint", sharded.stack)
        checkpointer.wait_until_finished()
        template = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), fewer.stack
        )
        restored = checkpointer.restore(DIRECTORY / "checkpoint", template)
    jax.tree.map(np.testing.assert_array_equal, restored, fewer.stack)
    args = arguments(RAGGED, 8)
    close(parallel.moe_forward(replace(fewer, stack=restored), *args), jmoe.moe_forward(random_stack(RAGGED), *args))


def check_a_sharded_stack_is_written_and_read_by_jax_export() -> None:
    on = mesh(EXPLICIT, tensor=2, expert=4)
    sharded = parallel.shard_experts(random_stack(WIDE), on, tensor_axis="tensor")
    args = arguments(WIDE, 8)
    forward = jax.jit(lambda *args: (parallel.moe_forward(*args, backend="jnp"), args[0]))
    artefact = jax.export.export(forward)(sharded, *args).serialize()
    again = jax.export.deserialize(artefact)
    y, same = again.call(sharded, *args)
    close(y, jmoe.moe_forward(random_stack(WIDE), *args, backend="jnp"))
    jax.tree.map(np.testing.assert_array_equal, same, sharded)
    assert (same.num_experts, same.mesh, same.expert_axis, same.tensor_axis) == (6, on, "expert", "tensor")
    assert same.mesh.axis_types == on.axis_types
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: jax.local_devices()[:6])
        refused(ValueError, r"does not see the ids \[6, 7\]", jax.export.deserialize, artefact)


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    with tempfile.TemporaryDirectory() as directory:
        DIRECTORY = Path(directory)
        for name in sys.argv[1:] or [name for name in globals() if name.startswith("check_")]:
            begun = time.process_time()
            try:
                globals()[name]()
                error = None
            except Exception:
                error = traceback.format_exc()
            print(json.dumps([name, error, time.process_time() - begun]), flush=True)
