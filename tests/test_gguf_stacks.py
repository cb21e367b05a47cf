"""All layers of a file at once, apart or stacked; where they are placed; and what happens when memory is short."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import gguf_builder as b
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from jmoe import ExpertStack
from jmoe.gguf_file import GgufError, GgufFile, placing, planes, stacking
from jmoe.gguf_file.load import load_expert_stack, load_expert_stacks

DATA = Path(__file__).parent / "data"
SMALL = b.Sizes(num_experts=3, hidden_size=64, expert_intermediate=96)


def leaves_equal(one: Any, other: Any) -> None:
    jax.tree.map(lambda a, c: np.testing.assert_array_equal(np.asarray(a), np.asarray(c)), one, other)


def five_layers(rng: np.random.Generator) -> dict[str, b.Tensor]:
    """Layers 1 to 5; down alternates between two types, layer 4 has a bias."""
    tensors: dict[str, b.Tensor] = {}
    for layer in range(1, 6):
        tensors |= b.moe_tensors(rng, layer, SMALL, T.Q4_0, T.Q8_0 if layer % 2 else T.Q5_0)
    tensors["blk.4.ffn_up_exps.bias"] = b.random_tensor(rng, T.F32, (3, 96))
    return tensors


@pytest.fixture
def five(tmp_path, rng) -> Path:
    return b.write(tmp_path / "five.gguf", b.good_file(five_layers(rng), b.moe_pairs(sizes=SMALL, blocks=6)))


def test_stacked_layers_hold_each_layer_at_its_place_by_signature(five):
    apart = load_expert_stacks(five, progress=False)
    assert list(apart) == [1, 2, 3, 4, 5]
    stacked = load_expert_stacks(five, stacked=True, progress=False)
    assert [group.layers for group in stacked] == [(1, 3, 5), (2,), (4,)]
    for group in stacked:
        for place, layer in enumerate(group.layers):
            leaves_equal(jax.tree.map(lambda leaf, place=place: leaf[place], group.stack), apart[layer])
        assert group.stack.up.shape == (len(group.layers), 3, 96, 64)
    assert jax.tree.map(lambda leaf: leaf, stacked[0]).layers == (1, 3, 5)


def test_layers_can_be_chosen_in_any_order(five):
    assert list(load_expert_stacks(five, [5, 1, 5], progress=False)) == [5, 1]
    assert [g.layers for g in load_expert_stacks(five, [5, 2, 1], stacked=True, progress=False)] == [(5, 1), (2,)]
    assert load_expert_stacks(five, [], progress=False) == {}
    assert load_expert_stacks(five, iter(()), stacked=True, progress=False) == ()
    with pytest.raises(GgufError, match="layer 0 holds no expert tensors; its MoE layers are 1, 2, 3, 4, 5"):
        load_expert_stacks(five, [1, 0], progress=False)


def test_a_dense_model_has_no_layers_to_load(tmp_path, rng):
    path = b.write(tmp_path / "m.gguf", b.good_file({"blk.0.ffn_up.weight": b.random_tensor(rng, T.F32, (4, 8))}))
    with pytest.raises(GgufError, match="no MoE layers"):
        load_expert_stacks(path, progress=False)


def test_the_bar_shows_only_where_it_is_wanted(five, capsys):
    load_expert_stacks(five, progress=False)
    assert capsys.readouterr().err == ""
    load_expert_stacks(five)
    assert "loading experts: 100%" in capsys.readouterr().err


def test_stacking_fills_the_same_device_memory_layer_by_layer(five, monkeypatch):
    places: dict[int, set[int]] = {}
    add = stacking.LayerStacker.add

    def watched(self: stacking.LayerStacker, layer: int, stack: ExpertStack) -> None:
        add(self, layer, stack)
        for group, so_far in self.stacks.items():
            places.setdefault(group, set()).add(so_far.up.planes.codes.unsafe_buffer_pointer())

    monkeypatch.setattr(stacking.LayerStacker, "add", watched)
    load_expert_stacks(five, stacked=True, progress=False)
    assert [len(pointers) for pointers in places.values()] == [1, 1, 1]


def test_planes_reach_the_cpu_backend_without_a_copy():
    host = planes.aligned_empty((3, 5, 7), np.dtype(np.uint16))
    assert host.ctypes.data % 64 == 0
    placed = placing.Placement().put([host])[0]
    if placed.device.platform == "cpu":
        assert placed.unsafe_buffer_pointer() == host.ctypes.data


def test_device_and_sharding_are_taken_one_at_a_time():
    path = DATA / "mixtral-Q6_K.gguf"
    device = jax.devices()[0]
    assert ExpertStack.open_and_load(path, 0, device=device).up.planes.codes.devices() == {device}
    with pytest.raises(ValueError, match="not both"):
        ExpertStack.open_and_load(path, 0, device=device, sharding=jax.sharding.SingleDeviceSharding(device))


@pytest.mark.parametrize(
    ("name", "given"), [("device", "cpu"), ("device", 0), ("sharding", jax.sharding.PartitionSpec())]
)
def test_what_is_no_device_or_sharding_is_refused(name, given):
    with pytest.raises(TypeError, match=rf"{name} must be a jax\.Device or a jax\.sharding\.Sharding, got"):
        ExpertStack.open_and_load(DATA / "mixtral-Q6_K.gguf", 0, **{name: given})


def test_experts_are_sharded_over_a_mesh_apart_and_stacked(five):
    program = f"""
import jax, numpy as np, warnings
warnings.simplefilter("error")
jax.config.update("jax_num_cpu_devices", 3)
from jax.sharding import NamedSharding, PartitionSpec as P
from jmoe.gguf_file.load import load_expert_stacks
path = {str(five)!r}
plain = load_expert_stacks(path, progress=False)
for axis_types in ((jax.sharding.AxisType.Explicit,), (jax.sharding.AxisType.Auto,)):
    mesh = jax.make_mesh((3,), ("ep",), axis_types=axis_types)
    sharding = NamedSharding(mesh, P("ep"))
    for index, stack in load_expert_stacks(path, progress=False, sharding=sharding).items():
        for mine, theirs in zip(jax.tree.leaves(stack), jax.tree.leaves(plain[index]), strict=True):
            assert mine.sharding.is_equivalent_to(sharding, mine.ndim), mine.sharding
            np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))
    longer = NamedSharding(mesh, P("ep", None, None))
    for group in load_expert_stacks(path, stacked=True, progress=False, sharding=longer):
        for place, index in enumerate(group.layers):
            for mine, theirs in zip(jax.tree.leaves(group.stack), jax.tree.leaves(plain[index]), strict=True):
                assert mine.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "ep")), mine.ndim), mine.sharding
                np.testing.assert_array_equal(np.asarray(mine)[place], np.asarray(theirs))
print("sharded")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "sharded\n", done.stderr


def test_an_honest_tensor_larger_than_memory_is_refused_before_it_is_read(tmp_path):
    # 3 x 600 GiB, in a file without a block on the disk.
    dims = {"gate": (4096, 2048, 1 << 17), "up": (4096, 2048, 1 << 17), "down": (2048, 4096, 1 << 17)}
    nbytes = 4096 // 256 * 144 * 2048 << 17
    entries = [
        b.tensor_entry(f"blk.0.ffn_{kind}_exps.weight", dims[kind], int(T.Q4_K), i * nbytes)
        for i, kind in enumerate(dims)
    ]
    path = b.write(tmp_path / "sparse.gguf", b.assemble([], entries))
    os.truncate(path, path.stat().st_size + 3 * nbytes + 32)
    with GgufFile(path) as file, pytest.raises(GgufError, match=r"layer 0 needs \d+ bytes of host memory, .*sharding="):
        load_expert_stack(file, 0)
    with pytest.raises(GgufError, match=r"loading 1 layer\(s\) needs \d+ bytes of host memory"):
        load_expert_stacks(path, progress=False)


def test_a_device_without_room_is_refused_before_anything_is_read(five, monkeypatch):
    monkeypatch.setattr(placing, "free_bytes", lambda _: 10_000)
    monkeypatch.setattr(planes, "read_projection", None)
    with pytest.raises(
        GgufError, match=r"loading 5 layer\(s\) needs \d+ bytes on .*, but 10000 are free: load fewer layers"
    ):
        load_expert_stacks(five, progress=False)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("failing", [0, 7, 20])
def test_a_device_out_of_memory_gives_one_clear_error_and_keeps_nothing(five, failing, stacked, monkeypatch):
    load_expert_stacks(five, stacked=stacked, progress=False)
    before = len(jax.live_arrays())
    device_put, calls = jax.device_put, iter(range(1000))

    def limited(leaf: Any, *args: Any) -> jax.Array:
        if leaf.ndim and next(calls) == failing:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")
        return device_put(leaf, *args)

    words = r"loading 5 layer\(s\) needs \d+ bytes .*out of memory.*sharding=.*123 bytes"
    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_put", limited)
        with pytest.raises(GgufError, match=words) as caught:
            load_expert_stacks(five, stacked=stacked, progress=False)
    # The traceback in ``caught`` still refers to what was placed: it must have been deleted, not only dropped.
    assert len(jax.live_arrays()) == before
    assert isinstance(caught.value.__cause__, jax.errors.JaxRuntimeError)
    assert len(load_expert_stacks(five, [1], progress=False)) == 1


def test_loading_warns_of_nothing_where_all_types_are_packed(five):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_expert_stacks(five, stacked=True, progress=False)
