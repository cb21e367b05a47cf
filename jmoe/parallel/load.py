"""From a file to a sharded stack: each process reads the bytes of the experts that its own devices hold."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ..devices import check_process
from ..gguf_file import GgufFile
from ..gguf_file.names import find_expert_layer
from ..gguf_file.placing import deleted_on_error, out_of_memory_explained, require_room
from ..gguf_file.planes import layer_specs, read_optional, read_projection
from ..gguf_file.shards import StrPath
from ..stack import ExpertStack
from .sharded import ShardedStack, check_axes, check_split, partition_specs


def load_experts(
    file: GgufFile | StrPath,
    layer_idx: int,
    mesh: Mesh,
    *,
    expert_axis: str = "expert",
    tensor_axis: str | None = None,
    check_finite: bool = True,
) -> ShardedStack:
    """``shard_experts`` of a file's layer, of which no process reads or holds more than its devices' experts.

    Where I is split over ``tensor_axis`` a process reads its experts whole, and puts their parts on its devices. On the
    way to the devices the host holds one projection of one device's experts. In many processes each calls it with the
    same mesh, and with its own copy of the file or a shared one.

    Raises what ``ExpertStack.load_from_gguf`` and :func:`shard_experts` raise. What is wrong in the bytes of an expert
    (scales that are not finite) shows in the processes that read it.
    """
    if not isinstance(file, GgufFile):
        with GgufFile(file) as gguf:
            return load_experts(
                gguf, layer_idx, mesh, expert_axis=expert_axis, tensor_axis=tensor_axis, check_finite=check_finite
            )
    check_process()
    check_axes(mesh, expert_axis, tensor_axis)
    layer = find_expert_layer(file, layer_idx)
    specs = layer_specs(file, layer)
    check_split(specs, mesh, tensor_axis)
    experts, devices = specs.num_experts, mesh.shape[expert_axis]
    padded = -(-experts // devices) * devices
    target = jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(
            (padded, *leaf.shape[1:]), leaf.dtype, sharding=NamedSharding(mesh, spec)
        ),
        specs,
        partition_specs(specs, expert_axis, tensor_axis),
    )
    what, needed = f"{file.path}: layer {layer.layer_idx}", _bytes_by_device(target)
    require_room(needed, specs.nbytes // devices, what)
    leaves: dict[str, Any] = {}
    with (
        out_of_memory_explained(what, sum(needed.values()), needed),
        deleted_on_error(leaves),
        ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as executor,
    ):
        for name, source in (("gate", layer.gate), ("up", layer.up), ("down", layer.down)):
            if source is not None:
                leaves[name] = _placed(
                    getattr(target, name),
                    experts,
                    lambda start, stop, source=source: read_projection(
                        file, source.of_experts(start, stop), executor, check_finite
                    ),
                )
        for name, tensor in layer.optional.items():
            leaf = getattr(target, name)
            leaves[name] = _placed(
                leaf,
                experts,
                lambda start, stop, tensor=tensor, leaf=leaf: read_optional(
                    file, tensor, (stop - start, *leaf.shape[1:]), check_finite, first=start
                ),
            )
        file.check_unchanged()
    return ShardedStack(ExpertStack(**{"gate": None, **leaves}), experts, mesh, expert_axis, tensor_axis)


def _bytes_by_device(target: ExpertStack) -> dict[Any, int]:
    """What this process's devices will hold."""
    needed: dict[Any, int] = {}
    for leaf in jax.tree.leaves(target):
        for device in leaf.sharding.addressable_devices:
            shard = prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            needed[device] = needed.get(device, 0) + shard
    return needed


def _placed(target: Any, num_experts: int, read: Callable[[int, int], Any]) -> Any:
    """Global arrays of ``target``'s shapes and shardings; ``read(start, stop)`` gives host arrays of these experts.

    Each range of experts is read once, for all devices of this process that hold it or a part of it.
    """
    specs, tree = jax.tree.flatten(target)
    indices = [spec.sharding.addressable_devices_indices_map(spec.shape) for spec in specs]
    ranges: dict[tuple[int, int], list[Any]] = {}
    for device, index in indices[0].items():
        start, stop, _ = index[0].indices(specs[0].shape[0])
        ranges.setdefault((start, stop), []).append(device)
    shards: list[list[jax.Array]] = [[] for _ in specs]
    with deleted_on_error(shards):
        for (start, stop), devices in ranges.items():
            for index, host, placed in zip(
                indices, _read_padded(specs, num_experts, start, stop, read), shards, strict=True
            ):
                for device in devices:
                    placed.append(jax.device_put(host[(slice(None), *index[device][1:])], device))
            # Else the next range would be read while this one is still on its way.
            jax.block_until_ready(shards)
    arrays = [
        jax.make_array_from_single_device_arrays(spec.shape, spec.sharding, placed)
        for spec, placed in zip(specs, shards, strict=True)
    ]
    return jax.tree.unflatten(tree, arrays)


def _read_padded(
    specs: list[Any], num_experts: int, start: int, stop: int, read: Callable[[int, int], Any]
) -> list[np.ndarray]:
    """The leaves of experts ``start`` to ``stop``, those from ``num_experts`` on zero: no file has them."""
    there = min(stop, num_experts)
    empty = [np.zeros((stop - max(start, there), *spec.shape[1:]), spec.dtype) for spec in specs]
    if start >= there:
        return empty
    found = jax.tree.leaves(read(start, there))
    if there == stop:
        return found
    return [np.concatenate(pair) for pair in zip(found, empty, strict=True)]
